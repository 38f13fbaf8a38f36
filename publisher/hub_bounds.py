"""How large an answer of the hub may be, unpacked, where it may send us, and what may name a file there.

The client reads every JSON answer whole, unpacks it whatever it comes to, and goes wherever it is redirected. `bound`
sees every answer before the client reads it. Contents of files are not bounded here: they are read as streams, by whoever
knows their size. What comes over the wire in how much time is bounded in `hub_watch`.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from urllib.parse import urljoin, urlsplit

import httpx2

from inference.errors import CONTROL, HubUnavailable

ANSWER_BYTES = 64 << 20  # the tree of a repo with 100,000 files has about 20 MB
FILE_BYTES = 1 << 50
COMMIT_ID = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")
ENCODINGS = "gzip, deflate"  # that `_Unpacked` knows; the client is told to ask for no other


def bound(answer: httpx2.Response) -> None:
    """A response hook of the client, the first. Raises HubUnavailable for what goes beyond."""
    request = answer.request
    api = request.url.path.startswith("/api/") or request.method not in ("GET", "HEAD")
    if answer.has_redirect_location and api:
        _check_redirect(answer)
    if not api and answer.is_success:
        return
    declared = answer.headers.get("content-length", "")
    if declared.isdigit() and int(declared[:20]) > ANSWER_BYTES and request.method != "HEAD":
        raise HubUnavailable(f"{request.url.host} answers with {declared[:20]} bytes, expected at most {ANSWER_BYTES}")
    encoding = answer.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", "gzip", "x-gzip", "deflate"):
        raise HubUnavailable(f"{request.url.host} answers in the encoding {encoding[:40]!r}, which nobody asked for")
    if encoding != "identity":
        del answer.headers["content-encoding"]
    if not answer.is_stream_consumed and isinstance(answer.stream, httpx2.SyncByteStream):
        answer.stream = _Unpacked(answer.stream, encoding, str(request.url.host))


def is_file_of_a_repo(path: object, size: object, sha256: object, blob: object) -> bool:
    """Whether a hub may list this: a path that stays inside the folder it is downloaded to, a size, and hashes."""
    if not isinstance(path, str) or not 0 < len(path) <= 1000 or CONTROL.search(path) or "\n" in path or "\\" in path:
        return False
    if any(part in ("", ".", "..") for part in path.split("/")):
        return False
    if type(size) is not int or not 0 <= size <= FILE_BYTES:
        return False
    good = sha256 is None or (isinstance(sha256, str) and SHA256.fullmatch(sha256) is not None)
    return good and isinstance(blob, str) and COMMIT_ID.fullmatch(blob) is not None


def _check_redirect(answer: httpx2.Response) -> None:
    """The API of a hub is on one host: elsewhere nobody is asked, told or believed."""
    here = answer.request.url
    try:
        there = urlsplit(urljoin(str(here), answer.headers["location"]))
        moved = (there.hostname, there.scheme) != (here.host, here.scheme) and not (
            there.hostname == here.host and there.scheme == "https"
        )
    except ValueError:
        raise HubUnavailable(f"{here.host} redirects to what is no address") from None
    if moved:
        raise HubUnavailable(f"{here.host} redirects a call of its API to {str(there.hostname)[:100]}; not followed")


class _Unpacked(httpx2.SyncByteStream):
    """The bytes of an answer without its compression; ends with an error beyond ANSWER_BYTES."""

    def __init__(self, stream: httpx2.SyncByteStream, encoding: str, host: str) -> None:
        self._stream, self._encoding, self._host = stream, encoding, host

    def __iter__(self) -> Iterator[bytes]:
        left = ANSWER_BYTES
        unpack = None if self._encoding == "identity" else zlib.decompressobj(47)  # zlib or gzip, by the header
        for block in self._stream:
            while block:
                out = block
                if unpack is None:
                    block = b""
                else:
                    try:
                        out = unpack.decompress(block, 1 << 20)
                    except zlib.error:
                        raise HubUnavailable(f"{self._host}: an answer is not {self._encoding} as it says") from None
                    block = unpack.unconsumed_tail
                left -= len(out)
                if left < 0:
                    raise HubUnavailable(f"{self._host} answers with more than {ANSWER_BYTES} bytes")
                yield out

    def close(self) -> None:
        self._stream.close()
