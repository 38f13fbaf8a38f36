"""What a hub may answer: of the wrong type, huge, packed, from elsewhere, or with paths that lead out."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import set_client_factory
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inference.errors import HubUnavailable, PublishError
from publisher.fetch import remote_headers
from publisher.hub_bounds import ANSWER_BYTES, bound, is_file_of_a_repo

sys.path.insert(0, str(Path(__file__).parents[1] / "fuzz"))

from answering import ENDPOINT, answering_hub

OID = "a" * 40
ODD = st.sampled_from(
    [None, True, 0, -1, 1 << 70, 0.5, "", "x", "../x", "/x", "a\\b", "\x1b[2J", [], [[]], {}, {"a": 1}]
)


def refused(call, *args) -> str:
    with pytest.raises(PublishError) as e:
        call(*args)
    assert str(e.value).isprintable()
    return str(e.value)


def tree(*entries: dict) -> bytes:
    return json.dumps(list(entries)).encode()


def entry(path: object, size: object = 3, oid: object = OID, **more: object) -> dict:
    return {"type": "file", "path": path, "size": size, "oid": oid, **more}


@pytest.mark.parametrize(
    "path", ["../x", "a/../../x", "/etc/passwd", "a\\..\\x", "a//b", "", ".", "a\nb", "\x1b[2J", "x" * 2000]
)
def test_paths_that_lead_out_are_no_answer_of_a_hub(path):
    assert "none of a hub" in refused(answering_hub(200, tree(entry(path))).tree, "acme/x", OID)


@pytest.mark.parametrize(
    "entry",
    [entry("a", size=-1), entry("a", size="3"), entry("a", size=1 << 60), entry("a", oid="x"), entry("a", oid=None),
     entry("a", lfs={"oid": "x", "size": 3, "pointerSize": 1})],
)  # fmt: skip
def test_sizes_and_hashes_that_are_none_are_no_answer_of_a_hub(entry):
    assert "none of a hub" in refused(answering_hub(200, tree(entry)).tree, "acme/x", OID)


@pytest.mark.parametrize("item", [None, 5, "x", [], {}, {"id": "main"}, {"id": "../x"}, {"id": 5}])
def test_a_history_of_what_are_no_commits_is_no_answer_of_a_hub(item):
    assert "none of a hub" in refused(answering_hub(200, json.dumps([item]).encode()).history, "acme/x", OID)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    st.dictionaries(
        st.sampled_from(["title", "message", "authors", "date"]), ODD | st.lists(ODD | st.just({"user": 5}))
    )
)
def test_of_a_commit_only_its_id_must_be_one(said):
    (commit,) = answering_hub(200, json.dumps([{"id": OID, **said}]).encode()).history("acme/x", OID)
    assert commit.id == OID
    assert all(isinstance(text, str) for text in (commit.title, commit.message, commit.author))


def test_files_of_any_language_are_files():
    assert is_file_of_a_repo("Grüße/你好 (1).txt", 0, None, OID)
    assert is_file_of_a_repo("model.safetensors", 5 << 40, "b" * 64, OID)


@pytest.mark.parametrize("sha", ["../../../../x", "/../../../..", "main", "", None, 5, "A" * 40])
def test_a_commit_is_nothing_but_a_commit(sha):
    """It names a folder of the output."""
    hub = answering_hub(200, json.dumps({"id": "acme/x", "sha": sha}).encode())
    assert "none of a hub" in refused(hub.resolve_commit, "acme/x", "main")
    assert "none of a hub" in refused(hub.head, "acme/x")


def test_a_huge_answer_is_not_read():
    hub = answering_hub(200, b"{}", {"content-length": str(ANSWER_BYTES + 1)})
    assert "bytes, expected at most" in refused(hub.account)


def test_an_answer_that_unpacks_to_gigabytes_is_cut():
    bomb = gzip.compress(b" " * (ANSWER_BYTES + 1), 9)
    assert len(bomb) < 100_000
    assert f"more than {ANSWER_BYTES} bytes" in refused(answering_hub(200, bomb, {"content-encoding": "gzip"}).account)
    # the body of an error, too
    assert f"more than {ANSWER_BYTES} bytes" in refused(answering_hub(403, bomb, {"content-encoding": "gzip"}).account)


def test_packed_answers_are_read():
    name = gzip.compress(b'{"name": "acme"}')
    assert answering_hub(200, name, {"content-encoding": "gzip"}).account().name == "acme"
    assert "is not gzip" in refused(answering_hub(200, b"{}", {"content-encoding": "gzip"}).account)
    assert "nobody asked for" in refused(answering_hub(200, b"{}", {"content-encoding": "br"}).account)


@pytest.mark.parametrize(
    "body", [b"[" * 100_000, b'{"name": ' * 5000, b"\xff", b"", b"<html>", b"5", b'"x"', b"null", b"NaN"]
)
def test_answers_that_are_no_json_or_deeply_nested_are_one_line(body):
    hub = answering_hub(200, body)
    for call in (
        hub.account,
        lambda: hub.head("acme/x"),
        lambda: hub.tree("acme/x", OID),
        lambda: hub.tags("acme/x"),
        lambda: hub.history("acme/x", OID),
    ):
        refused(call)


@pytest.mark.parametrize(
    "to", ["http://other.example/x", "https://other.example/x", "//other.example/x", "ftp://127.0.0.1/x", "http://[::"]
)
@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_the_api_is_not_followed_to_another_host(to, status):
    asked: list[httpx2.Request] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        asked.append(request)
        if request.url.host != "127.0.0.1":
            return httpx2.Response(200, json={"name": "mallory"})
        return httpx2.Response(status, headers={"location": to})

    hub = answering_hub(200, b"")
    hooks = {"response": [bound, hub._call.watch]}
    set_client_factory(
        lambda: httpx2.Client(transport=httpx2.MockTransport(answer), follow_redirects=True, event_hooks=hooks)
    )
    refused(hub.account)
    refused(hub.create_repo, "acme/x", False)
    assert {r.url.host for r in asked} == {"127.0.0.1"}


def test_a_repo_that_moved_on_the_same_host_is_followed():
    def answer(request: httpx2.Request) -> httpx2.Response:
        if request.url.path == "/api/whoami-v2":
            return httpx2.Response(307, headers={"location": "/api/whoami-v3"})
        return httpx2.Response(200, json={"name": "acme"})

    hub = answering_hub(200, b"")
    hooks = {"response": [bound, hub._call.watch]}
    set_client_factory(
        lambda: httpx2.Client(transport=httpx2.MockTransport(answer), follow_redirects=True, event_hooks=hooks)
    )
    assert hub.account().name == "acme"


def test_a_file_is_followed_to_the_storage_without_the_token():
    seen: dict[str, str | None] = {}

    def answer(request: httpx2.Request) -> httpx2.Response:
        seen[request.url.host] = request.headers.get("authorization")
        if request.url.host == "127.0.0.1":
            return httpx2.Response(302, headers={"location": "https://cdn.example/blob"})
        return httpx2.Response(200, content=b"{}")

    hub = answering_hub(200, b"")
    set_client_factory(
        lambda: httpx2.Client(
            transport=httpx2.MockTransport(answer), event_hooks={"response": [bound, hub._call.watch]}
        )
    )
    assert hub.read_range("acme/x", OID, "config.json", 0, 10) == b"{}"
    assert seen == {"127.0.0.1": "Bearer hf_fuzz", "cdn.example": None}


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_answers_of_wrong_types_give_a_result_or_one_line(data):
    whole = {
        "id": "acme/x", "sha": OID, "private": False, "siblings": [{"rfilename": "a", "size": 3}], "name": "acme",
        "auth": {"accessToken": {"role": "write"}}, "tags": [{"name": "v1", "ref": "refs/tags/v1", "targetCommit": OID}],
        "branches": [], "converts": [], "url": f"{ENDPOINT}/acme/x", "lastModified": "2026-01-01T00:00:00.000Z",
        "errors": [{"message": "no"}],
    }  # fmt: skip
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.sampled_from(sorted(whole)))] = data.draw(ODD)
    status = data.draw(st.sampled_from([200, 200, 200, 400, 401, 403, 404, 409, 412, 429, 500]))
    hub = answering_hub(
        status, json.dumps(whole).encode(), data.draw(st.sampled_from([{}, {"x-error-code": "RepoNotFound"}]))
    )
    calls = [
        hub.account, lambda: hub.head("acme/x"), lambda: hub.tags("acme/x"), lambda: hub.resolve_commit("acme/x", "main"),
        lambda: hub.check_write("acme/x"), lambda: hub.create_repo("acme/x", False), lambda: hub.check_card("---\n---\n"),
        lambda: hub.pull_status("acme/x", 3),
    ]  # fmt: skip
    try:
        data.draw(st.sampled_from(calls))()
    except PublishError as e:
        assert str(e).isprintable()
        assert "hf_fuzz" not in str(e)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../model.safetensors"}, "is no name of a safetensors file"),
        ({"a": "a\0.safetensors"}, "is no name of a safetensors file"),
        ({"a": 5}, "is no name of a safetensors file"),
        ({"a": ["x"]}, "holds no weight_map"),
        ({}, "0 safetensors files"),
        ("x", "holds no weight_map"),
    ],
)
def test_headers_of_a_hostile_repo_write_nothing_elsewhere(tmp_path, weight_map, message):
    index = json.dumps({"weight_map": weight_map}).encode()
    files = {"config.json": b"{}", "model.safetensors.index.json": index}

    def answer(request: httpx2.Request) -> httpx2.Response:
        if "/tree/" in request.url.path:
            return httpx2.Response(200, json=[entry(n, len(d)) for n, d in files.items()])
        return httpx2.Response(200, content=files[request.url.path.rsplit("/", 1)[1]])

    hub = answering_hub(200, b"")
    set_client_factory(lambda: httpx2.Client(transport=httpx2.MockTransport(answer), event_hooks={"response": [bound]}))
    (tmp_path / "out").mkdir()
    assert message in refused(remote_headers, hub, "acme/x", OID, tmp_path / "out/headers/x")
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "headers"]


def test_a_hub_that_never_answers_well_is_unavailable():
    with pytest.raises(HubUnavailable):
        answering_hub(500, b"").account()
