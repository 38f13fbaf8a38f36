"""What a stranger gets who downloads a repo: `verify --download` fetches it and loads it; `remote_signature` asks for less.

The client of the hub checks sizes and not content, so every file is hashed here. Nothing comes from a cache, and nothing
stays.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from inference.errors import CheckpointError, InputError, ResourceError

from .card_format import size
from .fetch import check_disk
from .push_plan import local_files, repo_id, same
from .report import Report
from .schema import Check, Manifest, Receipt
from .scratch import scratch
from .signing import MAX_BYTES, Trust, check_signature
from .store import read_model, read_result
from .survey import read_manifest
from .variants import Project
from .verification import strays_allowed
from .verify import SIGNATURE, check_of, is_plain, sha256_of, verify_folder

if TYPE_CHECKING:
    from .hub import Hub, RemoteFile

SMALL_BYTES = 10 << 20  # the most that a file outside of LFS may have
PROMPT = "The quick brown fox jumps over the lazy dog."


def verify_download(hub: Hub, project: Project, id: str, trust: Trust, report: Report) -> list[Check]:
    """Fetch the repo as it was pushed (else its head) into a scratch folder: hashes, contents, signature, a forward pass.

    Raises ResourceError if the disk cannot hold it.
    """
    hub.require_online("verify --download")
    repo = repo_id(project, id)
    receipt = read_result(project.store.receipt(id), Receipt)
    if receipt and (receipt.repo, receipt.endpoint) != (repo, hub.endpoint):
        receipt = None
    head = hub.head(repo)
    if head is None:
        return [check_of("repo", f"{repo} is not on {hub.endpoint}, or not for this token")]
    commit = receipt.commit if receipt else head.commit
    tree = head.files if commit == head.commit else hub.tree(repo, commit)
    if tree is None:
        return [check_of("repo", f"{repo} no longer has {commit[:12]}, which was pushed; run push again")]
    odd = next((path for path in tree if not is_plain(path)), None)
    if odd is not None:
        return [check_of("repo", f"{repo} holds {odd!r}, which leads out of a folder")]
    places = project.store.root / "staging"
    total = sum(f.size for f in tree.values())
    check_disk({places: total})
    with scratch("download", places) as work:
        report.line(f"{id}: downloading {size(total)} of {repo} at {commit[:12]}")
        folder = hub.download(repo, commit, work / "repo", work / "cache")
        shutil.rmtree(folder / ".cache", ignore_errors=True)  # the client's own notes
        checks = [check_of("repo", "", f"{repo} at {commit[:12]}, {len(tree)} files")]
        return [*checks, *_checked(project, id, folder, tree, receipt, trust)]


def _checked(
    project: Project, id: str, folder: Path, tree: Mapping[str, RemoteFile], receipt: Receipt | None, trust: Trust
) -> list[Check]:
    """The checks of what was downloaded."""
    manifest = _read_manifest(folder)
    if isinstance(manifest, str):
        return [check_of("downloaded manifest", manifest)]
    found = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
    ours = read_manifest(project, id)
    checks = verify_folder(folder, manifest)  # hashes every shard, once
    hashes = {path: sha256_of(p) for path, p in found.items()}
    wanted = {f.path: f.sha256 for f in receipt.files} if receipt else {f.path: f.sha256 for f in manifest.files}
    of = "the receipt" if receipt else "its manifest"
    checks = [
        check_of("downloaded files", _differs(hashes, wanted, tree, of), f"{len(hashes)} files, sha256 as in {of}"),
        *checks,
    ]
    if ours:
        same_weights = ours.weights_hash == manifest.weights_hash
        here = "" if same_weights else f"weights {manifest.weights_hash[:12]}, here are {ours.weights_hash[:12]}"
        checks.append(check_of("same weights as here", here, manifest.weights_hash[:12]))
    checks = [strays_allowed(folder, manifest, c) if c.name == "no other files" else c for c in checks]
    signature = folder / SIGNATURE
    data = signature.read_bytes() if signature.is_file() else None
    return [*checks, *check_signature(data, hashes, trust), _loads(folder)]


def _read_manifest(folder: Path) -> Manifest | str:
    try:
        return read_model(folder / "manifest.json", Manifest) or "is missing"
    except InputError as e:
        return str(e).partition(";")[0]


def _differs(hashes: Mapping[str, str], wanted: Mapping[str, str], tree: Mapping[str, RemoteFile], of: str) -> str:
    """The first file that is not what it should be."""
    for path, sha256 in wanted.items():
        if path not in hashes:
            return f"{path} is missing"
        if hashes[path] != sha256:
            return f"{path} has sha256 {hashes[path][:12]}, {of} says {sha256[:12]}"
    for path, remote in tree.items():
        if remote.sha256 and hashes.get(path) != remote.sha256:
            return f"{path} has sha256 {hashes.get(path, 'nothing')[:12]}, the hub says {remote.sha256[:12]}"
    return ""


def _loads(folder: Path) -> Check:
    """Whether the engine takes it, by its config.json alone, and computes something that is finite."""
    from inference.backend import mx  # noqa: PLC0415 - MLX only for this
    from inference.divergence import nonfinite_count  # noqa: PLC0415
    from inference.load import load  # noqa: PLC0415

    try:
        model = load(folder)
        tokens = model.tokenizer.encode(PROMPT)
        bad = nonfinite_count(model.forward(mx.array([tokens]))[0])
    except ResourceError as e:
        return Check(name="loads", passed=None, detail=f"does not fit this machine: {e}")
    except CheckpointError as e:
        return check_of("loads", str(e))
    return check_of(
        "loads", f"{bad} of {len(tokens)} positions are not finite" if bad else "", f"{len(tokens)} tokens run"
    )


# ------------------------------------------------------------------------------------------------ without a download


def remote_signature(hub: Hub, project: Project, id: str, trust: Trust) -> list[Check]:
    """The signature of the repo's head against the hashes that the hub tells. Small files whose hash it does not tell are
    read, unless they are as here."""
    repo = repo_id(project, id)
    head = hub.head(repo)
    if head is None:
        return []  # told by verify_remote
    there = head.files.get(SIGNATURE)
    if there is None:
        return check_signature(None, {}, trust)
    if there.size > MAX_BYTES:
        return [check_of("signature", f"has {there.size} bytes")]
    data = hub.read_range(repo, head.commit, SIGNATURE, 0, MAX_BYTES)
    ours = {f.path: f for f in local_files(project, id, rehash=False)[1]}
    hashes = {}
    for path, remote in head.files.items():
        mine = ours.get(path)
        if remote.sha256 is not None:
            hashes[path] = remote.sha256
        elif mine is not None and same(mine, remote):
            hashes[path] = mine.sha256
        else:
            hashes[path] = _read_hash(hub, repo, head.commit, remote)
    return check_signature(data, hashes, trust)


def _read_hash(hub: Hub, repo: str, commit: str, remote: RemoteFile) -> str:
    return hashlib.sha256(hub.read_range(repo, commit, remote.path, 0, SMALL_BYTES)).hexdigest()
