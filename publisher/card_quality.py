"""How the variants of a ladder and foreign models stand to BF16 and to each other, for cards: `standings` → `Standings`.

Only current results of one teacher stand together. Two models are told apart where the interval of their paired difference
excludes zero and the difference is above the control row; else nothing here ranks them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from .schema import Baselines, Divergence, Interval, Quality
from .store import read_result
from .survey import quality_state, read_quality
from .variants import Project

OTHER_TEACHER = "measured against another BF16 than the rest"
UNSOUND = "the result holds no figure that can be used"


@dataclass(frozen=True)
class Entry:
    """A variant, or a model of a foreign recipe. quality None: `why` says why it is not measured.

    nbytes, text_nbytes, text_params: of the stored tensors; None where it is not built. sound: no smoke test failed.
    """

    name: str
    recipe: str | None  # of a foreign model
    nbytes: int | None
    text_nbytes: int | None
    text_params: int | None
    sound: bool
    quality: Quality | None
    why: str

    @property
    def foreign(self) -> bool:
        return self.recipe is not None

    @property
    def bpw(self) -> float | None:
        return 8 * self.text_nbytes / self.text_params if self.text_nbytes and self.text_params else None

    def corpus(self, name: str) -> Divergence | None:
        return next((d for d in self.quality.corpora if d.corpus == name), None) if self.quality else None

    @property
    def kld(self) -> Interval | None:
        """Over the text. None where a position was not finite, too: such a model is not recommended."""
        text = self.corpus("text")
        return text.kld if text and not text.nonfinite else None


@dataclass(frozen=True)
class Pair:
    """difference: mean KL divergence of `a` minus that of `b`, paired by windows. apart: they can be told apart."""

    a: str
    b: str
    difference: Interval
    apart: bool


@dataclass(frozen=True)
class Standings:
    """entries: smallest first, what is not built last. control: BF16 against itself computed another way, by corpus."""

    entries: tuple[Entry, ...] = ()
    control: tuple[Divergence, ...] = ()
    pairs: tuple[Pair, ...] = ()

    @property
    def measured(self) -> tuple[Entry, ...]:
        return tuple(e for e in self.entries if e.quality)

    def entry(self, name: str) -> Entry:
        return next(e for e in self.entries if not e.foreign and e.name == name)

    def floor(self, corpus: str) -> Divergence | None:
        return next((d for d in self.control if d.corpus == corpus), None)

    def closer(self, a: str, b: str) -> Interval | None:
        """b's mean KL minus a's, where `a` is told to be closer to BF16 than `b`; else None."""
        for p in self.pairs:
            if p.apart and {p.a, p.b} == {a, b}:
                d = p.difference if p.a == b else _negative(p.difference)
                return d if d.low > 0 else None
        return None

    def dominator(self, name: str) -> tuple[Entry, Interval] | None:
        """Who is at most as large as this variant and told to be closer: the closest such, a variant before others."""
        own = self.entry(name)
        found = [
            (e, by)
            for e in self.measured
            if e.name != name and (e.text_nbytes or 0) <= (own.text_nbytes or 0) and (by := self.closer(e.name, name))
        ]
        return min(found, key=lambda f: (f[0].foreign, -f[1].value), default=None)

    def best(self, names: Sequence[str]) -> Entry | None:
        """The closest to BF16 of these variants; of those that cannot be told from it, the smallest."""
        known = [(e, e.kld.value) for e in self.entries if e.name in names and not e.foreign and e.sound and e.kld]
        if not known:
            return None
        closest = min(known, key=lambda f: f[1])[0]
        level = [e for e, _ in known if e is closest or not self.closer(closest.name, e.name)]
        return min(level, key=lambda e: e.text_nbytes or 0)


def _negative(x: Interval) -> Interval:
    return Interval(value=-x.value, low=-x.high, high=-x.low)


def measured_entries(project: Project) -> list[Entry]:
    """Foreign models of out/baselines.json."""
    index, out = read_result(project.store.baselines, Baselines), []
    for b in index.baselines if index else ():
        quality = read_quality(project, b.weights_hash)
        why = "; ".join(quality_state(project, quality, quality.base_hash if quality else ""))
        name = " ".join(b.name.split())
        out.append(
            Entry(name, b.recipe, b.nbytes, b.text_nbytes, b.text_params, True, None if why else quality, why)
        )  # fmt: skip
    return out


def standings(entries: Sequence[Entry]) -> Standings:
    """Pure. Where results of several teachers are on record, those of the most common one stand."""
    usable = [_checked(e) for e in {e.name: e for e in reversed(entries)}.values()][
        ::-1
    ]  # a name is of its first bearer
    counts = Counter(t for e in usable if (t := _teacher(e)))
    teacher = max(counts, key=lambda t: counts[t], default=None)  # of equals the first
    usable = [
        replace(e, quality=None, why=OTHER_TEACHER) if e.quality and _teacher(e) != teacher else e for e in usable
    ]
    ordered = sorted(usable, key=lambda e: math.inf if e.text_nbytes is None else e.text_nbytes)
    control = tuple(next((d for e in ordered if e.quality for d in e.quality.control if d.corpus == c and _sound(d)), None)
                    for c in ("text", "chat"))  # fmt: skip
    known = tuple(d for d in control if d)
    floor = next((d for d in known if d.corpus == "text"), None)
    pairs = []
    for a, b in combinations([e for e in ordered if e.kld], 2):
        first, second = a.corpus("text"), b.corpus("text")
        if not (first and second) or first.window_positions != second.window_positions:
            continue
        from .evaluate_figures import paired  # noqa: PLC0415 - numpy, only where two were measured

        found = paired(first, second, floor)
        if found:
            pairs.append(Pair(a.name, b.name, found.difference, found.excludes_zero and found.above_floor is not False))
    return Standings(tuple(ordered), known, tuple(pairs))


def _teacher(e: Entry) -> str | None:
    text = e.corpus("text")
    return text.teacher if text else None


def _checked(e: Entry) -> Entry:
    """Results come from disk: what does not add up counts as not measured."""
    text = e.corpus("text")
    if e.quality is None:
        return e
    if text is None or not _sound(text) or not (e.text_nbytes and e.text_params):
        return replace(e, quality=None, why=UNSOUND)
    good = [d for d in e.quality.corpora if _sound(d)]
    return replace(e, quality=e.quality.model_copy(update={"corpora": good}))


def _sound(d: Divergence) -> bool:
    """A mean with its interval, and windows that fit together."""
    lists = (d.window_positions, d.window_kld)
    figures = [x for i in (d.kld, d.kld_p999, d.top1, d.ln_ppl_ratio) if i for x in (i.value, i.low, i.high)]
    per_window = [x for x in d.window_kld if x is not None]
    return (
        d.kld is not None
        and d.windows > 1
        and d.positions > 0
        and all(len(x) == d.windows for x in lists)
        and all(n >= 0 for n in d.window_positions)
        and sum(d.window_positions) > 0
        and all(map(math.isfinite, [*figures, *per_window]))
        and d.kld.low <= d.kld.value <= d.kld.high
    )
