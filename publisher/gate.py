"""What must be true before a variant may leave the machine. Each refusal is one line that names the one thing to do."""

from __future__ import annotations

import re
from collections.abc import Sequence, Set
from pathlib import Path

from inference.errors import InputError

from .card import check_card, machine_paths
from .card_figure import NAMES as PICTURES
from .card_history import card_command
from .card_links import link_faults
from .card_metadata import LICENSE_FILE, metadata_faults, read_metadata
from .card_notes import CARD_BYTES, split
from .protocol import kld_ceiling
from .provenance import FOLDER, LADDER, LOCK
from .prune import pruned
from .schema import Manifest, Quality, Smoke
from .store import read_model
from .variants import Project
from .verify import verify_folder

MAX_REPO_ID = 96  # the Hub's limit
# what of the provenance says no more than this tool put there; what a model said in a smoke test is its own
OURS = (LADDER, LOCK, f"{FOLDER}/results/build.json", f"{FOLDER}/results/bench.json", f"{FOLDER}/results/quality.json")
NAME = re.compile(r"\w(?:[\w.\-]*\w)?", re.ASCII)


def gate(
    project: Project,
    id: str,
    *,
    expected_card: str | None = None,
    card_fault: str | None = None,
    stale: Sequence[str] = (),
) -> list[str]:
    """Reasons not to publish a variant; none: it may go. Raises nothing about what it finds.

    expected_card: the card as it would be rendered now, if the caller has it; card_fault: why it cannot be. stale: what
    the caller knows to be of other inputs than today's, each with its next step; told where there is something built at all.
    """
    refusals = _names(project, id)
    folder = project.store.variant(id)
    if not folder.is_dir():
        return [*refusals, f"{id}: not built; run `publish build {id}`"]
    try:
        manifest = read_model(project.store.manifest(id), Manifest)
    except InputError as e:
        return [*refusals, str(e)]
    if manifest is None:
        return [*refusals, f"{id}: manifest.json is missing; run `publish build {id}`"]
    if manifest.id != id:
        refusals.append(f"{id}: manifest.json is of {manifest.id}; run `publish build {id}`")
    for check in verify_folder(folder, manifest, pruned(project, manifest)):
        if check.passed is False:
            # a build by itself leaves strays where they are, and does not read the bytes of what it takes for current
            step = "remove it" if check.name == "no other files" else f"run `publish build {id} --force`"
            refusals.append(f"{id}: {check.name}: {check.detail}; {step}")
    refusals += [f"{id}: {reason}" for reason in stale]
    refusals += _smoke(project, id, manifest)
    refusals += _quality(project, id, manifest)
    refusals += [r for name in ("config.json", "manifest.json", *OURS) for r in _paths(folder / name, id)]
    files = {f.path for f in manifest.files} | {
        p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()
    }
    command = card_command(project, id, manifest)
    refusals += _card(folder, id, expected_card, card_fault, project.repo(id), files, command)
    return refusals


def _names(project: Project, id: str) -> list[str]:
    repo = project.repo(id)
    if "/" not in repo:
        return [f"{id}: owner is not set in {project.path.name}; set it to the Hub user or organization"]
    owner, name = repo.split("/", 1)
    if repo == project.ladder.base.repo:
        return [f"{id}: {repo} is the original's own repo; change `repo:` or `owner:`"]
    if len(repo) > MAX_REPO_ID:
        return [f"{id}: repo id {repo} has {len(repo)} characters, the Hub takes {MAX_REPO_ID}; shorten `repo:`"]
    bad = not NAME.fullmatch(owner) or not NAME.fullmatch(name) or ".." in repo or "--" in repo
    if bad or name.endswith((".git", ".ipynb")):
        return [f"{id}: {repo} is no name the Hub takes; change `repo:`"]
    return []


def _smoke(project: Project, id: str, manifest: Manifest) -> list[str]:
    path = project.store.results(manifest.weights_hash) / "smoke.json"
    try:
        smoke = read_model(path, Smoke)
    except InputError as e:
        return [str(e)]
    if smoke is None or smoke.weights_hash != manifest.weights_hash:
        return [f"{id}: no smoke test of these weights ({manifest.weights_hash[:12]}); run `publish smoke {id}`"]
    if not smoke.passed:
        failed = next((c for c in smoke.checks if c.passed is False), None)
        why = f": {failed.name}: {failed.detail}" if failed else ""
        return [f"{id}: the smoke test failed{why}; change the recipe and run `publish build {id}`"]
    return []


def _quality(project: Project, id: str, manifest: Manifest) -> list[str]:
    """Only where a ceiling is set."""
    ceiling = kld_ceiling(project, id, manifest.inputs.bits)
    if ceiling is None:
        return []
    path = project.store.results(manifest.weights_hash) / "quality.json"
    try:
        quality = read_model(path, Quality)
    except InputError as e:
        return [str(e)]
    if quality is None or quality.weights_hash != manifest.weights_hash:
        return [f"{id}: kld_ceiling is set, but the quality of these weights is not measured; run `publish eval {id}`"]
    text = next((d for d in quality.corpora if d.corpus == "text"), None)
    if text is None or text.kld is None or text.nonfinite:
        bad = f"{text.nonfinite} of {text.positions} positions are not finite" if text else "no text was measured"
        return [f"{id}: kld_ceiling is set, but {bad}; change the recipe and run `publish build {id}`"]
    if text.kld.value > ceiling:
        return [
            f"{id}: mean KL {text.kld.value:.4g} nats a token over the evaluation text, kld_ceiling {ceiling:g}; "
            f"change the recipe and run `publish build {id}`"
        ]
    return []


def _paths(path: Path, id: str) -> list[str]:
    """Paths of a machine in a JSON file that is published. What does not parse is told by others."""
    try:
        found = machine_paths(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return []
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    if not found:
        return []
    what = f"path of a machine {found[0]!r}{more}"
    source = "variants.yaml" if path.suffix == ".yaml" else "the base"
    return [f"{id}: {path.name}: {what}; take it out of {source} and run `publish build {id}`"]


def card_faults(text: str, repo: str, files: Set[str]) -> list[str]:
    """What of a card must not leave, as `line N: …`. repo: where it goes; files: all that go with it."""
    found = [*check_card(text), *metadata_faults(text, repo, files), *link_faults(text, files)]
    return list(dict.fromkeys(found))


def _card(
    folder: Path, id: str, expected: str | None, unkept: str | None, repo: str, files: Set[str], command: str
) -> list[str]:
    path = folder / "README.md"
    try:
        if path.stat().st_size > CARD_BYTES:
            return [f"{id}: README.md is larger than {CARD_BYTES} bytes; run `publish card {id}`"]
        text = path.read_bytes().decode()
    except FileNotFoundError:
        return [f"{id}: README.md is missing; run `publish card {id}`"]
    except UnicodeDecodeError:
        return [f"{id}: README.md is not UTF-8; run `publish card {id}`"]
    refusals = []
    if expected is not None and text != expected:
        refusals.append(f"{id}: README.md is not what it would be now; run `{command}`")
    try:
        block = split(text)
    except InputError as e:
        return [*refusals, unkept or f"{id}: README.md: {e}"]
    if unkept:
        refusals.append(unkept)
    for fault in card_faults(text, repo, files):
        line = re.match(r"line (\d+)", fault)
        theirs = block is not None and line is not None and int(line[1]) in block.lines
        drawn = any(f"images/{name}" in fault for name in PICTURES)
        step = f"{'' if drawn else 'correct the template and '}run `publish card {id}`"
        step = "correct the notes in README.md" if theirs else step
        refusals.append(f"{id}: README.md: {fault}; {step}")
    if not read_metadata(text).values.get("license") and not any(map(LICENSE_FILE.fullmatch, files)):
        refusals.append(f"{id}: no licence in the folder or the card; set `card.license` and run `publish card {id}`")
    return refusals
