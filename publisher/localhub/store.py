"""Repositories on disk: commits, refs, blobs.

    FOLDER/lock                            held while a hub runs: two hubs on one folder would lose commits
    FOLDER/secret                          key of the signed upload and download URLs
    FOLDER/tmp/                            unfinished files, emptied at start
    FOLDER/blobs/sha1/ab/<git blob id>     regular files
    FOLDER/blobs/sha256/ab/<sha256>        LFS files
    FOLDER/repos/KIND/NS/NAME/commits/<id>.json
    FOLDER/repos/KIND/NS/NAME/repo.json    settings, branches, tags, discussions
    FOLDER/collections/<24 hex>.json
    FOLDER/xet/                            see xet_store.py

Every file is written under `tmp/` and moved into place, and blobs and commits go first: a push becomes visible by
the one replacement of `repo.json`, so a hub killed at any moment restarts with the push whole or absent. (Killed,
not powered off: there is no fsync.) A path inside a repository is never a path on this disk.

Nothing here is locked: the server runs all of it on one event loop and never awaits between reading and saving.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import os
import re
import secrets
import shutil
import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

KINDS = ("models", "datasets", "spaces")
COMMIT_ID = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")
NAME = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}(?<![.-])")
PR_REF = re.compile(r"refs/pr/([1-9]\d{0,8})")
STALE_UPLOAD_S = 24 * 3600  # parts of a multipart upload nobody completed


class FolderInUse(Exception):
    """Another hub runs on this folder."""


@dataclass(frozen=True)
class File:
    """One file of a commit: its git blob id (of the pointer, for an LFS file), and sha256 if it is in LFS."""

    oid: str
    size: int
    sha256: str | None = None

    @property
    def etag(self) -> str:
        return self.sha256 or self.oid


Tree = dict[str, File]


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    tree: Tree
    title: str
    message: str
    author: str
    date: str


@dataclass
class Repo:
    """What `repo.json` holds. Changed in memory, then saved whole by `Store.save`."""

    kind: str
    id: str
    private: bool
    gated: str | bool
    created_at: str
    heads: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    discussions: list[dict[str, Any]] = field(default_factory=list)

    @property
    def namespace(self) -> str:
        return self.id.split("/")[0]

    def discussion(self, num: int) -> dict[str, Any] | None:
        return self.discussions[num - 1] if 1 <= num <= len(self.discussions) else None


class Store:
    """The folder of one hub. Raises FolderInUse if another process has it open."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = open(folder / "lock", "w")  # noqa: SIM115 - held until close
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            self._lock.close()
            raise FolderInUse(f"{folder}: another hub is running on this folder") from e
        shutil.rmtree(folder / "tmp", ignore_errors=True)
        for name in ("tmp", "uploads", "collections", "blobs/sha1", "blobs/sha256", "repos"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        for upload in (folder / "uploads").iterdir():
            if time.time() - upload.stat().st_mtime > STALE_UPLOAD_S:
                shutil.rmtree(upload, ignore_errors=True)
        self.secret = self._secret()

    def close(self) -> None:
        self._lock.close()

    def _secret(self) -> bytes:
        path = self.folder / "secret"
        if not path.exists():
            self.write(path, secrets.token_bytes(32))
            path.chmod(0o600)
        return path.read_bytes()

    def mac(self, text: str) -> str:
        """What only this hub can say of a text: its signature of URLs and of Xet tokens."""
        return hmac.new(self.secret, text.encode("utf-8", "surrogateescape"), "sha256").hexdigest()

    def is_mac(self, text: str, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self.mac(text).encode())

    # -- files ------------------------------------------------------------------------------------------------

    def temp(self) -> Path:
        return self.folder / "tmp" / secrets.token_hex(16)

    def write(self, path: Path, data: bytes) -> None:
        """The whole file or none of it."""
        temp = self.temp()
        temp.write_bytes(data)
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(temp, path)

    def add_blob(self, data: bytes) -> File:
        file = File(git_blob_id(data), len(data))
        path = self.path_of(file)
        if not path.exists():
            self.write(path, data)
        return file

    def keep_lfs(self, temp: Path, sha256: str) -> None:
        """Move a checked file into the LFS store."""
        path = self.lfs_path(sha256)
        path.parent.mkdir(exist_ok=True)
        os.replace(temp, path)

    def lfs_file(self, sha256: str) -> File | None:
        path = self.lfs_path(sha256)
        if not path.exists():
            return None
        size = path.stat().st_size
        return File(git_blob_id(pointer(sha256, size)), size, sha256)

    def lfs_path(self, sha256: str) -> Path:
        assert SHA256.fullmatch(sha256)
        return self.folder / "blobs/sha256" / sha256[:2] / sha256

    def path_of(self, file: File) -> Path:
        if file.sha256:
            return self.lfs_path(file.sha256)
        return self.folder / "blobs/sha1" / file.oid[:2] / file.oid

    # -- repositories -----------------------------------------------------------------------------------------

    def repo(self, kind: str, repo_id: str) -> Repo | None:
        if not is_repo_id(repo_id):
            return None
        try:
            text = (self._repo_folder(kind, repo_id) / "repo.json").read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return _load_repo(text, kind, repo_id)

    def repos(self, kind: str) -> list[Repo]:
        found = sorted((self.folder / "repos" / kind).glob("*/*/repo.json"))
        return [_load_repo(path.read_bytes(), kind, "/".join(path.parts[-3:-1])) for path in found]

    def create_repo(self, kind: str, repo_id: str, private: bool, author: str, tree: Tree) -> Repo:
        repo = Repo(kind, repo_id, private, False, now())
        # The first commit's id would be the same in two repositories made in one millisecond; harmless.
        repo.heads["main"] = self.add_commit(repo, None, tree, "initial commit", "", author).oid
        self.save(repo)
        return repo

    def save(self, repo: Repo) -> None:
        self.write(self._repo_folder(repo.kind, repo.id) / "repo.json", dump(asdict(repo)))

    def delete_repo(self, repo: Repo) -> None:
        temp = self.temp()
        os.replace(self._repo_folder(repo.kind, repo.id), temp)
        shutil.rmtree(temp)

    def move_repo(self, repo: Repo, new_id: str) -> None:
        old, new = self._repo_folder(repo.kind, repo.id), self._repo_folder(repo.kind, new_id)
        new.parent.mkdir(parents=True, exist_ok=True)
        os.replace(old, new)
        repo.id = new_id
        self.save(repo)

    def _repo_folder(self, kind: str, repo_id: str) -> Path:
        """No id leads outside `repos/`."""
        assert kind in KINDS
        assert is_repo_id(repo_id)
        return self.folder / "repos" / kind / repo_id

    # -- commits ----------------------------------------------------------------------------------------------

    def add_commit(self, repo: Repo, parent: str | None, tree: Tree, title: str, message: str, author: str) -> Commit:
        """Write a commit object. No ref points to it yet: that is for the caller to save."""
        value = {
            "parent": parent,
            "tree": {path: [f.oid, f.size, f.sha256] for path, f in tree.items()},
            "title": title,
            "message": message,
            "author": author,
            "date": now(),
        }
        data = dump(value)
        oid = hashlib.sha1(b"commit %d\0" % len(data) + data).hexdigest()
        self.write(self._commit_path(repo, oid), data)
        return self.commit(repo, oid)

    def commit(self, repo: Repo, oid: str) -> Commit:
        value = json.loads(self._commit_path(repo, oid).read_bytes())
        value["tree"] = {path: File(*item) for path, item in value["tree"].items()}
        return Commit(oid, **value)

    def history(self, repo: Repo, oid: str) -> list[Commit]:
        """The commit and its ancestors, newest first."""
        commits = []
        at: str | None = oid
        while at:
            commits.append(self.commit(repo, at))
            at = commits[-1].parent
        return commits

    def resolve(self, repo: Repo, rev: str) -> str | None:
        """Commit id of a branch, tag, full ref, pull request, full commit id, or of HEAD, which is main."""
        if COMMIT_ID.fullmatch(rev):
            return rev if self._commit_path(repo, rev).exists() else None
        pull = PR_REF.fullmatch(rev)
        if pull:
            discussion = repo.discussion(int(pull[1]))
            return discussion["head"] if discussion and discussion["isPullRequest"] else None
        if rev.startswith("refs/heads/"):
            return repo.heads.get(rev.removeprefix("refs/heads/"))
        if rev.startswith("refs/tags/"):
            return repo.tags.get(rev.removeprefix("refs/tags/"))
        return repo.heads.get("main" if rev == "HEAD" else rev) or repo.tags.get(rev)

    def _commit_path(self, repo: Repo, oid: str) -> Path:
        assert COMMIT_ID.fullmatch(oid)
        return self._repo_folder(repo.kind, repo.id) / "commits" / f"{oid}.json"


def _load_repo(text: bytes, kind: str, repo_id: str) -> Repo:
    # The folder names the repository, not the file: a move is one rename, whatever happens after it.
    return Repo(**(json.loads(text) | {"kind": kind, "id": repo_id}))


def is_repo_id(text: str) -> bool:
    """NS/NAME, as the Hub would take it."""
    names = text.split("/")
    return len(names) == 2 and all(NAME.fullmatch(name) for name in names) and not text.endswith(".git")


def git_blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def pointer(sha256: str, size: int) -> bytes:
    """The text git keeps in place of an LFS file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def dump(value: Any) -> bytes:
    """Canonical JSON: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
