"""Which bits each tensor gets for a number of bytes: a multiple-choice knapsack over measured costs. Pure, no MLX.

A tensor's options are bf16 and every affine format that its columns take and its cost is known for. One is chosen a
tensor, so that the bytes stay within the budget and the sum of the costs (nats of KL divergence a token, see `Costs`)
is least. Experts of a layer are one stacked tensor and so share a format.

How: along each tensor's lower convex hull, steps are taken in the order of what they gain a byte (the linear relaxation,
solved exactly, so its value is a lower bound). What is left over is filled greedily. Then every option whose reduced
cost exceeds the distance between that plan and the bound is out of the running for a proof, and the few that remain are
searched exactly by a list of undominated (bytes, cost) states. Ties go to fewer bytes, then to the earlier option.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from inference.checkpoint import AFFINE_BITS, AFFINE_GROUPS, QuantSpec
from inference.errors import InputError
from inference.layout import Target

from .builtin import ROUTER
from .recipe import DENSE, Recipe, Rule, TensorClass, TensorPlan, layer_of, matches, resolve

if TYPE_CHECKING:
    import numpy as np

FREE = "left to the allocator"  # the reason of the rule under which `resolve` puts what no pin names
MAX_STATES = 2000  # of the exact search; beyond it the best are kept and `Choice.exact` is False
DEEPENING = (
    1 / 256,
    1 / 64,
    1 / 16,
    1 / 4,
    1.0,
)  # parts of the gap that the exact search allows, until one holds a plan
EPSILON = 1e-9  # relative: rounding of sums of costs
GROUP = 64  # of a pin that names none


@dataclass(frozen=True)
class Costs:
    """What each format of each module costs: nats of mean KL divergence a token, by module and "bits/group_size".

    Costs add up: what a plan is predicted to cost is the sum over its modules. bf16 costs nothing. A format that a module
    has no figure for is not offered. statistics, solver, version: what the figures were made from and by; digest: sha256
    of it all.
    """

    modules: Mapping[str, Mapping[str, float]]
    statistics: str = ""
    solver: str = ""
    version: int = 0
    digest: str = ""

    def of(self, module: str, spec: QuantSpec | None) -> float | None:
        """Cost of a format; None where it is not known."""
        if spec is None:
            return 0.0
        return self.modules.get(module, {}).get(label(spec)) if spec.mode == "affine" else None


@dataclass(frozen=True)
class Floor:
    """At least these bits (`bf16`: no quantization) for the modules that a glob names. optional: may match nothing."""

    match: str
    bits: int | str
    optional: bool = False


# a router's rounding moves which experts run; they are tiny
PINS: tuple[Rule, ...] = (ROUTER,)
# the gates of the recurrence: 0.03 % of the weights, and their errors add up over the sequence
FLOORS: tuple[Floor, ...] = (Floor("*.linear_attn.in_proj_{a,b}", 8, optional=True),)


@dataclass(frozen=True)
class Option:
    """One format of a tensor: bytes stored (scales and biases included) and cost."""

    nbytes: int
    cost: float
    spec: QuantSpec | None = None


@dataclass(frozen=True)
class Item:
    """A tensor and what it may become."""

    name: str
    options: tuple[Option, ...]


@dataclass(frozen=True)
class Choice:
    """One option an item. bound: no choice within the budget costs less; exact: none costs less than this one."""

    options: tuple[int, ...]
    nbytes: int
    cost: float
    bound: float
    exact: bool


@dataclass(frozen=True)
class Demand:
    """What is to be allocated: tensors that are free, those that are pinned, and bytes that nothing can change.

    plans: of every tensor in order, free ones as bf16. items: one a free tensor. fixed: bytes of the language model
    outside `items`; other: those of vision and MTP. pins: the rules that decided, in order.
    """

    plans: tuple[TensorPlan, ...]
    items: tuple[Item, ...]
    fixed: int
    other: int
    pins: tuple[Rule, ...]

    @property
    def least(self) -> int:
        """Text bytes of the smallest plan."""
        return self.fixed + sum(min(o.nbytes for o in i.options) for i in self.items)


@dataclass(frozen=True)
class Allocated:
    """An allocation as a recipe's rules: pins first, then one rule for each projection, format and set of layers.

    nbytes: of the language model. predicted: sum of the costs, nats a token; bound: the least that any plan of the budget
    could be predicted at.
    """

    rules: tuple[Rule, ...]
    nbytes: int
    predicted: float
    bound: float
    exact: bool


def label(spec: QuantSpec) -> str:
    """The name of a format in a table of costs."""
    return f"{spec.bits}/{spec.group_size}"


def predict(plans: Iterable[TensorPlan], costs: Costs) -> float | None:
    """Sum of the costs of a plan, in nats a token; None where a tensor's format has no figure."""
    found = [costs.of(p.target.module, p.spec) for p in plans if p.target.part == "text"]
    return None if None in found else sum(c for c in found if c is not None)


# ------------------------------------------------------------------------------------------------ demand


def demand(
    targets: Sequence[Target],
    classes: Sequence[TensorClass],
    costs: Costs | None,
    pins: Sequence[Rule] = (),
    floors: Sequence[Floor] = (),
    group_size: int = GROUP,
) -> Demand:
    """What may become of each tensor. pins, floors: tried before PINS and FLOORS; the first that matches decides.

    costs None: the bytes alone count (before anything was measured); every option then costs 0. group_size: of pins that
    name none. Raises InputError for a pattern that matches nothing, and for a free tensor without figures.
    """
    rules = (*pins, *PINS)
    recipe = Recipe("allocation", (*rules, Rule("*", DENSE, why=FREE, optional=True)))
    plans = tuple(resolve(recipe, 0, group_size, targets, classes))
    floors = (*floors, *FLOORS)
    for floor in floors:
        if not floor.optional and not any(matches(floor.match, p.target.module) for p in plans):
            raise InputError(f"floor {floor.match!r} matches no tensor of this model")
    items, fixed, other = [], 0, 0
    for plan in plans:
        if plan.target.part != "text":
            other += plan.nbytes
        elif plan.why != FREE or len(plan.target.shape) < 2:
            fixed += plan.nbytes
        else:
            items.append(Item(plan.target.module, _options(plan.target, costs, floors)))
    return Demand(plans, tuple(items), fixed, other, rules)


def _options(target: Target, costs: Costs | None, floors: Sequence[Floor]) -> tuple[Option, ...]:
    """Narrow to wide, then bf16."""
    module = target.module
    least = next((f.bits for f in floors if matches(f.match, module)), 0)
    floor = least if isinstance(least, int) else max(AFFINE_BITS) + 1  # bf16
    known = None if costs is None else costs.modules.get(module)
    if costs is not None and known is None:
        raise InputError(f"no costs are known for {module}; run publish calibrate again, or pin its format")
    out = []
    for bits in AFFINE_BITS:
        for group in sorted(AFFINE_GROUPS, reverse=True):
            spec = QuantSpec(bits, group)
            if bits < floor or target.shape[-1] % group or (known is not None and label(spec) not in known):
                continue
            cost = 0.0 if known is None else known[label(spec)]
            out.append(Option(spec.nbytes(target.shape, target.dtype), cost, spec))
    return (*out, Option(target.nbytes, 0.0))


def allocate(wanted: Demand, budget: int, costs: Costs) -> Allocated:
    """The best plan of the language model within `budget` bytes. Raises InputError if there is none."""
    if budget < wanted.least:
        raise InputError(f"{budget} bytes are less than the smallest possible plan, {wanted.least} bytes")
    chosen = choose(wanted.items, budget - wanted.fixed)
    specs = {i.name: i.options[k].spec for i, k in zip(wanted.items, chosen.options, strict=True)}
    free = [p for p in wanted.plans if p.target.module in specs and p.why == FREE]
    plans = [replace(p, spec=specs[p.target.module]) for p in free]
    pinned = sum(
        costs.of(p.target.module, p.spec) or 0.0 for p in wanted.plans if p.target.part == "text" and p.why != FREE
    )
    return Allocated(
        (*wanted.pins, *_rules(plans, reasons(plans, costs))),
        wanted.fixed + chosen.nbytes,
        chosen.cost + pinned,
        chosen.bound + pinned,
        chosen.exact,
    )


# ------------------------------------------------------------------------------------------------ the choice as rules


def _rules(plans: Sequence[TensorPlan], whys: Mapping[tuple[str, QuantSpec | None], str]) -> list[Rule]:
    """Rules that `resolve` turns into these plans again, in the order of the tensors.

    One rule a projection and format; a format that not all layers share names its layers.
    """
    leaves: dict[str, dict[tuple[str, QuantSpec | None], list[int]]] = {}
    for plan in plans:
        layer = layer_of(plan.target.name)
        leaf = plan.target.module
        if layer is not None:
            leaf = f"*.layers.*.{leaf.split(f'.layers.{layer}.', 1)[1]}"
        leaves.setdefault(leaf, {}).setdefault((plan.cls, plan.spec), []).append(-1 if layer is None else layer)
    out = []
    for leaf, formats in leaves.items():
        for (cls, spec), layers in sorted(formats.items(), key=lambda f: sorted(f[1])):
            out.append(
                Rule(
                    leaf,
                    DENSE if spec is None else spec.bits,
                    None if spec is None else spec.group_size,
                    why=whys[cls, spec],
                    layers=tuple(sorted(layers)) if len(formats) > 1 else None,
                )
            )
    return out


def reasons(plans: Sequence[TensorPlan], costs: Costs) -> dict[tuple[str, QuantSpec | None], str]:
    """For each class and format that a plan holds: what the next narrower and the next wider one would change."""
    members: dict[tuple[str, QuantSpec | None], list[TensorPlan]] = {}
    for plan in plans:
        members.setdefault((plan.cls, plan.spec), []).append(plan)
    return {key: _reason(key[1], found, costs) for key, found in members.items()}


def _reason(spec: QuantSpec | None, plans: Sequence[TensorPlan], costs: Costs) -> str:
    group = spec.group_size if spec else GROUP
    widths = [*AFFINE_BITS, None]
    at = widths.index(spec.bits if spec else None)
    parts = []
    for step, word in ((-1, "would add"), (1, "would take away")):
        other = widths[at + step] if 0 <= at + step < len(widths) else "none"
        if other == "none":
            continue
        form = QuantSpec(other, group) if isinstance(other, int) else None
        pairs = [(costs.of(p.target.module, form), costs.of(p.target.module, spec)) for p in plans]
        if any(a is None or b is None for a, b in pairs):
            continue  # a group size that these columns do not take, or a floor
        moved = sum((a or 0) - (b or 0) for a, b in pairs)
        parts.append(f"{DENSE if form is None else f'{form.bits} bits'} {word} {_nats(abs(moved))}")
    return (
        f"measured on this model: {', '.join(parts)} nats of KLD" if parts else "chosen by measured cost on this model"
    )


def _nats(value: float) -> str:
    """Two digits, without an exponent as long as that is legible."""
    return f"{value:.2g}" if value >= 1e-4 or value == 0 else f"{value:.1e}"


# ------------------------------------------------------------------------------------------------ the knapsack


@dataclass
class _Steps:
    """Hull of one item: positions (indices into its options), cheapest bytes first."""

    positions: list[int]
    undominated: list[int] = field(default_factory=list)


def choose(items: Sequence[Item], budget: int) -> Choice:
    """The options whose cost is least among those that fit into `budget` bytes. Raises InputError if none fits."""
    hulls = [_hull(item) for item in items]
    at = [0] * len(items)  # position on the hull
    nbytes = sum(i.options[h.positions[0]].nbytes for i, h in zip(items, hulls, strict=True))
    if nbytes > budget:
        raise InputError(f"{budget} bytes are less than the smallest possible choice, {nbytes} bytes")
    steps = sorted(
        (-_slope(item.options[a], item.options[b]), i, k)
        for i, (item, hull) in enumerate(zip(items, hulls, strict=True))
        for k, (a, b) in enumerate(zip(hull.positions, hull.positions[1:], strict=False))
    )
    rate, slack = 0.0, 0
    for slope, i, k in steps:
        options, positions = items[i].options, hulls[i].positions
        grown = nbytes + options[positions[k + 1]].nbytes - options[positions[k]].nbytes
        if grown > budget:
            rate, slack = -slope, budget - nbytes
            break
        nbytes, at[i] = grown, k + 1
    chosen = [h.positions[k] for h, k in zip(hulls, at, strict=True)]
    bound = _cost(items, chosen) - rate * slack
    if rate == 0.0:  # everything got the last that helps
        return _choice(items, chosen, bound, True)
    _fill(items, hulls, chosen, budget)
    gap = _cost(items, chosen) - bound
    tolerance = EPSILON * max(abs(bound), gap)
    exact = True
    for part in DEEPENING if gap > tolerance else ():
        better, exact = _search(items, hulls, chosen, budget, rate, gap * part + tolerance)
        if better is not None:
            if _cost(items, better) < _cost(items, chosen):
                chosen = better
            _fill(items, hulls, chosen, budget)
        if better is not None or not exact:
            break
    return _choice(items, chosen, bound, exact)


def _choice(items: Sequence[Item], chosen: Sequence[int], bound: float, exact: bool) -> Choice:
    return Choice(tuple(chosen), _nbytes(items, chosen), _cost(items, chosen), bound, exact)


def _nbytes(items: Sequence[Item], chosen: Sequence[int]) -> int:
    return sum(i.options[k].nbytes for i, k in zip(items, chosen, strict=True))


def _cost(items: Sequence[Item], chosen: Sequence[int]) -> float:
    return sum(i.options[k].cost for i, k in zip(items, chosen, strict=True))


def _slope(a: Option, b: Option) -> float:
    """What a byte gains between two options."""
    return (a.cost - b.cost) / (b.nbytes - a.nbytes)


def _hull(item: Item) -> _Steps:
    """Options that cost less than all smaller ones, and of these the lower convex hull over bytes."""
    order = sorted(range(len(item.options)), key=lambda k: (item.options[k].nbytes, item.options[k].cost, k))
    undominated: list[int] = []
    for k in order:
        if not undominated or item.options[k].cost < item.options[undominated[-1]].cost:
            undominated.append(k)
    hull: list[int] = []
    for k in undominated:
        while len(hull) > 1 and _slope(item.options[hull[-2]], item.options[hull[-1]]) <= _slope(
            item.options[hull[-1]], item.options[k]
        ):
            hull.pop()
        hull.append(k)
    return _Steps(hull, undominated)


def _fill(items: Sequence[Item], hulls: Sequence[_Steps], chosen: list[int], budget: int) -> None:
    """Spend what is left: again and again the upgrade that gains most a byte among those that fit, until none does."""
    left = budget - _nbytes(items, chosen)
    while True:
        best: tuple[float, int, int] | None = None
        for i, (item, hull) in enumerate(zip(items, hulls, strict=True)):
            now = item.options[chosen[i]]
            for k in hull.undominated:
                other = item.options[k]
                if other.cost < now.cost and 0 < other.nbytes - now.nbytes <= left:
                    gain = _slope(now, other)
                    if best is None or gain > best[0]:
                        best = gain, i, k
        if best is None:
            return
        _, i, k = best
        left -= items[i].options[k].nbytes - items[i].options[chosen[i]].nbytes
        chosen[i] = k


def _search(
    items: Sequence[Item], hulls: Sequence[_Steps], chosen: Sequence[int], budget: int, rate: float, gap: float
) -> tuple[list[int] | None, bool]:
    """(the best choice within `gap` of the bound, or None; whether nothing was left out of the search).

    With reduced costs r = cost + rate · bytes − (the item's least such sum), any choice costs bound + Σ r + rate · (bytes
    left over). So one within the gap has Σ r below it, and an option whose own r exceeds it cannot take part.
    """
    import numpy as np  # noqa: PLC0415 - ladders without `size` need no search

    out = list(chosen)
    core: list[tuple[int, list[int], list[float]]] = []  # item, options still in the running, their reduced costs
    base = 0
    for i, (item, hull) in enumerate(zip(items, hulls, strict=True)):
        sums = [item.options[k].cost + rate * item.options[k].nbytes for k in hull.undominated]
        least = min(sums)
        keep = [(k, s - least) for k, s in zip(hull.undominated, sums, strict=True) if s - least <= gap]
        if len(keep) == 1:
            out[i] = keep[0][0]
            base += item.options[out[i]].nbytes
        else:
            core.append((i, [k for k, _ in keep], [r for _, r in keep]))
    room = budget - base
    sizes = [np.array([items[i].options[k].nbytes for k in ks], np.int64) for i, ks, _ in core]
    # bytes that the rest needs at least, and can take at most
    least_after = np.cumsum([0, *(int(s.min()) for s in reversed(sizes))])[::-1][1:]
    most_after = np.cumsum([0, *(int(s.max()) for s in reversed(sizes))])[::-1][1:]
    used, spent, exact = np.zeros(1, np.int64), np.zeros(1), True
    trail: list[tuple[np.ndarray, np.ndarray]] = []
    for n, (_, _, reduced) in enumerate(core):
        count = len(used)
        grown = (used[None] + sizes[n][:, None]).ravel()
        cost = (spent[None] + np.array(reduced)[:, None]).ravel()
        unspent = np.maximum(room - grown - most_after[n], 0)  # left over whatever follows
        index = np.flatnonzero((grown + least_after[n] <= room) & (cost + rate * unspent <= gap))
        # a state is kept if it costs less than every one of as many bytes or fewer
        order = index[np.lexsort((index, cost[index], grown[index]))]
        true = cost[order] - rate * grown[order]
        front = np.ones(len(order), bool)
        front[1:] = true[1:] < np.minimum.accumulate(true)[:-1]
        order = order[front]
        if len(order) > MAX_STATES:
            exact = False
            order = order[np.sort(np.lexsort((order, cost[order]))[:MAX_STATES])]
        if not len(order):
            return None, exact
        used, spent = grown[order], cost[order]
        trail.append((order % count, order // count))
    if not core and room < 0:
        return None, exact
    state = int(np.argmin(spent - rate * used))
    if spent[state] + rate * (room - used[state]) > gap:
        return None, exact
    for (i, ks, _), (parents, options) in zip(reversed(core), reversed(trail), strict=True):
        out[i] = ks[int(options[state])]
        state = int(parents[state])
    return out, exact
