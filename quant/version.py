"""What enters the identity of every quantized byte, without MLX."""

# Bump it, with the reason, when the bytes of any output change.
# 1: round to nearest; folds in float32, rounded once
QUANT_VERSION = 1

SOLVER = "rtn"  # the solver that variants use; `quant.solve.SOLVERS` lists them
