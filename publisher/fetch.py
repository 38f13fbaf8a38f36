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
from collections.abc import Mapping
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from inference.checkpoint import INDEX, MAX_HEADER_BYTES
from inference.errors import CheckFailed, InputError, ResourceError
from inference.strict import parse_json

from .card_format import size
from .store import write_bytes

if TYPE_CHECKING:
    from .hub import Hub, Progress, RemoteFile

# What a build reads or copies; never Python, nor the weights in other formats that many repos also hold.
BASE_FILES = [
    "config.json", "model*.safetensors", INDEX, "generation_config.json", "tokenizer*",
    "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*", "*processor*.json",
    "LICENSE*", "NOTICE*", "USE_POLICY*", "README.md",
]  # fmt: skip

LARGE_BYTES = 32 << 20  # files above come in small groups, so that progress can be told
AT_ONCE = 4  # of them; the client loads the files of a group side by side

SMALL_FILES = {"config.json": 10 << 20, INDEX: 50 << 20, "README.md": 2 << 20}  # bytes read at most
HEADER_GUESS = 256 << 10  # bytes of the first request; holds the header of most shards
MAX_SHARDS = 2000
MAX_SHARD_BYTES = 500 << 30  # the Hub's limit for one file


def download_size(hub: Hub, repo: str, commit: str) -> int:
    """Bytes that `download_base` would add to the cache of `hf`. Raises InputError if there is no such commit."""
    return sum(f.size for f in _wanted(hub, repo, commit) if not hub.is_cached(repo, f))


def check_disk(needs: Mapping[Path, int]) -> None:
    """Whether the bytes about to be written below each folder fit, all of one disk taken together.

    Raises ResourceError with both figures. A folder need not exist yet.
    """
    disks: dict[int, list[tuple[Path, int]]] = {}
    for folder, nbytes in needs.items():
        existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
        disks.setdefault(existing.stat().st_dev, []).append((existing, nbytes))
    for parts in disks.values():
        total, free = sum(nbytes for _, nbytes in parts), shutil.disk_usage(parts[0][0]).free
        if total > free:
            where = " and ".join(dict.fromkeys(str(folder) for folder, nbytes in parts if nbytes))
            raise ResourceError(f"disk: {size(total)} needed at {where}, {size(free)} free")


def download_base(hub: Hub, repo: str, commit: str, progress: Progress | None = None) -> Path:
    """The base model's folder in the cache of `hf`, downloaded as far as it is not there, every file hashed.

    progress is told before each group of files, with the bytes of those that are done. Raises CheckFailed for a file
    that is not what the hub says, ResourceError if the disk cannot hold it.
    """
    tell = progress or (lambda what, done, total: None)
    hub.require_online(f"downloading {repo}")
    files = _wanted(hub, repo, commit)
    check_disk({hub.cache: sum(f.size for f in files if not hub.is_cached(repo, f))})
    small = [f for f in files if f.size <= LARGE_BYTES]
    large = [f for f in files if f.size > LARGE_BYTES]
    total, done = sum(f.size for f in files), 0
    folder = None
    for group in filter(None, [small, *(large[i : i + AT_ONCE] for i in range(0, len(large), AT_ONCE))]):
        tell(f"downloading {group[0].path}" + (f" and {len(group) - 1} more" if group[1:] else ""), done, total)
        folder = hub.snapshot(repo, commit, [f.path for f in group])
        done += sum(f.size for f in group)
    assert folder is not None
    tell("checking what arrived", total, total)
    check_snapshot(folder)
    return folder


def _wanted(hub: Hub, repo: str, commit: str) -> list[RemoteFile]:
    files = hub.tree(repo, commit)
    found = [f for f in (files or {}).values() if any(fnmatchcase(f.path, pattern) for pattern in BASE_FILES)]
    if not found:
        raise InputError(f"{repo}: no model at {commit[:12]}; expected config.json and safetensors weights")
    return found


def download_file(hub: Hub, repo: str, file: str, commit: str) -> Path:
    """One file of a commit; from the cache, without a network, if it is there. Raises CheckFailed if it is damaged."""
    path = hub.file(repo, file, commit)
    _check_blob(path)
    return path


def check_snapshot(folder: Path) -> None:
    """Hash the base's files in a snapshot of the cache, unless a run of ours did and none was touched since.

    That they were is a note beside the snapshots: a download that was killed before its check has none. Raises
    CheckFailed for a damaged file, which is removed.
    """
    files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
    files = {name: path for name, path in files.items() if any(fnmatchcase(name, pattern) for pattern in BASE_FILES)}
    note = folder.parent.parent / "publish-verified" / folder.name
    if note.is_file() and note.read_bytes() == _note(files):
        return
    for path in files.values():
        _check_blob(path)
    with suppress(OSError):  # a cache that cannot be written to is hashed every time
        write_bytes(note, _note(files))


def _note(files: Mapping[str, Path]) -> bytes:
    """What a check found: name, bytes and time of each file."""
    stats = {name: path.stat() for name, path in files.items()}
    return json.dumps({name: [s.st_size, s.st_mtime_ns] for name, s in stats.items()}, indent=1).encode()


def _check_blob(path: Path) -> None:
    """A blob of the cache is named by its sha256 (LFS) or by git's sha1. Where links are not used there is no name.

    The blob may itself be a link, into the store that the cache's repos share.
    """
    if not path.is_symlink():
        return
    blob = Path(os.path.normpath(path.parent / os.readlink(path)))
    name, size = blob.name, blob.stat().st_size
    if blob.parent.name != "blobs" or len(name) not in (40, 64):
        return
    hasher = hashlib.sha256() if len(name) == 64 else hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
    with open(blob, "rb") as f:
        while block := f.read(8 << 20):
            hasher.update(block)
    if hasher.hexdigest() != name:
        try:  # else the next run would find a complete snapshot
            for damaged in (path, blob.resolve(), blob):
                damaged.unlink(missing_ok=True)
        except OSError:
            raise CheckFailed(f"{path.name}: what arrived is not what the hub holds; delete {blob}") from None
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
            found = sorted(set(parse_json((folder / INDEX).read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
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
            or not name.isprintable()
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
