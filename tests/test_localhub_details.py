"""What clients other than this project's own ask of a hub, and what only some of their calls need."""

import base64
import json
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import CommitOperationCopy, HfApi, hf_hub_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from xet_pieces import Cas, file_entry, shard

from publisher.localhub import LocalHub

WRITE, STRANGER = "hf_write", "hf_stranger"
TOKENS = {WRITE: "write:alice,acme", STRANGER: "write:bob"}
REPO = "acme/tiny-4bit"
WEIGHTS = bytes(range(256)) * 40


@pytest.fixture
def hub(tmp_path):
    with LocalHub(tmp_path / "hub", TOKENS) as hub:
        api(hub).create_repo(REPO)
        yield hub
        assert hub.stats.crashes == 0


@pytest.fixture
def web(hub):
    with httpx2.Client(base_url=hub.url, headers={"Authorization": f"Bearer {WRITE}"}) as client:
        yield client


def api(hub, token=WRITE):
    return HfApi(endpoint=hub.url, token=token)


def put(hub, path, data, **options):
    return api(hub).upload_file(path_or_fileobj=data, path_in_repo=path, repo_id=REPO, **options)


def test_squashing_leaves_one_commit_with_the_same_files(hub):
    put(hub, "a.txt", b"a")
    before = put(hub, "model.safetensors", WEIGHTS).oid
    files = api(hub).list_repo_files(REPO)
    api(hub).super_squash_history(REPO, commit_message="all of it")
    assert [commit.title for commit in api(hub).list_repo_commits(REPO)] == ["all of it"]
    assert api(hub).list_repo_files(REPO) == files
    assert api(hub).model_info(REPO, revision=before).sha == before  # a commit that somebody pinned stays
    with pytest.raises(RevisionNotFoundError):
        api(hub).super_squash_history(REPO, branch="nope")
    with pytest.raises(HfHubHTTPError, match="403"):
        api(hub, STRANGER).super_squash_history(REPO)


def test_long_lists_come_in_pages(hub, web):
    for n in range(4):
        put(hub, "n.txt", str(n).encode(), commit_message=f"n {n}")
    answer = web.get(f"/api/models/{REPO}/commits/main?limit=2")
    assert ([item["title"] for item in answer.json()], answer.headers["x-total-count"]) == (["n 3", "n 2"], "5")
    titles, url = [], f"/api/models/{REPO}/commits/main?limit=2"
    while url:
        answer = web.get(url)
        titles += [item["title"] for item in answer.json()]
        url = answer.links.get("next", {}).get("url")
    assert titles == ["n 3", "n 2", "n 1", "n 0", "initial commit"]
    for name in ("b", "c"):
        api(hub).create_repo(f"acme/{name}")
        api(hub).create_collection(name, namespace="acme")
    assert len(list(api(hub).list_models(author="acme", limit=2))) == 2
    assert len(web.get("/api/models?limit=2").json()) == 2
    assert len(list(api(hub).list_models(author="acme"))) == 3
    first = web.get("/api/collections?owner=acme&owner=nobody&limit=1")
    assert (len(first.json()), len(web.get(first.links["next"]["url"]).json())) == (1, 1)


def test_a_gated_repository_shows_its_files_and_gives_them_to_its_own_people(hub, tmp_path):
    put(hub, "a.txt", b"a")
    api(hub).update_repo_settings(REPO, gated="auto")
    for token in (STRANGER, False):
        assert api(hub, token).model_info(REPO).gated == "auto"
        with pytest.raises(GatedRepoError):
            hf_hub_download(REPO, "a.txt", endpoint=hub.url, token=token, cache_dir=tmp_path / "cache")
        with pytest.raises(GatedRepoError):
            api(hub, token).auth_check(REPO)
    own = hf_hub_download(REPO, "a.txt", endpoint=hub.url, token=WRITE, cache_dir=tmp_path / "cache")
    assert Path(own).read_bytes() == b"a"
    api(hub).auth_check(REPO)


def test_head_is_main_and_no_branch_can_take_its_name(hub, web):
    head = put(hub, "a.txt", b"a").oid
    assert api(hub).model_info(REPO, revision="HEAD").sha == head
    assert web.get(f"/{REPO}/resolve/HEAD/a.txt").content == b"a"
    with pytest.raises(HfHubHTTPError, match="invalid branch name"):
        api(hub).create_branch(REPO, branch="HEAD")


def test_raw_gives_the_pointer_of_a_large_file(hub, web):
    put(hub, "model.safetensors", WEIGHTS)
    pointer = web.get(f"/{REPO}/raw/main/model.safetensors").text
    assert pointer.startswith("version https://git-lfs.github.com/spec/v1\noid sha256:")
    assert pointer.endswith(f"size {len(WEIGHTS)}\n")
    assert web.get(f"/{REPO}/raw/main/.gitattributes").text.startswith("*.7z")
    assert web.head(f"/{REPO}/raw/main/nope").status_code == 404


def test_a_pull_request_is_read_by_its_ref_escaped_or_not(hub, web):
    put(hub, "a.txt", b"new", create_pr=True)
    for ref in ("refs/pr/1", "refs%2Fpr%2F1"):
        assert [item["path"] for item in web.get(f"/api/models/{REPO}/tree/{ref}").json()][1:] == ["a.txt"]
        assert web.get(f"/{REPO}/resolve/{ref}/a.txt").content == b"new"
    api(hub).merge_pull_request(REPO, 1, comment="thanks")
    events = api(hub).get_discussion_details(REPO, 1).events
    assert [event.type for event in events][-2:] == ["comment", "status-change"]
    assert events[-2].content == "thanks"


def test_what_the_npm_client_sends_is_understood(hub, web):
    files = [{"path": "a/b.txt", "encoding": "base64", "content": base64.b64encode(b"hi").decode()}]
    new = {"name": "new", "organization": "acme", "type": "model", "license": "mit", "files": files}
    assert web.post("/api/repos/create", json=new).json()["name"] == "acme/new"
    assert web.get("/acme/new/resolve/main/a/b.txt").content == b"hi"
    assert web.get("/acme/new/resolve/main/README.md").text == '---\nlicense: "mit"\n---\n'
    assert web.post("/api/repos/create", json=new | {"name": "x", "files": [{"path": "../a", "content": ""}]}).is_error
    with pytest.raises(RepositoryNotFoundError):
        api(hub).model_info("acme/x")
    found = web.post("/api/models/acme/new/paths-info/main", json={"paths": ["a/b.txt", "nope", 7]}).json()
    assert [item["path"] for item in found] == ["a/b.txt"]
    asked = {"files": [{"path": "x.dat", "size": 3}], "gitAttributes": "*.dat filter=lfs diff=lfs merge=lfs -text\n"}
    told = web.post("/api/models/acme/new/preupload/main", json=asked).json()
    assert told["files"][0]["uploadMode"] == "lfs"
    branch = "/api/models/acme/new/branch/other"
    assert web.post(branch, json={"emptyBranch": True}).status_code == 200
    assert api(hub).list_repo_files("acme/new", revision="other") == [".gitattributes"]
    assert web.post(branch, json={"startingPoint": "main"}).status_code == 409
    assert web.post(branch, json={"startingPoint": "main", "overwrite": True}).status_code == 200
    assert "a/b.txt" in api(hub).list_repo_files("acme/new", revision="other")


def test_a_large_file_is_copied_from_a_sibling_without_sending_it(hub, web):
    chunks = [WEIGHTS]
    cas = Cas(hub, WRITE, REPO)
    assert cas.put_xorb(chunks).status_code == cas.put_shard(shard(file_entry([(chunks, 0, 1)]))).status_code == 200
    put(hub, "model.safetensors", WEIGHTS)  # the hub has it: nothing is sent
    assert hub.stats.requests["lfs_put"] == 0
    api(hub).create_repo("acme/sibling")
    hub.stats.reset()
    copy = [CommitOperationCopy("model.safetensors", "weights.safetensors", src_repo_id=REPO, src_repo_type="model")]
    api(hub).create_commit("acme/sibling", operations=copy, commit_message="copy")
    assert (hub.stats.requests["lfs_copy"], hub.stats.requests["lfs_put"]) == (1, 0)
    assert web.get("/acme/sibling/resolve/main/weights.safetensors", follow_redirects=False).status_code == 302
    body = {"target": {"type": "model", "name": "acme/sibling"}, "files": [{"sha256": "a" * 64}]}
    assert web.post(f"/api/models/{REPO}/lfs-files/duplicate", json=body).json()["failed"][0]["sha256"] == "a" * 64
    body["target"]["type"] = "../models"
    assert web.post(f"/api/models/{REPO}/lfs-files/duplicate", json=body).status_code in (400, 404)
    api(hub).update_repo_settings(REPO, private=True)
    foreign = {"Authorization": f"Bearer {STRANGER}"}
    assert web.post(f"/api/models/{REPO}/lfs-files/duplicate", json=body, headers=foreign).status_code == 404


def test_a_client_that_asks_how_to_get_a_file_is_told_of_xet(hub, web):
    chunks = [WEIGHTS]
    cas = Cas(hub, WRITE, REPO)
    cas.put_xorb(chunks)
    cas.put_shard(shard(file_entry([(chunks, 0, 1)])))
    put(hub, "model.safetensors", WEIGHTS)
    accept = {"Accept": "application/vnd.xet-fileinfo+json, */*", "Range": "bytes=0-0"}
    told = web.get(f"/{REPO}/resolve/main/model.safetensors", headers=accept)
    assert (told.status_code, told.headers["x-linked-size"]) == (200, str(len(WEIGHTS)))
    assert told.headers["content-type"].startswith("application/vnd.xet-fileinfo+json")
    assert {link["rel"] for link in told.links.values()} == {"xet-auth", "xet-reconstruction-info"}
    assert web.get(told.links["xet-auth"]["url"]).json()["casUrl"].startswith("http://localhost:")
    head = web.head(f"/{REPO}/resolve/main/model.safetensors", headers={"Accept-Encoding": "identity"})
    assert (head.status_code, head.headers["x-xet-hash"]) == (302, told.headers["x-xet-hash"])
    assert json.loads(told.text)["size"] == len(WEIGHTS)
