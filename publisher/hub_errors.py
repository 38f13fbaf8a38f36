"""What a call to the hub can raise, and what it becomes: a wait and another try, or one line that a person can act on.

The client retries some calls and not others, waits as long as a server asks it to, and lets httpx2, LFS and Xet errors
through in a dozen types. Here each call goes through `Calls`, which repeats what may be repeated and turns the rest into
the errors of `inference.errors`. Faults of our own code are none of these: they keep their type and traceback.

No token is ever put into a message: errors are built from the status and the server's own words, with the token and
the signatures of URLs cut out, and raised without the client's exception behind them.
"""

from __future__ import annotations

import errno
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx2
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)

from inference.errors import (
    AuthError,
    CheckFailed,
    HubUnavailable,
    InputError,
    PublishError,
    RemoteChanged,
    ResourceError,
)

RETRYABLE = (408, 429, 500, 502, 503, 504)
CONFLICTS = 30  # answers "another conflicting operation is in progress" to a create before giving up, one a second

# What the client's own code raises for an answer without the fields that it expects, and ours for a bug: see `_is_bug`.
AMBIGUOUS = (KeyError, TypeError, AttributeError, AssertionError)
CLIENT_ERRORS = (httpx2.HTTPError, httpx2.InvalidURL, OSError, RuntimeError, ValueError, *AMBIGUOUS)

T = TypeVar("T")


class Calls:
    """Makes calls to one endpoint: bounded retries, and our errors for the client's.

    endpoint, token: what messages name, and never show. patience_s: for all tries of one call, waits included.
    pause_s: before the second try, doubled for each further one. `watch` has to be a response hook of the client.
    """

    def __init__(self, endpoint: str, token: str | None, patience_s: float, pause_s: float) -> None:
        self.endpoint, self.patience_s, self.pause_s = endpoint, patience_s, pause_s
        self._token = token
        self._answers = 0  # that arrived so far
        self._conflicts = 0

    def __call__(self, doing: str, function: Callable[..., T], *args: Any, retry: bool = True, **kwargs: Any) -> T:
        """function's value; what it raises becomes one of our errors. doing: for the message, "reading acme/x"."""
        end, pause = time.monotonic() + self.patience_s, self.pause_s
        while True:
            before = self._answers
            try:
                return function(*args, **kwargs)
            except PublishError:
                raise
            except CLIENT_ERRORS as e:
                if _is_bug(e, answered=self._answers > before):
                    raise
                fault, again, asked = self._translate(e, doing)
            # Raised outside of the handler: the client's exceptions hold the request, and with it the token.
            wait = max(pause, asked)
            if not (retry and again) or time.monotonic() + wait > end:
                raise fault
            time.sleep(wait)
            pause *= 2

    def watch(self, answer: httpx2.Response) -> None:
        """Sees every answer; ends waits that the client would do without a bound."""
        self._answers += 1
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

    def forget_conflicts(self) -> None:
        """The next create may meet CONFLICTS of its own."""
        self._conflicts = 0

    def none_of_a_hub(self, doing: str) -> HubUnavailable:
        """The error for an answer without what every hub's answer has."""
        return HubUnavailable(f"{doing}: {self.endpoint} gave an answer that is none of a hub")

    def clean(self, text: str) -> str:
        """One line of bounded length without the token and without the queries of URLs (they hold signatures)."""
        if self._token:
            text = text.replace(self._token, "hf_…")
        text = re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]+", r"\1", text)
        return " ".join(text.split())[:300]

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
        if isinstance(error, AMBIGUOUS) or "JSON" in type(error).__name__:
            return self.none_of_a_hub(doing), True, 0
        if isinstance(error, OSError | RuntimeError):  # Xet: text is all there is
            return HubUnavailable(f"{doing}: {self.clean(str(error)) or type(error).__name__}"), True, 0
        return InputError(f"{doing}: {self.clean(str(error))}"), False, 0

    def _by_status(self, error: BaseException, answer: httpx2.Response, doing: str) -> PublishError:
        status = answer.status_code
        words = self.clean(str(getattr(error, "server_message", None) or ""))
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


def _is_bug(error: BaseException, answered: bool) -> bool:
    """Whether this is a fault of our own code, which must keep its traceback.

    A missing key or a wrong type is the hub's fault only where the client's code reads an answer: one arrived in this
    try, and the innermost frame of ours or the client's is the client's. Other errors are ours if our line raised them.
    """
    packages = []
    trace = error.__traceback__
    while trace is not None:
        packages.append(str(trace.tb_frame.f_globals.get("__name__")).partition(".")[0])
        trace = trace.tb_next
    if isinstance(error, AMBIGUOUS):
        ours_or_theirs = [p for p in packages if p in ("publisher", "huggingface_hub")]
        return not answered or ours_or_theirs[-1:] != ["huggingface_hub"]
    return isinstance(error, ValueError | RuntimeError) and packages[-1] == "publisher"


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
