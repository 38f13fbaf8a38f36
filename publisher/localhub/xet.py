"""Xet: tokens for it, and the store of content itself (CAS), which clients talk to without the hub.

The CAS is on the blob origin and takes only the tokens issued here: signed, short-lived, for reading or writing. A
hub's own token there is a leak. A client asks which chunks are known, sends xorbs, then a shard that makes files of
them; to download it asks for a file's reconstruction and fetches ranges of xorbs by signed URLs, without any token.
"""

from __future__ import annotations

import asyncio
import errno
import json
import re
import secrets
import shutil
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse

from publisher.localhub.commits import need_push_right, wants_pr
from publisher.localhub.store import File, Repo
from publisher.localhub.web import Call, HubError, field
from publisher.localhub.xet_format import (
    MORE_BYTES,
    SHARD_BYTES,
    XORB_BYTES,
    FileInfo,
    Term,
    XetFormatError,
    read_shard,
    write_shard,
)
from publisher.localhub.xet_store import XetFile, XetStore

TOKEN_S = 3600  # clients ask for a new one shortly before the end
DEDUP_S = 7 * 24 * 3600  # how long a client may build on what it was told of a xorb
BEAT_S = 5.0  # between frames while one long file is being checked
NO_XET = "this hub runs without Xet (--no-xet): set HF_HUB_DISABLE_XET=1"


def store_of(call: Call) -> XetStore:
    """The store of what came by Xet. Raises HubError (404) on a hub that offers none."""
    if call.hub.xet is None:
        raise HubError(404, NO_XET)
    return call.hub.xet


# -- on the hub: tokens, and what a file's answers say of Xet ---------------------------------------------------


async def write_token(call: Call) -> Response:
    """GET .../xet-write-token/REV[?create_pr=1]."""
    store_of(call)
    need_push_right(call, call.repo(), wants_pr(call))
    return _token_answer(call, "write")


async def read_token(call: Call) -> Response:
    """GET .../xet-read-token/REV."""
    store_of(call)
    repo = call.repo()
    call.need_download(repo)
    call.commit(repo)
    return _token_answer(call, "read")


def token_headers(call: Call, scope: str) -> dict[str, str]:
    """As the Python client reads a token; an LFS batch gives it to the npm client like this, too."""
    exp = int(time.time()) + TOKEN_S
    token = f"xet.{scope}.{exp}.{call.hub.store.mac(f'xet {scope} {exp}')}"
    return {
        "X-Xet-Cas-Url": call.hub.blob_origin,
        "X-Xet-Access-Token": token,
        "X-Xet-Token-Expiration": str(exp),
    }


def _token_answer(call: Call, scope: str) -> Response:
    headers = token_headers(call, scope)
    url, token, exp = headers.values()
    return JSONResponse({"casUrl": url, "accessToken": token, "exp": int(exp)}, headers=headers)


def file_headers(call: Call, repo: Repo, commit: str, file: File) -> dict[str, str]:
    """For /resolve/: where a client with Xet gets this file."""
    name = call.xet_hash(file)
    if name is None:
        return {}
    auth = f"{call.hub.hub_origin}/api/{repo.kind}/{repo.id}/xet-read-token/{commit}"
    rebuild = f"{call.hub.blob_origin}/v1/reconstructions/{name}"
    link = f'<{auth}>; rel="xet-auth", <{rebuild}>; rel="xet-reconstruction-info"'
    return {"X-Xet-Hash": name, "Link": link}


# -- on the blob origin: the CAS --------------------------------------------------------------------------------


async def chunk(call: Call) -> Response:
    """GET /v1/chunks/PREFIX/H: a shard about a xorb that holds this chunk, so that it need not be sent again."""
    store = _admit(call, "read")
    xorb = store.xorb_with(call.args["hash"])
    if xorb is None:
        raise HubError(404, "chunk is not known")
    now = int(time.time())
    data = write_shard(xorb, store.chunks(xorb), now, now + DEDUP_S)
    return Response(data, media_type="application/octet-stream")


async def grant(call: Call) -> Response:
    """POST /v1/xorb-grants/default/H: where to put a xorb; 200 if it is here already."""
    store = _admit(call, "write")
    body = await call.json()
    size = field(body, "length", int)
    if not 0 < size <= XORB_BYTES + MORE_BYTES:
        raise HubError(413, f"xorb larger than {XORB_BYTES} bytes")
    if store.xorb_path(call.args["hash"]).exists():
        return JSONResponse({})
    name = secrets.token_hex(8)
    url = call.sign("PUT", call.hub.blob_origin, f"/xorbs/{call.args['hash']}/{name}", size)
    return JSONResponse({"id": name, "method": "PUT", "url": url, "headers": {}}, 201)


async def put_granted(call: Call) -> Response:
    """PUT of a xorb by a grant's URL, without a token. It is looked at when it is committed."""
    store_of(call)
    call.check_signature()
    temp = call.hub.store.temp()
    try:
        digest = await call.save(temp)
        path = _granted(call)
        path.parent.mkdir(exist_ok=True)
        temp.replace(path)
    finally:
        temp.unlink(missing_ok=True)
    return Response(headers={"ETag": f'"{digest}"'})


async def commit_granted(call: Call) -> Response:
    """POST /v1/xorb-commits/default/H/grant/ID."""
    store = _admit(call, "write")
    path = _granted(call)
    if not path.is_file():
        if store.xorb_path(call.args["hash"]).exists():  # the answer to an earlier commit may have been lost
            return JSONResponse({"was_inserted": False})
        raise HubError(404, "nothing was uploaded for this grant")
    try:
        inserted = await run_in_threadpool(store.keep_xorb, path, call.args["hash"])
    except XetFormatError as e:
        raise HubError(400, str(e)) from e
    finally:
        shutil.rmtree(path.parent, ignore_errors=True)
    return JSONResponse({"was_inserted": inserted})


def _granted(call: Call) -> Path:
    return call.hub.store.folder / "uploads" / f"{call.args['hash']}.{call.args['grant']}" / "xorb"


async def put_xorb(call: Call) -> Response:
    """POST /v1/xorbs/default/H. Every chunk is decompressed and hashed before the xorb is kept."""
    store = _admit(call, "write")
    temp = call.hub.store.temp()
    try:
        await call.save(temp, XORB_BYTES + MORE_BYTES)
        inserted = await run_in_threadpool(store.keep_xorb, temp, call.args["hash"])
    except XetFormatError as e:
        raise HubError(400, str(e)) from e
    finally:
        temp.unlink(missing_ok=True)
    return JSONResponse({"was_inserted": inserted})


async def put_shard(call: Call) -> Response:
    """POST /v1/shards. Its files are put together and checked; the answer comes when they are kept."""
    store = _admit(call, "write")
    infos = await _shard(call)
    try:
        for info in infos:
            await run_in_threadpool(store.keep_file, info)
    except XetFormatError as e:
        raise HubError(400, str(e)) from e
    return JSONResponse({"result": 1})


async def put_shard_v2(call: Call) -> Response:
    """POST /v2/shards: the same, with a line of JSON now and then while it lasts; the last one is the verdict."""
    store = _admit(call, "write")
    return StreamingResponse(_frames(store, await _shard(call)), media_type="application/x-ndjson")


async def _shard(call: Call) -> list[FileInfo]:
    raw = await call.body(SHARD_BYTES)
    try:
        return await run_in_threadpool(read_shard, raw)
    except XetFormatError as e:
        raise HubError(400, str(e)) from e


async def _frames(store: XetStore, infos: list[FileInfo]) -> AsyncIterator[bytes]:
    try:
        for n, info in enumerate(infos):
            yield _frame(type="validating", verified=n, total=len(infos))
            work = asyncio.ensure_future(run_in_threadpool(store.keep_file, info))
            while not (await asyncio.wait([work], timeout=BEAT_S))[0]:
                yield _frame(type="validating", verified=n, total=len(infos))
            work.result()
    except (XetFormatError, OSError) as e:
        full = isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT)
        message = f"the hub's disk: {e.strerror}" if isinstance(e, OSError) else str(e)
        yield _frame(type="error", message=message, retryable=isinstance(e, OSError) and not full)
        return
    yield _frame(type="committing", stage="syncing")
    yield _frame(type="result")


def _frame(**value: Any) -> bytes:
    return json.dumps(value).encode() + b"\n"


async def reconstruction(call: Call) -> Response:
    """GET /v1/reconstructions/H or /v2/..., of the whole file or of a Range of its bytes."""
    store = _admit(call, "read")
    file = store.file(call.args["hash"])
    if file is None:
        raise HubError(404, "file is not known")
    terms, offset = _wanted(store, file, *_range(call, file.nbytes))
    value: dict[str, Any] = {"offset_into_first_range": offset}
    value["terms"] = [
        {"hash": t.xorb, "unpacked_length": t.nbytes, "range": {"start": t.start, "end": t.end}} for t in terms
    ]
    ranges = {xorb: _joined(terms, xorb) for xorb in dict.fromkeys(t.xorb for t in terms)}
    urls = {xorb: call.sign("GET", call.hub.blob_origin, f"/xorbs/{xorb}") for xorb in ranges}
    if call.args["version"] == "1":
        value["fetch_info"] = {
            xorb: [{"range": chunks, "url": urls[xorb], "url_range": where} for chunks, where in _located(store, spans)]
            for xorb, spans in ranges.items()
        }
    else:
        value["xorbs"] = {
            xorb: [
                {"url": urls[xorb], "ranges": [{"chunks": chunks, "bytes": where}]}
                for chunks, where in _located(store, spans)
            ]
            for xorb, spans in ranges.items()
        }
    return JSONResponse(value)


def _range(call: Call, nbytes: int) -> tuple[int, int]:
    """[start, end) that the Range header asks for; all of the file without one."""
    header = call.request.headers.get("range")
    if header is None:
        return 0, nbytes
    match = re.fullmatch(r"bytes=(\d{1,18})-(\d{0,18})", header)
    if match is None:
        raise HubError(400, "Range must be bytes=START-[END]")
    start, end = int(match[1]), int(match[2]) + 1 if match[2] else nbytes
    if start >= nbytes or start >= end:
        raise HubError(416, f"the file has {nbytes} bytes")
    return start, min(end, nbytes)


def _wanted(store: XetStore, file: XetFile, start: int, end: int) -> tuple[list[Term], int]:
    """The terms, cut to whole chunks, that cover [start, end); and how far into the first of them `start` is."""
    terms, offset, at = [], 0, 0
    for term in file.terms:
        if at < end and at + term.nbytes > start:
            chunks = store.chunks(term.xorb)
            inside = []  # of this term's chunks: (index, bytes)
            for n in range(term.start, term.end):
                if at < end and at + chunks[n].nbytes > start:
                    if not terms and not inside:
                        offset = start - at
                    inside.append((n, chunks[n].nbytes))
                at += chunks[n].nbytes
            terms.append(Term(term.xorb, inside[0][0], inside[-1][0] + 1, sum(size for _, size in inside)))
        else:
            at += term.nbytes
    return terms, offset


def _joined(terms: list[Term], xorb: str) -> list[Term]:
    """The ranges of chunks needed of a xorb; those that touch are one, so that each term is inside one of them."""
    spans: list[Term] = []
    for term in sorted((t for t in terms if t.xorb == xorb), key=lambda t: t.start):
        if spans and term.start <= spans[-1].end:
            spans[-1] = Term(xorb, spans[-1].start, max(spans[-1].end, term.end), 0)
        else:
            spans.append(Term(xorb, term.start, term.end, 0))
    return spans


def _located(store: XetStore, spans: list[Term]) -> list[tuple[dict[str, int], dict[str, int]]]:
    """(chunks, end excluded; bytes, end included) of each range."""
    places = []
    for span in spans:
        start, end = store.byte_range(span)
        places.append(({"start": span.start, "end": span.end}, {"start": start, "end": end - 1}))
    return places


async def get_xorb(call: Call) -> Response:
    """GET /xorbs/H by a signed URL, without a token."""
    call.check_signature()
    path = store_of(call).xorb_path(call.args["hash"])
    if not path.exists():
        raise HubError(404, f"xorb {call.args['hash']} is gone")
    return FileResponse(path, media_type="application/octet-stream", headers={"X-Content-Type-Options": "nosniff"})


def _admit(call: Call, scope: str) -> XetStore:
    """A token of the hub's own for this; a writer may read."""
    store = store_of(call)
    token = call.request.headers.get("authorization", "").removeprefix("Bearer ")
    match = re.fullmatch(r"xet\.(read|write)\.(\d{1,12})\.([0-9a-f]{64})", token)
    if match is None or not call.hub.store.is_mac(f"xet {match[1]} {match[2]}", match[3]):
        raise HubError(401, "this needs a Xet token of this hub")
    if int(match[2]) < time.time():
        raise HubError(401, "the Xet token has expired: ask the hub for a new one")
    if scope == "write" and match[1] != "write":
        raise HubError(403, "this needs a Xet token for writing")
    return store
