"""What enters the identity of every quantized byte, without MLX."""

# Bump it, with the reason, when the bytes of any output change.
# 1: round to nearest; folds in float32, rounded once
# 2: matrices that a solver quantizes undo the rounding of the norm they read; gptq chooses scales while it feeds errors on
# 3: gptq adds up the errors of a group's columns in another order
QUANT_VERSION = 3

SOLVERS = ("rtn", "ls", "gptq")  # `quant.solve`: round to nearest; least squares; GPTQ with coordinate descent
# Bump it, with the reason, when the same statistics would give other prices (`quant.sensitivity`), last bits of a sum aside.
# 1: second order on sampled rows, a factor a class from probes at 2 and 4 bits
# 2: probes over windows spread over the text, twice as many, in place of its first
# 3: gptq leaves less
# 4: its lead over least squares at each group size; probes rounded by the solver that builds
SENSITIVITY_VERSION = 4
ALLOCATED_SOLVER = "gptq"  # of variants made by size, unless the file says otherwise
