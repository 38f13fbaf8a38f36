"""The Hub as this project uses it: typed calls with timeouts, bounded retries and one line for every error.

Only the files `hub*.py` import huggingface_hub. Each call is made through `hub_errors.Calls`, which retries what
may be retried and turns the rest into the errors of `inference.errors`. `commit` is never retried here: whether it
landed is decided by `push` from what the repo then holds.
"""

from __future__ import annotations

import glob
import hashlib
import os
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    hf_hub_url,
    snapshot_download,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import (
    build_hf_headers,
    get_session,
    hf_raise_for_status,
)

from inference.checkpoint import shard_files
from inference.errors import AuthError, CheckFailed, CheckpointError, HubUnavailable, InputError, RemoteChanged

from .fetch import BASE_FILES, check_disk, check_snapshot, download_base, download_file, download_size, remote_headers
from .hub_client import checked_endpoint, checked_token, configure, no_bars
from .hub_errors import Calls

__all__ = [
    "Account", "Head", "Hub", "Progress", "RemoteFile", "Upload",
    "cached_snapshot", "check_disk", "download_base", "download_file", "download_size", "remote_headers",
]  # fmt: skip

ANSWER_S = 120  # of silence while reading or writing; the Hub's gateway gives up on a commit after about 60
PATIENCE_S = 60  # for all tries of one call, waits included
PAUSE_S = 1.0  # before the second try, doubled for each further one
DOWNLOAD_TRIES = 3  # what has arrived is kept from one to the next
UPLOAD_TRIES = 3  # of one group of files; the client itself repeats a PUT up to five times within each
ALONE_BYTES = 32 << 20  # larger files are uploaded one by one, so that progress can be told and done ones are kept

Progress = Callable[[str, int, int], None]  # what is being done, bytes done, bytes in all


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repo. sha256: of an LFS file's bytes, else None; blob: git's sha1, of the pointer for LFS."""

    path: str
    size: int
    sha256: str | None
    blob: str

    @property
    def identity(self) -> str:
        """What changes exactly when the bytes do."""
        return self.sha256 or self.blob


@dataclass(frozen=True)
class Head:
    """What a revision holds."""

    commit: str
    private: bool
    files: dict[str, RemoteFile]


@dataclass(frozen=True)
class Account:
    """Whose token this is. role: read, write, fineGrained, or "" if the hub does not say."""

    name: str
    role: str


@dataclass(frozen=True)
class Upload:
    """A file to commit. source: bytes for small files, so that what was hashed is what is sent."""

    path: str
    source: Path | bytes
    size: int
    sha256: str


class Hub:
    """A connection to one endpoint with one token.

    endpoint None: HF_ENDPOINT or huggingface.co. token None: HF_TOKEN or the file that `hf auth login` writes.
    patience_s: for all tries of one call. Raises AuthError for a token that cannot be one, InputError for an endpoint.
    The client is one for the process: the last Hub made sets its timeouts.
    """

    def __init__(
        self,
        endpoint: str | None = None,
        token: str | None = None,
        *,
        patience_s: float = PATIENCE_S,
        pause_s: float = PAUSE_S,
        answer_s: float = ANSWER_S,
    ) -> None:
        self.endpoint = checked_endpoint(endpoint or constants.ENDPOINT)
        self.pause_s = pause_s
        self._token = checked_token(token)
        self._call = Calls(self.endpoint, self._token, patience_s, pause_s)
        configure(self.endpoint, answer_s, self._call.watch)
        self._api = HfApi(endpoint=self.endpoint, token=self._token or False)

    def __repr__(self) -> str:
        return f"Hub({self.endpoint!r})"

    # ------------------------------------------------------------------------------------------ before a push

    def require_online(self, doing: str) -> None:
        """Raises HubUnavailable while HF_HUB_OFFLINE is set."""
        if constants.is_offline_mode():
            raise HubUnavailable(f"{doing} needs the hub, and HF_HUB_OFFLINE is set: unset it")

    def require_token(self, doing: str) -> None:
        """Raises AuthError if there is no token."""
        if not self._token:
            raise AuthError(f"{doing} needs a token with write access: run `hf auth login`, or set HF_TOKEN")

    def account(self) -> Account:
        def ask() -> Account:
            who = self._api.whoami()
            token = (who.get("auth") or {}).get("accessToken") or {}
            if not isinstance(who.get("name"), str):
                raise self._call.none_of_a_hub("asking whose token this is")
            return Account(who["name"], str(token.get("role") or ""))

        return self._call("asking whose token this is", ask)

    def check_write(self, repo: str) -> None:
        """Raises AuthError unless the token may write to the repo."""
        self._call(f"checking write access to {repo}", self._api.auth_check, repo, write=True)

    def create_repo(self, repo: str, private: bool) -> None:
        self._call.forget_conflicts()
        self._call(f"creating {repo}", self._api.create_repo, repo, private=private, exist_ok=True)

    # ------------------------------------------------------------------------------------------ what a repo holds

    def head(self, repo: str, revision: str = "main") -> Head | None:
        """A revision's commit and files; None if there is no such repo, or none that this token may see."""

        def ask() -> Any:
            try:
                return self._api.model_info(repo, revision=revision)
            except GatedRepoError:
                raise
            except RepositoryNotFoundError:
                return None

        info = self._call(f"reading {repo}", ask)
        if info is None:
            return None
        if info.id != repo:
            raise InputError(f"{repo}: the hub calls it {info.id} now; set `repo: {info.id}` for the variant")
        files = self.tree(repo, str(info.sha))
        return Head(str(info.sha), bool(info.private), files or {})

    def tree(self, repo: str, commit: str) -> dict[str, RemoteFile] | None:
        """The files of a commit by path; None if the repo no longer has that commit."""

        def ask() -> dict[str, RemoteFile] | None:
            try:
                entries = list(self._api.list_repo_tree(repo, recursive=True, revision=commit))
            except RevisionNotFoundError:
                return None
            files = {}
            for entry in entries:
                if hasattr(entry, "blob_id"):
                    lfs: Any = getattr(entry, "lfs", None)
                    files[entry.path] = RemoteFile(entry.path, entry.size, lfs.sha256 if lfs else None, entry.blob_id)  # type: ignore[union-attr]
            return files

        return self._call(f"listing the files of {repo}", ask)

    def tags(self, repo: str) -> dict[str, str]:
        """Commit by tag name."""
        refs = self._call(f"reading the tags of {repo}", self._api.list_repo_refs, repo)
        return {tag.name: tag.target_commit for tag in refs.tags}

    # ------------------------------------------------------------------------------------------ changing a repo

    def check_card(self, text: str) -> None:
        """Raises InputError if the hub would refuse the card's metadata: better before the weights than after."""

        def ask() -> str:
            body = {"content": text, "repoType": "model"}
            answer = get_session().post(f"{self.endpoint}/api/validate-yaml", json=body, headers=self._headers())
            if answer.status_code == 400:
                return _first_message(answer.json())
            hf_raise_for_status(answer)
            return ""

        fault = self._call("checking the card's metadata", ask)
        if fault:
            raise InputError(f"README.md: the hub refuses its metadata: {self._call.clean(fault)}")

    def upload(
        self, repo: str, revision: str, uploads: Sequence[Upload], progress: Progress | None = None
    ) -> list[Any]:
        """Send what goes to LFS or Xet; returns the operations for `commit`. What the hub has is not sent again.

        Raises CheckFailed if what was sent is not what was hashed before.
        """
        operations = {
            u.path: CommitOperationAdd(u.path, str(u.source) if isinstance(u.source, Path) else u.source)
            for u in uploads
        }
        total, done = sum(u.size for u in uploads), 0
        small = [u for u in uploads if u.size <= ALONE_BYTES]
        with no_bars():
            for group in filter(None, [small, *([u] for u in uploads if u.size > ALONE_BYTES)]):
                if progress:
                    progress(f"uploading {group[0].path}" if group is not small else "uploading", done, total)
                self._upload_group(repo, revision, group, operations)
                done += sum(u.size for u in group)
        if progress:
            progress("uploaded", total, total)
        return list(operations.values())

    def _upload_group(self, repo: str, revision: str, group: list[Upload], operations: dict[str, Any]) -> None:
        wanted = [operations[u.path] for u in group]
        for attempt in range(1, UPLOAD_TRIES + 1):
            try:
                # also for refused URLs (400, 403, 413 by the storage): a new call gets new ones
                self._call(
                    f"uploading to {repo}", self._api.preupload_lfs_files, repo, wanted, revision=revision,
                    free_memory=False, retry=False,
                )  # fmt: skip
                break
            except (HubUnavailable, InputError):
                _check_sizes(group)
                if attempt == UPLOAD_TRIES:
                    raise
                time.sleep(self.pause_s * attempt)
        for u in group:
            if operations[u.path].upload_info.sha256.hex() != u.sha256:
                raise CheckFailed(f"{u.path} changed while it was being pushed; nothing was committed: run push again")

    def commit(
        self, repo: str, revision: str, operations: Iterable[Any], delete: Iterable[str], title: str, parent: str
    ) -> str:
        """One commit on top of `parent`; returns its id. An error does not mean that it did not land."""
        all_ = [*operations, *(CommitOperationDelete(path, is_folder=False) for path in delete)]
        with no_bars(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # hints about the card's metadata; its faults are told by check_card
            info = self._call(
                f"committing to {repo}", self._api.create_commit, repo, all_, commit_message=title, revision=revision,
                parent_commit=parent, retry=False,
            )  # fmt: skip
        return info.oid

    def open_pull(self, repo: str, title: str, text: str) -> int:
        """A new pull request without commits, or ours of that title if the answer to an earlier call was lost."""
        name = self.account().name

        def ask() -> int:
            for d in self._api.get_repo_discussions(
                repo, author=name, discussion_type="pull_request", discussion_status="open"
            ):
                if d.title == title:
                    return d.num
            return self._api.create_pull_request(repo, title, description=text).num

        return self._call(f"opening a pull request on {repo}", ask)

    def pull_status(self, repo: str, number: int) -> str:
        """draft, open, closed, merged, or "" if there is no such pull request."""

        def ask() -> str:
            try:
                return self._api.get_discussion_details(repo, number).status
            except HfHubHTTPError as e:
                if e.response.status_code == 404:
                    return ""
                raise

        return self._call(f"reading pull request {number} of {repo}", ask)

    def publish_pull(self, repo: str, number: int) -> None:
        """Make a draft an open pull request. Raises AuthError where only the repo's owner may."""
        if self.pull_status(repo, number) == "draft":
            self._call(
                f"opening pull request {number} of {repo}", self._api.change_discussion_status, repo, number, "open"
            )

    def tag(self, repo: str, name: str, commit: str) -> None:
        """Raises RemoteChanged if the tag exists on another commit."""
        self._call(f"tagging {repo}", self._api.create_tag, repo, tag=name, revision=commit, exist_ok=True)
        found = self.tags(repo).get(name)
        if found != commit:
            raise RemoteChanged(f"{repo}: tag {name} is on {str(found)[:8]}, not on {commit[:8]}; run push again")

    def collect(self, owner: str, title: str, description: str, repo: str, note: str) -> str:
        """List the repo in the owner's collection of that title, with the note; returns the collection's slug."""
        doing = f"adding {repo} to the collection {title!r}"
        collection = self._call(
            doing, self._api.create_collection, title, namespace=owner, description=description, exists_ok=True
        )
        if (collection.description or "") != description:
            self._call(doing, self._api.update_collection_metadata, collection.slug, description=description)
        item = next((i for i in collection.items if i.item_type == "model" and i.item_id == repo), None)
        if item is None:
            self._call(
                doing, self._api.add_collection_item, collection.slug, repo, "model", note=note or None, exists_ok=True
            )
        elif (item.note or "") != note:
            self._call(doing, self._api.update_collection_item, collection.slug, item.item_object_id, note=note)
        return collection.slug

    # ------------------------------------------------------------------------------------------ downloads

    def resolve_commit(self, repo: str, revision: str) -> str:
        """The commit that a branch, tag or commit of a repo is now."""
        self.require_online(f"resolving {repo}")
        info = self._call(f"resolving {repo} at {revision}", self._api.model_info, repo, revision=revision)
        return str(info.sha)

    def snapshot(self, repo: str, commit: str, names: Iterable[str]) -> Path:
        """The folder in the cache of `hf` with these files of a commit; what is there already is not fetched again."""
        return self._download(
            f"downloading {repo}", self._api.snapshot_download, repo, revision=commit,
            allow_patterns=[glob.escape(name) for name in names],
        )  # fmt: skip

    def file(self, repo: str, file: str, commit: str) -> Path:
        """One file of a commit, in the cache of `hf`."""
        return self._download(f"downloading {file} of {repo}", self._api.hf_hub_download, repo, file, revision=commit)

    def _download(self, doing: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Path:
        for attempt in range(1, DOWNLOAD_TRIES + 1):
            try:
                with no_bars():
                    return Path(self._call(doing, function, *args, retry=False, **kwargs))
            except HubUnavailable:
                if attempt == DOWNLOAD_TRIES or constants.is_offline_mode():
                    raise
                time.sleep(self.pause_s * attempt)
        raise AssertionError

    @property
    def cache(self) -> Path:
        """The folder that downloads go to."""
        return Path(constants.HF_HUB_CACHE)

    def is_cached(self, repo: str, file: RemoteFile) -> bool:
        """Whether these bytes are in the cache of `hf`, from whatever commit."""
        return (self.cache / repo_folder_name(repo_id=repo, repo_type="model") / "blobs" / file.identity).exists()

    # ------------------------------------------------------------------------------------------ the wire

    def read_range(self, repo: str, commit: str, path: str, start: int, limit: int) -> bytes:
        """At most `limit` bytes of a file from `start`, whatever the server sends."""
        return self._call(f"reading {path} of {repo}", self._range, repo, commit, path, start, limit)

    def _range(self, repo: str, commit: str, path: str, start: int, limit: int) -> bytes:
        url = hf_hub_url(repo, path, revision=commit, endpoint=self.endpoint)
        headers = self._headers() | {"Range": f"bytes={start}-{start + limit - 1}", "Accept-Encoding": "identity"}
        with get_session().stream("GET", url, headers=headers, follow_redirects=True) as answer:
            if answer.status_code == 416:
                return b""
            if answer.status_code >= 400:
                answer.read()
            hf_raise_for_status(answer)
            skip = start if answer.status_code == 200 else 0  # a server that ignores Range sends all
            out = bytearray()
            for chunk in answer.iter_bytes():
                out += chunk[skip:] if skip else chunk
                skip = max(0, skip - len(chunk))
                if len(out) >= limit:
                    break
            return bytes(out[:limit])

    def _headers(self) -> dict[str, str]:
        return build_hf_headers(token=self._token or False)


def cached_snapshot(repo: str, commit: str) -> Path | None:
    """The folder of a base model in the cache of `hf`, if all of it is there and intact. Needs no network.

    A snapshot that no run of ours has checked yet (the download was killed, or `hf` did it) is hashed first.
    """
    try:
        folder = Path(snapshot_download(repo, revision=commit, allow_patterns=BASE_FILES, local_files_only=True))
        if not all(path.is_file() for path in shard_files(folder)):
            return None
        check_snapshot(folder)
        return folder
    except (LocalEntryNotFoundError, CheckpointError, CheckFailed):
        return None
    except ValueError as e:
        raise InputError(f"{repo}: {str(e).splitlines()[0][:200]}") from None


def _first_message(body: Any) -> str:
    """The first reason of `{"errors": [{"message": …}]}`, whatever else a server may send."""
    errors = body.get("errors") if isinstance(body, dict) else None
    first = errors[0] if isinstance(errors, list) and errors else None
    return str(first.get("message") if isinstance(first, dict) else "") or "no reason given"


def _check_sizes(group: Iterable[Upload]) -> None:
    """An upload was refused: if a file is no longer what was hashed, say so instead of trying again."""
    for u in group:
        if isinstance(u.source, Path):
            try:
                with open(u.source, "rb") as f:
                    same = os.fstat(f.fileno()).st_size == u.size and (
                        hashlib.file_digest(f, "sha256").hexdigest() == u.sha256
                    )
            except FileNotFoundError:
                same = False
            if not same:
                raise CheckFailed(f"{u.path} changed while it was being pushed; nothing was committed: run push again")
