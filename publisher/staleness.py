"""What of a variant is not current, and why: values in, reasons out. Nothing here reads a disk or a clock."""

from __future__ import annotations

from dataclasses import dataclass, field

from .schema import Bench, BuildInputs, Manifest, Quality, RuleInput, Smoke


@dataclass(frozen=True)
class State:
    """Reasons by step; an empty list means current. failed: the smoke test ran on these bytes and said no. pruned: where
    the hub holds the weights that were deleted here.

    quality is a step of its own (`publish eval`), which a build does not wait for: it does not count for `built`.
    """

    id: str
    weights: list[str] = field(default_factory=list)
    smoke: list[str] = field(default_factory=list)
    bench: list[str] = field(default_factory=list)
    quality: list[str] = field(default_factory=list)
    card: list[str] = field(default_factory=list)
    failed: str | None = None
    pruned: str | None = None

    @property
    def built(self) -> bool:
        return not (self.weights or self.smoke or self.bench or self.card)


def weights_reasons(manifest: Manifest | None, now: BuildInputs | None, unknown: str | None = None) -> list[str]:
    """Why the weights are stale. `now` None: today's inputs cannot be known yet: an imatrix is not downloaded, or
    `unknown` says why."""
    if manifest is None:
        return [unknown or "not built"]
    if now is None:
        return [unknown or "imatrix: not downloaded yet"]
    return input_reasons(manifest.inputs, now)


def input_reasons(old: BuildInputs, now: BuildInputs) -> list[str]:
    """What differs between the inputs of two builds, as far as weights depend on it."""
    reasons = []
    reasons += _base_reasons(old, now)
    if old.assignment != now.assignment:
        reasons += rule_reasons(old, now) or ["recipe: other formats for the same rules"]
    for key in ("awq_exponent", "mtp", "vision", "solver", "quant_version"):
        before, after = getattr(old, key), getattr(now, key)
        if before != after:
            reasons.append(f"{key}: {_show(before)} → {_show(after)}")
    if old.statistics != now.statistics:
        reasons.append(f"statistics: {_short(old.statistics)} → {_short(now.statistics)}")
    if (old.imatrix and old.imatrix.sha256) != (now.imatrix and now.imatrix.sha256):
        reasons.append(f"imatrix: {_imatrix(old)} → {_imatrix(now)}")
    return reasons


def rule_reasons(old: BuildInputs, now: BuildInputs) -> list[str]:
    """The keys of the recipe that differ, rule by rule."""
    reasons = []
    for key in ("recipe", "bits", "group_size"):
        before, after = getattr(old, key), getattr(now, key)
        if before != after:
            reasons.append(f"{key}: {before} → {after}")
    if old.allocation and now.allocation:
        return [*reasons, *_allocation_reasons(old, now)]
    before_rules, after_rules = _by_pattern(old.rules), _by_pattern(now.rules)
    for pattern in dict.fromkeys((*before_rules, *after_rules)):
        before, after = before_rules.get(pattern), after_rules.get(pattern)
        if before is None:
            reasons.append(f"rules[{pattern[0]}]: added")
        elif after is None:
            reasons.append(f"rules[{pattern[0]}]: removed")
        else:
            for key in ("bits", "group_size", "mode", "awq"):
                if getattr(before, key) != getattr(after, key):
                    reasons.append(
                        f"rules[{pattern[0]}].{key}: {_show(getattr(before, key))} → {_show(getattr(after, key))}"
                    )
    if not reasons and old.rules != now.rules:
        reasons.append("rules: another order")
    return reasons


def _allocation_reasons(old: BuildInputs, now: BuildInputs) -> list[str]:
    """Why an allocator chose other formats, and of how many tensors: its rules are too many to name."""
    assert old.allocation
    assert now.allocation
    reasons = []
    if old.allocation.size != now.allocation.size:
        reasons.append(f"size: {old.allocation.size} → {now.allocation.size}")
    if old.allocation.costs != now.allocation.costs:
        reasons.append(f"measured costs: {old.allocation.costs[:8]} → {now.allocation.costs[:8]}")
    before, after = _by_layer(old.rules), _by_layer(now.rules)
    moved = sum(before.get(key) != after.get(key) for key in before.keys() | after.keys())
    return [*reasons, f"allocation: other formats in {moved} places"]


def _by_layer(rules: list[RuleInput]) -> dict[tuple[str, str], tuple[object, ...]]:
    """Format by pattern and layer."""
    return {(r.match, layer): (r.bits, r.group_size, r.mode) for r in rules for layer in (r.layers or "all").split(",")}


def smoke_reasons(smoke: Smoke | None, version: int, settings: str, base_hash: str, ceiling: float) -> list[str]:
    reasons = _result_reasons(smoke, "smoke test", version, "smoke: prompts, text or seed", settings, base_hash)
    if smoke and smoke.ceiling != ceiling:
        reasons.append(f"smoke_kld: {smoke.ceiling:g} → {ceiling:g}")
    return reasons


def bench_reasons(bench: Bench | None, version: int, settings: str, base_hash: str) -> list[str]:
    return _result_reasons(bench, "benchmark", version, "bench: protocol or text", settings, base_hash)


def quality_reasons(
    quality: Quality | None, version: int, settings: str, base_hash: str, calibration: str
) -> list[str]:
    """calibration: hash of today's calibration texts, which the evaluation must not share content with."""
    if quality is None:
        return ["not measured"]
    reasons = _result_reasons(
        quality, "evaluation", version, "evaluation: texts, windows or prompts", settings, base_hash
    )
    if quality.calibration_hash != calibration:
        reasons.append("calibration text: changed")
    return reasons


def _result_reasons(
    found: Smoke | Bench | Quality | None, name: str, version: int, what: str, settings: str, base_hash: str
) -> list[str]:
    if found is None:
        return ["not run on these weights"]
    reasons = []
    if found.version != version:
        reasons.append(f"{name}: version {found.version} → {version}")
    if found.settings != settings:
        reasons.append(f"{what} changed")
    if found.base_hash != base_hash:
        reasons.append("base: changed")
    return reasons


def _by_pattern(rules: list[RuleInput]) -> dict[tuple[str, str | None], RuleInput]:
    out: dict[tuple[str, str | None], RuleInput] = {}
    for rule in rules:
        out.setdefault((rule.match, rule.layers), rule)  # a second rule of the same pattern never decides
    return out


def _base_reasons(old: BuildInputs, now: BuildInputs) -> list[str]:
    """Content decides where it is known on both sides, else the commit; what a base is called does not."""
    before, after = old.base, now.base
    reasons = []
    if before.source_hash and after.source_hash:
        if before.source_hash != after.source_hash:
            reasons.append(f"base weights: {before.source_hash[:8]} → {after.source_hash[:8]}")
    elif before.commit != after.commit:
        reasons.append(f"base commit: {_short(before.commit)} → {_short(after.commit)}")
    elif after.commit is None:
        reasons.append("base: its files changed size or time since they were last hashed")
    if before.files_hash and after.files_hash and before.files_hash != after.files_hash:
        reasons.append(f"base config, tokenizer or licence: {before.files_hash[:8]} → {after.files_hash[:8]}")
    return reasons


def _imatrix(inputs: BuildInputs) -> str:
    return f"{inputs.imatrix.name} {inputs.imatrix.sha256[:8]}" if inputs.imatrix else "none"


def _short(commit: str | None) -> str:
    return commit[:8] if commit else "none"


def _show(value: object) -> str:
    return "none" if value is None else f"{value}"
