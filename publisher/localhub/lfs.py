"""Large files: batch, single PUT, multipart, verify, download.

Uploads and downloads go to the blob origin with signed URLs and without a token, as with the Hub's storage. Every
file is hashed as it arrives and kept only if size and sha256 are what was announced. The store is one for all
repositories: what one has uploaded, another need not send again.
"""

from __future__ import annotations

import hashlib
import math
import re
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.responses import FileResponse, JSONResponse, Response

from publisher.localhub import xet
from publisher.localhub.store import KINDS, SHA256, Commit, File, Repo, pointer
from publisher.localhub.web import Call, HubError, field

FILE_BYTES = 500 << 30  # the Hub's hard limit for one file
BATCH_FILES = 1000
XET_INFO = "application/vnd.xet-fileinfo+json"  # a client that wants to be told of Xet instead of redirected
COPY_BYTES = 1 << 20


async def batch(call: Call) -> Response:
    """POST /R.git/info/lfs/objects/batch. An object already stored gets no actions: no byte of it is sent again."""
    call.repo()
    call.need_role()
    body = await call.json()
    if field(body, "operation", str) != "upload":
        raise HubError(422, "only uploads are supported; download by /resolve/")
    objects = field(body, "objects", list)
    if len(objects) > BATCH_FILES:
        raise HubError(413, f"more than {BATCH_FILES} objects")
    transfers = field(body, "transfers", list, default=["basic"])
    transfer = next(kind for kind in ("xet", "multipart", "basic") if kind == "basic" or kind in transfers)
    if call.hub.xet is None and transfer == "xet":
        transfer = "multipart" if "multipart" in transfers else "basic"
    answers = [_plan(call, item, transfer) for item in objects]
    named = "xet" if transfer == "xet" else "basic"
    return JSONResponse({"transfer": named, "objects": answers}, media_type="application/vnd.git-lfs+json")


def _plan(call: Call, item: Any, transfer: str) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise HubError(400, "an object must be a JSON object")
    oid, size = field(item, "oid", str), field(item, "size", int)
    answer: dict[str, Any] = {"oid": oid, "size": size}
    if not SHA256.fullmatch(oid) or not 0 <= size <= FILE_BYTES:
        return answer | {"error": {"code": 422, "message": "invalid oid or size"}}
    stored = call.hub.store.lfs_file(oid)
    if stored:
        if stored.size != size:
            return answer | {"error": {"code": 422, "message": f"stored with {stored.size} bytes"}}
        return answer
    if transfer == "xet":
        return answer | {"actions": {"upload": _xet(call)}}
    if transfer == "multipart" and size > call.hub.multipart_bytes:
        upload = _open_multipart(call, oid, size)
    else:
        upload = {"href": call.sign("PUT", call.hub.blob_origin, f"/lfs/{oid}", size)}
    verify = f"{call.hub.hub_origin}/{_prefix(call)}{call.repo_id}.git/info/lfs/verify"
    return answer | {"actions": {"upload": upload, "verify": {"href": verify}}}


def _xet(call: Call) -> dict[str, Any]:
    """Where to get a token for Xet, and the first one."""
    href = f"{call.hub.hub_origin}/api/{call.kind}/{call.repo_id}/xet-write-token/main"
    return {"href": href, "header": xet.token_headers(call, "write")}


def _prefix(call: Call) -> str:
    return "" if call.kind == "models" else f"{call.kind}/"


def _open_multipart(call: Call, oid: str, size: int) -> dict[str, Any]:
    """One signed URL for each part; `header` is where the client looks for them."""
    part_bytes = call.hub.part_bytes
    parts = math.ceil(size / part_bytes)
    upload = secrets.token_hex(8)
    _upload_folder(call, oid, upload).mkdir()
    header = {"chunk_size": str(part_bytes)}
    for n in range(1, parts + 1):
        nbytes = min(part_bytes, size - (n - 1) * part_bytes)
        header[f"{n:05d}"] = call.sign("PUT", call.hub.blob_origin, f"/lfs/{oid}/{upload}/{n}", nbytes)
    return {
        "href": call.sign("POST", call.hub.hub_origin, f"/lfs/{oid}/{upload}/complete", size),
        "header": header,
    }


def _upload_folder(call: Call, oid: str, upload: str) -> Path:
    return call.hub.store.folder / "uploads" / f"{oid}.{upload}"


async def put(call: Call) -> Response:
    """PUT of a whole file to the blob origin."""
    call.check_signature()
    temp = call.hub.store.temp()
    try:
        digest = await call.save(temp)
        if digest != call.args["oid"]:
            raise HubError(400, f"BadDigest: sha256 is {digest}, announced {call.args['oid']}")
        call.hub.store.keep_lfs(temp, digest)
    finally:
        temp.unlink(missing_ok=True)
    return Response(status_code=200, headers={"ETag": f'"{digest}"'})


async def put_part(call: Call) -> Response:
    """PUT of one part to the blob origin. The whole is checked when it is complete."""
    call.check_signature()
    folder = _upload_folder(call, call.args["oid"], call.args["upload"])
    if not folder.is_dir():
        raise HubError(404, "NoSuchUpload")
    temp = call.hub.store.temp()
    try:
        digest = await call.save(temp)
        temp.replace(folder / call.args["part"])
    finally:
        temp.unlink(missing_ok=True)
    return Response(status_code=200, headers={"ETag": f'"{digest}"'})


async def complete(call: Call) -> Response:
    """POST that ends a multipart upload; no token, the URL is signed."""
    call.check_signature()
    body = await call.json()
    oid = call.args["oid"]
    if field(body, "oid", str) != oid:
        raise HubError(400, "the oid is not that of this upload")
    parts = []
    for n, part in enumerate(field(body, "parts", list), start=1):
        if not isinstance(part, dict) or field(part, "partNumber", int) != n:
            raise HubError(400, "InvalidPartOrder")
        parts.append(field(part, "etag", str).strip('"'))
    folder = _upload_folder(call, oid, call.args["upload"])
    size = int(call.request.query_params["size"])
    if len(parts) != math.ceil(size / call.hub.part_bytes):
        raise HubError(400, "InvalidPart: not all parts are there")
    if not folder.is_dir():
        # The answer to an earlier, successful completion may have been lost.
        if call.hub.store.lfs_file(oid):
            return JSONResponse({"success": True})
        raise HubError(404, "NoSuchUpload")
    temp = call.hub.store.temp()
    try:
        await run_in_threadpool(_join, folder, parts, temp, oid)
        call.hub.store.keep_lfs(temp, oid)
    finally:
        temp.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    return JSONResponse({"success": True})


def _join(folder: Path, etags: list[str], out_path: Path, oid: str) -> None:
    whole = hashlib.sha256()
    with open(out_path, "wb") as out:
        for n, etag in enumerate(etags, start=1):
            part = hashlib.sha256()
            path = folder / str(n)
            if not path.is_file():
                raise HubError(400, f"InvalidPart: part {n} was not uploaded")
            with path.open("rb") as source:
                while chunk := source.read(COPY_BYTES):
                    part.update(chunk)
                    whole.update(chunk)
                    out.write(chunk)
            if part.hexdigest() != etag:
                raise HubError(400, f"InvalidPart: part {n} has another ETag")
    if whole.hexdigest() != oid:
        raise HubError(400, f"BadDigest: sha256 is {whole.hexdigest()}, announced {oid}")


async def verify(call: Call) -> Response:
    """POST /R.git/info/lfs/verify: is it really there?"""
    call.repo()
    call.need_role()
    body = await call.json()
    oid, size = field(body, "oid", str), field(body, "size", int)
    stored = call.hub.store.lfs_file(oid) if SHA256.fullmatch(oid) else None
    if stored is None or stored.size != size:
        raise HubError(404, "object is not stored with this size")
    return JSONResponse({"success": True})


async def duplicate(call: Call) -> Response:
    """POST .../lfs-files/duplicate: makes LFS files of this repository known to another, without sending them."""
    body = await call.json()
    source = call.repo()
    target = field(body, "target", dict)
    kind = field(target, "type", str, default="model") + "s"
    if kind not in KINDS:
        raise HubError(400, "invalid repo type")
    call.repo(kind=kind, repo_id=field(target, "name", str), write=True)
    held = {
        file.sha256 for oid in {*source.heads.values(), *source.tags.values()} for file in _files(call, source, oid)
    }
    good, failed = [], []
    for item in field(body, "files", list):
        sha256 = field(item, "sha256", str) if isinstance(item, dict) else ""
        if sha256 in held:
            good.append({"sha256": sha256})
        else:
            failed.append({"sha256": sha256, "error": f"{source.id} has no such file"})
    return JSONResponse({"success": good, "failed": failed})


def _files(call: Call, repo: Repo, oid: str) -> Iterable[File]:
    return call.hub.store.commit(repo, oid).tree.values()


async def resolve(call: Call) -> Response:
    """GET or HEAD /R/resolve/REV/PATH: a regular file itself, or where an LFS file is."""
    repo, commit, file = _find(call)
    headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
    if file.sha256 is None:
        return _file(call, call.hub.store.path_of(file), file.oid, headers)
    location = call.sign("GET", call.hub.blob_origin, f"/lfs/{file.sha256}")
    headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
    headers |= xet.file_headers(call, repo, commit.oid, file)
    if "X-Xet-Hash" in headers and XET_INFO in call.request.headers.get("accept", ""):
        return JSONResponse({"hash": headers["X-Xet-Hash"], "size": file.size}, headers=headers, media_type=XET_INFO)
    headers["Location"] = location
    return Response(status_code=302, headers=headers)


async def raw(call: Call) -> Response:
    """GET or HEAD /R/raw/REV/PATH: the file as git has it, which is the pointer for an LFS file."""
    _, commit, file = _find(call)
    headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{file.oid}"'}
    if file.sha256 is None:
        return _file(call, call.hub.store.path_of(file), file.oid, headers)
    return Response(pointer(file.sha256, file.size), headers=headers, media_type="text/plain")


def _find(call: Call) -> tuple[Repo, Commit, File]:
    """The file that the URL names, for one who may download it."""
    repo = call.repo()
    call.need_download(repo)
    commit = call.commit(repo)
    file = commit.tree.get(call.args["path"])
    if file is None:
        raise HubError(404, "Entry not found", "EntryNotFound", x_repo_commit=commit.oid)
    return repo, commit, file


async def get_blob(call: Call) -> Response:
    """GET of an LFS file from the blob origin, in whole or by Range."""
    call.check_signature()
    oid = call.args["oid"]
    return _file(call, call.hub.store.lfs_path(oid), oid, {"ETag": f'"{oid}"'})


def _file(call: Call, path: Path, oid: str, headers: dict[str, str]) -> Response:
    if not path.exists():
        raise HubError(404, f"blob {oid} is gone")
    # Never a type a browser would run: the content is whatever somebody pushed.
    headers |= {"X-Content-Type-Options": "nosniff", "Content-Security-Policy": "default-src 'none'; sandbox"}
    text = re.search(r"\.(md|txt|json|jinja|ya?ml)$", call.args.get("path", ""))
    return FileResponse(path, headers=headers, media_type="text/plain" if text else "application/octet-stream")
