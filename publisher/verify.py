"""A variant's folder against its manifest and against itself, without MLX: every byte, every shape, every entry.

Headers are read twice, by `inference.checkpoint` and by the safetensors library. Each shard is read once; the hash of
the file and of each tensor come from the same pass, and are kept for the rest of the process as long as the file's
size, times and inode stay (push asks for them again).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Container, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from blake3 import blake3

from inference.checkpoint import (
    INDEX,
    CheckpointError,
    QuantSpec,
    TensorInfo,
    count,
    read_checkpoint,
    read_header,
    read_json,
    read_quantization,
)
from quant.folder import weights_hash
from quant.shards import MTP_FILE

from .prune import Pruned, described
from .schema import Check, Manifest

READ_BYTES = 8 << 20
HASHERS = 4  # threads; one hashes about 1 GB/s: sha256 of the file, and BLAKE3 of its tensors
PARTS = (".weight", ".scales", ".biases")
SIGNATURE = "model.sig"  # `publisher.signing`
PROVENANCE = re.compile(  # `publisher.provenance`
    r"provenance/(variants\.yaml|lock\.json|variants\.allocations/[\w.\-]+\.yaml|results/(build|smoke|bench|quality)\.json)",
    re.ASCII,
)

_hashes: dict[tuple[str, tuple[int, ...]], tuple[str, dict[str, str]]] = {}


def file_key(path: Path) -> tuple[int, ...]:
    """(size, mtime, ctime, inode): changes when the file does."""
    s = path.stat()
    return (s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino)


def is_plain(path: str) -> bool:
    """Whether a path of a manifest stays inside the folder."""
    return bool(path) and "\\" not in path and all(part not in ("", ".", "..") for part in path.split("/"))


def sha256_of(path: Path) -> str:
    """sha256 of a file's bytes; read once a process while `file_key` stays the same."""
    return _hash(path, ())[0]


def _hash(path: Path, tensors: Sequence[TensorInfo]) -> tuple[str, dict[str, str]]:
    """(sha256 of the file, BLAKE3 by tensor). tensors: in file order, as read_header gives them."""
    key = (str(path), file_key(path))
    known = _hashes.get(key)
    if known and all(t.name in known[1] for t in tensors):
        return known
    whole, parts = hashlib.sha256(), {}
    with open(path, "rb", buffering=0) as f:
        position = 0
        for t in [*tensors, None]:
            position += _feed(f, (t.start if t else key[1][0]) - position, whole)
            if t:
                own = blake3()
                position += _feed(f, t.nbytes, whole, own)
                parts[t.name] = own.hexdigest()
        _feed(f, 1 << 62, whole)  # should it have grown meanwhile
    _hashes[key] = whole.hexdigest(), parts
    return _hashes[key]


def _feed(f: Any, nbytes: int, *hashers: Any) -> int:
    left = nbytes
    while left > 0:
        block = f.read(min(left, READ_BYTES))
        if not block:
            break
        for hasher in hashers:
            hasher.update(block)
        left -= len(block)
    return nbytes - left


def verify_folder(folder: Path, manifest: Manifest, pruned: Pruned | None = None) -> list[Check]:
    """One check a property; the detail names the first offender. Raises nothing about the folder's content.

    pruned: files that are not here on purpose. Their tensors count as the manifest says. A check that then finds no fault
    and had nothing of the weights to look at is neither passed nor failed.
    """
    gone = pruned.files if pruned else {}
    shards, headers_fault = _headers(folder, manifest, gone)
    with ThreadPoolExecutor(HASHERS) as pool:
        list(pool.map(_hash, shards.keys(), shards.values()))

    def checked(name: str, fault: str, good: str) -> Check:
        return _not_checked(name) if pruned and not shards and not fault else check_of(name, fault, good)

    checks = [
        _files(folder, manifest, shards, gone),
        _no_others(folder, manifest),
        checked("shards", headers_fault, f"{len(shards)} safetensors files parse"),
        checked("second reader", _second_reader(shards), "the safetensors library finds the same tensors"),
        _index(folder) if pruned is None else _index_alone(folder, manifest),
    ]
    config: dict[str, Any] = {}
    spec: QuantSpec | None = None
    modules: dict[str, QuantSpec | None] = {}
    try:
        config = read_json(folder / "config.json")
        spec, modules = read_quantization(config)
        if ("quantization" in config) != ("quantization_config" in config):
            raise CheckpointError("config.json: quantization and quantization_config must both be there or neither")
        checks.append(check_of("config", "", f"{len(modules)} modules have a format"))
    except CheckpointError as e:
        checks.append(check_of("config", str(e)))
    found = {t.name: t for tensors in shards.values() for t in tensors}
    hashes = {name: own for path, tensors in shards.items() for name, own in _hash(path, tensors)[1].items()}
    unread = 0
    if pruned:
        detail = f"pruned: {len(gone)} files, proven to be in {pruned.where}; publish build brings them back"
        checks.insert(1, Check(name="weights", passed=None, detail=detail))
        with suppress(CheckpointError):  # told by `_index_alone`
            missing = {n: t for n, t in described(folder, manifest).tensors.items() if t.file.name in gone}
            found = {**missing, **found}
            unread = len(missing.keys() - hashes.keys())
            hashes = {t.name: t.blake3 for t in manifest.tensors if t.name in missing} | hashes
    fault = _tensors(manifest, found, hashes)
    few = f"{len(hashes) - unread} of " if unread else ""
    checks.append(checked("tensors", fault, f"{few}{len(manifest.tensors)} tensors, bytes as in the manifest"))
    rows = [(t.name, t.dtype, t.shape, hashes[t.name]) for t in found.values()]
    actual = weights_hash(rows, config.get("quantization"))
    wrong = (
        "" if actual == manifest.weights_hash else f"found {actual[:12]}, manifest says {manifest.weights_hash[:12]}"
    )
    checks.append(check_of("weights hash", wrong, actual[:12]))
    checks.append(checked("packed weights", _packing(found, modules), "shapes fit bits, group size and mode"))
    checks.append(
        check_of("module formats", _entries(found, spec, modules), "an entry for each packed module, no other")
    )
    return checks


def check_of(name: str, fault: str, good: str = "") -> Check:
    """A check that failed if there is a fault, which is then its detail."""
    return Check(name=name, passed=not fault, detail=fault or good)


def _not_checked(name: str) -> Check:
    return Check(name=name, passed=None, detail="not checked: pruned")


def _headers(folder: Path, manifest: Manifest, gone: Container[str]) -> tuple[dict[Path, list[TensorInfo]], str]:
    """Tensors by shard of the manifest, and the first fault."""
    found: dict[Path, list[TensorInfo]] = {}
    fault = ""
    for entry in manifest.files:
        if entry.path.endswith(".safetensors") and is_plain(entry.path) and entry.path not in gone:
            try:
                found[folder / entry.path] = read_header(folder / entry.path)[0]
            except CheckpointError as e:
                fault = fault or str(e)
    return found, fault


def _second_reader(shards: dict[Path, list[TensorInfo]]) -> str:
    """The first shard that the format's own library does not read as `read_header` does. Maps files, reads no weights."""
    from safetensors import SafetensorError, safe_open  # noqa: PLC0415 - `status` needs it for nothing

    for path, tensors in shards.items():
        ours = {t.name: (t.dtype, t.shape) for t in tensors}
        try:
            with safe_open(path, framework="np") as f:
                theirs = {n: (s.get_dtype(), tuple(s.get_shape())) for n in f.keys() for s in [f.get_slice(n)]}  # noqa: SIM118
        except (SafetensorError, OSError) as e:
            return f"{path.name}: the safetensors library refuses it: {str(e).splitlines()[0][:200]}"
        for name in sorted(ours.keys() | theirs.keys()):
            if ours.get(name) != theirs.get(name):
                return f"{path.name}: {name} is {_shown(ours.get(name))}, for the safetensors library {_shown(theirs.get(name))}"
    return ""


def _files(folder: Path, manifest: Manifest, shards: dict[Path, list[TensorInfo]], gone: Container[str]) -> Check:
    here = [entry for entry in manifest.files if entry.path not in gone]
    for entry in here:
        path = folder / entry.path
        if not is_plain(entry.path):
            return check_of("files", f"{entry.path!r} leads out of the folder")
        try:
            size = path.stat().st_size
            if path.is_symlink() or not path.is_file():
                return check_of("files", f"{entry.path} is no regular file")
            if size != entry.size:
                return check_of("files", f"{entry.path} has {size} bytes, manifest says {entry.size}")
            sha = _hash(path, shards.get(path, ()))[0]
        except OSError as e:
            return check_of("files", f"{entry.path}: {e.strerror}")
        if sha != entry.sha256:
            return check_of("files", f"{entry.path} has sha256 {sha[:12]}, manifest says {entry.sha256[:12]}")
    return check_of("files", "", f"{len(here)} files, sizes and sha256 as in the manifest")


def beside_manifest(path: str) -> bool:
    """Whether a file of a variant's folder is one that the manifest does not list: itself, the card with its images, the
    provenance, the signature."""
    if path in ("manifest.json", "README.md", SIGNATURE) or PROVENANCE.fullmatch(path):
        return True
    return path.startswith("images/") and path.count("/") == 1


def stray_files(folder: Path, manifest: Manifest) -> list[str]:
    """Files below the folder that are neither in the manifest nor may stand beside it."""
    known = {f.path for f in manifest.files}
    found = [p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_symlink() or not p.is_dir()]
    return [p for p in found if p not in known and not beside_manifest(p)]


def _no_others(folder: Path, manifest: Manifest) -> Check:
    strays = stray_files(folder, manifest)
    weights = [p for p in strays if p.endswith(".safetensors")]
    first = next(iter(weights or strays), "")
    return check_of("no other files", f"{first} is not in the manifest" if first else "", "none")


def _index(folder: Path) -> Check:
    """The index names exactly the tensors and shards that are there; without one there is a single file."""
    try:
        checkpoint = read_checkpoint(folder)
        named = {t.file.name for t in checkpoint.tensors.values()}
        lost = sorted(p.name for p in folder.glob("*.safetensors") if p.name not in {*named, MTP_FILE})
        if lost:
            raise CheckpointError(f"{lost[0]} is in no {INDEX}")
        if not checkpoint.mlx:
            raise CheckpointError("the shards do not declare `format: mlx`")
    except CheckpointError as e:
        return check_of("index", str(e))
    return check_of("index", "", f"{len(checkpoint.tensors)} tensors")


def _index_alone(folder: Path, manifest: Manifest) -> Check:
    """The index against the manifest, where shards are pruned."""
    try:
        described(folder, manifest)
        if (folder / INDEX).is_file():
            names = {t.name for t in manifest.tensors}
            other = sorted(set(read_json(folder / INDEX)["weight_map"]) - names)
            if other:
                raise CheckpointError(f"{INDEX}: {other[0]} is not in the manifest")
    except CheckpointError as e:
        return check_of("index", str(e))
    return check_of("index", "", f"{len(manifest.tensors)} tensors")


def _tensors(manifest: Manifest, found: dict[str, TensorInfo], hashes: dict[str, str]) -> str:
    """The first tensor that is not as the manifest says."""
    listed = {t.name: t for t in manifest.tensors}
    for name in sorted(listed.keys() | found.keys()):
        if name not in found:
            return f"{name} is in no shard"
        if name not in listed:
            return f"{name} is not in the manifest"
        want, have = listed[name], found[name]
        if (want.dtype, want.shape) != (have.dtype, list(have.shape)):
            return f"{name} is {have.dtype} {list(have.shape)}, not {want.dtype} {want.shape}"
        if want.blake3 != hashes[name]:
            return f"{name} has BLAKE3 {hashes[name][:12]}, manifest says {want.blake3[:12]}"
    return ""


def _packing(found: dict[str, TensorInfo], modules: dict[str, QuantSpec | None]) -> str:
    """The first packed weight whose stored tensors are not those of its format."""
    for name in sorted(found):
        if not name.endswith((".scales", ".biases")):
            continue
        module = name.rsplit(".", 1)[0]
        weight, scales = found.get(f"{module}.weight"), found.get(f"{module}.scales")
        spec = modules.get(module)
        if weight is None or scales is None:
            return f"{name} has no {module}.{'weight' if weight is None else 'scales'} beside it"
        if spec is None:
            continue  # told by _entries
        if len(weight.shape) < 2 or len(weight.shape) != len(scales.shape):
            return f"{module}: weight {list(weight.shape)} and scales {list(scales.shape)} are no matrices"
        columns, groups = weight.shape[-1] * 32, scales.shape[-1] * spec.group_size
        if columns != groups * spec.bits:
            return (
                f"{module}: {weight.shape[-1]} packed columns hold {columns / spec.bits:g} weights of {spec.bits} "
                f"bits, {scales.shape[-1]} groups of {spec.group_size} hold {groups}"
            )
        want = {n: (d, s) for n, d, s in spec.parts(f"{module}.weight", (*weight.shape[:-1], groups), scales.dtype)}
        have = {n: (found[n].dtype, found[n].shape) for p in PARTS if (n := module + p) in found}
        for part in sorted(want.keys() | have.keys()):
            if want.get(part) != have.get(part):
                return f"{part}: found {_shown(have.get(part))}, {spec.label()} needs {_shown(want.get(part))}"
        if spec.mode == "affine" and scales.dtype not in ("BF16", "F16", "F32"):
            return f"{module}.scales: dtype {scales.dtype} is no float"
    return ""


def _shown(part: tuple[str, tuple[int, ...]] | None) -> str:
    return f"{part[0]} {list(part[1])}" if part else "nothing"


def _entries(found: dict[str, TensorInfo], spec: QuantSpec | None, modules: dict[str, QuantSpec | None]) -> str:
    """The first module whose entry in the config and whose stored tensors disagree on whether it is packed."""
    packed = {name.removesuffix(".scales") for name in found if name.endswith(".scales")}
    named = {module for module, entry in modules.items() if entry is not None}
    if packed and spec is None:
        return "config.json has no quantization block, but tensors are packed"
    for module in sorted(packed ^ named):
        if module in packed:
            return f"{module} is packed, but config.json has no entry for it"
        return f"{module} has an entry in config.json, but no scales"
    for name, t in sorted(found.items()):
        if t.dtype == "U32" and count(t.shape) and name.removesuffix(".weight") not in packed:
            return f"{name} is packed (U32), but has no scales"
    return ""
