"""Results as text for people and as plain values for --json. Returns strings and dicts; prints nothing."""

from __future__ import annotations

import difflib
import io
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quant.recipe import TensorPlan, layer_of

from .allocation import UNKNOWN
from .card_bits import layer_text
from .card_format import size
from .plan import CONTEXT, VariantPlan, build_memory, disk_needed
from .schema import Baseline, Baselines, Bench, Check, Divergence, Greedy, LadderReceipt, Quality, Receipt, Smoke
from .store import read_result, sha256_file
from .survey import Rung, Survey, read_manifest, read_quality
from .variants import Project

if TYPE_CHECKING:
    from .build import Cards, Outcome
    from .calibrate import Calibrated
    from .drift import BaseDrift
    from .evaluate_figures import Paired
    from .merge import Merged, Part
    from .push import PushPlan, RemoteState
    from .push_plan import LocalFile
    from .release import Released

GIB = 1 << 30
NAMES = 12  # of files, before a line says how many more
SHARD_NAME = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")
UNITS = ("GB is 1e9 bytes, GiB is 2^30 bytes. To run: weights and caches, before workspace.",)
UNITS_WITH_VISION = (
    "GB is 1e9 bytes, GiB is 2^30 bytes, vision tower included. Bits a weight: of the language model alone, and of all",
    "that is stored. To run: language model and caches, before workspace.",
)


def table(headers: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[int] = ()) -> str:
    """Aligned columns; `right` names the columns that are numbers."""
    from rich import box  # noqa: PLC0415 - 60 ms that only a table is worth
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    numbers = set(right)
    grid = Table(box=box.SIMPLE_HEAD if sys.stdout.isatty() else None, pad_edge=False, header_style="bold")
    for i, header in enumerate(headers):
        grid.add_column(
            header, justify="right" if i in numbers else "left", no_wrap=i in numbers or i == 0, overflow="fold"
        )
    for row in rows:
        grid.add_row(*(cell.replace("[", "\\[") for cell in row))
    terminal = sys.stdout.isatty()
    out = io.StringIO()
    Console(file=out, width=None if terminal else 200, force_terminal=terminal, highlight=False).print(grid)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


# ---------------------------------------------------------------------------------------------- plan


def plan_json(seen: Survey) -> dict[str, Any]:
    plans = [r.plan for r in seen.rungs.values()]
    stale = [r.plan for r in seen.rungs.values() if r.state.weights]
    return {
        "base": {"name": seen.base.name, "commit": seen.base.commit, "downloaded": seen.base.weights},
        "variants": [_plan_row(r) for r in seen.rungs.values()],
        "total_nbytes": sum(p.nbytes for p in plans),
        "build": {"disk_nbytes": disk_needed(stale), "peak_memory_gb": round(build_memory(stale) / 1e9, 2)},
        "context_tokens": CONTEXT,
    }


def _plan_row(rung: Rung) -> dict[str, Any]:
    p, state = rung.plan, rung.state
    return {
        "id": p.id,
        "repo": p.repo,
        "recipe": p.recipe,
        "bits": p.bits,
        "nbytes": p.nbytes,
        "params": p.params,
        "bpw": round(p.bpw, 4),
        "text_nbytes": p.text_nbytes,
        "text_params": p.text_params,
        "text_bpw": round(p.text_bpw, 4),
        "run_nbytes": p.run_nbytes,
        "classes": [
            {
                "class": r.cls,
                "format": r.format,
                "awq": r.awq,
                "group_size": r.group_size,
                "tensors": r.tensors,
                "params": r.params,
                "nbytes": r.nbytes,
            }
            for r in p.rows
        ],
        "stale": {"weights": state.weights, "smoke": state.smoke, "bench": state.bench},
        "size": _size_json(p),
    }


def _size_json(plan: VariantPlan) -> dict[str, Any] | None:
    """What a size comes to; null for a variant that a recipe decides. allocation: null before publish calibrate."""
    sized = plan.sized
    if sized is None:
        return None
    found = sized.allocation
    return {
        "text": sized.size.text,
        "budget_nbytes": sized.budget,
        "least_nbytes": sized.least,
        "allocation": {
            "from": sized.source,
            "nbytes": found.nbytes,
            "predicted_kld": found.predicted_kld,
            "costs": found.costs,
            "rules": [r.model_dump(mode="json", exclude_defaults=True) for r in found.rules],
        }
        if found
        else None,
    }


def plan_text(seen: Survey) -> str:
    rungs = list(seen.rungs.values())
    commit = f" at {seen.base.commit[:12]}" if seen.base.commit else ""
    digits = 2 if rungs[0].plan.nbytes >= 1e9 else 4
    vision = any(t.part == "vision" for t in seen.base.targets)
    sizes = table(
        (
            "variant",
            "recipe",
            "GB",
            "GiB",
            "bits/weight",
            *(["with vision"] if vision else []),
            f"GB to run, {CONTEXT // 1024}k context",
            "stale",
        ),
        [
            (
                r.id,
                _how(r.plan),
                f"{r.plan.nbytes / 1e9:.{digits}f}",
                f"{r.plan.nbytes / GIB:.{digits}f}",
                f"{r.plan.text_bpw:.2f}",
                *([f"{r.plan.bpw:.2f}"] if vision else []),
                f"{r.plan.run_nbytes / 1e9:.{digits}f}",
                _first_reason(r),
            )
            for r in rungs
        ],
        right=(2, 3, 4, 5, 6) if vision else (2, 3, 4, 5),
    )
    stale = [r.plan for r in rungs if r.state.weights]
    need, memory = disk_needed(stale), build_memory(stale)
    return "\n".join(
        (
            f"{seen.base.name}{commit}: {rungs[0].plan.text_params / 1e9:.3f} billion parameters in the language model",
            "",
            sizes,
            "",
            _classes(rungs),
            "",
            *([told, ""] if (told := _sizes(rungs)) else []),
            *(UNITS_WITH_VISION if vision else UNITS),
            f"To build {len(stale)} of {len(rungs)}: {size(need)} of disk, at most {size(memory)} of memory."
            if stale
            else "Weights of all variants are current.",
        )
    )


def _classes(rungs: Sequence[Rung]) -> str:
    """A row a tensor class, a column a variant."""
    labels = list(dict.fromkeys(row.cls for r in rungs for row in r.plan.rows))
    rows = [(cls, *(_formats(r.plan, cls) for r in rungs)) for cls in labels]
    return table(("tensors", *(r.id for r in rungs)), rows)


def _how(plan: VariantPlan) -> str:
    """The recipe and its N, or the size."""
    return plan.sized.size.text if plan.sized else f"{plan.recipe} N={plan.bits}"


def _sizes(rungs: Sequence[Rung]) -> str:
    """A line for each variant that is made by size: its budget and what is known of its allocation."""
    lines = []
    for r in rungs:
        if (sized := r.plan.sized) is None:
            continue
        digits = 3 if sized.budget >= 1e9 else 6
        budget = f"{sized.budget / 1e9:.{digits}f} GB for the language model"
        if sized.allocation is None:
            lines.append(f"{r.id}: {sized.size.text}: {budget}; {UNKNOWN}")
            continue
        source = {"frozen": ", frozen", "built": ", as built", "costs": ""}[sized.source]
        lines.append(
            f"{r.id}: {sized.size.text}: {sized.allocation.nbytes / 1e9:.{digits}f} of {budget}, predicted KL divergence "
            f"{sized.allocation.predicted_kld:.4g} nats{source}"
        )
    return "\n".join(lines)


def _formats(plan: VariantPlan, cls: str) -> str:
    rows = [r for r in plan.rows if r.cls == cls]
    names = [f"{r.format}{' +AWQ' if r.awq else ''}" for r in rows]
    if not plan.plans:
        return "–"
    if not plan.sized or len(set(names)) < 2 or not any(r.group_size for r in rows):
        return " / ".join(dict.fromkeys(names))
    counts = {name: sum(r.tensors for r, n in zip(rows, names, strict=True) if n == name) for name in names}
    return " / ".join(f"{counts[n]} × {n}" for n in sorted(counts, key=lambda n: (len(n), n)))


def _first_reason(rung: Rung) -> str:
    for step in ("weights", "smoke", "bench"):
        reasons = getattr(rung.state, step)
        if reasons:
            return f"{step}: {reasons[0]}" + (f" (+{len(reasons) - 1})" if len(reasons) > 1 else "")
    return "–"


# ---------------------------------------------------------------------------------------------- allocate


def allocations_json(seen: Survey, frozen: Mapping[str, Path]) -> dict[str, Any]:
    return {
        "variants": [
            {"id": r.id, **(_size_json(r.plan) or {}), "frozen": str(frozen[r.id]) if r.id in frozen else None}
            for r in seen.rungs.values()
        ]
    }


def allocations_text(seen: Survey, frozen: Mapping[str, Path]) -> str:
    """Of each variant its budget, then formats by class and layers, with what the next widths would change."""
    out = []
    for r in seen.rungs.values():
        out.append(_sizes([r]))
        allocation = r.plan.sized.allocation if r.plan.sized else None
        if allocation:
            by_rule: dict[tuple[str, str, str], list[TensorPlan]] = {}
            for p in r.plan.plans:
                if p.rule and p.target.part == "text":
                    form = f"{p.spec.label()}, {p.spec.group_size}" if p.spec else p.target.dtype.lower()
                    by_rule.setdefault((p.cls, form, p.why), []).append(p)
            rows = [
                (cls, form, _layers(found), f"{sum(p.nbytes for p in found) / 1e9:.4f}", why)
                for (cls, form, why), found in sorted(by_rule.items(), key=lambda item: item[0][:2])
            ]
            out.append(table(("tensors", "format, group", "layers", "GB", "why"), rows, right=(3,)))
        if r.id in frozen:
            out.append(f"{r.id}: frozen as {frozen[r.id].parent.name}/{frozen[r.id].name}")
        out.append("")
    return "\n".join(out)


def _layers(plans: Sequence[TensorPlan]) -> str:
    layers = [i for p in plans if (i := layer_of(p.target.name)) is not None]
    return layer_text(layers).partition(" ")[2] if layers else ""


# ---------------------------------------------------------------------------------------------- status


def status_json(seen: Survey, remotes: Mapping[str, RemoteState], base: BaseDrift | None = None) -> dict[str, Any]:
    rows = [_status_row(seen.project, r, remotes.get(r.id)) for r in seen.rungs.values()]
    return {"variants": rows, **({"base": {**asdict(base), "text": base.text}} if base else {})}


def _status_row(project: Project, rung: Rung, remote: RemoteState | None) -> dict[str, Any]:
    receipt = read_result(project.store.receipt(rung.id), Receipt)
    s = rung.state
    return {
        "id": rung.id,
        "repo": rung.plan.repo,
        "built": rung.manifest is not None,
        "current": s.built,
        "state": _state_word(rung),
        "stale": {"weights": s.weights, "smoke": s.smoke, "bench": s.bench, "card": s.card},
        "quality": s.quality,  # reasons why it is not current; `publish eval` is a step of its own
        "smoke_failed": s.failed,
        "pruned": s.pruned,  # where the weights are that were deleted here
        "weights_hash": rung.manifest.weights_hash if rung.manifest else None,
        "nbytes": rung.manifest.nbytes if rung.manifest else None,
        "pushed": _pushed(project, rung, receipt),
        "remote": {"state": remote.state, "commit": remote.commit, "differences": list(remote.differences)}
        if remote
        else None,
    }


def _pushed(project: Project, rung: Rung, receipt: Receipt | None) -> dict[str, Any] | None:
    """What the last push sent, and whether it is what lies here now. A receipt of another repo is no push of this one."""
    if receipt is None or receipt.repo != rung.plan.repo:
        return None
    ladder = read_result(project.store.ladder_receipt, LadderReceipt)
    card = project.store.variant(rung.id) / "README.md"
    sent = {f.path: f.sha256 for f in receipt.files}
    weights = bool(rung.manifest) and receipt.weights_hash == rung.manifest.weights_hash  # type: ignore[union-attr]
    return {
        "commit": receipt.commit,
        "at": receipt.pushed_at,
        "waiting": any(e.id == rung.id and e.waiting for e in ladder.repos) if ladder else False,  # to become public
        "weights_current": weights,
        "card_current": card.is_file() and sent.get("README.md") == sha256_file(card),
    }


def status_text(seen: Survey, remotes: Mapping[str, RemoteState], base: BaseDrift | None = None) -> str:
    rows = []
    notes = []
    for r in seen.rungs.values():
        row = _status_row(seen.project, r, remotes.get(r.id))
        rows.append(
            (r.id, row["state"], _why(row), _pushed_word(row["pushed"]), *([_remote_word(row)] if remotes else []))
        )
        if remotes:
            notes += [f"{r.id}: {d.removeprefix(f'{r.id}: ')}" for d in row["remote"]["differences"]]
            notes += _moved(row)
    notes += [base.text] if base else []
    headers = ("variant", "state", "why", "pushed", *(["remote"] if remotes else []))
    return "\n".join([table(headers, rows), *notes])


def _moved(row: Mapping[str, Any]) -> list[str]:
    """Of a repo whose head is not the commit that was pushed, whatever that commit changed."""
    head, pushed = row["remote"]["commit"], (row["pushed"] or {}).get("commit")
    if not head or not pushed or head == pushed:
        return []
    return [f"{row['id']}: the head is {head[:8]}, not {pushed[:8]} that was pushed last"]


def _state_word(rung: Rung) -> str:
    """That weights are not here is told whatever else is stale: `_why` says what."""
    state = rung.state
    if state.failed:
        return "failed"
    if state.pruned:
        return "pruned"
    if state.built:
        return "built"
    return "stale" if rung.manifest else "not built"


def _why(row: Mapping[str, Any]) -> str:
    if not row["built"]:
        return ""
    stale = row["stale"]
    told = [f"weights are in {row['pruned']}"] if row["pruned"] else []
    if row["smoke_failed"]:
        return "; ".join([f"smoke: {row['smoke_failed']}", *told])
    if stale["weights"]:
        return "; ".join([*told, f"weights: {'; '.join(stale['weights'])}"])
    steps = {**stale, "quality": row["quality"]}
    return "; ".join([*told, *(f"{step}: {', '.join(reasons)}" for step, reasons in steps.items() if reasons)])


def _pushed_word(pushed: Mapping[str, Any] | None) -> str:
    if pushed is None:
        return "no"
    if not pushed["weights_current"]:
        return f"other weights ({pushed['commit'][:8]})"
    waits = ", private until all are good" if pushed["waiting"] else ""
    return (f"{pushed['commit'][:8]}" if pushed["card_current"] else f"older card ({pushed['commit'][:8]})") + waits


def _remote_word(row: Mapping[str, Any]) -> str:
    return row["remote"]["state"]


# ---------------------------------------------------------------------------------------------- build, smoke, bench, card


def outcomes_json(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    return {
        "variants": [
            {
                "id": o.id,
                "rebuilt": o.rebuilt,
                "smoked": o.smoked,
                "benched": o.benched,
                "card_changed": o.card,
                "smoke_failed": o.failed,
                "card_fault": o.card_fault,
            }
            for o in outcomes
        ]
    }


def outcomes_text(project: Project, outcomes: Sequence[Outcome]) -> str:
    rows = []
    for o in outcomes:
        manifest = read_manifest(project, o.id)
        if manifest is None:
            continue
        results = project.store.results(manifest.weights_hash)
        smoke, bench = read_result(results / "smoke.json", Smoke), read_result(results / "bench.json", Bench)
        done = [
            w for w, did in (("weights", o.rebuilt), ("smoke", o.smoked), ("bench", o.benched), ("card", o.card)) if did
        ]
        rows.append(
            (
                o.id,
                f"{manifest.nbytes / 1e9:.3f}",
                f"{8 * manifest.text_nbytes / manifest.text_params:.2f}",
                f"{smoke.kld:.4f}" if smoke and smoke.kld is not None else "–",
                f"{bench.variant.decode_tps.median:.1f}" if bench and bench.variant.decode_tps else "–",
                "failed" if o.failed else "passed" if smoke and smoke.passed else "not run",
                ", ".join(done) or "nothing",
            )
        )
    return table(
        ("variant", "GB", "bits/weight", "KL, nats", "decode tok/s", "smoke", "done now"), rows, right=(1, 2, 3, 4)
    )


def merged_json(done: Merged) -> dict[str, Any]:
    return {
        "variants": [
            {
                "id": p.id,
                "folder": str(p.folder),
                "state": p.state,
                "detail": p.detail,
                "weights_hash": p.weights_hash or None,
                "results": list(p.results),
                "moved": p.moved,
            }
            for p in done.parts
        ],
        "others": list(done.others),
        "cards_changed": list(done.cards),
        "card_faults": done.card_faults,
        "absent": list(done.absent),
        "empty": [str(folder) for folder in done.empty],
    }


def not_taken(parts: Sequence[Part]) -> str:
    """Why, as the error of a merge."""
    return "; ".join(f"{p.id} of {p.folder}: not taken: {p.detail}" for p in parts)


def merged_text(done: Merged) -> str:
    told = [*done.wrong, *([] if done.wrong else done.stale)]  # by the error that follows
    rows = [
        (
            p.id, str(p.folder), p.state, p.weights_hash[:12] or "–", ", ".join(p.results) or "none",
            "see the error" if p in told else p.detail,
        )
        for p in done.parts
    ]  # fmt: skip
    lines = [table(("variant", "from", "result", "weights", "results taken", "detail"), rows)] if rows else []
    lines += [f"{folder}: nothing to take, it holds no variant" for folder in done.empty]
    lines += done.others
    if done.cards:
        lines.append(f"cards rendered again: {', '.join(done.cards)}")
    lines.append(f"not here yet: {', '.join(done.absent)}" if done.absent else "every variant of the ladder is here")
    return "\n".join(lines)


def results_json(project: Project, ids: Sequence[str]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for id in ids:
        manifest = read_manifest(project, id)
        if manifest:
            results = project.store.results(manifest.weights_hash)
            found = {
                "smoke": read_result(results / "smoke.json", Smoke),
                "bench": read_result(results / "bench.json", Bench),
            }
            out[id] = {k: v.model_dump(mode="json") if v else None for k, v in found.items()}
    return out


def results_text(project: Project, ids: Sequence[str], step: str) -> str:
    found = results_json(project, ids)
    if step == "smoke":
        return checks_text({id: [Check(**c) for c in found[id]["smoke"]["checks"]] for id in ids})
    rows = []
    for id in ids:
        bench = Bench(**found[id]["bench"]) if found[id]["bench"] else None
        for name, speed in ((id, bench.variant), ("  BF16", bench.bf16)) if bench else ():
            if speed.decode_tps is None:
                rows.append((name, "not measured", speed.reason or "", "", "", ""))
                continue
            prefill = ", ".join(f"{s.median:.0f} at {n}" for n, s in sorted(speed.prefill_tps.items()))
            rows.append(
                (
                    name,
                    f"{speed.decode_tps.median:.1f} [{speed.decode_tps.low:.1f}–{speed.decode_tps.high:.1f}]",
                    prefill,
                    f"{speed.ttft_s.median:.3f}" if speed.ttft_s else "",
                    f"{speed.peak_gb:.3f}" if speed.peak_gb else "",
                    f"{speed.decode_peak_gb:.3f}" if speed.decode_peak_gb else "",
                )
            )
    titles = ("variant", "decode tok/s", "prefill tok/s", "TTFT s", "peak GB", "in decode GB")
    return table(titles, rows, right=(1, 3, 4, 5))


def cards_json(ids: Sequence[str], done: Cards) -> dict[str, Any]:
    return {"changed": [i for i in ids if i in done.changed], "faults": done.faults}


def cards_text(project: Project, ids: Sequence[str], done: Cards) -> str:
    def what(id: str) -> str:
        if id in done.faults:
            return "card not rendered"
        return "card written" if id in done.changed else "card was current"

    return "\n".join(f"{i}: {what(i)}" for i in ids if read_manifest(project, i)) or "nothing is built"


def card_check_text(rendered: int, stale: Mapping[str, str]) -> str:
    """rendered: how many cards could be compared."""
    if stale:
        return "\n".join(stale.values())
    return "1 card is current" if rendered == 1 else f"{rendered} cards are current"


def card_diffs(project: Project, texts: Mapping[str, str], figures: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Unified diff, disk against what would be rendered, of every card that is not current; then its pictures' faults."""
    out = {}
    for id, text in texts.items():
        path = project.store.variant(id) / "README.md"
        old = path.read_bytes().decode(errors="replace") if path.is_file() else ""
        if old != text:
            name = f"{id}/README.md"
            diff = difflib.unified_diff(
                old.splitlines(True), text.splitlines(True), f"{name} (on disk)", f"{name} (rendered)"
            )
            out[id] = "".join(diff)
        if figures.get(id):
            out[id] = "\n".join(filter(None, (out.get(id, ""), *(f"{id}/{line}" for line in figures[id]))))
    return out


# ---------------------------------------------------------------------------------------------- eval


def qualities_json(
    project: Project, ids: Sequence[str], compared: Sequence[str] | None, pairs: Sequence[Paired]
) -> dict[str, Any]:
    return {
        "variants": {
            id: quality.model_dump(mode="json")
            for id in ids
            if (m := read_manifest(project, id)) and (quality := read_quality(project, m.weights_hash))
        },
        "baselines": [
            {**b.model_dump(mode="json"), "quality": quality.model_dump(mode="json")}
            for b, quality in _baselines(project)
        ],
        "compared": {
            "a": compared[0],
            "b": compared[1],
            "pairs": [
                {
                    "corpus": p.corpus,
                    "difference": p.difference.model_dump(mode="json"),
                    "excludes_zero": p.excludes_zero,
                    "control_kld": p.floor,
                    "above_control": p.above_floor,
                }
                for p in pairs
            ],
        }
        if compared
        else None,
    }


def qualities_text(
    project: Project, ids: Sequence[str], compared: Sequence[str] | None, pairs: Sequence[Paired]
) -> str:
    """A table a corpus: variants, baselines, and BF16 against itself."""
    found = [
        (id, quality)
        for id in ids
        if (m := read_manifest(project, id)) and (quality := read_quality(project, m.weights_hash))
    ]
    found += [(b.name, quality) for b, quality in _baselines(project)]
    if not found:
        return "nothing is measured"
    lines = []
    for corpus in dict.fromkeys(d.corpus for _, q in found for d in q.corpora):
        rows = [_quality_row(name, q, corpus) for name, q in found]
        last = found[-1][1]
        control = next((d for d in last.control if d.corpus == corpus), None)
        if control:
            rows.append(("BF16, computed another way", "", "", *_figures(control), _greedy(last.greedy_control)))
        windows = max(d.windows for _, q in found for d in q.corpora if d.corpus == corpus)
        lines += [f"{corpus}: {windows} {'windows' if corpus == 'text' else 'conversations'}", _quality_table(rows), ""]
    lines += dict.fromkeys(m for _, q in found for m in q.missing)
    if compared:
        lines += [_pair_line(compared, p) for p in pairs]
    lines.append(
        "KL: mean, nats a token, with its 95 % interval. Greedy: median tokens as BF16's, share that never differ."
    )
    return "\n".join(lines)


def _quality_table(rows: Sequence[Sequence[str]]) -> str:
    headers = ("model", "GB", "bits/weight", "KL", "interval", "p99.9", "top-1", "ln PPL ratio", "greedy")
    return table(headers, rows, right=range(1, len(headers)))


def _quality_row(name: str, quality: Quality, corpus: str) -> tuple[str, ...]:
    d = next((d for d in quality.corpora if d.corpus == corpus), None)
    digits = 3 if quality.nbytes >= 1e8 else 5
    return (
        name,
        f"{quality.nbytes / 1e9:.{digits}f}",
        f"{quality.bpw:.2f}",
        *(_figures(d) if d else ("–",) * 5),
        _greedy(quality.greedy),
    )


def _figures(d: Divergence) -> tuple[str, ...]:
    if d.kld is None or d.kld_p999 is None or d.top1 is None or d.ln_ppl_ratio is None:
        return ("not finite", "", "", "", "")
    lost = f" ({d.nonfinite} not finite)" if d.nonfinite else ""
    return (
        f"{d.kld.value:.3g}{lost}",
        f"{d.kld.low:.3g}–{d.kld.high:.3g}",
        f"{d.kld_p999.value:.3g}",
        f"{100 * d.top1.value:.2f} %",
        f"{round(d.ln_ppl_ratio.value, 4) + 0.0:+.4f}",
    )


def _greedy(greedy: Greedy | None) -> str:
    return f"{greedy.median:g} of {greedy.max_tokens}, {100 * greedy.identical:.0f} %" if greedy else "–"


def _pair_line(compared: Sequence[str], p: Paired) -> str:
    d = p.difference
    verdict = "differs from 0" if p.excludes_zero else "does not differ from 0"
    if p.above_floor is not None:
        verdict += f"; {'above' if p.above_floor else 'below'} what BF16 differs from itself ({p.floor:.2g})"
    return f"{p.corpus}: KL of {compared[0]} minus {compared[1]}: {d.value:+.4g} ({d.low:+.4g} to {d.high:+.4g}): {verdict}"


def _baselines(project: Project) -> list[tuple[Baseline, Quality]]:
    index = read_result(project.store.baselines, Baselines)
    found = [(b, read_quality(project, b.weights_hash)) for b in (index.baselines if index else [])]
    return [(b, quality) for b, quality in found if quality]


# ---------------------------------------------------------------------------------------------- verify


def checks_json(checks: Mapping[str, Sequence[Check]]) -> dict[str, Any]:
    return {id: [c.model_dump() for c in found] for id, found in checks.items()}


def checks_text(checks: Mapping[str, Sequence[Check]], brief: bool = False) -> str:
    """A row a check; brief: one row for a variant that passed them all."""
    words = {True: "ok", False: "FAILED", None: "not checked"}
    rows = []
    for id, found in checks.items():
        if brief and all(c.passed for c in found):
            rows.append((id, f"all {len(found)}", "ok", ", ".join(c.name for c in found)))
        else:
            rows += [(id, c.name, words[c.passed], c.detail) for c in found]
    return table(("variant", "check", "result", "detail"), rows)


# ---------------------------------------------------------------------------------------------- push


def push_json(plans: Sequence[PushPlan], prune: bool = False) -> dict[str, Any]:
    """prune: whether weights here would be deleted at the end."""
    return {
        "plans": [
            {
                "id": p.id,
                "repo": p.repo,
                "exists": p.exists,
                "up_to_date": p.up_to_date,
                "add": [f.path for f in p.add],
                "update": [f.path for f in p.update],
                "delete": list(p.delete),
                "unchanged": [f.path for f in p.unchanged],
                "kept": list(p.kept),
                "foreign": [{"path": f.path, "what": f.what, "diff": f.diff, "deleted": f.deleted} for f in p.foreign],
                "strays": list(p.strays),
                "refused": p.refusal,
                "told": list(p.told),
                "copied": {c.path: f"{c.repo or p.repo}/{c.source}" for c in p.copies},
                "bytes_to_send": p.bytes_to_send,
                "prune": {f.path: f.size for f in _pruned_by(p, prune)},
            }
            for p in plans
        ]
    }


def push_text(plans: Sequence[PushPlan], endpoint: str, prune: bool = False) -> str:
    """A table, then of each variant by name what would change, and what others changed on the hub. prune: as of `push_json`."""
    rows = []
    for p in plans:
        if p.up_to_date:
            what = "up to date"
        else:
            parts = (("add", len(p.add)), ("update", len(p.update)), ("delete", len(p.delete)))
            what = ", ".join(f"{word} {n}" for word, n in parts if n) + f"; {len(p.unchanged)} unchanged"
        rows.append((p.id, p.repo, "" if p.exists else "new", what, size(p.bytes_to_send) if not p.up_to_date else ""))
    total = sum(p.bytes_to_send for p in plans)
    freed = sum(f.size for p in plans for f in _pruned_by(p, prune))
    return "\n".join(
        [
            f"to {endpoint}",
            table(("variant", "repo", "", "change", "to send"), rows, right=(4,)),
            *(line for p in plans for line in _push_lines(p)),
            *(
                f"{p.id}: delete here, once the hub is proven to hold them: {_names([f.path for f in found])} "
                f"({size(sum(f.size for f in found))})"
                for p in plans
                if (found := _pruned_by(p, prune))
            ),
            f"at most {size(total)} to send" + (f", {size(freed)} to prune here" if prune else ""),
        ]
    )


def _pruned_by(plan: PushPlan, prune: bool) -> Sequence[LocalFile]:
    return plan.weights_here if prune and not plan.refusal else ()


def _push_lines(p: PushPlan) -> Iterable[str]:
    back = {f.path for f in p.foreign if f.deleted}
    named = {
        "add": [f.path for f in p.add if f.path not in back],
        "update": [f.path for f in p.update],
        "delete": p.delete,
        "copied by the hub": [c.path for c in p.copies],
        "signature on the hub, kept": p.keeps,
        "not from here, kept": p.kept,
        "weights not from here": p.strays,
    }
    for what, paths in named.items():
        if paths:
            yield f"{p.id}: {what}: {_names(paths)}"
    if p.signature is not None:
        yield f"{p.id}: would sign"
    yield from (_visible(f"{p.id}: {line}") for line in p.told)
    for f in p.foreign:
        yield _visible(
            f"{p.id}: {f.path} {f.what}"
            + (f"; would be {'put back' if f.deleted else 'replaced'}" if p.target.overwrite else "")
        )
        yield from (f"    {_visible(line)}" for line in f.diff.splitlines())
    if p.refusal:
        yield _visible(f"{p.id}: would be refused: {p.refusal}")


def _names(paths: Sequence[str]) -> str:
    """File names in words: shards as one, and no more than NAMES others."""
    shards = [path for path in paths if SHARD_NAME.search(path)]
    others = [path for path in paths if len(shards) < 2 or path not in shards]
    told = [_visible(path) for path in others[:NAMES]]
    if len(shards) > 1:
        told.append(f"{len(shards)} shards ({_visible(shards[0])} …)")
    if others[NAMES:]:
        told.append(f"{len(others) - NAMES} more")
    return ", ".join(told)


def _visible(text: str) -> str:
    """What somebody wrote on the hub, without the power to steer a terminal."""
    return "".join(c if c.isprintable() or c == "\t" else "\ufffd" for c in text)


def released_json(done: Released) -> dict[str, Any]:
    return {
        "receipts": [r.model_dump(mode="json") for r in done.receipts],
        "failed": {id: str(e).splitlines()[0] for id, e in done.failed.items()},
        "published": done.published,
        "waiting": done.waiting,
        "collections": done.collections,
        "freed": done.freed,
    }


def released_text(done: Released, endpoint: str) -> str:
    rows = []
    for r in done.receipts:
        tag = f"PR {r.pull_request}" if r.pull_request else (r.tag or "")
        waits = "private, waits" if r.id in done.waiting else ""
        rows.append((r.id, f"{endpoint}/{r.repo}", r.commit[:12], tag, waits))
    lines = [table(("variant", "repo", "commit", "tag", ""), rows)] if rows else []
    lines += [f"collection {endpoint}/collections/{slug}" for slug in done.collections]
    if done.freed:
        lines.append(f"pruned {size(sum(done.freed.values()))} of weights: {', '.join(done.freed)}")
    if done.waiting:
        ids = " ".join(done.waiting)
        lines.append(f"private until all repos of a push are good: {ids}; the same command goes on")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------- calibrate


def calibrated_json(done: Calibrated) -> dict[str, Any]:
    record = done.record
    facts = record.model_dump(mode="json", exclude={"inputs", "files"})
    return {
        "folder": str(done.folder),
        "fresh": done.fresh,
        "nbytes": record.nbytes,
        "inputs": len(record.inputs),
        "modules": sum(len(i.modules) for i in record.inputs),
        **facts,
    }


def calibrated_text(done: Calibrated) -> str:
    r = done.record
    texts = ", ".join(f"{t.tokens} of {t.name} {t.sha256[:12]}" for t in r.texts)
    how = "collected" if done.fresh else "current"
    resumed = f", {r.resumed_steps} steps of it by runs before" if r.resumed_steps else ""
    return "\n".join(
        [
            f"statistics {r.key[:16]} {how}: {len(r.inputs)} inputs of {sum(len(i.modules) for i in r.inputs)} modules",
            f"tokens    {r.tokens} in {r.windows} windows of {r.context} ({texts}); {r.fisher_tokens} backwards",
            f"took      {r.wall_s:.1f} s{resumed}, peak {r.peak_gb:.2f} GB, {r.device.name} ({r.device.backend})",
            f"on disk   {size(r.nbytes)} in {done.folder}",
        ]
    )
