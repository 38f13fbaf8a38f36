"""The base model and the imatrix: local, or of the Hub at the commit that variants.lock holds.

A revision is resolved once and written to the lock; from then on everything works from the cache, without a network.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from inference.checkpoint import Checkpoint, read_checkpoint
from inference.errors import InputError
from inference.families import names_of
from inference.layout import Target
from quant.folder import side_files

from .schema import BaseCache, ImatrixInput, ImatrixSource, Lock, LockedBase, LockedFile
from .store import digest, read_result, sha256_file, write_model
from .variants import Project

if TYPE_CHECKING:
    from .hub import Hub, Progress


@dataclass(frozen=True)
class ResolvedBase:
    """The base as a folder. weights: False where the folder holds headers only (a plan before the download)."""

    folder: Path
    name: str
    commit: str | None
    weights: bool
    checkpoint: Checkpoint
    targets: tuple[Target, ...]

    @cached_property
    def files_hash(self) -> str:
        """Identity of what a variant takes beside weights: config.json and the files that are copied. Empty while they
        are not here. Read once, whatever the number of variants."""
        if not self.weights:
            return ""
        config = {k: v for k, v in self.checkpoint.config.items() if k != "_name_or_path"}
        return digest({"config": config, "files": [[p.name, sha256_file(p)] for p in side_files(self.folder)]})


def resolve_base(
    project: Project, hub: Callable[[], Hub], weights: bool, progress: Progress | None = None
) -> ResolvedBase:
    """weights: download them if they are not here, telling `progress`.

    Raises InputError, CheckpointError, or what the hub raises.
    """
    base = project.ladder.base
    if base.path is not None:
        return _opened(project.local(base.path), project.base_name, None, True)
    assert base.repo is not None
    commit = locked_commit(project, hub)
    from .hub import cached_snapshot, download_base, remote_headers  # noqa: PLC0415 - the client only for Hub bases

    folder = cached_snapshot(base.repo, commit)
    if folder is not None:
        return _opened(folder, base.repo, commit, True)
    if weights:
        return _opened(download_base(hub(), base.repo, commit, progress), base.repo, commit, True)
    headers = project.store.root / "headers" / f"{base.repo.replace('/', '--')}-{commit[:12]}"
    if not (headers / "config.json").is_file():
        remote_headers(hub(), base.repo, commit, headers)
    return _opened(headers, base.repo, commit, False)


def _opened(folder: Path, name: str, commit: str | None, weights: bool) -> ResolvedBase:
    checkpoint = read_checkpoint(folder)
    targets = names_of(checkpoint.config).targets(checkpoint)
    return ResolvedBase(folder, name, commit, weights, checkpoint, tuple(targets))


def locked_commit(project: Project, hub: Callable[[], Hub]) -> str:
    """Commit of the base; resolved and written to the lock if it is not there yet."""
    base, lock = project.ladder.base, project.lock()
    assert base.repo is not None
    if lock.base and (lock.base.repo, lock.base.revision) == (base.repo, base.revision):
        if not re.fullmatch(r"[0-9a-f]{40}", lock.base.commit):  # it names a folder
            raise InputError(
                f"{project.lock_path.name}: base.commit: found {lock.base.commit!r}, expected a commit's id"
            )
        return lock.base.commit
    commit = hub().resolve_commit(base.repo, base.revision)
    locked = LockedBase(repo=base.repo, revision=base.revision, commit=commit)
    write_model(project.lock_path, lock.model_copy(update={"base": locked}))
    return commit


def imatrix_name(source: ImatrixSource) -> str:
    """What cards call an imatrix: never a path of this machine."""
    return Path(source.path).name if source.path else f"{source.repo}/{source.file}"


def known_imatrix(project: Project, source: ImatrixSource) -> ImatrixInput | None:
    """Name and hash if they can be known without a network: a local file, or one that the lock names."""
    if source.path:
        return ImatrixInput(name=imatrix_name(source), sha256=sha256_file(project.local(source.path)))
    entry = _locked_file(project.lock(), source)
    return ImatrixInput(name=imatrix_name(source), sha256=entry.sha256) if entry else None


def fetch_imatrix(project: Project, source: ImatrixSource, hub: Callable[[], Hub]) -> tuple[Path, ImatrixInput]:
    """The file itself, downloaded and locked if need be. Raises InputError if it is not the one that was locked."""
    if source.path:
        path = project.local(source.path)
        return path, ImatrixInput(name=imatrix_name(source), sha256=sha256_file(path))
    from .hub import download_file  # noqa: PLC0415

    assert source.repo
    assert source.file
    lock = project.lock()
    entry = _locked_file(lock, source)
    commit = entry.commit if entry else hub().resolve_commit(source.repo, source.revision)
    path = download_file(hub(), source.repo, source.file, commit)
    found = sha256_file(path)
    if entry and entry.sha256 != found:
        raise InputError(
            f"{imatrix_name(source)}: sha256 {found[:12]}, the lock says {entry.sha256[:12]}; delete the cached file"
        )
    if not entry:
        new = LockedFile(repo=source.repo, file=source.file, revision=source.revision, commit=commit, sha256=found)
        write_model(project.lock_path, lock.model_copy(update={"imatrix": [*lock.imatrix, new]}))
    return path, ImatrixInput(name=imatrix_name(source), sha256=found)


def _locked_file(lock: Lock, source: ImatrixSource) -> LockedFile | None:
    wanted = (source.repo, source.file, source.revision)
    return next((f for f in lock.imatrix if (f.repo, f.file, f.revision) == wanted), None)


def fingerprint(checkpoint: Checkpoint) -> dict[str, list[int]]:
    """Size and time of the weight files: as long as they stay, remembered content hashes hold."""
    stats = {t.file: None for t in checkpoint.tensors.values()}
    return {f.name: [s.st_size, s.st_mtime_ns] for f in stats if (s := os.stat(f))}


def source_key(targets: Sequence[Target]) -> str:
    return digest(sorted(t.name for t in targets))


def known_source_hash(project: Project, base: ResolvedBase, targets: Sequence[Target]) -> str | None:
    """Content hash of these tensors of the base, if it was computed for the files as they are."""
    cache = read_result(project.store.base, BaseCache)
    if cache is None or cache.files != fingerprint(base.checkpoint):
        return None
    return cache.hashes.get(source_key(targets))


def remember_source_hash(project: Project, base: ResolvedBase, targets: Sequence[Target], value: str) -> None:
    files = fingerprint(base.checkpoint)
    cache = read_result(project.store.base, BaseCache)
    hashes = dict(cache.hashes) if cache and cache.files == files else {}
    write_model(project.store.base, BaseCache(files=files, hashes={**hashes, source_key(targets): value}))
