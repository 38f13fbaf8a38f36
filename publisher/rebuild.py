"""`publish verify --rebuild`: build a variant again from its provenance and the base, and see whether the bytes are the same.

Takes a variant of the ladder, or any folder that holds one, such as a repo that was downloaded. What its provenance names is
fetched from the Hub at the commit on record; a local file (a base that is a folder, an imatrix, a text of the user's own)
is looked for where variants.yaml has it, and else by its name in the folder that --inputs gives. Today's inputs are
compared with those on record before anything is built, so that a wrong file is told at once.

All work happens in a scratch folder. The provenance of a stranger's repo is input like any other: it is read with bounds,
and no path in it is followed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from inference.errors import InputError

from . import __version__
from .base import ResolvedBase, fetch_imatrix, resolve_base
from .build import build
from .calibrate import base_hash, calibrate, find, key_of
from .fetch import check_disk
from .plan import disk_needed
from .provenance import LADDER, LOCK, frozen_name, versions
from .report import Report
from .schema import (
    CardSpec,
    Check,
    EvaluationSpec,
    Ladder,
    Lock,
    LockedBase,
    LockedFile,
    Manifest,
    Provenance,
    SmokeSpec,
)
from .scratch import scratch
from .staleness import weights_reasons
from .store import read_model, sha256_file, write_model
from .survey import base_input, survey
from .variants import Project, explain, parse_yaml
from .verify import check_of

if TYPE_CHECKING:
    from .hub import Hub

MAX_BYTES = {LADDER: 4_000_000, LOCK: 1_000_000}  # rules of an allocation that names every module are the most there is
FROZEN_BYTES = 2_000_000


def rebuild(
    folder: Path,
    manifest: Manifest,
    project: Project | None,
    hub: Callable[[], Hub],
    report: Report,
    inputs: Path | None,
) -> list[Check]:
    """One check a property; the detail names the first tensor or file that differs.

    folder: of the variant. project: the ladder it is of, if it is one of ours. inputs: where local files lie that the
    provenance names. Raises InputError where one of them is nowhere, and what a build raises.
    """
    lock = _read_lock(folder)
    wrong = (lock.id, lock.weights_hash) != (manifest.id, manifest.weights_hash)
    if wrong:
        return [check_of("provenance", f"{LOCK} is of {lock.id} with weights {lock.weights_hash[:12]}")]
    ladder = _read_ladder(folder, manifest.id)
    ladder = _placed(ladder, manifest, lock, project, inputs)
    with scratch("rebuild", project.store.root / "staging" if project else None) as work:
        again = Project(ladder, work / "variants.yaml")
        _prepare(again, folder, manifest, lock, project)
        reasons = _compare_inputs(again, manifest, hub, report)
        if reasons:
            return [check_of("inputs", "; ".join(reasons))]
        report.line(f"{manifest.id}: building it again from its provenance")
        build(again, [manifest.id], hub, report, skip=("smoke", "bench", "card"))
        made = read_model(again.store.manifest(manifest.id), Manifest)
    assert made is not None
    return [*compare(manifest, made), _versions(manifest, lock)]


def compare(manifest: Manifest, made: Manifest) -> list[Check]:
    """The manifest on record against that of the same variant built again."""
    return [
        check_of("inputs", "; ".join(weights_reasons(manifest, made.inputs)), "base, rules and settings as on record"),
        check_of(
            "rebuilt weights",
            ""
            if made.weights_hash == manifest.weights_hash
            else f"built again: {made.weights_hash[:12]}, manifest says {manifest.weights_hash[:12]}",
            f"{made.weights_hash[:12]}, as the manifest says",
        ),
        check_of("rebuilt tensors", _tensor(manifest, made), f"{len(made.tensors)} tensors, each with the same bytes"),
        check_of("rebuilt files", _file(manifest, made), f"{len(made.files)} files, each with the same sha256"),
        check_of("rebuilt manifest", _rest(manifest, made), "says the same"),
    ]


def _tensor(manifest: Manifest, made: Manifest) -> str:
    """The first tensor that differs, in the order of the files."""
    ours = {t.name: t for t in made.tensors}
    for want in manifest.tensors:
        have = ours.pop(want.name, None)
        if have is None:
            return f"{want.name} was not built again"
        if (have.dtype, have.shape) != (want.dtype, want.shape):
            return f"{want.name} became {have.dtype} {have.shape}, manifest says {want.dtype} {want.shape}"
        if have.blake3 != want.blake3:
            return f"{want.name} is the first that differs: BLAKE3 {have.blake3[:12]}, manifest says {want.blake3[:12]}"
    return f"{min(ours)} is not in the manifest" if ours else ""


def _file(manifest: Manifest, made: Manifest) -> str:
    ours = {f.path: f for f in made.files}
    for want in manifest.files:
        have = ours.pop(want.path, None)
        if have is None:
            return f"{want.path} was not built again"
        if (have.size, have.sha256) != (want.size, want.sha256):
            return f"{want.path}: sha256 {have.sha256[:12]}, manifest says {want.sha256[:12]}"
    return f"{min(ours)} is not in the manifest" if ours else ""


def _rest(manifest: Manifest, made: Manifest) -> str:
    """A key of the manifest that differs; what files are called does not count, nor which version of this tool it was."""
    for key in ("params", "text_params", "nbytes", "text_nbytes", "allocation", "awq_exponents", "calibration"):
        if getattr(manifest, key) != getattr(made, key):
            return f"{key} differs"
    return ""


def _versions(manifest: Manifest, lock: Provenance) -> Check:
    """Not a failure by itself: other versions may well give the same bytes, and where they do not this says why."""
    now = {"mlx-publish": __version__, **versions()}
    then = {"mlx-publish": manifest.tool.removeprefix("mlx-publish "), **lock.versions}
    moved = [f"{name} {then[name]} → {now.get(name, 'none')}" for name in then if then[name] != now.get(name)]
    detail = "; ".join(moved) or ("as when it was built" if lock.versions else "not on record")
    return Check(name="versions", passed=None if moved or not lock.versions else True, detail=detail)


# ------------------------------------------------------------------------------------------------ reading


def _read_lock(folder: Path) -> Provenance:
    _bounded(folder / LOCK, MAX_BYTES[LOCK], LOCK)
    found = read_model(folder / LOCK, Provenance)
    assert found is not None  # _bounded saw it
    return found


def _read_ladder(folder: Path, id: str) -> Ladder:
    path = folder / LADDER
    _bounded(path, MAX_BYTES[LADDER], LADDER)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise InputError(f"{LADDER}: found byte {e.object[e.start]:#x}; expected UTF-8") from None
    value, lines = parse_yaml(text, LADDER)
    try:
        ladder = Ladder.model_validate(value)
    except ValidationError as e:
        raise InputError(explain(e, lines, LADDER)) from None
    if list(ladder.variants) != [id]:
        raise InputError(f"{LADDER}: variants: found {', '.join(ladder.variants)}; expected {id} alone")
    return ladder


def _bounded(path: Path, limit: int, name: str) -> None:
    if path.is_symlink() or path.parent.is_symlink() or not path.is_file():
        raise InputError(f"{name} is missing: nothing says how these weights were made; run: publish card ID")
    if path.stat().st_size > limit:
        raise InputError(f"{name}: larger than {limit} bytes")


# ------------------------------------------------------------------------------------------------ where inputs lie


def _placed(
    ladder: Ladder, manifest: Manifest, lock: Provenance, project: Project | None, inputs: Path | None
) -> Ladder:
    """The ladder with local files where they are on this machine, and nothing in it that a build does not need."""
    changes: dict[str, Any] = {
        "output": "out", "owner": None, "sign": None, "collection": None, "card": CardSpec(), "smoke": SmokeSpec(),
        "evaluation": EvaluationSpec(),
    }  # fmt: skip
    base, own = ladder.base, project.ladder if project else None
    if base.path is not None:
        name = lock.base.name if base.repo is None else base.repo
        found = _find(
            f"the base {name}",
            base.path,
            [project.local(own.base.path) if project and own and own.base.path else None],
            inputs,
        )
        changes["base"] = base.model_copy(update={"path": str(found), "name": base.name or _plain_name(lock.base.name)})
    if ladder.imatrix and ladder.imatrix.path:
        used = manifest.inputs.imatrix
        source = project.imatrix(manifest.id) if project else None
        known = project.local(source.path) if project and source and source.path else None
        path = _find("the imatrix", ladder.imatrix.path, [known], inputs, used.sha256 if used else None)
        changes["imatrix"] = ladder.imatrix.model_copy(update={"path": str(path)})
    texts = {t.name: t.sha256 for t in manifest.calibration.texts} if manifest.calibration else {}
    places = {}
    for key in ("text", "chat"):
        value = getattr(ladder.calibration, key)
        if isinstance(value, str):
            mine = getattr(own.calibration, key) if own else None
            known = project.local(mine) if project and isinstance(mine, str) else None
            places[key] = str(_find(f"calibration.{key}", value, [known], inputs, texts.get(key)))
    changes["calibration"] = ladder.calibration.model_copy(update=places)
    return ladder.model_copy(update=changes)


def _find(what: str, named: str, known: Iterable[Path | None], inputs: Path | None, sha256: str | None = None) -> Path:
    """A local file or folder that the provenance names. Raises InputError if it is nowhere, or is another by its hash."""
    name = Path(named).name
    places = [*(p for p in known if p), *([inputs / name] if inputs and name not in ("", "..") else [])]
    there = [p.resolve() for p in places if p.exists()]
    if not there:
        looked = f" at {' or '.join(str(p) for p in places)}" if places else ""
        step = "put it there" if inputs else "put it into a folder and give --inputs FOLDER"
        raise InputError(f"{what} is a local one named {name!r}, and not here{looked}; {step}")
    if sha256 is None:
        return there[0]
    found = [(p, sha256_file(p)) for p in there if p.is_file()]
    good = next((p for p, sha in found if sha == sha256), None)
    if good is None:
        path, shown = (found[0][0], f"sha256 {found[0][1][:12]}") if found else (there[0], "a folder")
        raise InputError(f"{what} {name!r}: found {shown} at {path}, on record is {sha256[:12]}")
    return good


def _plain_name(name: str) -> str:
    return name.rpartition("/")[2]


# ------------------------------------------------------------------------------------------------ the work


def _prepare(again: Project, folder: Path, manifest: Manifest, lock: Provenance, project: Project | None) -> None:
    """What lies beside variants.yaml, and what the ladder at hand knows already about base and statistics."""
    base, imatrix = again.ladder.base, again.ladder.imatrix
    locked = (
        LockedBase(repo=base.repo, revision=base.revision, commit=base.revision)
        if base.repo and not base.path
        else None
    )
    files = []
    if imatrix and imatrix.repo and imatrix.file and lock.imatrix:
        files = [
            LockedFile(
                repo=imatrix.repo, file=imatrix.file, revision=imatrix.revision, commit=imatrix.revision,
                sha256=lock.imatrix.sha256,
            )
        ]  # fmt: skip
    write_model(again.lock_path, Lock(base=locked, imatrix=files))
    frozen = folder / frozen_name(manifest.id)
    if again.size(manifest.id):
        _bounded(frozen, FROZEN_BYTES, frozen_name(manifest.id))
        target = again.frozen_path(manifest.id)
        target.parent.mkdir(parents=True)
        shutil.copyfile(frozen, target)
    if project is None:
        return
    again.store.root.mkdir(parents=True, exist_ok=True)
    if project.store.base.is_file():
        shutil.copyfile(project.store.base, again.store.base)
    key = manifest.inputs.statistics
    if key and (project.store.statistics / key[:16]).is_dir():
        again.store.statistics.mkdir(parents=True)
        os.symlink((project.store.statistics / key[:16]).resolve(), again.store.statistics / key[:16])


def _compare_inputs(again: Project, manifest: Manifest, hub: Callable[[], Hub], report: Report) -> Sequence[str]:
    """Why the inputs at hand are not those on record. Reads the weights of a base that is a folder, if nobody did yet."""
    id = manifest.id
    source = again.imatrix(id)
    if source and source.repo:
        fetch_imatrix(again, source, hub)
    base: ResolvedBase | None = None
    if again.solves_by_statistics(id):
        base = resolve_base(again, hub, True, report.nbytes)
        base_hash(again, base)
        if key_of(again, base) == manifest.inputs.statistics and find(again, base) is None:
            report.line(f"{id}: its statistics are not here; collecting them again")
            calibrate(again, hub, report)
    seen = survey(again, hub, cards=False, ids=[id], read=False)
    rung = seen.rungs[id]
    if rung.inputs is None:
        return rung.state.weights
    found = base_input(again, seen.base, id, manifest)
    reasons = weights_reasons(manifest, rung.inputs.model_copy(update={"base": found}))
    if not reasons:
        check_disk({again.store.root: disk_needed([rung.plan])})
    return reasons
