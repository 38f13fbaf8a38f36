"""The card's words and cells about quality, pure: `quality_view(facts, id)` → `QualityView`; None where nothing is measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import card_format as fmt
from .card_figure import Figure, Kind, Point
from .card_quality import Entry, Standings
from .schema import Device, Divergence, Quality
from .sizes import CONTEXT, MEMORY_SHARE

if TYPE_CHECKING:
    from .card_facts import Facts

MEMORIES = (8, 16, 24, 32, 48, 64)  # GB, of Macs
CONTROL = "BF16 against BF16 computed another way"
NONE = "–"
NBSP = "\u00a0"


@dataclass(frozen=True)
class QualityRow:
    """A line of both tables; kld holds the reason where nothing was measured."""

    name: str
    url: str | None
    current: bool
    foreign: bool
    dominated: bool
    known: bool  # measured
    size: str
    bpw: str
    kld: str
    p999: str
    top1: str
    ln_ratio: str
    chat_kld: str
    chat_p999: str
    chat_top1: str
    greedy: str
    identical: str


@dataclass(frozen=True)
class Choice:
    """Which variant for a machine's memory; name None where none fits."""

    memory: str
    name: str | None
    url: str | None
    current: bool
    needs: str
    kld: str


@dataclass(frozen=True)
class QualityView:
    rows: tuple[QualityRow, ...]
    chat: bool
    greedy: bool
    text: Divergence  # one that stands for all: windows, context, positions
    chat_text: Divergence | None
    text_hash: str
    chat_hash: str | None
    ngram: int
    shared: int  # runs of `ngram` tokens that evaluation and calibration text have in common
    compute: str
    devices: tuple[Device, ...]
    dates: str
    prompts: int
    max_tokens: int
    control: bool
    missing: tuple[str, ...]  # what could not be measured
    own: str  # this variant's mean KL with its interval; empty where it is not measured
    floor: str  # of the control row
    dominated: tuple[str, ...]
    level: tuple[str, ...]  # pairs that the figures do not rank
    choices: tuple[Choice, ...]
    left_out: tuple[str, ...]  # not measured, not finite throughout, or failed at the smoke test
    context: int  # tokens that the memory is stated for
    share: int  # per cent
    workspace_measured: bool
    figure: Figure | None


def quality_view(facts: Facts, id: str) -> QualityView | None:
    s = facts.standings
    results = [e.quality for e in s.measured if e.quality]
    if not any(not e.foreign for e in s.measured):
        return None
    shown = next((e for e in s.measured if e.name == id), s.measured[0])
    quality, text = shown.quality, shown.corpus("text")
    assert quality
    assert text
    chat_text = next((d for e in s.measured if (d := e.corpus("chat"))), None)
    greedy = next((q.greedy for q in results if q.greedy), None)
    days = sorted({fmt.pretty_date(q.measured_at) for q in results})
    floor = s.floor("text")
    workspace, measured = _workspace(facts)
    own = s.entry(id).corpus("text")
    return QualityView(
        rows=tuple(_rows(s, id, facts)),
        chat=chat_text is not None,
        greedy=greedy is not None,
        text=text,
        chat_text=chat_text,
        text_hash=quality.text_hash,
        chat_hash=next((q.chat_hash for q in results if q.chat_hash), None),
        ngram=quality.overlap.ngram,
        shared=max(q.overlap.shared for q in results),
        compute=quality.compute,
        devices=_devices(results),
        dates=days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}",
        prompts=greedy.prompts if greedy else 0,
        max_tokens=greedy.max_tokens if greedy else 0,
        control=floor is not None,
        missing=tuple(dict.fromkeys(fmt.portable(m) for q in results for m in q.missing)),
        own=fmt.interval(own.kld) if own and own.kld else "",
        floor=fmt.small(floor.kld.value) if floor and floor.kld else "",
        dominated=tuple(_dominated(s)),
        level=tuple(f"{p.a} and {p.b}" for p in s.pairs if not p.apart),
        choices=tuple(_choices(facts, id, workspace)),
        left_out=tuple(e.name for e in s.entries if not e.foreign and not (e.kld and e.sound)),
        context=CONTEXT,
        share=int(100 * MEMORY_SHARE),
        workspace_measured=measured,
        figure=_figure(s, id),
    )


def _devices(results: Sequence[Quality]) -> tuple[Device, ...]:
    out: list[Device] = []
    for q in results:
        if q.device not in out:
            out.append(q.device)
    return tuple(out)


# ---------------------------------------------------------------------------------------------- tables


def quality_name(r: QualityRow) -> str:
    """The first cell of a line: linked, marked if dominated, bold if it is this card's."""
    name = f"[{r.name}]({r.url})" if r.url else fmt.cell(r.name)
    bold = "**" if r.current else ""
    return f"{bold}{name}{bold}{' <sup>†</sup>' if r.dominated else ''}"


def _rows(s: Standings, id: str, facts: Facts) -> Iterable[QualityRow]:
    for e in s.entries:
        v = None if e.foreign else facts.variant(e.name)
        text, chat = e.corpus("text"), e.corpus("chat")
        greedy = e.quality.greedy if e.quality else None
        yield QualityRow(
            name=e.name,
            url=v.url if v else None,
            current=e.name == id,
            foreign=e.foreign,
            dominated=not e.foreign and s.dominator(e.name) is not None,
            known=text is not None,
            size=fmt.size(e.nbytes).replace(" ", NBSP) if e.nbytes else NONE,
            bpw=fmt.bpw(e.bpw) if e.bpw else NONE,
            **_cells(text, e.why),
            **_chat_cells(chat, e),
            greedy=f"{greedy.mean:.1f}" if greedy else NONE,
            identical=fmt.percent(greedy.identical) if greedy else NONE,
        )
    text, chat = s.floor("text"), s.floor("chat")
    if text is None:
        return
    original = facts.base.original
    greedy = next((q.greedy_control for e in s.measured if (q := e.quality) and q.greedy_control), None)
    yield QualityRow(
        name=CONTROL,
        url=None,
        current=False,
        foreign=True,
        dominated=False,
        known=True,
        size=fmt.size(original.nbytes).replace(" ", NBSP) if original else NONE,
        bpw=fmt.bpw(8 * original.nbytes / original.params) if original else NONE,
        **_cells(text, ""),
        chat_kld=fmt.interval(chat.kld) if chat and chat.kld else NONE,
        chat_p999=fmt.small(chat.kld_p999.value) if chat and chat.kld_p999 else NONE,
        chat_top1=fmt.percent(chat.top1.value) if chat and chat.top1 else NONE,
        greedy=f"{greedy.mean:.1f}" if greedy else NONE,
        identical=fmt.percent(greedy.identical) if greedy else NONE,
    )


def _cells(d: Divergence | None, why: str) -> dict[str, str]:
    if d is None or d.kld is None:
        return {"kld": fmt.not_measured(why), "p999": NONE, "top1": NONE, "ln_ratio": NONE}
    lost = f" ({d.nonfinite} of {d.positions} positions are not finite and left out)" if d.nonfinite else ""
    return {
        "kld": fmt.interval(d.kld) + lost,
        "p999": fmt.small(d.kld_p999.value) if d.kld_p999 else NONE,
        "top1": fmt.percent(d.top1.value) if d.top1 else NONE,
        "ln_ratio": fmt.signed(d.ln_ppl_ratio) if d.ln_ppl_ratio else NONE,
    }


def _chat_cells(d: Divergence | None, e: Entry) -> dict[str, str]:
    if d is None or d.kld is None:
        why = e.why or "no conversation was measured"
        return {"chat_kld": fmt.not_measured(why), "chat_p999": NONE, "chat_top1": NONE}
    return {
        "chat_kld": fmt.interval(d.kld),
        "chat_p999": fmt.small(d.kld_p999.value) if d.kld_p999 else NONE,
        "chat_top1": fmt.percent(d.top1.value) if d.top1 else NONE,
    }


def _dominated(s: Standings) -> Iterable[str]:
    for e in s.measured:
        found = None if e.foreign else s.dominator(e.name)
        if found:
            other, by = found
            yield f"{e.name}: {other.name} is no larger and closer to BF16, by {fmt.interval(by)} nats a token"


# ---------------------------------------------------------------------------------------------- choosing


def _workspace(facts: Facts) -> tuple[int | None, bool]:
    """Bytes that a benchmark of this ladder took beside weights, at most, and whether one was run."""
    found = [
        int(v.bench.variant.peak_gb * 1e9) - v.contents.text_nbytes
        for v in facts.variants
        if v.contents and v.bench and v.bench.variant.peak_gb is not None and 0 < v.bench.variant.peak_gb < 1e6
    ]
    return (max(found), True) if found else (None, False)


def _choices(facts: Facts, id: str, workspace: int | None) -> Iterable[Choice]:
    """One line for memories with the same answer."""
    needs = {
        v.id: v.contents.text_nbytes + v.contents.caches + (v.contents.workspace if workspace is None else workspace)
        for v in facts.variants
        if v.contents
    }
    runs: list[tuple[list[int], Entry | None]] = []
    for memory in MEMORIES:
        room = memory * 10**9 * MEMORY_SHARE
        best = facts.standings.best([name for name, n in needs.items() if n <= room])
        if runs and runs[-1][1] == best:
            runs[-1][0].append(memory)
        else:
            runs.append(([memory], best))
    for memories, best in runs:
        text = f"{memories[0]} GB" if len(memories) == 1 else f"{memories[0]} to {memories[-1]} GB"
        if memories[-1] == MEMORIES[-1]:
            text = f"{memories[0]} GB and more"
        if best is None:
            yield Choice(text, None, None, False, NONE, NONE)
            continue
        v = facts.variant(best.name)
        assert best.kld
        yield Choice(text, best.name, v.url, best.name == id, fmt.size(needs[best.name]), fmt.small(best.kld.value))


# ---------------------------------------------------------------------------------------------- figure


def _figure(s: Standings, id: str) -> Figure | None:
    """None while fewer than two models have a figure that a log axis can hold."""
    drawn = [e for e in s.measured if e.kld and e.kld.value > 0 and e.nbytes and e.text_nbytes and e.text_params]
    points = [Point(e.name, _kind(e, id), e.nbytes or 0, e.kld.value, e.kld.low, e.kld.high) for e in drawn if e.kld]
    if len(points) < 2:
        return None
    shapes = {(e.text_params, (e.nbytes or 0) - (e.text_nbytes or 0)) for e in drawn}
    params, other = shapes.pop()
    floor = s.floor("text")
    value = floor.kld.value if floor and floor.kld and floor.kld.value > 0 else None
    return Figure(tuple(points), value, params or 0, None if shapes else other, _alt(points, value))


def _kind(e: Entry, id: str) -> Kind:
    if not e.foreign:
        return "this" if e.name == id else "variant"
    return "uniform" if e.recipe == "uniform" else "unsloth" if e.recipe == "unsloth" else "other"


def _alt(points: Sequence[Point], floor: float | None) -> str:
    """What the figure shows, in words, without what Markdown would read as more than words."""

    def told(p: Point) -> str:
        return f"{p.name} with {fmt.small(p.kld)} at {fmt.size(p.nbytes)}"

    own = [p for p in points if p.kind in ("this", "variant")]
    this = next((p for p in own if p.kind == "this"), None)
    parts = ["KL divergence from BF16 in nats a token, on a logarithmic axis, against size."]
    if this:
        parts.append(f"This variant: {told(this)}.")
    if len(own) > 1:
        closest, smallest = min(own, key=lambda p: p.kld), min(own, key=lambda p: p.nbytes)
        parts.append(f"Of {len(own)} variants the closest is {told(closest)}, the smallest {told(smallest)}.")
    if others := [p for p in points if p not in own]:
        parts.append(f"Other recipes: {', '.join(map(told, others))}.")
    if floor is not None:
        parts.append(f"{CONTROL}: {fmt.small(floor)}.")
    return "".join(c for c in " ".join(parts) if c not in "[]<>`*\\|!")
