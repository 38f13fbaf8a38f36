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
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
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
    paginate,
)

from inference.checkpoint import shard_files
from inference.errors import AuthError, CheckFailed, CheckpointError, HubUnavailable, InputError, RemoteChanged

from .account import Account, account_of
from .card_metadata import HEADER
from .fetch import BASE_FILES, check_disk, check_snapshot, download_base, download_file, download_size, remote_headers
from .hub_bounds import COMMIT_ID, is_file_of_a_repo
from .hub_client import checked_endpoint, checked_token, configure, no_bars
from .hub_collections import Item, arrange
from .hub_errors import Calls, Patience
from .hub_types import Commit, Copy, Head, RemoteFile, Upload, default_endpoint
from .hub_watch import Limits
from .locks import repo_lock

__all__ = [
    "Account", "Commit", "Copy", "Head", "Hub", "Progress", "RemoteFile", "Upload",
    "cached_snapshot", "check_disk", "download_base", "download_file", "download_size", "remote_headers",
]  # fmt: skip

PATIENCE_S = 60  # for all tries of one call, waits included
PAUSE_S = 1.0  # before the second try, doubled for each further one
WAIT_S = 330  # that a hub may ask to wait; its rate limits count over 5 minutes
DOWNLOAD_TRIES = 3  # what has arrived is kept from one to the next
UPLOAD_TRIES = 3  # of one group of files; the client itself repeats a PUT up to five times within each
HISTORY = 10_000  # commits of a repo that are read
ALONE_BYTES = 32 << 20  # larger files are uploaded one by one, so that progress can be told and done ones are kept

Progress = Callable[[str, int, int], None]  # what is being done, bytes done, bytes in all


class _Api(HfApi):
    """The client, sparing with bytes: before a commit it asks about the metadata of a card with all of the card."""

    def _validate_yaml(self, content: str, **kwargs: Any) -> None:
        super()._validate_yaml(_front_matter(content), **kwargs)


class Hub:
    """A connection to one endpoint with one token.

    endpoint None: HF_ENDPOINT or huggingface.co. token None: HF_TOKEN or the file that `hf auth login` writes.
    patience_s, pause_s, wait_s: see `hub_errors.Patience`; tell: shows a person that the hub asked to wait.
    Raises AuthError for a token that cannot be one, InputError for an endpoint.
    The client is one for the process: the last Hub made sets its timeouts.
    """

    def __init__(
        self,
        endpoint: str | None = None,
        token: str | None = None,
        *,
        patience_s: float = PATIENCE_S,
        pause_s: float = PAUSE_S,
        wait_s: float = WAIT_S,
        limits: Limits = Limits(),  # noqa: B008
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.endpoint = checked_endpoint(endpoint or default_endpoint())
        self.pause_s = pause_s
        self._token = checked_token(token)
        patience = Patience(patience_s, pause_s, wait_s, patience_s + limits.answer_s)
        self._call = Calls(self.endpoint, self._token, patience, tell)
        configure(self.endpoint, limits, self._call.watch)
        self._api = _Api(endpoint=self.endpoint, token=self._token or False)
        self._account: Account | None = None  # whose token this is, once `require_write` asked
        self._ahead: dict[tuple[str, str, str], Any] = {}  # what was uploaded ahead, by repo, path and sha256

    def __repr__(self) -> str:
        return f"Hub({self.endpoint!r})"

    # ------------------------------------------------------------------------------------------ before a push

    def require_online(self, doing: str) -> None:
        """Raises HubUnavailable while HF_HUB_OFFLINE is set."""
        if constants.is_offline_mode():
            raise HubUnavailable(f"{doing} needs the hub, and HF_HUB_OFFLINE is set: unset it")

    def require_write(self, doing: str) -> Account:
        """Whose token this is; the hub is asked once. Raises AuthError if there is none, the hub does not know it, or it can
        only read; HubUnavailable while HF_HUB_OFFLINE is set."""
        self.require_online(doing)
        if not self._token:
            raise AuthError(f"{doing} needs a token with write access: run `hf auth login`, or set HF_TOKEN")
        self._account = self._account or self.account()
        if self._account.role == "read":
            raise AuthError(f"{doing}: the token of {self._account.name} can only read; take one with write access")
        return self._account

    def account(self) -> Account:
        """Whose token this is, asked now. Raises AuthError if the hub does not know it, HubUnavailable."""

        def ask() -> Account:
            found = account_of(self._api.whoami())
            if found is None:
                raise self._call.none_of_a_hub("asking whose token this is")
            return found

        return self._call("asking whose token this is", ask)

    def check_write(self, repo: str) -> None:
        """Raises AuthError unless the token may write to the repo."""
        self._call(f"checking write access to {repo}", self._api.auth_check, repo, write=True)

    def create_repo(self, repo: str, private: bool) -> None:
        self._call.forget_conflicts()
        self._call(f"creating {repo}", self._api.create_repo, repo, private=private, exist_ok=True)

    def make_public(self, repo: str) -> None:
        """Raises AuthError where the token may not; HubUnavailable if the repo is private all the same."""
        self._call(f"making {repo} public", self._api.update_repo_settings, repo, private=False)
        if self._call(f"reading {repo}", self._api.model_info, repo).private:
            raise HubUnavailable(f"{repo}: the hub took the change to public, and still says private; run push again")

    def lock(self, repo: str) -> AbstractContextManager[None]:
        """One publisher on this machine at a time for a repo. Raises InputError, on entering, if another is at work."""
        return repo_lock(self.cache, self.endpoint, repo)

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
        commit = self._commit_id(info.sha, f"reading {repo}")
        files = self.tree(repo, commit)
        return Head(commit, bool(info.private), files or {})

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
                    sha256, xet = lfs.sha256 if lfs else None, bool(getattr(entry, "xet_hash", None))
                    file = RemoteFile(entry.path, entry.size, sha256, entry.blob_id, xet)  # type: ignore[union-attr]
                    if not is_file_of_a_repo(file.path, file.size, file.sha256, file.blob):
                        raise self._call.none_of_a_hub(f"listing the files of {repo}: {str(file.path)[:60]!r}")
                    files[file.path] = file
            return files

        return self._call(f"listing the files of {repo}", ask)

    def history(self, repo: str, commit: str, until: str | None = None) -> list[Commit]:
        """The commits that led to this one, newest first, itself included; no further than `until`, which ends them.

        Of what stands in a commit only its id must be as expected: anybody may have made it, by any tool.
        """
        doing = f"reading the history of {repo}"

        def ask() -> list[Commit]:
            found: list[Commit] = []
            url = f"{self.endpoint}/api/models/{repo}/commits/{commit}"
            for item in islice(paginate(url, params={}, headers=self._headers()), HISTORY):
                id = self._commit_id(item.get("id") if isinstance(item, dict) else item, doing)
                authors = item["authors"] if isinstance(item.get("authors"), list) else []
                names = [a["user"] for a in authors if isinstance(a, dict) and isinstance(a.get("user"), str)]
                title, message = (t if isinstance(t := item.get(key), str) else "" for key in ("title", "message"))
                found.append(Commit(id, self._call.clean(title), self._call.clean(message), ", ".join(names[:3])[:100]))
                if id == until:
                    break
            return found

        return self._call(doing, ask)

    def tags(self, repo: str) -> dict[str, str]:
        """Commit by tag name."""
        refs = self._call(f"reading the tags of {repo}", self._api.list_repo_refs, repo)
        return {tag.name: tag.target_commit for tag in refs.tags}

    # ------------------------------------------------------------------------------------------ changing a repo

    def check_card(self, text: str) -> list[str]:
        """The hub's warnings. Raises InputError if it would refuse the card's metadata: better before the weights."""

        def ask() -> tuple[str, list[str]]:
            body = {"content": _front_matter(text), "repoType": "model"}
            answer = get_session().post(f"{self.endpoint}/api/validate-yaml", json=body, headers=self._headers())
            if answer.status_code == 400:
                return _first_message(answer.json()), []
            hf_raise_for_status(answer)
            return "", _messages(answer.json(), "warnings")

        fault, warnings = self._call("checking the card's metadata", ask)
        if fault:
            raise InputError(f"README.md: the hub refuses its metadata: {self._call.clean(fault)}")
        return [self._call.clean(w) for w in warnings]

    def upload(
        self, repo: str, revision: str, uploads: Sequence[Upload], progress: Progress | None = None
    ) -> list[Any]:
        """Send what goes to LFS or Xet; returns the operations for `commit`. What the hub has is not sent again.

        Raises CheckFailed if what was sent is not what was hashed before.
        """
        operations = {u.path: self._operation(repo, revision, u) for u in uploads}
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

    def upload_ahead(self, repo: str, upload: Upload) -> None:
        """Send a file that a later commit to main will name; that one sends no byte of it. Raises as `upload` does."""
        (operation,) = self.upload(repo, "main", [upload])
        # One that the head holds already is not kept: the client would leave it out of a commit, whatever the head is then.
        if operation._upload_mode == "lfs" and operation._remote_oid != operation._local_oid:
            self._ahead[repo, upload.path, upload.sha256] = operation

    def forget_ahead(self, repo: str) -> None:
        """What was sent for a repo was not what it should have been: nothing of it is named by a commit."""
        self._ahead = {key: operation for key, operation in self._ahead.items() if key[0] != repo}

    def _operation(self, repo: str, revision: str, upload: Upload) -> CommitOperationAdd:
        ahead = self._ahead.get((repo, upload.path, upload.sha256)) if revision == "main" else None
        if ahead is not None and not ahead._is_committed:
            return ahead
        return CommitOperationAdd(upload.path, str(upload.source) if isinstance(upload.source, Path) else upload.source)

    def _upload_group(self, repo: str, revision: str, group: list[Upload], operations: dict[str, Any]) -> None:
        wanted = [operations[u.path] for u in group]
        for attempt in range(1, UPLOAD_TRIES + 1):
            try:
                # also for refused URLs (400, 403, 413 by the storage): a new call gets new ones
                self._call(
                    f"uploading to {repo}", self._api.preupload_lfs_files, repo, wanted, revision=revision,
                    free_memory=False, retry=False, transfer=True,
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
        self,
        repo: str,
        revision: str,
        operations: Iterable[Any],
        delete: Iterable[str],
        title: str,
        parent: str,
        copies: Iterable[Copy] = (),
        message: str = "",
    ) -> str:
        """One commit on top of `parent`; returns its id. An error does not mean that it did not land, and success not that
        `parent` was the head: see `push_between`."""
        copied = [CommitOperationCopy(c.source, c.path, c.commit, c.repo, "model" if c.repo else None) for c in copies]
        operations = list(operations)
        all_ = [*operations, *copied, *(CommitOperationDelete(path, is_folder=False) for path in delete)]
        with no_bars(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # hints about the card's metadata; its faults are told by check_card
            info = self._call(
                f"committing to {repo}", self._api.create_commit, repo, all_, commit_message=title,
                commit_description=message, revision=revision, parent_commit=parent, retry=False, nbytes=_inline(operations),
            )  # fmt: skip
        return info.oid

    def open_pull(self, repo: str, title: str, text: str) -> int:
        """A new pull request without commits, or ours of that title if the answer to an earlier call was lost."""
        author = self.account().name

        def ask() -> int:
            for d in self._api.get_repo_discussions(
                repo, author=author, discussion_type="pull_request", discussion_status="open"
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
            doing = f"opening pull request {number} of {repo}"
            self._call(doing, self._api.change_discussion_status, repo, number, "open")

    def tag(self, repo: str, name: str, commit: str) -> None:
        """Raises RemoteChanged if the tag exists on another commit."""
        self._call(f"tagging {repo}", self._api.create_tag, repo, tag=name, revision=commit, exist_ok=True)
        found = self.tags(repo).get(name)
        if found != commit:
            raise RemoteChanged(f"{repo}: tag {name} is on {str(found)[:8]}, not on {commit[:8]}; run push again")

    def arrange(self, owner: str, title: str, description: str, ladder: Sequence[Item], add: Iterable[str]) -> str:
        """The owner's collection of that title, with the ladder in order (see `hub_collections`); returns its slug."""
        return arrange(self._call, self._api, owner, title, description, ladder, set(add))

    @property
    def copies_between_repos(self) -> bool:
        """Whether the hub can copy a large file from another repo: it does so by Xet hash."""
        return not constants.HF_HUB_DISABLE_XET

    # ------------------------------------------------------------------------------------------ downloads

    def resolve_commit(self, repo: str, revision: str) -> str:
        """The commit that a branch, tag or commit of a repo is now."""
        self.require_online(f"resolving {repo}")
        info = self._call(f"resolving {repo} at {revision}", self._api.model_info, repo, revision=revision)
        return self._commit_id(info.sha, f"resolving {repo} at {revision}")

    def _commit_id(self, found: Any, doing: str) -> str:
        """Names folders and is put into addresses, so it is nothing but one."""
        if not isinstance(found, str) or not COMMIT_ID.fullmatch(found):
            raise self._call.none_of_a_hub(f"{doing}: commit {str(found)[:60]!r}")
        return found

    def snapshot(self, repo: str, commit: str, names: Iterable[str]) -> Path:
        """The folder in the cache of `hf` with these files of a commit; what is there already is not fetched again."""
        return self._download(
            f"downloading {repo}", self._api.snapshot_download, repo, revision=commit,
            allow_patterns=[glob.escape(name) for name in names],
        )  # fmt: skip

    def download(self, repo: str, commit: str, folder: Path, cache: Path) -> Path:
        """All files of a commit, fetched into `folder` whatever the cache of `hf` holds. cache: an empty folder."""
        return self._download(
            f"downloading {repo}", self._api.snapshot_download, repo, revision=commit, local_dir=folder, cache_dir=cache,
        )  # fmt: skip

    def file(self, repo: str, file: str, commit: str) -> Path:
        """One file of a commit, in the cache of `hf`."""
        return self._download(f"downloading {file} of {repo}", self._api.hf_hub_download, repo, file, revision=commit)

    def _download(self, doing: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Path:
        for attempt in range(1, DOWNLOAD_TRIES + 1):
            try:
                with no_bars():
                    return Path(self._call(doing, function, *args, retry=False, transfer=True, **kwargs))
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


def _inline(operations: Iterable[CommitOperationAdd]) -> int:
    """Bytes of a commit's own request: the files that are not in LFS, in base64."""
    return sum(o.upload_info.size * 4 // 3 for o in operations if o._upload_mode != "lfs")


def _front_matter(card: str) -> str:
    """The metadata of a card, which is all that the hub checks of it; a card without any as it is."""
    found = HEADER.match(card)
    return found[0] if found else card


def _first_message(body: Any) -> str:
    """The first reason of `{"errors": [{"message": …}]}`, whatever else a server may send."""
    return next(iter(_messages(body, "errors")), "no reason given")


def _messages(body: Any, key: str) -> list[str]:
    listed = body.get(key) if isinstance(body, dict) else None
    found = [m.get("message") for m in listed if isinstance(m, dict)] if isinstance(listed, list) else []
    return [m for m in found if isinstance(m, str) and m][:5]


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
