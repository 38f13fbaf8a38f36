"""`publish merge FOLDER…`: what other hosts built, from their output folders into this project's.

Nothing is believed. A variant comes in if a build of now, from the variants.yaml, base and lock of this project, would have
the inputs that its manifest names, and if every byte is what the manifest says: it is put below staging/, by hard link or
as a copy, read there once by the checks of `publish verify`, and moved into place by the rename that ends a build. So a
killed merge leaves nothing half, and the same command goes on. Then its results come along, each as far as it is current,
and receipts of pushes from there; statistics, where they are those that variants.yaml asks for. Cards are rendered again,
since they list their siblings. The other folder is only read; with `move`, variants that are here are deleted there.

Peak disk: links take nothing; of copies, one variant beside what it replaces.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal, TypeVar

from pydantic import BaseModel

from inference.errors import CheckpointError, InputError
from quant.folder import finish, replaced, sync
from quant.statistics import Statistics

from .base import ResolvedBase, resolve_base
from .build import check_places, keep_own, render_cards, sweep
from .calibrate import RECORD, key_of
from .card_format import size
from .card_notes import Notes, read_notes
from .costing import COSTS, current, solver_of
from .fetch import check_disk
from .ladder import LadderBook
from .locks import hold, take
from .plan import VariantPlan
from .protocol import BENCH_VERSION, SMOKE_VERSION, bench_settings, ceiling, smoke_settings
from .provenance import RESULTS
from .prune import pruned
from .report import Report
from .schema import (
    Bench,
    CalibrationRecord,
    Costs,
    FileEntry,
    History,
    LadderReceipt,
    Manifest,
    Quality,
    Receipt,
    Smoke,
)
from .staleness import bench_reasons, input_reasons, smoke_reasons, weights_reasons
from .store import MANIFEST_BYTES, PART, digest, exclusive, read_model, read_result, sha256_file, write_model
from .survey import damage, quality_state, read_manifest, todays_inputs
from .variants import Project
from .verify import verify_folder

if TYPE_CHECKING:
    from .hub import Hub

OURS = (".lock", "base.json", "results", "statistics", "receipts", "staging")  # what tells an output folder
State = Literal["added", "replaced", "kept", "stale", "damaged", "conflict"]
HERE = ("added", "replaced", "kept")
WRONG = ("damaged", "conflict")
Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class Part:
    """A variant of one of the folders. detail: why it was not taken, or how it came. moved: it was deleted there."""

    id: str
    folder: Path
    state: State
    detail: str
    weights_hash: str = ""
    results: tuple[str, ...] = ()  # that came along
    moved: bool = False


@dataclass(frozen=True)
class Merged:
    """What a merge did. others: lines about statistics and receipts. cards: variants whose card changed; card_faults: why
    one could not be rendered. absent: variants of the ladder that are not here. empty: folders that had no variant."""

    parts: tuple[Part, ...]
    others: tuple[str, ...]
    cards: tuple[str, ...]
    absent: tuple[str, ...]
    card_faults: dict[str, str]
    empty: tuple[Path, ...]

    @property
    def wrong(self) -> list[Part]:
        """Parts with a fault: bytes that are not what their manifest says, or other bytes from the same inputs."""
        return [p for p in self.parts if p.state in WRONG]

    @property
    def stale(self) -> list[Part]:
        """Parts that were left as stale, of variants that no other folder had either."""
        here = {p.id for p in self.parts if p.state in HERE}
        return [p for p in self.parts if p.state == "stale" and p.id not in here]


class _Unusable(Exception):
    """Why something of another host's folder is not taken."""


@exclusive("merge")
def merge(
    project: Project, folders: Sequence[Path], hub: Callable[[], Hub], report: Report, move: bool = False
) -> Merged:
    """Take over the finished variants of other hosts' output folders, in the order given.

    move: delete each variant there once it is proven to be here. Raises InputError for a folder that is none or where a
    build is at work, ResourceError if the disk is too small; what is not taken is told in the result.
    """
    roots = list(dict.fromkeys(_root(project, f) for f in folders))
    with ExitStack() as held:
        for root in roots:
            held.enter_context(_at_rest(root, move))
        base = resolve_base(project, hub, weights=False)
        others: list[str] = []
        for root in roots:
            others += _statistics(project, base, root, report)  # first: what is made by size is allocated by its costs
        parts = []
        for root in roots:
            if move:
                _finish_moves(project, root)
            for id in project.ladder.variants:
                if (root / id / "manifest.json").is_file():
                    part, notes = _variant(project, base, root, id, report, move)
                    parts.append(part)
                    others += notes
        cards = render_cards(project, base)
    absent = [id for id in project.ladder.variants if read_manifest(project, id) is None]
    return Merged(
        tuple(parts),
        tuple(others),
        tuple(id for id in project.ladder.variants if id in cards.changed),
        tuple(absent),
        cards.faults,
        tuple(root for root in roots if all(p.folder != root for p in parts)),
    )


# ------------------------------------------------------------------------------------------------ the other folder


def _root(project: Project, folder: Path) -> Path:
    """The folder, if it is the output of another build of a ladder. Raises InputError."""
    root, own = folder.resolve(), project.store.root.resolve()
    if root == own or own in root.parents or root in own.parents:
        raise InputError(
            f"{folder}: is, holds or lies in {own}, the output of {project.path.name}; name another host's"
        )
    if any((root / id / "manifest.json").is_file() for id in project.ladder.variants):
        return root
    if any((root / name).exists() for name in OURS):
        return root  # of a host that had nothing to build, or whose variants were moved already
    raise InputError(f"{folder}: holds no variant of {project.path.name}; name the folder `output` of another host")


@contextmanager
def _at_rest(root: Path, alone: bool) -> Iterator[None]:
    """While no build is at work there. alone: nor any begins, or another merge; else a folder that was copied without its
    lock is read without one.

    Raises InputError if one is, or if the lock is no file that can be locked.
    """

    def busy(who: str) -> InputError:
        told = f" ({who})" if who else ""
        return InputError(f"{root}: another publish is at work there{told}; wait for it to end")

    file = _lock_file(root / ".lock", alone)
    if file is None:
        yield
        return
    with file:
        if alone:
            with hold(file, "merge --move", busy):
                yield
        elif take(file, shared=True):
            yield
        else:
            raise busy("")


def _lock_file(path: Path, write: bool) -> IO[bytes] | None:
    """The lock of another host's folder, open; where there is none it is made to write, else None. Raises InputError."""
    try:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise InputError(f"{path}: is no regular file; remove it")
        flags = (os.O_RDWR | os.O_CREAT if write else os.O_RDONLY) | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        return open(path, "r+b" if write else "rb", 0, opener=lambda name, _: os.open(name, flags, 0o644))
    except FileNotFoundError:
        return None
    except OSError as e:
        raise InputError(f"{path}: cannot be opened ({e.strerror}), which a merge must, to lock it") from None


def _read(path: Path, kind: type[Model]) -> Model | None:
    """A file of another host; None if there is none. Raises _Unusable for what is not such a file."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise _Unusable(f"{path.name} is no regular file")
        if path.stat().st_size > MANIFEST_BYTES:
            raise _Unusable(f"{path.name} is larger than {MANIFEST_BYTES} bytes")
        return read_model(path, kind)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except InputError as e:
        raise _Unusable(str(e).partition("; ")[0]) from None


# ------------------------------------------------------------------------------------------------ one variant


def _variant(
    project: Project, base: ResolvedBase, root: Path, id: str, report: Report, move: bool
) -> tuple[Part, list[str]]:
    """What became of it, and lines about its results and receipts."""
    try:
        theirs = _read(root / id / "manifest.json", Manifest)
        if theirs is None or theirs.id != id or (root / id).is_symlink():
            raise _Unusable(f"manifest.json is of {theirs.id}" if theirs else "manifest.json is gone")
    except _Unusable as e:
        return Part(id, root, "damaged", str(e)), []
    plan, inputs, missing = todays_inputs(project, base, id, theirs)
    if reasons := weights_reasons(theirs, inputs, missing):
        return Part(id, root, "stale", "; ".join(reasons), theirs.weights_hash), []
    assert inputs is not None
    ours = read_manifest(project, id)
    same_inputs = ours is not None and not input_reasons(ours.inputs, inputs)
    if ours and same_inputs and ours.weights_hash != theirs.weights_hash:
        detail = (
            f"weights {theirs.weights_hash[:12]} there, {ours.weights_hash[:12]} here, of the same inputs: the hosts "
            "compute differently; compare their build.json, and delete one of the two"
        )
        return Part(id, root, "conflict", detail, theirs.weights_hash), []
    state: State = "kept" if ours and same_inputs and _intact(project, ours, move) else "replaced" if ours else "added"
    detail = "is here already"
    if state != "kept":
        try:
            detail = _bring(project, base, root, theirs, report)
        except _Unusable as e:
            return Part(id, root, "damaged", str(e), theirs.weights_hash), []
    sweep(project, id)
    came, notes = _results(project, root, theirs, plan)
    notes += _receipts(project, root, id)
    if move:
        _delete(root / id)
    return Part(id, root, state, detail, theirs.weights_hash, tuple(came), move), notes


def _intact(project: Project, ours: Manifest, move: bool) -> bool:
    """Whether what is here holds up: at a glance, and by every byte where the other copy is to be deleted."""
    folder, gone = project.store.variant(ours.id), pruned(project, ours)
    if damage(folder, ours, gone):
        return False
    return not move or (gone is None and all(c.passed is not False for c in verify_folder(folder, ours)))


def _bring(project: Project, base: ResolvedBase, root: Path, theirs: Manifest, report: Report) -> str:
    """Put a variant into place; says how. Raises _Unusable if it is not what its manifest says."""
    id, there = theirs.id, root / theirs.id
    check_places(project, base, [id])
    # of this folder: what a killed merge took from it is never mistaken for another one's
    staging = project.store.staging(id, digest({"merged": theirs.model_dump(mode="json"), "from": str(root)}))
    final = project.store.variant(id)
    report.line(f"{id}: {theirs.nbytes / 1e9:.3f} GB from {root}")
    with _discarded(staging):
        copied = _stage(there, staging / "files", theirs.files)
        write_model(staging / "files" / "manifest.json", theirs)
        if bad := next((c for c in verify_folder(staging / "files", theirs) if c.passed is False), None):
            raise _Unusable(f"{bad.name}: {bad.detail}")
    old = next((f for f in (final, replaced(final)) if f.is_dir()), None)
    if old:
        keep_own(old, staging / "files")
    else:
        _their_own(there, staging / "files")
    finish(staging, final)
    return f"{copied / 1e9:.3f} GB copied" if copied else "hard links"


@contextmanager
def _discarded(staging: Path) -> Iterator[None]:
    """Nothing stays of what proves unusable; what a kill or a full disk cut short does, for the run that goes on."""
    try:
        yield
    except _Unusable:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _stage(there: Path, files: Path, entries: Sequence[FileEntry]) -> int:
    """Link or copy the files of a manifest; returns the bytes that were copied, now or by a run that was killed.

    A name appears when all of its bytes are there. Raises _Unusable for what is missing or no regular file.
    """
    files.mkdir(parents=True, exist_ok=True)
    todo: list[tuple[Path, Path]] = []
    copied = 0
    for entry in entries:
        source, target = there / entry.path, files / entry.path
        if entry.path != target.name or entry.path.startswith("."):
            raise _Unusable(f"files: {entry.path!r} is no plain file name")
        try:
            found = source.lstat()
        except OSError as e:
            raise _Unusable(f"files: {entry.path}: {e.strerror}") from None
        if not stat.S_ISREG(found.st_mode):
            raise _Unusable(f"files: {entry.path} is no regular file")
        if found.st_size != entry.size:
            raise _Unusable(f"files: {entry.path} has {found.st_size} bytes, manifest says {entry.size}")
        if target.is_file() and target.stat().st_size == entry.size:
            copied += 0 if os.path.samefile(source, target) else entry.size
        elif not _link(source, target, found):
            todo.append((source, target))
    need = sum(source.stat().st_size for source, _ in todo)
    check_disk({files: need})
    for source, target in todo:
        part = target.with_name(f".{target.name}{PART}")
        shutil.copyfile(source, part)
        sync([part])
        os.replace(part, target)
    return copied + need


def _link(source: Path, target: Path, found: os.stat_result) -> bool:
    """A second name for a file that nobody else can write to, where the file system allows it: no build writes into a file
    that has its final name, so neither side's changes reach the other."""
    if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return False
    target.unlink(missing_ok=True)
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # another file system, or one without links
        return False
    return True


def _their_own(there: Path, files: Path) -> None:
    """Notes and pictures of the publisher's own that were kept on the other host, as far as they can be used."""
    card = there / "README.md"
    if _is_regular(card) and (notes := read_notes(card)) not in (None, Notes()) and not (notes and notes.fault):
        shutil.copyfile(card, files / "README.md")
    if (there / "images").is_dir() and not (there / "images").is_symlink():
        (files / "images").mkdir(exist_ok=True)
        for picture in sorted((there / "images").iterdir()):
            if _is_regular(picture) and not picture.name.startswith("."):
                shutil.copyfile(picture, files / "images" / picture.name)


def _is_regular(path: Path) -> bool:
    """Whether there is a file: no link, no pipe that a reader would wait for."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


# ------------------------------------------------------------------------------------------------ what comes along


def _results(project: Project, root: Path, manifest: Manifest, plan: VariantPlan) -> tuple[list[str], list[str]]:
    """(names of the results that came, lines about those that could not). A current one that is here stays."""
    weights = manifest.weights_hash
    came, notes = [], []
    for name, kind in RESULTS.items():
        path = project.store.results(weights) / f"{name}.json"
        try:
            theirs = _read(root / "results" / weights / path.name, kind)
            if theirs is None:
                continue
            if theirs.weights_hash != weights:
                raise _Unusable(f"of weights {theirs.weights_hash[:12]}")
            ours = read_result(path, kind)
            if ours and ours.weights_hash == weights and not _result_reasons(project, manifest, plan, ours):
                continue
            if reasons := _result_reasons(project, manifest, plan, theirs):
                raise _Unusable("; ".join(reasons))
        except _Unusable as e:
            notes.append(f"{manifest.id}: {path.name} of {root} left: {e}")
            continue
        write_model(path, theirs)
        came.append(name)
    return came, notes


def _result_reasons(project: Project, manifest: Manifest, plan: VariantPlan, found: BaseModel) -> list[str]:
    """Why a result is not current; a build's record always is."""
    base_hash = manifest.inputs.base.source_hash
    if isinstance(found, Smoke):
        limit = ceiling(project, manifest.id, plan.bits)
        return smoke_reasons(found, SMOKE_VERSION, smoke_settings(project), base_hash, limit)
    if isinstance(found, Bench):
        return bench_reasons(found, BENCH_VERSION, bench_settings(project), base_hash)
    if isinstance(found, Quality):
        return quality_state(project, found, base_hash)
    return []


def _receipts(project: Project, root: Path, id: str) -> list[str]:
    """The proof of a push from the other host, with its history, where there is none here; lines about what was left."""
    try:
        receipt = _read(root / "receipts" / f"{id}.json", Receipt)
        history = _read(root / "history" / f"{id}.json", History)
        ladder = _read(root / "receipts" / "ladder.json", LadderReceipt)
    except _Unusable as e:
        return [f"{id}: its receipt in {root} left: {e}"]
    if receipt is None:
        return []
    if receipt.id != id or receipt.repo != project.repo(id):
        return [f"{id}: its receipt in {root} left: of {receipt.id} in {receipt.repo}"]
    ours = read_result(project.store.receipt(id), Receipt)
    if ours is not None:
        same = (ours.endpoint, ours.commit) == (receipt.endpoint, receipt.commit)
        return [] if same else [f"{id}: its receipt in {root} left: here is one of commit {ours.commit[:12]}"]
    if history and history.id == id and read_result(project.store.history(id), History) is None:
        write_model(project.store.history(id), history)
    waiting = ladder and any(e.id == id and e.repo == receipt.repo and e.waiting for e in ladder.repos)
    known = read_result(project.store.ladder_receipt, LadderReceipt)
    if known is None or known.endpoint == receipt.endpoint:
        book = LadderBook(project, receipt.endpoint)
        if waiting:
            book.mark(id, True)
        book.done(receipt)  # before the receipt, which a run that goes on looks for
    write_model(project.store.receipt(id), receipt.model_copy(update={"pruned_at": None}))
    return [f"{id}: receipt of {receipt.repo} at {receipt.commit[:12]}"]


def _statistics(project: Project, base: ResolvedBase, root: Path, report: Report) -> list[str]:
    """Statistics and costs that variants.yaml asks for, where they are not here; lines about what came and what did not."""
    folders = [f for f in sorted((root / "statistics").glob("*")) if f.suffix != PART and (f / RECORD).is_file()]
    key = key_of(project, base, read=True) if folders else None
    out = []
    for folder in folders:
        try:
            record = _read(folder / RECORD, CalibrationRecord)
            if record is None or key is None:
                raise _Unusable("the base is not here to tell whose they are" if record else "their record is gone")
            if record.key != key:
                raise _Unusable("not what variants.yaml asks for")
            out += _bring_statistics(project, folder, record, report)
        except _Unusable as e:
            out.append(f"statistics {folder.name} of {root} left: {e}")
    return out


def _bring_statistics(project: Project, folder: Path, record: CalibrationRecord, report: Report) -> list[str]:
    final = project.store.statistics / record.key[:16]
    known, out = read_result(final / RECORD, CalibrationRecord), []
    try:
        if known is None or known.key != record.key:
            report.line(f"statistics {final.name}: {size(record.nbytes)} from {folder.parents[1]}")
            staging = project.store.staging("statistics", digest({"merged": record.key, "from": str(folder)}))
            with _discarded(staging):
                _stage(folder, staging / "files", record.files)
                for entry in record.files:
                    if sha256_file(staging / "files" / entry.path) != entry.sha256:
                        raise _Unusable(f"{entry.path} is not what {RECORD} says")
                write_model(staging / "files" / RECORD, record)
                try:
                    Statistics(staging / "files")
                except (CheckpointError, InputError) as e:
                    raise _Unusable(str(e)) from None
            finish(staging, final)
            sweep(project, "statistics")  # what a killed merge took of another folder
            out.append(f"statistics {final.name}: came along")
        costs = _read(folder / COSTS, Costs)
        statistics, solver = Statistics(final), solver_of(project)
        wanted = current(statistics, solver) is None and current(Statistics(folder), solver) == costs
        if costs and wanted and costs.statistics == statistics.digest:  # both folders hold what they were made from
            write_model(final / COSTS, costs)
            out.append(f"statistics {final.name}: costs came along")
    except (CheckpointError, InputError) as e:
        raise _Unusable(str(e)) from None
    return out


# ------------------------------------------------------------------------------------------------ moving


def _moved(folder: Path) -> Path:
    """What a variant's folder is called while it is being deleted: never taken for a variant."""
    return folder.with_name(f".{folder.name}.moved")


def _delete(folder: Path) -> None:
    if _moved(folder).exists():
        shutil.rmtree(_moved(folder))
    folder.rename(_moved(folder))
    shutil.rmtree(_moved(folder))


def _finish_moves(project: Project, root: Path) -> None:
    """Go on with what a killed run was deleting."""
    for id in project.ladder.variants:
        if _moved(root / id).is_dir() and not _moved(root / id).is_symlink():
            shutil.rmtree(_moved(root / id))
