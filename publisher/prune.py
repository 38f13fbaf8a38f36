"""Weights that were deleted here because the hub was proven to hold them: what counts as such, and the deletion itself.

A missing safetensors file of a built variant is damage, unless a receipt says that it was pruned, for these weights, and
names the file with the manifest's hash. Manifest, config, tokenizer and card stay: a folder with these still is a variant
that can be described, compared with the hub and pushed again; only what needs its weights asks for a build.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from inference.checkpoint import INDEX, ITEMSIZE, Checkpoint, CheckpointError, TensorInfo, count, read_json
from inference.errors import CheckFailed, GateRefused
from quant.shards import MTP_FILE

from .schema import Manifest, Receipt
from .store import read_result, write_model
from .variants import Project

WEIGHTS = ".safetensors"


@dataclass(frozen=True)
class Pruned:
    """Files of a manifest that are not here, and the push that proves where they are. files: sha256 by path."""

    receipt: Receipt
    files: Mapping[str, str]

    @property
    def where(self) -> str:
        return f"{self.receipt.repo} at {self.receipt.commit[:12]}"


def pruned(project: Project, manifest: Manifest) -> Pruned | None:
    """None: nothing is missing, or something is that no receipt stands for."""
    folder = project.store.variant(manifest.id)
    gone = {f.path: f.sha256 for f in manifest.files if f.path.endswith(WEIGHTS) and not (folder / f.path).exists()}
    if not gone:
        return None
    receipt = read_result(project.store.receipt(manifest.id), Receipt)
    if receipt is None or receipt.pruned_at is None or receipt.weights_hash != manifest.weights_hash:
        return None
    sent = {f.path: f.sha256 for f in receipt.files}
    return Pruned(receipt, gone) if all(sent.get(path) == sha for path, sha in gone.items()) else None


def require_weights(project: Project, manifest: Manifest) -> None:
    """Raises GateRefused for what needs weights that were pruned."""
    if pruned(project, manifest):
        raise GateRefused(f"{manifest.id}: its weights are pruned; run: publish build {manifest.id}")


def delete_weights(project: Project, manifest: Manifest, receipt: Receipt, proven: Mapping[str, str | None]) -> int:
    """Delete the weights of a variant; returns the bytes that this frees. proven: sha256 by path of what the hub holds at
    the receipt's commit, asked for just now.

    The receipt is written first: a run that is killed here leaves a folder that it accounts for, and the next prune goes on.
    Raises CheckFailed, and deletes nothing, if a single file is not proven.
    """
    weights = [f for f in manifest.files if f.path.endswith(WEIGHTS)]
    sent = {f.path: f.sha256 for f in receipt.files}
    for f in weights:
        if receipt.weights_hash != manifest.weights_hash or not f.sha256 == sent.get(f.path) == proven.get(f.path):
            raise CheckFailed(
                f"{manifest.id}: not pruned: {receipt.repo} at {receipt.commit[:12]} is not proven to hold {f.path}; "
                "run push again"
            )
    folder = project.store.variant(manifest.id)
    here = [folder / f.path for f in weights if (folder / f.path).exists()]
    if not here:
        return 0
    if receipt.pruned_at is None:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        write_model(project.store.receipt(manifest.id), receipt.model_copy(update={"pruned_at": now}))
    freed = 0
    for path in here:
        freed += path.stat().st_size
        path.unlink()
    return freed


def described(folder: Path, manifest: Manifest) -> Checkpoint:
    """A pruned folder as its shards' headers would describe it: from the manifest, config.json and the index.

    Raises CheckpointError where these disagree.
    """
    index, where = folder / INDEX, {}
    if index.is_file():
        found = read_json(index).get("weight_map")
        where = found if isinstance(found, dict) else {}
    listed = {f.path for f in manifest.files}
    tensors = {}
    for t in manifest.tensors:
        alone = MTP_FILE if t.name.startswith("mtp.") and MTP_FILE in listed else "model.safetensors"
        file = where.get(t.name, alone)
        if file not in listed:
            raise CheckpointError(f"{index.name}: {t.name} is in no file of the manifest")
        if t.dtype not in ITEMSIZE:
            raise CheckpointError(f"manifest.json: {t.name} has dtype {t.dtype!r}")
        tensors[t.name] = TensorInfo(
            t.name, t.dtype, tuple(t.shape), folder / file, 0, ITEMSIZE[t.dtype] * count(t.shape)
        )
    return Checkpoint(folder, read_json(folder / "config.json"), tensors, True)
