"""The process-wide client of huggingface_hub: its timeouts, proxy, transfers, logging and bars; endpoint and token.

The client reads most of this from module constants and environment variables at import, and has no timeouts of its own.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import httpx2
from huggingface_hub import constants, get_token, set_client_factory
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from huggingface_hub.utils import logging as hf_logging
from huggingface_hub.utils._http import default_client_factory

from inference.errors import AuthError, InputError

from .hub_bounds import ENCODINGS, bound
from .hub_watch import Limits, watch

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def configure(endpoint: str, limits: Limits, look: Callable[[httpx2.Response], None]) -> None:
    """For all calls of this process from now on. look: is shown every answer."""
    local = urlsplit(endpoint).hostname in LOOPBACK
    # Rehearsals go by plain LFS: a hub on loopback need not offer Xet, and the client does not fall back by itself.
    constants.HF_HUB_DISABLE_XET = local or _is_true(os.environ.get("HF_HUB_DISABLE_XET"))
    if local:
        _bypass_proxy()
    if not (constants.HF_DEBUG or os.environ.get("HF_HUB_VERBOSITY")):
        hf_logging.set_verbosity(logging.ERROR)  # its warnings quote signed URLs; failures are told by our errors

    def client() -> httpx2.Client:
        made = watch(default_client_factory(), limits)
        made.headers["accept-encoding"] = ENCODINGS
        made.event_hooks["response"] += [bound, look]
        return made

    set_client_factory(client)


def checked_endpoint(url: str) -> str:
    """Raises InputError for what is no endpoint; its message shows no part of it."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
        raise InputError("the hub's endpoint must be like https://huggingface.co, without a user or a query")
    return url.rstrip("/")


def checked_token(given: str | None) -> str | None:
    """None: HF_TOKEN or the file that `hf auth login` writes, if there is one. Raises AuthError for what is no token."""
    token = get_token() if given is None else given.strip()
    if token is None:
        return None
    if not token:
        raise AuthError("the token is empty; give one with write access, or leave it out to use `hf auth login`'s")
    if not token.isascii() or not token.isprintable() or " " in token:
        raise AuthError("the token holds characters that no token has; copy it again")
    return token


def token_step(token: str | None) -> str:
    """What to do about a token that the hub does not know, by where it came from."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if token and "".join(os.environ.get(name, "").split()) == token:
            return f"correct {name}, which is set in the environment, or unset it to use `hf auth login`'s"
    return "run `hf auth login`"


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
def no_bars() -> Iterator[None]:
    """The client's own bars off, wherever stderr goes: progress is told through callbacks."""
    if constants.HF_HUB_DISABLE_PROGRESS_BARS is not None or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
