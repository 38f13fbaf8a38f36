"""Xorbs and shards made by hand, as a client makes them, and a client that says anything to the hub's CAS."""

from __future__ import annotations

import hashlib
import io
import struct

import httpx2
import lz4.frame

from publisher.localhub.xet_format import chunk_hash, file_hash, from_hex, range_hash, read_chunks, xorb_hash

TAG = b"HFRepoMetaData\0" + bytes.fromhex("55696745 6a7b8157 83a5bdd9 5ccdd14a a9")
BOOKEND = b"\xff" * 32 + bytes(16)


def grouped(data: bytes) -> bytes:
    return b"".join(data[n::4] for n in range(4))


def packed(data: bytes, scheme: int = 0, *, version: int = 0, length: int | None = None) -> bytes:
    """One chunk of a xorb."""
    body = data if scheme == 0 else lz4.frame.compress(grouped(data) if scheme == 2 else data)
    sizes = [n.to_bytes(3, "little") for n in (len(body), len(data) if length is None else length)]
    return struct.pack("<B3sB3s", version, sizes[0], scheme, sizes[1]) + body


def leaves(chunks: list[bytes]) -> list[tuple[str, int]]:
    return [(chunk_hash(data), len(data)) for data in chunks]


def name_of(chunks: list[bytes]) -> str:
    return xorb_hash(leaves(chunks))


def file_entry(parts, sha256: str | None = None, *, name: str | None = None, checks: bool = True) -> bytes:
    """parts: (all chunks of a xorb, start, end). sha256 None: the right one; "": none."""
    used = [chunk for chunks, start, end in parts for chunk in chunks[start:end]]
    if sha256 is None:
        sha256 = hashlib.sha256(b"".join(used)).hexdigest()
    flags = (checks << 31) | (bool(sha256) << 30)
    entries = [struct.pack("<32sIIQ", from_hex(name or file_hash(leaves(used))), flags, len(parts), 0)]
    for chunks, start, end in parts:
        nbytes = sum(map(len, chunks[start:end]))
        entries.append(struct.pack("<32s4I", from_hex(name_of(chunks)), 0, nbytes, start, end))
    if checks:
        for chunks, start, end in parts:
            entries.append(from_hex(range_hash([h for h, _ in leaves(chunks[start:end])])) + bytes(16))
    if sha256:
        entries.append(from_hex(sha256) + bytes(16))
    return b"".join(entries)


def shard(*entries: bytes) -> bytes:
    return struct.pack("<32sQQ", TAG, 2, 0) + b"".join(entries) + BOOKEND * 2


class Cas:
    """The CAS of a hub, with a token for one repository."""

    def __init__(self, hub, token: str, repo: str, scope: str = "write") -> None:
        url = f"{hub.url}/api/models/{repo}/xet-{scope}-token/main"
        self.client = httpx2.Client()
        told = self.client.get(url, headers={"Authorization": f"Bearer {token}"} if token else {})
        told.raise_for_status()
        self.url, self.token = told.json()["casUrl"], told.json()["accessToken"]

    def call(self, method: str, path: str, **options) -> httpx2.Response:
        headers = {"Authorization": f"Bearer {self.token}"} | options.pop("headers", {})
        return self.client.request(method, self.url + path, headers=headers, **options)

    def put_xorb(self, chunks: list[bytes], scheme: int = 0, body: bytes | None = None) -> httpx2.Response:
        body = b"".join(packed(chunk, scheme) for chunk in chunks) if body is None else body
        return self.call("POST", f"/v1/xorbs/default/{name_of(chunks)}", content=body)

    def put_shard(self, raw: bytes, version: int = 1) -> httpx2.Response:
        return self.call("POST", f"/v{version}/shards", content=raw)

    def fetch(self, name: str, start: int, end: int, version: int) -> bytes:
        """Bytes [start, end) of a file, put together as a client does it."""
        answer = self.call("GET", f"/v{version}/reconstructions/{name}", headers={"Range": f"bytes={start}-{end - 1}"})
        answer.raise_for_status()
        told = answer.json()
        if version == 1:
            places = {
                xorb: [(place["range"], place["url"], place["url_range"]) for place in places]
                for xorb, places in told["fetch_info"].items()
            }
        else:
            places = {
                xorb: [(part["chunks"], place["url"], part["bytes"]) for place in places for part in place["ranges"]]
                for xorb, places in told["xorbs"].items()
            }
        out = b""
        for term in told["terms"]:
            inside, url, where = next(
                place for place in places[term["hash"]]
                if place[0]["start"] <= term["range"]["start"] and term["range"]["end"] <= place[0]["end"]
            )  # fmt: skip
            raw = self.client.get(url, headers={"Range": f"bytes={where['start']}-{where['end']}"})
            assert raw.status_code == 206
            chunks = [data for data, _ in read_chunks(io.BytesIO(raw.content), len(raw.content))]
            skip = inside["start"]
            data = b"".join(chunks[term["range"]["start"] - skip : term["range"]["end"] - skip])
            assert len(data) == term["unpacked_length"]
            out += data
        offset = told["offset_into_first_range"]
        return out[offset : offset + end - start]
