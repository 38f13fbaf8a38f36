"""What stands beside the shards of a variant: config, index, files copied from the base, final move."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from inference.checkpoint import ITEMSIZE, QuantSpec, count
from inference.errors import InputError
from inference.families import names_of

from .recipe import TensorPlan
from .shards import MTP_FILE, Stored

INDEX = "model.safetensors.index.json"
# tokenizer, template, generation and processor files of the published repositories, and the licence texts.
# Never Python: a variant holds no code.
SIDE_FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "tokenizer.model", "chat_template.jinja", "chat_template.json", "generation_config.json",
    "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json", "LICENSE*", "NOTICE*",
    "USE_POLICY*",
)  # fmt: skip


def quantized_config(config: Mapping[str, Any], plans: Sequence[TensorPlan], mtp_tensors: int = 0) -> dict[str, Any]:
    """config.json of a variant: the base's, key order kept, without `_name_or_path`, with `quantization` and whatever
    mlx-lm needs to be told for this family.

    The top level of the block is the format of most weights; every quantized module also has its own entry, so that no
    reader has to guess. A module that has none is stored unquantized (it has no `.scales` either). Two equal blocks,
    `quantization` and `quantization_config`, as mlx-lm writes them; neither if nothing is quantized. mtp_tensors: how
    many tensors the side file holds, if there is one.
    """
    told = names_of(dict(config)).mlx_config(dict(config))
    out = {k: v for k, v in told.items() if k != "_name_or_path"}
    specs = {p.target.module: p.spec for p in plans if p.spec is not None}
    if specs:
        weights: Counter[QuantSpec] = Counter()
        for p in plans:
            if p.spec is not None:
                weights[p.spec] += p.target.params
        common = min(weights, key=lambda spec: (-weights[spec], spec))
        block = {**_entry(common), **{module: _entry(spec) for module, spec in specs.items()}}
        out["quantization"] = block
        out["quantization_config"] = block
    if mtp_tensors:
        out["mlx_lm_extra_tensors"] = {"mtp_file": MTP_FILE, "mtp_tensor_count": mtp_tensors}
    return out


def _entry(spec: QuantSpec) -> dict[str, Any]:
    return {"group_size": spec.group_size, "bits": spec.bits, "mode": spec.mode}


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def sync(paths: Iterable[Path]) -> None:
    """Make sure that files survive a loss of power, before the rename that gives their folder the final name.

    All at once: a journaling filesystem commits them together, where one by one each would wait for a commit.
    """
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def index_json(tensors: Sequence[tuple[Stored, str]], params: int) -> dict[str, Any]:
    """The index of (stored tensor, file name) pairs. params: unpacked parameters, vision included."""
    return {
        "metadata": {
            "total_size": sum(ITEMSIZE[t.dtype] * count(t.shape) for t, _ in tensors),
            "total_parameters": params,
        },
        "weight_map": {t.name: file for t, file in sorted(tensors, key=lambda p: p[0].name)},
    }


def weights_hash(tensors: Iterable[tuple[str, str, Sequence[int], str]], quantization: Mapping[str, Any] | None) -> str:
    """sha256 of the values that a variant computes with: every stored tensor's name, dtype, shape and bytes (by BLAKE3),
    and how to read them. Independent of sharding, of the card and of side files."""
    rows = sorted([name, dtype, list(shape), blake3] for name, dtype, shape, blake3 in tensors)
    return hashlib.sha256(canonical({"tensors": rows, "quantization": quantization})).hexdigest()


def canonical(value: Any) -> bytes:
    """One JSON text for one value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def side_files(base: Path) -> list[Path]:
    """Files of the base folder that every variant ships. Raises InputError for a link that leaves the folder.

    In a snapshot of the Hugging Face cache every file is a link into `blobs`, which is allowed.
    """
    roots = [base.resolve()]
    if (
        base.absolute().parent.name == "snapshots"
    ):  # models--X/snapshots/COMMIT: blobs of the repo, and of the whole cache
        roots += [(parent / "blobs").resolve() for parent in base.absolute().parents[1:3]]
    found: list[Path] = []
    for pattern in SIDE_FILES:
        for path in sorted(base.glob(pattern)):
            real = path.resolve()
            if not any(real.is_relative_to(root) for root in roots):
                raise InputError(
                    f"{base.name}/{path.name}: links to {real}, outside the base folder; copy the file itself"
                )
            if real.is_file() and path.suffix != ".py":
                found.append(path)
    return found


def copy_side_files(paths: Iterable[Path], folder: Path) -> None:
    for path in paths:
        shutil.copyfile(path, folder / path.name)


def hash_files(folder: Path, known: Iterable[tuple[str, int, str]]) -> list[tuple[str, int, str]]:
    """(name, bytes, sha256) of every file in the folder, sorted; those in `known` are not read again."""
    have = {name: (size, sha) for name, size, sha in known}
    out = []
    for path in sorted(p for p in folder.iterdir() if p.is_file()):
        if path.name in have:
            out.append((path.name, *have[path.name]))
        else:
            with open(path, "rb") as f:
                out.append((path.name, path.stat().st_size, hashlib.file_digest(f, "sha256").hexdigest()))
    return out


def replaced(final: Path) -> Path:
    """Where a variant's old folder waits while the new one is moved in."""
    return final.with_name(f".{final.name}.old")


def finish(staging: Path, final: Path) -> None:
    """Move staging/files to its final name, in place of whatever folder has it, and remove the rest of the staging.

    Both must be on one filesystem. The old folder is set aside by a rename, so that the final name is never half-done;
    it is removed afterwards, stale shards and all.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    aside = replaced(final)
    if aside.exists() and final.exists():
        shutil.rmtree(aside)  # left by a kill between the moves below and the removal
    if final.exists():
        os.rename(final, aside)
    try:
        os.rename(staging / "files", final)
    except OSError:
        if aside.exists():
            os.rename(aside, final)
        raise
    shutil.rmtree(aside, ignore_errors=True)
    shutil.rmtree(staging)
