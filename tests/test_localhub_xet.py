"""Xet in the built-in hub: the real client (hf_xet) against it, and anything a hostile one might say."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import CommitOperationAdd, HfApi, constants, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from hypothesis import given
from hypothesis import strategies as st
from xet_pieces import BOOKEND, Cas, file_entry, leaves, name_of, packed, shard

from publisher.localhub import Fault, LocalHub
from publisher.localhub import xet_format as form

WRITE, READ, STRANGER = "hf_write", "hf_read", "hf_stranger"
TOKENS = {WRITE: "write:alice,acme", READ: "read:alice,acme", STRANGER: "write:bob"}
REPO = "acme/tiny-4bit"
NOISE = hashlib.shake_256(b"weights").digest(600_000)
CHUNKS = [NOISE[at : at + 5000] for at in range(0, 40_000, 5000)]


@pytest.fixture(autouse=True)
def _with_xet(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.setenv("HF_XET_CACHE", str(tmp_path / "xet-cache"))
    monkeypatch.setenv("HF_XET_CLIENT_RETRY_BASE_DELAY", "10ms")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    monkeypatch.delenv("HF_TOKEN", raising=False)


@pytest.fixture
def hub(tmp_path):
    with LocalHub(tmp_path / "hub", TOKENS) as hub:
        HfApi(endpoint=hub.url, token=WRITE).create_repo(REPO)
        yield hub
        assert hub.stats.crashes == 0
        assert list((tmp_path / "hub/tmp").iterdir()) == []


def push(hub, tmp_path, data, name="model.safetensors", repo=REPO):
    """As `publish push` does it, with a file on disk: the client has no Xet for bytes in memory."""
    path = tmp_path / "to-send.bin"
    path.write_bytes(data)
    client = HfApi(endpoint=hub.url, token=WRITE)
    client.create_repo(repo, exist_ok=True)
    adds = [CommitOperationAdd(name, str(path))]
    client.preupload_lfs_files(repo, additions=adds)
    return client.create_commit(repo, operations=adds, commit_message="push")


def download(hub, tmp_path, name="model.safetensors", cache="cache", token=WRITE):
    path = hf_hub_download(REPO, name, endpoint=hub.url, token=token, cache_dir=tmp_path / cache)
    return Path(path).read_bytes()


def listed(hub, name="model.safetensors"):
    return HfApi(endpoint=hub.url, token=WRITE).get_paths_info(REPO, [name])


def commit(hub, sha256, size):
    lines = [
        {"key": "header", "value": {"summary": "x"}},
        {"key": "lfsFile", "value": {"path": "a.bin", "algo": "sha256", "oid": sha256, "size": size}},
    ]
    url = f"{hub.url}/api/models/{REPO}/commit/main"
    body = "\n".join(map(json.dumps, lines))
    return httpx2.post(url, content=body, headers={"Authorization": f"Bearer {WRITE}"})


# -- the real client ------------------------------------------------------------------------------------------


def test_the_client_uploads_and_downloads_through_xet(hub, tmp_path, monkeypatch):
    push(hub, tmp_path, NOISE)
    assert hub.stats.requests["lfs_batch"] == hub.stats.requests["lfs_put"] == 0
    assert len(NOISE) <= hub.stats.received["xet_put"] < len(NOISE) + 1000
    entry = listed(hub)[0]
    assert entry.lfs.sha256 == hashlib.sha256(NOISE).hexdigest()
    assert len(entry.xet_hash) == 64
    hub.stats.reset()
    assert download(hub, tmp_path) == NOISE
    assert hub.stats.requests["blob"] == 0
    assert hub.stats.sent["xet_blob"] >= len(NOISE)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    assert download(hub, tmp_path, cache="without-xet") == NOISE
    assert hub.stats.requests["blob"] == 1
    assert hub.stats.leaks == 0


def test_what_the_hub_has_is_not_sent_again_even_by_a_client_that_forgot(hub, tmp_path, monkeypatch):
    push(hub, tmp_path, NOISE)
    hub.stats.reset()
    monkeypatch.setenv("HF_XET_CACHE", str(tmp_path / "empty"))
    push(hub, tmp_path, NOISE, repo="acme/other")
    assert hub.stats.received["xet_put"] == 0
    monkeypatch.setenv("HF_XET_CACHE", str(tmp_path / "empty-too"))
    push(hub, tmp_path, NOISE + b"and more", name="longer.safetensors")
    assert 0 < hub.stats.received["xet_put"] < len(NOISE) / 2


def test_a_file_sent_without_xet_is_downloaded_without(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    push(hub, tmp_path, NOISE)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    assert listed(hub)[0].xet_hash is None
    assert download(hub, tmp_path) == NOISE
    assert hub.stats.requests["xet_token"] == 0


def test_a_file_that_changes_after_it_was_hashed_is_not_committed(hub, tmp_path):
    """The client believes the sha256 it was given; the hub does not."""
    path = tmp_path / "changing.bin"
    path.write_bytes(NOISE)
    adds = [CommitOperationAdd("model.safetensors", str(path))]
    assert adds[0].upload_info.sha256.hex() == hashlib.sha256(NOISE).hexdigest()
    path.write_bytes(b"changed" + NOISE[7:])
    with pytest.raises((OSError, RuntimeError), match="sha256"):
        HfApi(endpoint=hub.url, token=WRITE).preupload_lfs_files(REPO, additions=adds)
    assert commit(hub, hashlib.sha256(NOISE).hexdigest(), len(NOISE)).status_code == 400
    assert listed(hub) == []


def test_faults_of_xet_are_survived_or_seen(hub, tmp_path):
    hub.faults.add(Fault("xet_put", "status", status=503))
    hub.faults.add(Fault("xet_shard", "lose_answer"))
    push(hub, tmp_path, NOISE)
    assert (hub.stats.requests["xet_put"], hub.stats.requests["xet_shard"]) == (2, 2)
    hub.faults.add(Fault("xet_blob", "cut", after_bytes=1000))
    assert download(hub, tmp_path) == NOISE
    hub.faults.add(Fault("xet_token", "status", status=403))
    with pytest.raises((HfHubHTTPError, OSError, RuntimeError)):
        push(hub, tmp_path, NOISE[::-1])


def test_state_survives_a_kill_between_upload_and_commit(tmp_path):
    code = f"from publisher.localhub import *; run({str(tmp_path / 'hub')!r}, '127.0.0.1', 0, {TOKENS!r})"
    server = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    path = tmp_path / "model.bin"
    path.write_bytes(NOISE)
    try:
        url = next(word for word in server.stdout.readline().split() if word.startswith("http"))
        client = HfApi(endpoint=url, token=WRITE)
        client.create_repo(REPO)
        client.preupload_lfs_files(REPO, additions=[CommitOperationAdd("model.safetensors", str(path))])
    finally:
        server.send_signal(signal.SIGKILL)
        server.wait()
        server.stdout.close()
    os.environ["HF_XET_CACHE"] = str(tmp_path / "another-machine")  # the fixture puts the old one back
    with LocalHub(tmp_path / "hub", TOKENS) as hub:
        assert listed(hub) == []
        push(hub, tmp_path, NOISE)
        assert hub.stats.received["xet_put"] == 0
        hub.stop()
    with LocalHub(tmp_path / "hub", TOKENS) as again:
        assert download(again, tmp_path) == NOISE
        assert again.stats.requests["xet_blob"] > 0


def test_a_client_that_gets_no_grant_sends_xorbs_to_the_cas(hub, tmp_path):
    hub.faults.add(Fault("xet_grant", "status", status=404))
    push(hub, tmp_path, NOISE)
    assert (hub.stats.requests["xet_put"], hub.stats.received["xet_xorb"] >= len(NOISE)) == (0, True)
    assert download(hub, tmp_path) == NOISE


# -- the CAS, by hand -----------------------------------------------------------------------------------------


def test_hashes_are_those_of_the_protocol():
    """Values of the protocol's own reference tests."""
    nodes = [
        ("cfc5d07f6f03c29bbf424132963fe08d19a37d5757aaf520bf08119f05cd56d6", 100),
        ("c3e67584b5c4fc2a89837ec39e40f2c8a6bb0b2987ac94cd4b31e5fbdd210a72", 200),
        ("0d2beb91b9196929a5ddec9f6e306924ddf4a24268e3e59fd8464738d525af37", 300),
    ]
    assert form.xorb_hash(nodes) == "71ec1275fca074724e2dd666921b3277c7cee603e4d025bcab2d4050015be2bc"
    assert form.file_hash(nodes) == "54e55dccc6653c612bdb5576c5d3cb34bb31bc4e100248abccf4c908b3ef7715"
    again = form.xorb_hash([nodes[0], nodes[1], nodes[0], nodes[1]])
    assert again == "90f8313ef12df385d237a067aded02562c35ded12116e32eba401dbc86c38031"
    assert form.to_hex(bytes(range(32))) == "07060504030201000f0e0d0c0b0a090817161514131211101f1e1d1c1b1a1918"


@pytest.mark.parametrize("scheme", [0, 1, 2])
def test_every_compression_scheme_is_read(hub, scheme):
    cas = Cas(hub, WRITE, REPO)
    chunks = [b"some text " * 500 + bytes(n) for n in range(4)]
    assert cas.put_xorb(chunks, scheme).json() == {"was_inserted": True}
    assert cas.put_xorb(chunks, scheme).json() == {"was_inserted": False}
    assert cas.put_shard(shard(file_entry([(chunks, 0, 4)]))).json() == {"result": 1}
    data = b"".join(chunks)
    assert commit(hub, hashlib.sha256(data).hexdigest(), len(data)).status_code == 200
    assert commit(hub, hashlib.sha256(data).hexdigest(), len(data) + 1).status_code == 400


@pytest.mark.parametrize("version", [1, 2])
def test_any_range_of_a_file_is_put_together_from_pieces_of_several_xorbs(hub, version):
    cas = Cas(hub, WRITE, REPO)
    one, two = CHUNKS[:5], CHUNKS[5:]
    assert cas.put_xorb(one).status_code == cas.put_xorb(two, 1).status_code == 200
    parts = [(one, 1, 4), (two, 0, 2), (one, 3, 5), (one, 0, 1), (two, 1, 3)]
    assert cas.put_shard(shard(file_entry(parts))).status_code == 200
    data = b"".join(b"".join(chunks[start:end]) for chunks, start, end in parts)
    used = [chunk for chunks, start, end in parts for chunk in chunks[start:end]]
    name = form.file_hash(leaves(used))
    reader = Cas(hub, None, REPO, "read")
    for start, end in [(0, len(data)), (0, 1), (4999, 5001), (7000, 31_000), (49_999, 50_000), (12_345, 12_346)]:
        assert reader.fetch(name, start, end, version) == data[start:end]
    beyond = reader.call("GET", f"/v{version}/reconstructions/{name}", headers={"Range": f"bytes={len(data)}-"})
    assert beyond.status_code == 416


def test_a_known_chunk_is_answered_with_a_shard_about_its_xorb(hub):
    cas = Cas(hub, WRITE, REPO)
    first = f"/v1/chunks/default-merkledb/{form.chunk_hash(CHUNKS[0])}"
    assert cas.call("GET", first).status_code == 404
    cas.put_xorb(CHUNKS)
    cas.put_shard(shard(file_entry([(CHUNKS, 0, 8)])))
    answer = cas.call("GET", first)
    assert answer.status_code == 200
    assert form.read_shard(answer.content) == []
    assert form.from_hex(name_of(CHUNKS)) in answer.content


def test_v2_shards_end_with_a_verdict(hub):
    cas = Cas(hub, WRITE, REPO)
    cas.put_xorb(CHUNKS)
    good = [json.loads(line) for line in cas.put_shard(shard(file_entry([(CHUNKS, 0, 8)])), 2).text.splitlines()]
    assert [frame["type"] for frame in good] == ["validating", "committing", "result"]
    bad = cas.put_shard(shard(file_entry([(CHUNKS, 0, 2)], sha256="ab" * 32)), 2)
    verdict = json.loads(bad.text.splitlines()[-1])
    assert (bad.status_code, verdict["type"], verdict["retryable"]) == (200, "error", False)
    assert "sha256" in verdict["message"]


def test_a_wrong_sha256_is_refused_with_the_shard_and_at_the_commit(hub):
    cas = Cas(hub, WRITE, REPO)
    cas.put_xorb(CHUNKS)
    wanted = hashlib.sha256(b"something else").hexdigest()
    answer = cas.put_shard(shard(file_entry([(CHUNKS, 0, 8)], sha256=wanted)))
    assert (answer.status_code, wanted in answer.json()["error"]) == (400, True)
    assert commit(hub, wanted, 40_000).status_code == 400
    # Once the file is known under its own name, another shard cannot give it a second one.
    assert cas.put_shard(shard(file_entry([(CHUNKS, 0, 8)], sha256=""))).status_code == 200
    assert cas.put_shard(shard(file_entry([(CHUNKS, 0, 8)], sha256=wanted))).status_code == 400
    assert commit(hub, wanted, 40_000).status_code == 400
    assert commit(hub, hashlib.sha256(b"".join(CHUNKS)).hexdigest(), 40_000).status_code == 200


def test_a_xorb_by_grant_is_looked_at_when_it_is_committed(hub, tmp_path):
    cas, name, body = Cas(hub, WRITE, REPO), name_of(CHUNKS[:1]), packed(CHUNKS[0])
    nbytes = len(body)

    def ask(length=nbytes):
        return cas.call("POST", f"/v1/xorb-grants/default/{name}", json={"length": length, "checksum": {}})

    def finish(grant):
        return cas.call("POST", f"/v1/xorb-commits/default/{name}/grant/{grant['id']}")

    assert ask(1 << 40).status_code == 413
    grant = ask().json()
    assert finish(grant).status_code == 404
    assert httpx2.put(grant["url"], content=body[:-1]).status_code == 400
    assert httpx2.put(grant["url"].split("?")[0], content=body).status_code == 403
    assert httpx2.put(grant["url"], content=packed(CHUNKS[1])).status_code == 200
    assert "its hash is" in finish(grant).json()["error"]
    grant = ask().json()
    httpx2.put(grant["url"], content=body)
    assert finish(grant).json() == {"was_inserted": True}
    assert finish(grant).json() == {"was_inserted": False}
    assert ask().status_code == 200
    assert list((tmp_path / "hub/uploads").iterdir()) == []


# -- who may do what ------------------------------------------------------------------------------------------


def test_the_cas_takes_only_its_own_tokens(hub):
    client = HfApi(endpoint=hub.url, token=WRITE)
    client.update_repo_settings(REPO, private=True)
    for token, scope in ((READ, "write"), (STRANGER, "write"), (STRANGER, "read"), (None, "read"), (None, "write")):
        with pytest.raises(httpx2.HTTPStatusError, match=r"40[134]"):
            Cas(hub, token, REPO, scope)
    reader = Cas(hub, READ, REPO, "read")
    assert reader.put_xorb(CHUNKS).status_code == 403
    assert reader.put_shard(shard()).status_code == 403
    writer = Cas(hub, WRITE, REPO)
    writer.put_xorb(CHUNKS)
    good = writer.token
    path = f"/v1/chunks/default/{'0' * 64}"
    scope, exp, mac = good.split(".")[1:]
    for token in ("none", "xet.write.1." + mac, good[:-1] + "x", f"xet.{scope}.{int(exp) + 1}.{mac}"):
        writer.token = token
        assert writer.call("GET", path).status_code == 401, token
    assert hub.stats.leaks == 0
    writer.token = WRITE
    assert writer.call("GET", path).status_code == 400
    assert httpx2.get(f"{writer.url}/xorbs/{name_of(CHUNKS)}").status_code == 403
    leaky = httpx2.get(f"{writer.url}/xorbs/{name_of(CHUNKS)}", headers={"Authorization": f"Bearer {good}"})
    assert leaky.status_code == 400
    assert hub.stats.leaks == 2


def test_a_token_ends(hub, monkeypatch):
    cas = Cas(hub, WRITE, REPO)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 4000)
    assert "expired" in cas.call("GET", f"/v1/chunks/default/{'0' * 64}").json()["error"]


def test_a_hub_can_be_without_xet(tmp_path, monkeypatch):
    with LocalHub(tmp_path / "hub", TOKENS, xet=False) as hub:
        HfApi(endpoint=hub.url, token=WRITE).create_repo(REPO)
        answer = httpx2.get(
            f"{hub.url}/api/models/{REPO}/xet-write-token/main", headers={"Authorization": f"Bearer {WRITE}"}
        )
        assert (answer.status_code, "HF_HUB_DISABLE_XET" in answer.json()["error"]) == (404, True)
        body = {"operation": "upload", "transfers": ["basic", "xet"], "objects": [{"oid": "a" * 64, "size": 1}]}
        url = f"{hub.url}/{REPO}.git/info/lfs/objects/batch"
        batch = httpx2.post(url, json=body, headers={"Authorization": f"Bearer {WRITE}"}).json()
        assert batch["transfer"] == "basic"
        assert "/lfs/" in batch["objects"][0]["actions"]["upload"]["href"]
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        push(hub, tmp_path, NOISE)
        assert download(hub, tmp_path) == NOISE


# -- hostile input --------------------------------------------------------------------------------------------


GOOD = packed(CHUNKS[0])
XORBS = {
    "empty": b"",
    "header cut short": GOOD[:5],
    "data cut short": GOOD[:-1],
    "junk behind": GOOD + b"\0",
    "another version": packed(CHUNKS[0], version=1),
    "unknown scheme": GOOD[:4] + b"\x07" + GOOD[5:],
    "length of nothing": packed(CHUNKS[0], length=0),
    "length too long": packed(CHUNKS[0], length=1 << 23),
    "other length": packed(CHUNKS[0], length=4999),
    "more than announced": packed(bytes(100_000), 1, length=10),
    "less than announced": packed(bytes(10), 1, length=100),
    "not lz4": packed(b"not lz4 at all", 0)[:4] + b"\x01" + packed(b"not lz4 at all", 0)[5:],
    "another chunk": packed(CHUNKS[1]),
    "a footer alone": b"XETBLOB\0" + bytes(100),
    "too many chunks": packed(b"x") * (form.XORB_CHUNKS + 1),
}


@pytest.mark.parametrize("fault", XORBS)
def test_a_wrong_xorb_is_refused(hub, fault):
    cas = Cas(hub, WRITE, REPO)
    answer = cas.put_xorb(CHUNKS[:1], body=XORBS[fault])
    assert (answer.status_code, answer.json()["error"].count("\n")) == (400, 0)
    assert cas.put_shard(shard(file_entry([(CHUNKS[:1], 0, 1)]))).status_code == 400
    assert cas.put_xorb(CHUNKS[:1], body=GOOD + b"XETBLOB\0 as older clients end it").status_code == 200


ENTRY = file_entry([(CHUNKS, 0, 8)])
WHOLE = shard(ENTRY)
SHARDS = {
    "empty": b"",
    "another format": b"x" * len(WHOLE),
    "another version": WHOLE[:32] + b"\x03" + WHOLE[33:],
    "no end": WHOLE[: -len(BOOKEND) * 2],
    "no end of the second section": WHOLE[: -len(BOOKEND)],
    "four billion terms": shard(ENTRY[:36] + b"\xff" * 4 + ENTRY[40:]),
    "no chunks": shard(file_entry([(CHUNKS, 3, 3)])),
    "chunks backwards": shard(file_entry([(CHUNKS, 3, 1)])),
    "another file hash": shard(file_entry([(CHUNKS, 0, 8)], name="ab" * 32)),
    "a xorb nobody sent": shard(file_entry([(CHUNKS[1:], 0, 7)])),
    "chunks past the xorb's end": shard(ENTRY[:92] + b"\x09" + ENTRY[93:]),
    "another size": shard(ENTRY[:84] + b"\x01" + ENTRY[85:]),
    "another check": shard(ENTRY[:96] + b"\x01" * 32 + ENTRY[128:]),
}


@pytest.mark.parametrize("fault", SHARDS)
def test_a_wrong_shard_is_refused_and_makes_no_file(hub, tmp_path, fault):
    cas = Cas(hub, WRITE, REPO)
    cas.put_xorb(CHUNKS)
    answer = cas.put_shard(SHARDS[fault])
    assert (answer.status_code, answer.json()["error"].count("\n")) == (400, 0)
    assert list((tmp_path / "hub/blobs/sha256").iterdir()) == []
    assert cas.put_shard(WHOLE).status_code == 200


def test_a_small_shard_cannot_fill_the_disk(hub):
    """A few kilobytes can name one xorb over and over: a file of any size."""
    cas = Cas(hub, WRITE, REPO)
    chunks = [bytes([n % 256, n // 256]) + bytes(form.CHUNK_BYTES - 2) for n in range(256)]
    assert cas.put_xorb(chunks, 1).status_code == 200
    whole = file_entry([(chunks, 0, 256)], checks=False)
    header, term, end = whole[:48], whole[48:96], whole[96:]
    count = form.SHARD_TERMS  # of 32 MiB each
    huge = shard(header[:36] + count.to_bytes(4, "little") + header[40:] + term * count + end)
    started = time.monotonic()
    assert cas.put_shard(huge).status_code == 507
    assert time.monotonic() - started < 5
    more = shard(header[:36] + (count + 1).to_bytes(4, "little") + header[40:] + term * (count + 1) + end)
    assert cas.put_shard(more).status_code == 400
    assert cas.put_shard(huge + bytes(form.SHARD_BYTES)).status_code == 413


def test_a_xorb_larger_than_the_protocol_allows_is_refused(hub, monkeypatch):
    monkeypatch.setattr("publisher.localhub.xet.XORB_BYTES", 10_000)
    monkeypatch.setattr("publisher.localhub.xet.MORE_BYTES", 1000)
    monkeypatch.setattr(form, "XORB_BYTES", 10_000)
    cas = Cas(hub, WRITE, REPO)
    assert cas.put_xorb(CHUNKS).status_code == 413
    assert cas.put_xorb([*CHUNKS[:2], b"x"]).status_code == 400
    # Clients fill a xorb up to the limit, and the chunks' headers come on top.
    assert cas.put_xorb(CHUNKS[:2]).status_code == 200


@given(st.binary(max_size=300), st.integers(0, 250), st.binary(max_size=8))
def test_whatever_comes_is_read_or_refused(junk, at, patch):
    for raw in (junk, WHOLE[:at] + patch + WHOLE[at + len(patch) :], form._SHARD_TAG + junk):
        try:
            form.read_shard(raw)
        except form.XetFormatError as e:
            assert "\n" not in str(e)
    packs = packed(b"text " * 50, 1) + packed(b"text " * 60, 2)
    for raw in (junk, packs[:at] + patch + packs[at + len(patch) :]):
        try:
            form.index_xorb(io.BytesIO(raw), len(raw))
        except form.XetFormatError as e:
            assert "\n" not in str(e)
