"""One variant's card as values, pure: `view(facts, id)` → `View`, what the template puts into words.

Every cell that holds a figure is text already: the figure, or `not measured: REASON`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from inference.errors import InputError

from . import card_format as fmt
from .card_bits import BitRow
from .card_facts import SAMPLING, Base, Contents, Facts, License, Variant
from .card_history import Change, changelog
from .card_quality_view import QualityView, quality_view
from .hub_types import HUGGING_FACE
from .protocol import protocol_line
from .schema import Bench, Check, Device, Speed

STRATEGY_TAGS = {"unsloth": "unsloth-dynamic", "unsloth_8bit_out": "unsloth-dynamic"}
LICENSES = {
    "apache-2.0": ("Apache 2.0", "https://www.apache.org/licenses/LICENSE-2.0"),
    "mit": ("MIT", "https://opensource.org/license/mit"),
    "cc-by-4.0": ("CC BY 4.0", "https://creativecommons.org/licenses/by/4.0/"),
    "cc-by-nc-4.0": ("CC BY-NC 4.0", "https://creativecommons.org/licenses/by-nc/4.0/"),
    "gpl-3.0": ("GPL 3.0", "https://www.gnu.org/licenses/gpl-3.0.html"),
}
NO_ORIGINAL = "not read: the original's files were not at hand"
BACKENDS = {"metal": "Metal", "cuda": "CUDA", "cpu": "CPU"}


@dataclass(frozen=True)
class LadderRow:
    """A line of All Variants."""

    current: bool
    name: str
    url: str | None
    gguf: str
    size: str
    bpw: str
    decode: str
    speedup: str
    kld: str
    mark: str  # which measuring setup, where there are several
    kld_mark: str


@dataclass(frozen=True)
class Setup:
    """Rows measured alike: protocol, device and versions."""

    mark: str
    ids: tuple[str, ...]
    protocol: str
    compute: str  # bfloat16, float32
    device: str
    dates: str
    brackets: bool  # more than one repetition, so that there is a lowest and a highest
    runs: int  # separate benchmark runs
    apple: bool


@dataclass(frozen=True)
class TextSetup:
    """Divergences measured alike: same text, seed and version of the smoke test."""

    mark: str
    ids: tuple[str, ...]
    tokens: int


@dataclass(frozen=True)
class SpeedRow:
    label: str
    original: str
    this: str


@dataclass(frozen=True)
class View:
    """What the template sees as `card`."""

    front_matter: dict[str, Any]
    title: str
    base: Base
    base_url: str | None
    variant: Variant
    contents: Contents
    tool: str  # name and version, linked if card.tool_url is set
    tool_url: str | None
    mixed: bool
    awq: bool
    original_size: str
    original_format: str
    original_precision: str
    original_bpw: str
    original_params: str
    precision: str
    format: str
    quality: QualityView | None  # None: of no variant
    quality_devices: tuple[str, ...]
    ladder: tuple[LadderRow, ...]
    setups: tuple[Setup, ...]
    texts: tuple[TextSetup, ...]
    speed: tuple[SpeedRow, ...]
    speed_setup: Setup | None
    compute: str  # type that all figures of `ladder` were computed in; empty where they differ
    bits: tuple[BitRow, ...]
    reason_notes: tuple[str, ...]
    reasons: dict[str, str]  # a row's reason, its common part as a mark
    checks: tuple[Check, ...]
    model: str  # what a loader is given: repo, or the local folder
    sampling: dict[str, float]
    license: License | None  # None: the base's card names none, and the publisher gave none
    license_title: str
    license_url: str | None
    credit: tuple[str, str, str]  # name, link and deed of who made the family
    question: str  # of the usage snippets
    strategy: str
    build_device: str
    smoke_device: str
    built_at: str
    mlx: str
    replaces: Change | None  # the release before these weights; None: they are the first
    changelog: tuple[Change, ...]  # newest first; empty where they are the first
    older: int  # releases that it leaves out


def view(facts: Facts, id: str) -> View:
    """Raises InputError if the variant has no weights to describe."""
    v, base = facts.variant(id), facts.base
    if v.error:
        raise InputError(v.error)
    if v.contents is None:
        raise InputError(f"{id}: {v.missing}, so there is nothing that a card could describe; run `publish build {id}`")
    c = v.contents
    tool, *version = c.manifest.tool.split()
    awq = any(r.awq for r in c.rows)
    setups, texts = _setups(facts.variants), _texts(facts.variants)
    rows = _with_probes(v, c)
    notes, reasons = shared_notes(r.why for r in c.rows)
    quality = quality_view(facts, id)
    history = changelog(v.releases)
    title, url = "", None
    if base.license:
        title, url = LICENSES.get(base.license.id, (base.license.name or base.license.id, None))
        url = _license_link(base.license, c) or url
    o = base.original
    return View(
        front_matter=front_matter(facts, v, c, base.license),
        title=f"{base.short} {v.gguf or v.id} (MLX)",
        base=base,
        base_url=f"{HUGGING_FACE}/{base.repo}" if base.repo else None,
        variant=v,
        contents=c,
        tool=" ".join((fmt.link(tool, facts.card.tool_url), *version)),
        tool_url=facts.card.tool_url,
        mixed=len(_formats(c.rows)) > 1,
        awq=awq,
        original_size=f"{fmt.size(o.size)} ({fmt.binary_size(o.size)})" if o else NO_ORIGINAL,
        original_format=_files(o.shards) if o else NO_ORIGINAL,
        original_precision=" + ".join(d.lower() for d in o.dtypes) if o else NO_ORIGINAL,
        original_bpw=fmt.bpw(8 * o.nbytes / o.params) if o else NO_ORIGINAL,
        precision=_precision(c.rows),
        original_params=fmt.params(o.params) if o else NO_ORIGINAL,
        format=_files(len(c.weights)),
        quality=quality,
        quality_devices=tuple(device_text(d) for d in quality.devices) if quality else (),
        ladder=tuple(_ladder_row(x, v, setups, texts, facts if quality else None) for x in facts.variants),
        setups=setups,
        texts=texts if quality is None else (),
        speed=tuple(_speed_rows(v)),
        speed_setup=next((s for s in setups if id in s.ids), None),
        compute=computes.pop() if len(computes := {s.compute for s in setups}) == 1 else "",
        bits=rows,
        reason_notes=notes,
        reasons=reasons,
        checks=tuple(k.model_copy(update={"detail": fmt.portable(k.detail)}) for k in v.smoke.checks)
        if v.smoke
        else (),
        model=v.repo if v.owned else f"./{v.name}",
        sampling={k: c.sampling[k] for k in SAMPLING if k in c.sampling},
        license=base.license,
        license_title=title,
        license_url=url,
        credit=c.credit,
        question=c.question,
        strategy=v.strategy,
        build_device=machine_text(v.build.device) if v.build else "not recorded: build.json is missing",
        smoke_device=_smoke_device(v),
        built_at=fmt.pretty_date(v.build.built_at) if v.build else "not recorded: build.json is missing",
        mlx=v.build.device.mlx if v.build else "not recorded: build.json is missing",
        replaces=history.replaces,
        changelog=history.changes,
        older=history.older,
    )


def front_matter(facts: Facts, v: Variant, c: Contents, license: License | None) -> dict[str, Any]:
    out: dict[str, Any] = {}
    if license:
        out["license"] = license.id
        if license.name:
            out["license_name"] = license.name
        if link := _license_link(license, c):
            out["license_link"] = link
    if facts.base.language:
        out["language"] = list(facts.base.language)
    if facts.base.repo:
        out |= {"base_model": facts.base.repo, "base_model_relation": "quantized"}
    out |= {"library_name": "mlx", "pipeline_tag": "text-generation", "model_type": c.model_type}
    if facts.quantized_by:
        out["quantized_by"] = facts.quantized_by
    out["tags"] = list(dict.fromkeys(_tags(facts, v, c)))
    return out


def _license_link(license: License, c: Contents) -> str | None:
    """An address, or a file that this repo really holds."""
    if license.link and license.link.startswith("https://"):
        return license.link
    return c.license_file if license.link or license.id == "other" else None


def _tags(facts: Facts, v: Variant, c: Contents) -> Iterable[str]:
    yield "mlx"
    yield c.manifest.tool.split()[0]
    yield "quantized"
    formats = _formats(c.rows)
    if len(formats) > 1:
        yield "mixed-precision"
    if f"{v.bits}-bit" in formats:
        yield f"{v.bits}-bit"
    yield from (f for f in formats if f in ("mxfp4", "mxfp8", "nvfp4"))
    if any(r.awq for r in c.rows):
        yield "awq"
    if c.manifest.inputs.imatrix:
        yield "imatrix"
    yield c.model_type
    yield from c.tags
    yield "apple-silicon"
    if v.strategy in STRATEGY_TAGS:
        yield STRATEGY_TAGS[v.strategy]
    yield from (t for t in (fmt.line(t) for t in facts.card.tags) if t)


def _formats(rows: Iterable[BitRow]) -> tuple[str, ...]:
    """Formats of the matrices that a rule decided, narrow to wide."""
    found = {r.format: r.bpw for r in sorted(rows, key=lambda r: r.bpw) if not r.passthrough}
    return tuple(sorted(found, key=lambda f: (found[f], f)))


def _precision(rows: Iterable[BitRow]) -> str:
    """`2/3/5-bit + bf16`: everything stored, norms and vision included."""
    found = {r.format: r.bpw for r in sorted(rows, key=lambda r: -r.bpw)}
    widths = sorted(int(f.removesuffix("-bit")) for f in found if f.endswith("-bit"))
    rest = sorted((f for f in found if not f.endswith("-bit")), key=lambda f: (found[f], f))
    return " + ".join([*(["/".join(map(str, widths)) + "-bit"] if widths else []), *rest])


def row_label(r: BitRow) -> str:
    """Names of projections as code, words as words; then the layers, if not all."""
    names = r.label.split(", ")
    plain = r.passthrough or any(" " in n for n in names)
    text = fmt.cell(r.label) if plain else ", ".join(map(fmt.code, names))
    return f"{text}, {r.layers}" if r.layers else text


def _files(n: int) -> str:
    return "safetensors, one file" if n == 1 else f"safetensors, {n} files"


# ---------------------------------------------------------------------------------------------- measured


def _ladder_row(
    x: Variant, current: Variant, setups: tuple[Setup, ...], texts: tuple[TextSetup, ...], measured: Facts | None
) -> LadderRow:
    """measured: where `eval` measured some variant, so that the smoke test's figure has no place here."""
    c = x.contents
    return LadderRow(
        current=x.id == current.id,
        name=x.repo,
        url=x.url,
        gguf=x.gguf or "no namesake",
        size=fmt.size(c.size) if c else x.missing,
        bpw=fmt.bpw(c.text_bpw) if c else x.missing,
        decode=_decode(x),
        speedup=_speedup(x),
        kld=_quality(measured, x) if measured else _kld(x),
        mark=next((s.mark for s in setups if x.id in s.ids), ""),
        kld_mark="" if measured else next((t.mark for t in texts if x.id in t.ids), ""),
    )


def _decode(x: Variant) -> str:
    if x.bench is None:
        return fmt.not_measured(x.no_bench)
    return fmt.stat(x.bench.variant.decode_tps, _why_decode(x.bench.variant, x.bench), fmt.rate)


def _speedup(x: Variant) -> str:
    """Against the BF16 figure of the same benchmark run, never another."""
    if x.bench is None:
        return fmt.not_measured(x.no_bench)
    mine, original = x.bench.variant.decode_tps, x.bench.bf16.decode_tps
    if mine is None:
        return fmt.not_measured(_why_decode(x.bench.variant, x.bench))
    if original is None or not original.median > 0:
        return fmt.not_measured(f"BF16: {_why_decode(x.bench.bf16, x.bench)}")
    return fmt.number(mine.median / original.median, "", lambda r: f"{r:.2f}×")


def _kld(x: Variant) -> str:
    if x.smoke is None:
        return fmt.not_measured(x.no_smoke)
    failed = next((f"the smoke test failed at “{k.name}”" for k in x.smoke.checks if k.passed is False), "")
    return fmt.number(x.smoke.kld, failed or "the smoke test gave none", fmt.kld)


def _quality(facts: Facts, x: Variant) -> str:
    entry = facts.standings.entry(x.id)
    text = entry.corpus("text")
    return fmt.small(text.kld.value) if text and text.kld else fmt.not_measured(entry.why)


def _with_probes(v: Variant, c: Contents) -> tuple[BitRow, ...]:
    """The first row of each class says what the class was measured to cost as a whole, where that is on record."""
    out, told = [], set()
    for r in c.rows:
        found = [p for p in v.build.probes if p.label == r.cls and math.isfinite(p.measured)] if v.build else []
        if r.passthrough or r.cls in told or not found:
            out.append(r)
            continue
        told.add(r.cls)
        count = sum(x.tensors for x in c.rows if x.cls == r.cls and not x.passthrough)
        figures = ", ".join(f"at {p.bits} bits {fmt.small(p.measured)}" for p in sorted(found, key=lambda p: p.bits))
        out.append(replace(r, probe=f"{f'all {count}' if count > 1 else 'alone'} {figures}"))
    return tuple(out)


def _speed_rows(v: Variant) -> Iterable[SpeedRow]:
    """This variant beside BF16, from one result file."""
    bench = v.bench
    if bench is None:
        return
    pair, last = (bench.bf16, bench.variant), f"turn {bench.protocol.turns}"
    context = v.contents.context if v.contents else None
    yield SpeedRow(f"Decode, {last} (tok/s)", *(fmt.stat(s.decode_tps, _why_decode(s, bench), fmt.rate) for s in pair))
    for n in sorted({*bench.protocol.prefill, *bench.variant.prefill_tps, *bench.bf16.prefill_tps}):
        prefill = (fmt.stat(s.prefill_tps.get(n), _why_prefill(s, n, context), fmt.rate) for s in pair)
        yield SpeedRow(f"Prefill, {n} tokens (tok/s)", *prefill)
    yield SpeedRow(f"Time to first token, {last}", *(fmt.stat(s.ttft_s, _why(s), fmt.seconds) for s in pair))
    yield SpeedRow("Peak memory", *(fmt.number(s.peak_gb, _why(s), fmt.gigabytes) for s in pair))
    if any(s.decode_peak_gb is not None for s in pair):
        in_decode = (fmt.number(s.decode_peak_gb, _why(s), fmt.gigabytes) for s in pair)
        yield SpeedRow(f"Peak memory in decode, {last}", *in_decode)


def _why(s: Speed) -> str:
    return s.reason or "the benchmark gave none"


def _why_decode(s: Speed, bench: Bench) -> str:
    if not s.reason and bench.protocol.turn_tokens == 1:
        return "a turn of one token leaves nothing to time"
    return _why(s)


def _why_prefill(s: Speed, length: int, context: int | None) -> str:
    """The benchmark leaves out lengths that the context does not take."""
    if s.reason or context is None or length < context:
        return _why(s)
    return f"{'longer than' if length > context else 'as long as'} the model's context of {context} tokens"


def _setups(variants: Iterable[Variant]) -> tuple[Setup, ...]:
    groups: dict[str, list[tuple[str, Bench]]] = {}
    for v in variants:
        if v.bench and v.bench.variant.decode_tps:
            b = v.bench
            key = " ".join(
                (str(b.version), b.settings, b.protocol.model_dump_json(), b.device.model_dump_json(), b.compute)
            )
            groups.setdefault(key, []).append((v.id, v.bench))
    out = []
    for i, members in enumerate(groups.values()):
        bench = members[0][1]
        days = sorted({fmt.pretty_date(b.measured_at) for _, b in members})
        out.append(
            Setup(
                mark="abcdefghijklmnopqrstuvwxyz"[i % 26] if len(groups) > 1 else "",
                ids=tuple(id for id, _ in members),
                protocol=protocol_line(bench.protocol),
                compute=bench.compute,
                device=device_text(bench.device),
                dates=days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}",
                brackets=bench.protocol.runs > 1,
                runs=len({b.run for _, b in members}),
                apple=bench.device.backend.lower() == "metal",
            )
        )
    return tuple(out)


def _texts(variants: Iterable[Variant]) -> tuple[TextSetup, ...]:
    groups: dict[tuple[Any, ...], list[str]] = {}
    for v in variants:
        if v.smoke and v.smoke.kld is not None:
            groups.setdefault((v.smoke.version, v.smoke.settings, v.smoke.kld_tokens), []).append(v.id)
    marks = "pqrstuvwxyz" if len(groups) > 1 else ""
    return tuple(
        TextSetup(marks[i % 11] if marks else "", tuple(ids), key[2]) for i, (key, ids) in enumerate(groups.items())
    )


def _smoke_device(v: Variant) -> str:
    if v.smoke is None:
        return fmt.not_measured(v.no_smoke)
    if v.bench and v.bench.variant.decode_tps and v.bench.device == v.smoke.device:
        return "the machine of the benchmark above"
    return device_text(v.smoke.device)


def machine_text(d: Device) -> str:
    return fmt.line(f"{d.name}, {fmt.binary_size(1e9 * d.memory_gb)} memory, {d.os}")


def device_text(d: Device) -> str:
    parts = [
        machine_text(d),
        f"{BACKENDS.get(d.backend.lower(), d.backend)} backend{f' ({d.blas})' if d.blas else ''}",
        f"mlx {d.mlx}",
        d.tool,
    ]
    return fmt.line(", ".join(parts))


def shared_notes(whys: Iterable[str]) -> tuple[tuple[str, ...], dict[str, str]]:
    """(notes, reason → shortened reason): a closing `(…)` that several reasons share becomes a numbered note."""
    distinct = list(dict.fromkeys(whys))
    tails: dict[str, int] = {}
    for why in distinct:
        if m := re.search(r" \(([^()]+)\)$", why):
            tails[m[1]] = tails.get(m[1], 0) + 1
    notes = tuple(t for t, n in tails.items() if n > 1)
    out = {}
    for why in distinct:
        m = re.search(r" \(([^()]+)\)$", why)
        if m and m[1] in notes:
            out[why] = f"{fmt.cell(why[: m.start()])} <sup>{notes.index(m[1]) + 1}</sup>"
        else:
            out[why] = fmt.cell(why)
    return notes, out
