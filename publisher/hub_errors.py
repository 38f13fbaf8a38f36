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
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
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

from .hub_client import token_step
from .hub_watch import Budget, budget, extend

RETRYABLE = (408, 429, 500, 502, 503, 504)
SLOWEST = 32 << 10  # bytes a second that a call is given time for, beyond what it may take anyway
LONGEST_S = 10**9  # a number of seconds that a server asks for is cut to this
CONFLICTS = 30  # answers "another conflicting operation is in progress" to a create before giving up, one a second

# What the client's own code raises for an answer without the fields that it expects, and ours for a bug: see `_is_bug`.
AMBIGUOUS = (KeyError, TypeError, AttributeError, AssertionError)
CLIENT_ERRORS = (httpx2.HTTPError, httpx2.InvalidURL, OSError, RuntimeError, ValueError, *AMBIGUOUS)
# How hf_xet tells what a server answered: by text alone
XET_STATUS = re.compile(r"HTTP status (?:client|server) error \((\d{3})[^)]*\), domain: (https?://[^\s/]+)")

T = TypeVar("T")


@dataclass(frozen=True)
class Patience:
    """Seconds. retry_s: no further try of a call begins after that; pause_s: before the second one, doubled for each
    further one; wait_s: that a hub may ask to wait, at once or in a row; call_s: for all tries of a call that is no
    transfer, without the waits that were asked for."""

    retry_s: float
    pause_s: float
    wait_s: float
    call_s: float


class Calls:
    """Makes calls to one endpoint: bounded retries, waits as the hub asks for them, and our errors for the client's.

    endpoint, token: what messages name, and never show. tell: shows a person that and why nothing happens. `watch` has to
    be a response hook of the client, and its connections watched (`hub_watch`).
    """

    def __init__(self, endpoint: str, token: str | None, patience: Patience, tell: Callable[[str], None]) -> None:
        self.endpoint, self.patience, self._tell = endpoint, patience, tell
        self._token = token
        self._answers = 0  # that arrived so far
        self._conflicts = 0
        self._asked_since: float | None = None  # when the hub began to ask for waits, without a good answer since
        self._told_until = 0.0

    def __call__(
        self,
        doing: str,
        function: Callable[..., T],
        *args: Any,
        retry: bool = True,
        transfer: bool = False,
        nbytes: int = 0,
        **kwargs: Any,
    ) -> T:
        """function's value; what it raises becomes one of our errors. doing: for the message, "reading acme/x".

        transfer: takes as long as it takes, at the rate of `hub_watch.Limits`. nbytes: that another call has to send.
        """
        seconds = self.patience.call_s + nbytes / SLOWEST
        with budget(None if transfer else Budget(doing, self.endpoint, seconds)):
            return self._try(doing, function, args, kwargs, retry)

    def _try(self, doing: str, function: Callable[..., T], args: Any, kwargs: Any, retry: bool) -> T:
        end, pause = time.monotonic() + self.patience.retry_s, self.patience.pause_s
        while True:
            before = self._answers
            try:
                return function(*args, **kwargs)
            except PublishError:
                raise
            except CLIENT_ERRORS as e:
                if _is_bug(e, answered=self._answers > before):
                    raise
                fault, again = self._translate(e, doing)
            # Raised outside of the handler: the client's exceptions hold the request, and with it the token.
            if not (retry and again) or time.monotonic() + pause > end:
                raise fault
            time.sleep(pause)
            pause *= 2

    def watch(self, answer: httpx2.Response) -> None:
        """Sees every answer. Waits here as the hub asks: the client would not for some calls, not as a date, not within a
        bound, and without a word."""
        self._answers += 1
        if answer.status_code in RETRYABLE:
            self._wait(answer.status_code, asked_wait(answer))
            for header in ("Retry-After", "ratelimit"):  # done: the client shall not wait for it again
                answer.headers.pop(header, None)
            return
        self._asked_since = None
        if answer.status_code == 409:
            answer.read()
            if "another conflicting operation" in answer.text:
                self._conflicts += 1
                if self._conflicts > CONFLICTS:
                    raise HubUnavailable("the hub is creating another of your repos all the while; run again later")
                time.sleep(self.patience.pause_s)

    def _wait(self, status: int, seconds: float) -> None:
        """Raises HubUnavailable if that is too long, or has been by now."""
        if not seconds:
            return
        now = time.monotonic()
        self._asked_since = self._asked_since or now
        if now + seconds - self._asked_since > self.patience.wait_s:
            raise HubUnavailable(f"the hub asks to wait {seconds:.0f} s ({status}); run again after that")
        if now + seconds > self._told_until + 1:  # once for uploads side by side
            self._told_until = now + seconds
            self._tell(f"the hub asks to wait {seconds:.0f} s ({status})")
        extend(seconds)
        time.sleep(seconds)

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

    def _translate(self, error: BaseException, doing: str) -> tuple[PublishError, bool]:
        """(our error, whether another try can help)."""
        for e in _chain(error):
            if isinstance(e, PublishError):
                return e, False
            if isinstance(e, OfflineModeIsEnabled):
                return HubUnavailable(f"{doing} needs the hub, and HF_HUB_OFFLINE is set: unset it"), False
            if isinstance(e, LocalEntryNotFoundError) and not isinstance(e.__cause__, httpx2.HTTPError | OSError):
                return InputError(f"{doing}: not in the local cache, and the hub cannot be asked"), False
            if isinstance(e, HfHubHTTPError | httpx2.HTTPStatusError):
                status = e.response.status_code
                words = self.clean(str(getattr(e, "server_message", None) or ""))
                if isinstance(e, GatedRepoError):
                    step = "accept its terms on the hub with this token's account"
                    return AuthError(f"{doing}: the repo is gated; {step}"), False
                return self._by_status(status, words, e.response.url.host, doing), status in RETRYABLE
            if isinstance(e, httpx2.TransportError):
                what = "does not answer" if isinstance(e, httpx2.TimeoutException) else "cannot be reached"
                return HubUnavailable(f"{doing}: {self.endpoint} {what} ({type(e).__name__})"), True
            if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT):
                return ResourceError(f"{doing}: the disk is full ({e.filename or 'in the cache of hf'})"), False
        if isinstance(error, FileNotFoundError):
            return CheckFailed(f"{doing}: {error.filename} is gone"), False
        if isinstance(error, AMBIGUOUS) or "JSON" in type(error).__name__:
            return self.none_of_a_hub(doing), True
        found = XET_STATUS.search(str(error)) if isinstance(error, OSError | RuntimeError) else None
        if found and int(found[1]) not in RETRYABLE:
            words = "by Xet, which keeps the hub's words to itself"
            return self._by_status(int(found[1]), words, urlsplit(found[2]).hostname, doing), False
        if isinstance(error, OSError | RuntimeError):  # Xet: text is all there is
            return HubUnavailable(f"{doing}: {self.clean(str(error)) or type(error).__name__}"), True
        return InputError(f"{doing}: {self.clean(str(error))}"), False

    def _by_status(self, status: int, words: str, host: str | None, doing: str) -> PublishError:
        """words: the server's, if any; host: that answered."""
        said = f"{status}: {words}" if words else str(status)
        if status not in RETRYABLE and host != urlsplit(self.endpoint).hostname:
            return HubUnavailable(f"{doing}: the storage behind the hub refuses ({said}); run again")
        if status == 401:
            if not self._token:
                return AuthError(f"{doing}: not found, or private: set HF_TOKEN, or run `hf auth login`")
            return AuthError(f"{doing}: the hub does not know this token ({said}); {token_step(self._token)}")
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


def asked_wait(answer: httpx2.Response) -> float:
    """Seconds that a 429 or 503 asks to wait, 0 if it does not: as a number, as a date, or by the Hub's own header."""
    text = answer.headers.get("Retry-After", "").strip()
    if re.fullmatch(r"[0-9]+", text):
        return min(float(text[:12]), LONGEST_S)
    limit = re.search(r"r\s*=\s*0\s*;\s*t\s*=\s*([0-9]{1,12})", answer.headers.get("ratelimit", ""))
    if limit and answer.status_code == 429:
        return min(float(limit[1]) + 1, LONGEST_S)
    until = _date(text)
    if until is None:
        return 0.0
    # by the server's own clock, if it tells it: ours may go wrong
    return max(0.0, (until - (_date(answer.headers.get("Date", "")) or datetime.now(UTC))).total_seconds())


def _date(text: str) -> datetime | None:
    try:
        found = parsedate_to_datetime(text)
    except (ValueError, TypeError, OverflowError):
        return None
    return found if found.tzinfo else found.replace(tzinfo=UTC)
