"""The Hub as this project uses it: typed calls with timeouts, bounded retries and one line for every error.

The only module that imports huggingface_hub. The client has no timeouts, waits as long as a server asks it to, retries
some calls and not others, and lets httpx2, LFS and Xet errors through in a dozen types; here each call is made through
`Hub._call`, which retries what may be retried and turns the rest into the errors of `inference.errors`. `commit` is
never retried here: whether it landed is decided by `push` from what the repo then holds.

No token is ever put into a message: errors are built from the status and the server's own words, with the token and
the signatures of URLs cut out, and raised without the client's exception behind them.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx2
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    get_token,
    hf_hub_url,
    snapshot_download,
)
from huggingface_hub import set_client_factory as _set_client_factory
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    build_hf_headers,
    disable_progress_bars,
    enable_progress_bars,
    get_session,
    hf_raise_for_status,
)
from huggingface_hub.utils import logging as hf_logging
from huggingface_hub.utils._http import default_client_factory

from inference.checkpoint import shard_files
from inference.errors import (
    AuthError,
    CheckFailed,
    CheckpointError,
    HubUnavailable,
    InputError,
    PublishError,
    RemoteChanged,
    ResourceError,
)

from .fetch import BASE_FILES, download_base, download_file, remote_headers

__all__ = [
    "Account", "Head", "Hub", "Progress", "RemoteFile", "Upload",
    "cached_snapshot", "download_base", "download_file", "remote_headers",
]  # fmt: skip

CONNECT_S = 15  # to open a connection
ANSWER_S = 120  # of silence while reading or writing; the Hub's gateway gives up on a commit after about 60
PATIENCE_S = 60  # for all tries of one call, waits included
PAUSE_S = 1.0  # before the second try, doubled for each further one
DOWNLOAD_TRIES = 3  # what has arrived is kept from one to the next
UPLOAD_TRIES = 3  # of one group of files; the client itself repeats a PUT up to five times within each
ALONE_BYTES = 32 << 20  # larger files are uploaded one by one, so that progress can be told and done ones are kept
CONFLICTS = 30  # answers "another conflicting operation is in progress" to a create before giving up, one a second
RETRYABLE = (408, 429, 500, 502, 503, 504)
LOOPBACK = ("127.0.0.1", "localhost", "::1")

# what a call into the client can raise
MALFORMED = (
    KeyError,
    TypeError,
    AttributeError,
    AssertionError,
)  # an answer without the fields the client expects
CLIENT_ERRORS = (httpx2.HTTPError, httpx2.InvalidURL, OSError, RuntimeError, ValueError, *MALFORMED)

T = TypeVar("T")
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
        self.endpoint = _endpoint(endpoint or constants.ENDPOINT)
        self.patience_s, self.pause_s, self.answer_s = patience_s, pause_s, answer_s
        self._token = _token(token)
        self._conflicts = 0
        local = urlsplit(self.endpoint).hostname in LOOPBACK
        # The built-in hub has no Xet, and the client does not fall back by itself.
        constants.HF_HUB_DISABLE_XET = local or _is_true(os.environ.get("HF_HUB_DISABLE_XET"))
        if local:
            _bypass_proxy()
        if not (constants.HF_DEBUG or os.environ.get("HF_HUB_VERBOSITY")):
            hf_logging.set_verbosity(logging.ERROR)  # its warnings quote signed URLs; failures are told by our errors
        _set_client_factory(self._client)
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
            return Account(str(who["name"]), str(token.get("role") or ""))

        return self._call("asking whose token this is", ask)

    def check_write(self, repo: str) -> None:
        """Raises AuthError unless the token may write to the repo."""
        self._call(f"checking write access to {repo}", self._api.auth_check, repo, write=True)

    def create_repo(self, repo: str, private: bool) -> None:
        self._conflicts = 0
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

        def ask() -> httpx2.Response:
            body = {"content": text, "repoType": "model"}
            answer = get_session().post(f"{self.endpoint}/api/validate-yaml", json=body, headers=self._headers())
            if answer.status_code != 400:
                hf_raise_for_status(answer)
            return answer

        answer = self._call("checking the card's metadata", ask)
        if answer.status_code == 400:
            errors = answer.json().get("errors") or [{"message": "no reason given"}]
            raise InputError(f"README.md: the hub refuses its metadata: {self._clean(str(errors[0].get('message')))}")

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
        with _no_bars():
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
        with _no_bars(), warnings.catch_warnings():
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

    def snapshot(self, repo: str, commit: str, patterns: list[str]) -> Path:
        """The files of a commit that match, in the cache of `hf`; what is there already is not fetched again."""
        return self._download(
            f"downloading {repo}", self._api.snapshot_download, repo, revision=commit, allow_patterns=patterns
        )

    def file(self, repo: str, file: str, commit: str) -> Path:
        """One file of a commit, in the cache of `hf`."""
        return self._download(f"downloading {file} of {repo}", self._api.hf_hub_download, repo, file, revision=commit)

    def _download(self, doing: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Path:
        for attempt in range(1, DOWNLOAD_TRIES + 1):
            try:
                return Path(self._call(doing, function, *args, retry=False, **kwargs))
            except HubUnavailable:
                if attempt == DOWNLOAD_TRIES or constants.is_offline_mode():
                    raise
                time.sleep(self.pause_s * attempt)
        raise AssertionError

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

    def _client(self) -> httpx2.Client:
        client = default_client_factory()
        client.timeout = httpx2.Timeout(self.answer_s, connect=CONNECT_S)
        client.event_hooks["response"].append(self._watch)
        return client

    def _watch(self, answer: httpx2.Response) -> None:
        """Ends waits that the client would do without a bound."""
        if answer.status_code in RETRYABLE:
            asked = _asked_wait(answer)
            if asked > self.patience_s:
                raise HubUnavailable(f"the hub asks to wait {asked:.0f} s ({answer.status_code}); run again after that")
        elif answer.status_code == 409:
            answer.read()
            if "another conflicting operation" in answer.text:
                self._conflicts += 1
                if self._conflicts > CONFLICTS:
                    raise HubUnavailable("the hub is creating another of your repos all the while; run again later")
                time.sleep(self.pause_s)

    def _call(self, doing: str, function: Callable[..., T], *args: Any, retry: bool = True, **kwargs: Any) -> T:
        """function's value; what it raises becomes one of our errors. doing: for the message, "reading acme/x"."""
        end, pause = time.monotonic() + self.patience_s, self.pause_s
        while True:
            try:
                return function(*args, **kwargs)
            except PublishError:
                raise
            except CLIENT_ERRORS as e:
                fault, again, asked = self._translate(e, doing)
            # Raised outside of the handler: the client's exceptions hold the request, and with it the token.
            wait = max(pause, asked)
            if not (retry and again) or time.monotonic() + wait > end:
                raise fault
            time.sleep(wait)
            pause *= 2

    def _translate(self, error: BaseException, doing: str) -> tuple[PublishError, bool, float]:
        """(our error, whether another try can help, seconds that the server asked to wait)."""
        for e in _chain(error):
            if isinstance(e, PublishError):
                return e, False, 0
            if isinstance(e, OfflineModeIsEnabled):
                return HubUnavailable(f"{doing} needs the hub, and HF_HUB_OFFLINE is set: unset it"), False, 0
            if isinstance(e, LocalEntryNotFoundError) and not isinstance(e.__cause__, httpx2.HTTPError | OSError):
                return InputError(f"{doing}: not in the local cache, and the hub cannot be asked"), False, 0
            if isinstance(e, HfHubHTTPError | httpx2.HTTPStatusError):
                status = e.response.status_code
                return self._by_status(e, e.response, doing), status in RETRYABLE, _asked_wait(e.response)
            if isinstance(e, httpx2.TransportError):
                what = "does not answer" if isinstance(e, httpx2.TimeoutException) else "cannot be reached"
                return HubUnavailable(f"{doing}: {self.endpoint} {what} ({type(e).__name__})"), True, 0
            if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT):
                return ResourceError(f"{doing}: the disk is full ({e.filename or 'in the cache of hf'})"), False, 0
        if isinstance(error, FileNotFoundError):
            return CheckFailed(f"{doing}: {error.filename} is gone"), False, 0
        if isinstance(error, MALFORMED) or "JSON" in type(error).__name__:
            return HubUnavailable(f"{doing}: {self.endpoint} gave an answer that is none of a hub"), True, 0
        if isinstance(error, OSError | RuntimeError):  # Xet: text is all there is
            return HubUnavailable(f"{doing}: {self._clean(str(error)) or type(error).__name__}"), True, 0
        return InputError(f"{doing}: {self._clean(str(error))}"), False, 0

    def _by_status(self, error: BaseException, answer: httpx2.Response, doing: str) -> PublishError:
        status = answer.status_code
        words = self._clean(str(getattr(error, "server_message", None) or ""))
        said = f"{status}: {words}" if words else str(status)
        if status not in RETRYABLE and answer.url.host != urlsplit(self.endpoint).hostname:
            return HubUnavailable(f"{doing}: the storage behind the hub refuses ({said}); run again")
        if isinstance(error, GatedRepoError):
            return AuthError(f"{doing}: the repo is gated; accept its terms on the hub with this token's account")
        if status == 401:
            if not self._token:
                return AuthError(f"{doing}: not found, or private: set HF_TOKEN, or run `hf auth login`")
            return AuthError(f"{doing}: the hub does not know this token ({said}); run `hf auth login`")
        if status == 403:
            return AuthError(f"{doing}: refused ({said}); the token needs write access to that repo's owner")
        if status in (402, 413, 507):
            return AuthError(f"{doing}: the account's storage or plan does not allow it ({said})")
        if status == 404:
            return InputError(f"{doing}: not found on {self.endpoint} ({said})")
        if status in (409, 412):
            return RemoteChanged(f"{doing}: the repo has changed meanwhile ({said}); run push again")
        if status in RETRYABLE:
            return HubUnavailable(f"{doing}: {self.endpoint} answers {said}; run again later")
        return InputError(f"{doing}: {self.endpoint} answers {said}")

    def _clean(self, text: str) -> str:
        """One line of bounded length without the token and without the queries of URLs (they hold signatures)."""
        if self._token:
            text = text.replace(self._token, "hf_…")
        text = re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]+", r"\1", text)
        return " ".join(text.split())[:300]


def cached_snapshot(repo: str, commit: str) -> Path | None:
    """The folder of a base model in the cache of `hf`, if all of it is there. Needs no network."""
    try:
        folder = Path(snapshot_download(repo, revision=commit, allow_patterns=BASE_FILES, local_files_only=True))
        return folder if all(path.is_file() for path in shard_files(folder)) else None
    except (LocalEntryNotFoundError, CheckpointError):
        return None
    except ValueError as e:
        raise InputError(f"{repo}: {str(e).splitlines()[0][:200]}") from None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    for _ in range(8):
        if error is None:
            return
        yield error
        error = error.__cause__ or error.__context__


def _asked_wait(answer: httpx2.Response) -> float:
    """Seconds that a 429 or 503 asks to wait, 0 if it does not."""
    text = answer.headers.get("Retry-After", "").strip()
    limit = re.search(r"r\s*=\s*0\s*;\s*t\s*=\s*(\d+)", answer.headers.get("ratelimit", ""))
    return float(text) if text.isdigit() else float(limit[1]) if limit and answer.status_code == 429 else 0.0


def _endpoint(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
        raise InputError("the hub's endpoint must be like https://huggingface.co, without a user or a query")
    return url.rstrip("/")


def _token(given: str | None) -> str | None:
    token = get_token() if given is None else given.strip()
    if token is None:
        return None
    if not token:
        raise AuthError("the token is empty; give one with write access, or leave it out to use `hf auth login`'s")
    if not token.isascii() or not token.isprintable() or " " in token:
        raise AuthError("the token holds characters that no token has; copy it again")
    return token


def _is_true(value: str | None) -> bool:
    return (value or "").upper() in ("1", "ON", "YES", "TRUE")


def _bypass_proxy() -> None:
    """A proxy, if one is configured, cannot reach this machine's own loopback."""
    if not any(name.lower() in ("http_proxy", "https_proxy", "all_proxy") for name in os.environ):
        return
    have = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    hosts = dict.fromkeys([*filter(None, have.split(",")), *LOOPBACK])
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(hosts)


@contextmanager
def _no_bars() -> Iterator[None]:
    """The client's own upload bars off: progress is told through the callback."""
    if constants.HF_HUB_DISABLE_PROGRESS_BARS is not None or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


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
