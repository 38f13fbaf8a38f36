"""What comes down from the Hub: the base model, an imatrix, or only the headers of a base that is to be planned with.

The client checks sizes and not content, so everything is hashed here: in the cache of `hf` a file's blob bears the name
of its own hash. Answers are not trusted: names, counts and sizes are bounded before anything is written.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from inference.errors import CheckFailed, InputError, ResourceError

if TYPE_CHECKING:
    from .hub import Hub

# What a build reads or copies; never Python, nor the weights in other formats that many repos also hold.
BASE_FILES = [
    "config.json", "model*.safetensors", "model.safetensors.index.json", "generation_config.json", "tokenizer*",
    "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*", "*processor*.json",
    "LICENSE*", "NOTICE*", "README.md",
]  # fmt: skip

INDEX = "model.safetensors.index.json"
SMALL_FILES = {"config.json": 10 << 20, INDEX: 50 << 20, "README.md": 2 << 20}  # bytes read at most
HEADER_GUESS = 256 << 10  # bytes of the first request; holds the header of most shards
MAX_HEADER_BYTES = 25 << 20  # the Hub's own limit
MAX_SHARDS = 2000
MAX_SHARD_BYTES = 500 << 30  # the Hub's limit for one file


def download_base(hub: Hub, repo: str, commit: str) -> Path:
    """The base model's folder in the cache of `hf`, downloaded as far as it is not there, every file hashed.

    Raises CheckFailed for a file that is not what the hub says, ResourceError if the disk cannot hold it.
    """
    hub.require_online(f"downloading {repo}")
    folder = hub.snapshot(repo, commit, BASE_FILES)
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        _check_blob(path)
    return folder


def download_file(hub: Hub, repo: str, file: str, commit: str) -> Path:
    """One file of a commit; from the cache, without a network, if it is there. Raises CheckFailed if it is damaged."""
    path = hub.file(repo, file, commit)
    _check_blob(path)
    return path


def _check_blob(path: Path) -> None:
    """A blob of the cache is named by its sha256 (LFS) or by git's sha1. Where links are not used there is no name."""
    blob = path.resolve()
    name, size = blob.name, blob.stat().st_size
    if blob.parent.name != "blobs" or len(name) not in (40, 64):
        return
    hasher = hashlib.sha256() if len(name) == 64 else hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
    with open(blob, "rb") as f:
        while block := f.read(8 << 20):
            hasher.update(block)
    if hasher.hexdigest() != name:
        path.unlink()  # else the next run would find a complete snapshot
        blob.unlink(missing_ok=True)
        raise CheckFailed(f"{path.name}: what arrived is not what the hub holds; it was removed: run again")


def remote_headers(hub: Hub, repo: str, commit: str, dest: Path) -> Path:
    """Write a folder that reads like the checkpoint but holds no weights: config, index, README and sparse shards.

    A shard is its header, by ranged request, and a hole up to its full size. `dest` appears when all of it is there.
    Raises InputError if the repo holds no safetensors checkpoint.
    """
    hub.require_online(f"reading the headers of {repo}")
    files = hub.tree(repo, commit)
    if files is None or "config.json" not in files:
        raise InputError(f"{repo}: no config.json at {commit[:12]}; expected a model with safetensors weights")
    dest.parent.mkdir(parents=True, exist_ok=True)
    temp = Path(tempfile.mkdtemp(dir=dest.parent, prefix=f".{dest.name}."))
    try:
        for name, limit in SMALL_FILES.items():
            if name in files:
                if files[name].size > limit:
                    raise InputError(f"{repo}: {name} has {files[name].size} bytes, expected at most {limit}")
                data = hub.read_range(repo, commit, name, 0, limit)
                if len(data) != files[name].size:
                    raise InputError(f"{repo}: {name} ends after {len(data)} of {files[name].size} bytes")
                (temp / name).write_bytes(data)
        shards = _shard_names(temp, list(files), repo)
        for name in shards:
            if name not in files:
                raise InputError(f"{repo}: {INDEX} names {name}, which the repo does not hold")
            _write_sparse(hub, repo, commit, name, files[name].size, temp / name)
        os.chmod(temp, 0o755)
        if dest.exists():
            shutil.rmtree(dest)  # left by something else; complete folders are not asked for again
        os.rename(temp, dest)
    except OSError as e:
        raise ResourceError(f"{dest}: {e.strerror}; sparse files of the model's full size are needed there") from None
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    return dest


def _shard_names(folder: Path, files: list[str], repo: str) -> list[str]:
    if (folder / INDEX).is_file():
        try:
            found = sorted(set(json.loads((folder / INDEX).read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise InputError(f"{repo}: {INDEX} holds no weight_map") from None
    else:
        found = sorted(f for f in files if f.startswith("model") and f.endswith(".safetensors"))
    if not found or len(found) > MAX_SHARDS:
        raise InputError(f"{repo}: {len(found)} safetensors files, expected 1 to {MAX_SHARDS}")
    for name in found:
        if (
            not isinstance(name, str)
            or name != os.path.basename(name)
            or not name.endswith(".safetensors")
            or "\\" in name
        ):
            raise InputError(f"{repo}: {name!r} is no name of a safetensors file beside the index")
    return found


def _write_sparse(hub: Hub, repo: str, commit: str, name: str, size: int, path: Path) -> None:
    if not 8 <= size <= MAX_SHARD_BYTES:
        raise InputError(f"{repo}: {name} has {size} bytes, expected a safetensors file")
    data = hub.read_range(repo, commit, name, 0, min(size, HEADER_GUESS))
    if len(data) < 8:
        raise InputError(f"{repo}: {name}: the hub sent {len(data)} bytes, expected a header")
    end = 8 + struct.unpack("<Q", data[:8])[0]
    if end > min(size, MAX_HEADER_BYTES):
        raise InputError(f"{repo}: {name}: a header of {end} bytes does not fit the file ({size} bytes)")
    if len(data) < end:
        data += hub.read_range(repo, commit, name, len(data), end - len(data))
    if len(data) < end:
        raise InputError(f"{repo}: {name}: the header ends after {len(data)} of {end} bytes")
    with open(path, "wb") as f:
        f.write(data[:end])
        f.truncate(size)
