"""What each format of each tensor costs on this model, in nats of KL divergence a token: the allocator's prices.

Second order. A change ΔW of one tensor costs about ½ Σ_o fisher_o · ΔW_o H ΔW_oᵀ (`quant.statistics`): ΔW is what a
solver really leaves in that format, measured on a sample of rows. Every width is solved by least squares, other group sizes
at one width; how much less the Hessian solver leaves is measured at that width, for each group size: where a few channels
outweigh all others, smaller groups help least squares far more. Neither ratio depends much on the width (docs/quality.md).

Then it is checked. For every class of tensors, all of them are rounded at PROBE_BITS by the solver that will build, the model is
run, and its true KL divergence over part of the calibration text is compared with what the sum of the figures says. The
ratio, which holds what second order misses (recurrences, tensors that act together, large errors), multiplies the figures
of its class.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from inference.backend import mx
from inference.checkpoint import AFFINE_BITS, AFFINE_GROUPS, QuantSpec
from inference.divergence import compare
from inference.layout import Target
from inference.linear import Linear, Packed
from inference.load import Weights, hidden_states_of_versions

from .allocate import label
from .collect import BATCH_TOKENS
from .moments import FromStatistics
from .recipe import TensorClass, class_of, layer_of
from .sample import restored, sample
from .solve import QUICK, solve

ROWS = 128  # of a tensor that are solved
GROUP = 64  # at which every width is measured; other groups are at GROUP_BITS, and in proportion at other widths
GROUP_BITS = 4  # and there the Hessian solver's lead is, too
BAND_VALUES = 1 << 26  # of a matrix that are rounded at once for a probe
PROBE_BITS = (2, 4)
PROBE_TOKENS = 8192  # of windows spread over the text: they differ by a third, so that eight say it within 10 %
LARGEST_FACTOR = 8.0  # of a class: beyond it the probe says more of itself than of the tensors

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Probe:
    """A whole class at one width: KL divergence that was measured, and what its tensors' figures came to."""

    label: str  # of the class
    bits: int
    group_size: int
    predicted: float
    measured: float


@dataclass(frozen=True)
class Sensitivity:
    """modules: module → "bits/group" → nats a token, the class's factor applied."""

    modules: dict[str, dict[str, float]]
    probes: tuple[Probe, ...]
    probe_tokens: int


def measure(
    folder: Path,
    targets: Sequence[Target],
    classes: Sequence[TensorClass],
    known: FromStatistics,
    windows: Sequence[Sequence[int]],
    solver: str,
    progress: Progress | None = None,
) -> Sensitivity:
    """Costs of every matrix that has statistics.

    folder: the base; windows: token ids of the calibration text for the probes, one length. Peak: the model's largest
    layer or tensor in float32, its Hessian's factor, and the states of PROBE_TOKENS tokens for every probe.
    """
    tick = progress or (lambda what, done, total: None)
    chosen = [t for t in targets if t.part == "text" and t.name.endswith(".weight") and known.knows(t.module)]
    raw: dict[str, dict[str, float]] = {}
    for together in sharing(chosen, known):
        raw |= _costs(together, known, solver)
        tick("errors", len(raw), len(chosen))
    labels = {t.module: class_of(t, classes).label for t in chosen}
    probes, tokens = _probes(folder, chosen, labels, raw, known, windows, solver, tick)
    factors = {(p.label, p.bits): _factor(p) for p in probes}
    modules = {
        m: {f: cost * _at(factors, labels[m], int(f.split("/")[0])) for f, cost in costs.items()}
        for m, costs in raw.items()
    }
    return Sensitivity({m: _monotone(c) for m, c in modules.items()}, tuple(probes), tokens)


def formats(columns: int) -> list[QuantSpec]:
    return [QuantSpec(b, g) for b in AFFINE_BITS for g in AFFINE_GROUPS if columns % g == 0]


# ------------------------------------------------------------------------------------------------ errors of formats


def sharing(targets: Sequence[Target], known: FromStatistics) -> list[list[Target]]:
    """Targets by objective: q, k and v have one, and gate and up, wherever they lie in the files."""
    found: dict[object, list[Target]] = {}
    for t in targets:
        found.setdefault((known.statistics.objective_name(t.module), t.shape[:-2], t.dtype), []).append(t)
    return list(found.values())


def _costs(targets: Sequence[Target], known: FromStatistics, solver: str) -> dict[str, dict[str, float]]:
    """Cost of every format by the solver that will build, by module. The targets share their objective: rows of all of them
    are solved together, since what a GPU takes for a few columns hardly depends on the rows."""
    columns = targets[0].shape[-1]
    main = _group(columns)
    measured: dict[QuantSpec, np.ndarray] = {}  # by least squares, of each target
    solved: dict[int, np.ndarray] = {}  # by the Hessian solver, at GROUP_BITS
    taken = list(zip(*(sample(t, ROWS) for t in targets), strict=True))  # an expert of each, or all that there is
    for pieces in taken:
        expert = pieces[0][2]
        part = slice(expert, expert + 1) if expert is not None else None
        moments = known.moments(targets[0].module, part, None, solver == "gptq")
        price = _Price(known, targets, [rows for rows, _, _ in pieces], expert, len(taken))
        weights = mx.concatenate([w for _, w, _ in pieces])
        x = weights[None] if expert is not None else weights

        def cost(spec: QuantSpec, by: str) -> np.ndarray:
            left = restored(solve(x, moments, spec, by, QUICK), spec)  # noqa: B023
            return price(weights, left[0] if left.ndim == 3 else left)  # noqa: B023

        for spec in formats(columns):
            if spec.group_size == main or spec.bits == GROUP_BITS:
                measured[spec] = measured.get(spec, 0.0) + cost(spec, "ls")
            if spec.bits == GROUP_BITS and solver == "gptq":
                solved[spec.group_size] = solved.get(spec.group_size, 0.0) + cost(spec, "gptq")
    at_main = np.maximum(measured[QuantSpec(GROUP_BITS, main)], 1e-30)
    out: dict[str, dict[str, float]] = {t.module: {} for t in targets}
    for spec in formats(columns):
        by_least_squares = measured[QuantSpec(GROUP_BITS, spec.group_size)]
        left = np.minimum(solved.get(spec.group_size, by_least_squares), by_least_squares)
        for target, value in zip(targets, measured[QuantSpec(spec.bits, main)] * left / at_main, strict=True):
            out[target.module][label(spec)] = float(value)
    return out


def _group(columns: int) -> int:
    return GROUP if columns % GROUP == 0 else min(AFFINE_GROUPS)


class _Price:
    """½ c Σ_o fisher_o ΔW_o H ΔW_oᵀ of the sampled rows of targets with one H, each scaled up to all of its target's."""

    def __init__(
        self,
        known: FromStatistics,
        targets: Sequence[Target],
        rows: Sequence[np.ndarray],
        expert: int | None,
        samples: int,
    ) -> None:
        """rows: sampled of each target, of one expert out of `samples` if they are stacked."""
        self.parts: list[tuple[slice, mx.array, mx.array, mx.array]] = []
        self.scales: list[float] = []
        start = 0
        for target, sampled in zip(targets, rows, strict=True):
            objective = known.objective(target.module, expert)
            fisher = objective.rows
            # sampled rows and experts stand for the others in proportion to what those are worth
            worth = float(fisher.sum()) / max(float(fisher[sampled].sum()), 1e-30)
            if not self.parts:
                self.hessian = mx.array(objective.hessian)
            part = slice(start, start := start + len(sampled))
            self.scales.append(0.5 * objective.coherence * worth * objective.share / samples)
            self.parts.append(
                (part, mx.array(fisher[sampled]), mx.array(objective.second), mx.array(objective.second_g))
            )

    def __call__(self, weights: mx.array, restored: mx.array) -> np.ndarray:
        """weights, restored: rows of all targets behind each other, [Σ r, K] → nats a token, of each target"""
        e = weights.astype(mx.float32) - restored
        along, square = ((e @ self.hessian) * e).sum(axis=-1), mx.square(e)
        found = []
        for part, fisher, second, second_g in self.parts:
            whole = (along[part] * fisher).sum()
            apart = ((square[part] @ second) * fisher).sum()
            own = ((square[part] @ second_g) * fisher).sum()
            found.append(own * whole / mx.maximum(apart, 1e-30))
        return np.array(mx.stack(found)).astype(np.float64) * self.scales


def _monotone(costs: dict[str, float]) -> dict[str, float]:
    """At equal group size more bits never cost more: what a small sample says otherwise is noise."""
    out = dict(costs)
    for group in AFFINE_GROUPS:
        names = [f"{b}/{group}" for b in sorted(AFFINE_BITS) if f"{b}/{group}" in out]
        for low, high in itertools.pairwise(names):
            out[high] = min(out[high], out[low])
    return out


# ------------------------------------------------------------------------------------------------ probes


def _probes(
    folder: Path,
    targets: Sequence[Target],
    labels: Mapping[str, str],
    costs: Mapping[str, Mapping[str, float]],
    known: FromStatistics,
    windows: Sequence[Sequence[int]],
    solver: str,
    tick: Progress,
) -> tuple[list[Probe], int]:
    used = probe_windows(windows)
    base = Kept(Weights(folder, mx.float32))
    wanted = [(c, b) for c in dict.fromkeys(labels[t.module] for t in targets) for b in PROBE_BITS]
    plans = [
        {t.module: QuantSpec(bits, _group(t.shape[-1])) for t in targets if labels[t.module] == name}
        for name, bits in wanted
    ]
    versions = [base, *(Rounded(base, specs, known, solver) for specs in plans)]
    steps = base.config.num_hidden_layers + 1 + len(wanted)

    def passed(layer: int) -> None:
        base.forget()
        tick("probes", layer + 2, steps)

    together = max(1, BATCH_TOKENS // len(used[0]))
    batches = [mx.array(used[i : i + together]) for i in range(0, len(used), together)]
    teacher, *found = (_states(s) for s in hidden_states_of_versions(versions, batches, passed))
    head = base.head()
    want = [t for w in used for t in (*w[1:], 0)]  # the last has no next token; its figures of one are not used
    out = []
    for n, ((name, bits), specs, states) in enumerate(zip(wanted, plans, found, strict=True)):
        compared = compare(teacher, head, states, versions[n + 1].head(), want)
        predicted = sum(costs[m][label(s)] for m, s in specs.items())
        out.append(Probe(name, bits, GROUP, predicted, float(np.nanmean(compared.kld))))
        mx.clear_cache()
        tick("probes", steps - len(wanted) + n + 1, steps)
    return out, len(want)


def probe_windows(windows: Sequence[Sequence[int]]) -> list[list[int]]:
    """Windows as long as the first, spread over all of them, that together have PROBE_TOKENS tokens; at least one."""
    context = len(windows[0])
    whole = [list(w) for w in windows if len(w) == context]
    count = min(len(whole), max(1, PROBE_TOKENS // context))
    return [whole[i * len(whole) // count] for i in range(count)]


def _states(batches: Sequence[mx.array]) -> mx.array:
    return mx.concatenate([b.reshape(-1, b.shape[-1]) for b in batches])


class Kept(Weights):
    """Weights whose tensors are read once until they are forgotten: several versions of a layer share what is not rounded."""

    def __init__(self, weights: Weights) -> None:
        self.__dict__.update(weights.__dict__)
        self._arrays: dict[str, mx.array] = {}

    def array(self, name: str) -> mx.array:
        if name not in self._arrays:
            self._arrays[name] = super().array(name)
        return self._arrays[name]

    def forget(self) -> None:
        self._arrays.clear()


class Rounded(Weights):
    """The base with some modules rounded by a solver as they are loaded."""

    def __init__(self, weights: Weights, specs: Mapping[str, QuantSpec], known: FromStatistics, solver: str) -> None:
        self.__dict__.update(weights.__dict__)
        self._base, self._rounded, self._known, self._solver = weights, specs, known, solver
        self._once: dict[str, Packed] = {}  # a tied embedding is asked for twice

    def array(self, name: str) -> mx.array:
        return self._base.array(name)

    def linear(self, module: str) -> Linear:
        if module in self._once:
            return self._once[module]
        dense = super().linear(module)
        spec = self._rounded.get(module)
        if spec is None:
            return dense
        w, parts = dense.weight, []
        step = max(1, BAND_VALUES // (w.size // w.shape[0]))
        for start in range(0, w.shape[0], step):
            rows = slice(start, min(w.shape[0], start + step))
            known = self._known.moments(module, rows if w.ndim == 3 else None, None, self._solver == "gptq")
            part = solve(w[rows].astype(mx.bfloat16), known, spec, self._solver, QUICK)
            assert part.biases is not None
            parts.append((part.codes, part.scales.astype(mx.float32), part.biases.astype(mx.float32)))
        codes, scales, biases = (mx.concatenate(list(x)) for x in zip(*parts, strict=True))
        packed = Packed(codes, scales, biases, spec, mx.float32, dense.bias)
        if layer_of(module) is None:
            self._once[module] = packed
        return packed


def _factor(probe: Probe) -> float:
    if probe.predicted <= 0 or not math.isfinite(probe.measured) or probe.measured <= 0:
        return 1.0
    return min(max(probe.measured / probe.predicted, 1 / LARGEST_FACTOR), LARGEST_FACTOR)


def _at(factors: Mapping[tuple[str, int], float], name: str, bits: int) -> float:
    """A class's factor at a width: that of the nearest probe outside their range, between them geometrically."""
    known = {b: f for (n, b), f in factors.items() if n == name}
    widths = sorted(known)
    return math.exp(float(np.interp(bits, widths, [math.log(known[b]) for b in widths])))
