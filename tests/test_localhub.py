"""The built-in hub against the unmodified huggingface_hub client, over real HTTP on loopback."""

import base64
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from publisher.localhub import Fault, FolderInUse, LocalHub, frontmatter
from publisher.localhub.attributes import DEFAULT_GITATTRIBUTES, is_ignored, is_lfs, upload_mode

WRITE, READ, STRANGER = "hf_write", "hf_read", "hf_stranger"
TOKENS = {WRITE: "write:alice,acme", READ: "read:alice,acme", STRANGER: "write:bob"}
REPO = "acme/tiny-4bit"
WEIGHTS = bytes(range(256)) * 400  # 102400 bytes
CARD = "---\nlicense: apache-2.0\nbase_model: Qwen/Qwen3.5-4B\ntags:\n- mlx\n---\n# Tiny\n"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_TOKEN", raising=False)


@pytest.fixture
def hub(tmp_path):
    with LocalHub(tmp_path / "hub", TOKENS, multipart_bytes=200_000, part_bytes=64_000, page_size=5) as hub:
        yield hub
        assert hub.stats.crashes == 0
        assert hub.stats.leaks == 0


def api(hub, token=WRITE):
    return HfApi(endpoint=hub.url, token=token)


def operations(**changed):
    files = {"README.md": CARD.encode(), "config.json": b"{}\n", "model.safetensors": WEIGHTS} | changed
    return [CommitOperationAdd(path, data) for path, data in files.items()]


def push(hub, adds=None, repo=REPO, **options):
    """As `publish push` does it: LFS files first, then one commit."""
    client = api(hub)
    client.create_repo(repo, exist_ok=True)
    adds = adds or operations()
    client.preupload_lfs_files(repo, additions=adds)
    return client.create_commit(repo, operations=adds, commit_message="push", **options)


def raw(hub, method, path, token=WRITE, **options):
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    headers |= options.pop("headers", {})
    return httpx2.request(method, hub.url + path, headers=headers, **options)


# -- pushing --------------------------------------------------------------------------------------------------


def test_whoami_names_user_orgs_and_role(hub):
    me = api(hub).whoami()
    assert (me["name"], [org["name"] for org in me["orgs"]]) == ("alice", ["acme"])
    assert me["auth"]["accessToken"]["role"] == "write"
    assert api(hub, READ).whoami()["auth"]["accessToken"]["role"] == "read"


def test_create_repo_starts_with_gitattributes_and_answers_409_with_url(hub):
    url = api(hub).create_repo(REPO, private=True)
    assert url.repo_id == REPO
    assert api(hub).create_repo(REPO, exist_ok=True) == url
    info = api(hub).model_info(REPO)
    assert info.private
    assert [s.rfilename for s in info.siblings] == [".gitattributes"]
    with pytest.raises(HfHubHTTPError, match="409"):
        api(hub).create_repo(REPO)


def test_one_commit_with_lfs_and_regular_files(hub):
    commit = push(hub)
    assert [c.title for c in api(hub).list_repo_commits(REPO)] == ["push", "initial commit"]
    info = api(hub).model_info(REPO, files_metadata=True)
    assert info.sha == commit.oid
    files = {s.rfilename: s for s in info.siblings}
    weights = files["model.safetensors"]
    assert weights.lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    assert (weights.size, weights.lfs.size) == (len(WEIGHTS), len(WEIGHTS))
    assert files["config.json"].lfs is None
    assert files["config.json"].blob_id == hashlib.sha1(b"blob 3\0{}\n").hexdigest()
    assert info.card_data["base_model"] == "Qwen/Qwen3.5-4B"
    assert hub.stats.requests["commit"] == 1
    assert hub.stats.received["lfs_put"] == len(WEIGHTS)


def test_the_same_push_again_sends_nothing(hub):
    first = push(hub)
    hub.stats.reset()
    again = push(hub, parent_commit=first.oid)
    assert again.oid == first.oid
    assert hub.stats.requests["commit"] == 0
    assert hub.stats.received["lfs_put"] == 0
    push(hub, repo="acme/other")
    assert hub.stats.received["lfs_put"] == 0


def test_a_moved_head_is_a_412(hub):
    first = push(hub)
    push(hub, operations(**{"config.json": b'{"a": 1}'}), parent_commit=first.oid)
    with pytest.raises(HfHubHTTPError, match=r"A commit has happened since\. Please refresh and try again\.") as e:
        push(hub, operations(**{"config.json": b'{"a": 2}'}), parent_commit=first.oid)
    assert e.value.response.status_code == 412


def test_of_two_pushes_on_one_head_exactly_one_lands(hub):
    head = push(hub)

    def try_push(n):
        try:
            return push(hub, operations(**{"config.json": str(n).encode()}), parent_commit=head.oid).oid
        except HfHubHTTPError as e:
            return e.response.status_code

    with ThreadPoolExecutor() as pool:
        tags = [pool.submit(api(hub).create_tag, REPO, tag=f"v{n}") for n in range(4)]
        results = list(pool.map(try_push, range(4)))
        for tag in tags:
            tag.result()
    assert results.count(412) == 3
    assert api(hub).model_info(REPO).sha in results
    assert len(api(hub).list_repo_refs(REPO).tags) == 4


def test_multipart_upload(hub):
    big = os.urandom(300_000)
    push(hub, operations(**{"model.safetensors": big}))
    assert hub.stats.requests["lfs_part"] == 5
    assert hub.stats.received["lfs_part"] == len(big)
    assert hub.stats.requests["lfs_put"] == 0
    info = api(hub).get_paths_info(REPO, ["model.safetensors", "absent"])
    assert [entry.lfs.sha256 for entry in info] == [hashlib.sha256(big).hexdigest()]


def test_lfs_refuses_wrong_bytes_and_a_commit_without_them(hub):
    api(hub).create_repo(REPO)
    oid = hashlib.sha256(b"right").hexdigest()
    body = {"operation": "upload", "transfers": ["basic"], "objects": [{"oid": oid, "size": 5}]}
    answer = raw(hub, "POST", f"/{REPO}.git/info/lfs/objects/batch", json=body).json()
    href = answer["objects"][0]["actions"]["upload"]["href"]
    assert href.startswith(hub.url.replace("127.0.0.1", "localhost"))
    assert httpx2.put(href, content=b"wrong").status_code == 400
    assert httpx2.put(href, content=b"righ").status_code == 400
    assert httpx2.put(href, content=b"right and more").status_code == 400
    assert httpx2.put(href.replace("size=5", "size=6"), content=b"right!").status_code == 403
    answer = commit_lines(hub, {"lfsFile": {"path": "a.bin", "algo": "sha256", "oid": oid, "size": 5}})
    assert (answer.status_code, "has not been uploaded" in answer.json()["error"]) == (400, True)
    assert httpx2.put(href, content=b"right").status_code == 200
    answer = commit_lines(hub, {"lfsFile": {"path": "a.bin", "algo": "sha256", "oid": oid, "size": 6}})
    assert answer.status_code == 400


def commit_lines(hub, *items, summary="x"):
    lines = [{"key": "header", "value": {"summary": summary}}]
    lines += [{"key": key, "value": value} for item in items for key, value in item.items()]
    return raw(hub, "POST", f"/api/models/{REPO}/commit/main", content="\n".join(json.dumps(x) for x in lines))


def test_files_and_folders_are_deleted_and_copied(hub):
    push(hub, [*operations(), CommitOperationAdd("docs/a.md", b"a"), CommitOperationAdd("docs/b/c.md", b"c")])
    copies = [
        CommitOperationCopy("model.safetensors", "copy/model.safetensors"),
        CommitOperationCopy("docs/a.md", "a.md"),
    ]
    api(hub).create_commit(REPO, operations=copies, commit_message="copy")
    api(hub).delete_file("config.json", REPO)
    api(hub).delete_folder("docs", REPO)
    assert sorted(api(hub).list_repo_files(REPO)) == [
        ".gitattributes", "README.md", "a.md", "copy/model.safetensors", "model.safetensors",
    ]  # fmt: skip
    with pytest.raises(EntryNotFoundError):
        api(hub).create_commit(REPO, operations=[CommitOperationDelete("nope.txt")], commit_message="x")


def test_lfs_files_no_pattern_covers_are_added_to_gitattributes(hub):
    push(hub, [CommitOperationAdd("tokenizer data.json", b"\0" + WEIGHTS)])
    text = Path(download(hub, ".gitattributes")).read_text()
    assert text == DEFAULT_GITATTRIBUTES + "tokenizer[[:space:]]data.json filter=lfs diff=lfs merge=lfs -text\n"
    assert is_lfs("tokenizer data.json", text)


# -- reading --------------------------------------------------------------------------------------------------


def download(hub, name, token=WRITE, **options):
    return hf_hub_download(REPO, name, endpoint=hub.url, token=token, cache_dir=os.environ["HF_HOME"], **options)


def test_list_repo_tree_pages_folders_and_sha256(hub):
    push(hub, [*operations(), *(CommitOperationAdd(f"d/e {n}/é#{n}?.txt", b"x") for n in range(6))])
    entries = {entry.path: entry for entry in api(hub).list_repo_tree(REPO, recursive=True, expand=True)}
    assert len(entries) == 17
    assert hub.stats.requests["tree"] == 4
    assert entries["model.safetensors"].lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    assert entries["model.safetensors"].last_commit.title == "push"
    assert entries[".gitattributes"].last_commit.title == "initial commit"
    assert [entry.path for entry in api(hub).list_repo_tree(REPO, "d/e 1")] == ["d/e 1/é#1?.txt"]
    with pytest.raises(EntryNotFoundError):
        list(api(hub).list_repo_tree(REPO, "nope"))


def test_snapshot_download_gives_the_pushed_bytes(hub, tmp_path):
    commit = push(hub, [*operations(), CommitOperationAdd("d/é #?%.txt", b"odd name")])
    folder = Path(snapshot_download(REPO, endpoint=hub.url, token=False, cache_dir=tmp_path / "cache"))
    assert folder.name == commit.oid
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert (folder / "d/é #?%.txt").read_bytes() == b"odd name"
    assert api(hub).verify_repo_checksums(REPO, local_dir=folder).mismatches == []


def test_a_broken_download_resumes_by_range(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 10_000)
    push(hub)
    hub.faults.add(Fault("blob", "cut", after_bytes=70_000))
    hub.stats.reset()
    assert Path(download(hub, "model.safetensors")).read_bytes() == WEIGHTS
    assert hub.stats.requests["blob"] == 2
    assert hub.stats.sent["blob"] < len(WEIGHTS) + 20_000


def test_ranges_and_heads_are_answered_as_the_hub_does(hub):
    commit = push(hub)
    head = raw(hub, "HEAD", f"/{REPO}/resolve/main/model.safetensors")
    sha = hashlib.sha256(WEIGHTS).hexdigest()
    assert head.status_code == 302
    assert (head.headers["x-repo-commit"], head.headers["x-linked-etag"]) == (commit.oid, f'"{sha}"')
    assert head.headers["x-linked-size"] == str(len(WEIGHTS))
    part = httpx2.get(head.headers["location"], headers={"Range": "bytes=256-259"})
    assert (part.status_code, part.content) == (206, bytes([0, 1, 2, 3]))
    small = raw(hub, "HEAD", f"/{REPO}/resolve/main/config.json")
    assert (small.status_code, small.headers["content-length"]) == (200, "3")


def test_absent_things_raise_the_clients_typed_errors(hub):
    push(hub)
    with pytest.raises(EntryNotFoundError):
        download(hub, "nope.txt")
    with pytest.raises(RevisionNotFoundError):
        api(hub).model_info(REPO, revision="v9")
    with pytest.raises(RepositoryNotFoundError):
        api(hub).model_info("acme/nope")
    with pytest.raises(RepositoryNotFoundError):
        api(hub, token=False).model_info("acme/nope")


def test_repositories_are_listed_renamed_and_deleted(hub):
    push(hub)
    api(hub).create_repo("acme/other", private=True)
    assert [m.id for m in api(hub).list_models(author="acme", search="TINY")] == [REPO]
    assert {m.id for m in api(hub, token=False).list_models(author="acme")} == {REPO}
    api(hub).update_repo_settings("acme/other", private=False)
    assert not api(hub, token=False).model_info("acme/other").private
    api(hub).move_repo(REPO, "alice/moved")
    assert api(hub).file_exists("alice/moved", "model.safetensors")
    api(hub).delete_repo("alice/moved")
    assert not api(hub).repo_exists("alice/moved")
    assert not api(hub).repo_exists(REPO)


# -- who may do what ------------------------------------------------------------------------------------------


def test_a_private_repo_is_absent_to_strangers(hub):
    push(hub)
    api(hub).update_repo_settings(REPO, private=True)
    for token in (False, STRANGER):
        with pytest.raises(RepositoryNotFoundError):
            api(hub, token).model_info(REPO)
        with pytest.raises(RepositoryNotFoundError):
            download(hub, "config.json", token=token)
    assert api(hub, READ).model_info(REPO).private
    assert raw(hub, "GET", f"/{REPO}", token=None).status_code == 404


def test_a_read_token_and_a_foreign_namespace_cannot_write(hub):
    push(hub)
    for token in (READ, STRANGER):
        with pytest.raises(HfHubHTTPError, match="403"):
            api(hub, token).create_repo("acme/new")
        with pytest.raises(HfHubHTTPError, match="403"):
            api(hub, token).auth_check(REPO, write=True)
        with pytest.raises(HfHubHTTPError, match="403"):
            api(hub, token).upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id=REPO)
        with pytest.raises(HfHubHTTPError, match="403"):
            api(hub, token).create_tag(REPO, tag="v1")
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        api(hub, "hf_unknown").whoami()
    with pytest.raises(HfHubHTTPError, match="401"):
        api(hub, token=False).auth_check(REPO, write=True)
    api(hub).auth_check(REPO, write=True)


def test_a_token_sent_to_the_blob_store_is_refused_and_counted(hub):
    push(hub)
    download(hub, "model.safetensors", force_download=True)
    assert hub.stats.leaks == 0
    location = raw(hub, "HEAD", f"/{REPO}/resolve/main/model.safetensors").headers["location"]
    assert httpx2.get(location, headers={"Authorization": f"Bearer {WRITE}"}).status_code == 400
    assert hub.stats.leaks == 1
    hub.stats.reset()
    assert httpx2.get(location.split("?")[0]).status_code == 403
    assert httpx2.get(location.replace("localhost", "127.0.0.1")).status_code == 404


# -- pull requests, tags, collections -------------------------------------------------------------------------


def test_a_pull_request_is_opened_updated_and_merged(hub):
    push(hub)
    change = [CommitOperationAdd("config.json", b'{"a": 1}')]
    opened = api(hub, STRANGER).create_commit(REPO, operations=change, commit_message="Better", create_pr=True)
    assert opened.pr_num == 1
    assert opened.pr_revision == "refs/pr/1"
    api(hub, STRANGER).upload_file(path_or_fileobj=b"n", path_in_repo="notes/n.md", repo_id=REPO, revision="refs/pr/1")
    assert api(hub).file_exists(REPO, "notes/n.md", revision="refs/pr/1")
    assert not api(hub).file_exists(REPO, "notes/n.md")
    push(hub, operations(**{"README.md": CARD.encode() + b"more\n"}))
    pull = api(hub).get_discussion_details(REPO, 1)
    assert (pull.status, pull.author, pull.conflicting_files, pull.target_branch) == (
        "open",
        "bob",
        [],
        "refs/heads/main",
    )
    assert [d.num for d in api(hub).get_repo_discussions(REPO, discussion_type="pull_request")] == [1]
    api(hub).comment_discussion(REPO, 1, "Thanks")
    api(hub).merge_pull_request(REPO, 1)
    assert Path(download(hub, "config.json")).read_bytes() == b'{"a": 1}'
    assert Path(download(hub, "README.md")).read_text().endswith("more\n")
    assert api(hub).get_discussion_details(REPO, 1).status == "merged"
    with pytest.raises(HfHubHTTPError, match="403"):
        api(hub).merge_pull_request(REPO, 1)


def test_a_conflicting_pull_request_is_not_merged(hub):
    push(hub)
    api(hub).create_pull_request(REPO, title="Change config")
    api(hub).upload_file(path_or_fileobj=b"1", path_in_repo="config.json", repo_id=REPO, revision="refs/pr/1")
    api(hub).upload_file(path_or_fileobj=b"2", path_in_repo="config.json", repo_id=REPO)
    assert api(hub).get_discussion_details(REPO, 1).conflicting_files == ["config.json"]
    with pytest.raises(HfHubHTTPError, match="409"):
        api(hub).merge_pull_request(REPO, 1)
    api(hub).change_discussion_status(REPO, 1, "closed")
    with pytest.raises(HfHubHTTPError, match="403"):
        api(hub).upload_file(path_or_fileobj=b"3", path_in_repo="config.json", repo_id=REPO, revision="refs/pr/1")


def test_tags_and_branches_are_made_once_and_removed(hub):
    commit = push(hub)
    api(hub).create_tag(REPO, tag="v1.0", tag_message="first")
    api(hub).create_tag(REPO, tag="v1.0", exist_ok=True)
    with pytest.raises(HfHubHTTPError, match="409"):
        api(hub).create_tag(REPO, tag="v1.0")
    api(hub).create_branch(REPO, branch="feature/x", revision="v1.0")
    api(hub).upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id=REPO, revision="feature/x")
    refs = api(hub).list_repo_refs(REPO, include_pull_requests=True)
    assert [(t.name, t.target_commit) for t in refs.tags] == [("v1.0", commit.oid)]
    assert {b.name for b in refs.branches} == {"main", "feature/x"}
    assert api(hub).model_info(REPO, revision="v1.0").sha == commit.oid == api(hub).model_info(REPO).sha
    api(hub).delete_tag(REPO, tag="v1.0")
    api(hub).delete_branch(REPO, branch="feature/x")
    with pytest.raises(RevisionNotFoundError):
        api(hub).delete_tag(REPO, tag="v1.0")
    with pytest.raises(HfHubHTTPError, match="commits go to a branch"):
        api(hub).upload_file(path_or_fileobj=b"y", path_in_repo="x.txt", repo_id=REPO, revision=commit.oid)


def test_a_collection_with_notes(hub):
    push(hub)
    made = api(hub).create_collection("Tiny, quantized", namespace="acme", description="All of them")
    again = api(hub).create_collection("Tiny, quantized", namespace="acme", exists_ok=True)
    assert again.slug == made.slug
    with pytest.raises(HfHubHTTPError, match="409"):
        api(hub).create_collection("Tiny, quantized", namespace="acme")
    api(hub).add_collection_item(made.slug, REPO, "model", note="4 bits")
    api(hub).add_collection_item(made.slug, REPO, "model", exists_ok=True)
    with pytest.raises(HfHubHTTPError, match="404"):
        api(hub).add_collection_item(made.slug, "acme/nope", "model")
    push(hub, repo="acme/tiny-8bit")
    items = api(hub).add_collection_item(made.slug, "acme/tiny-8bit", "model").items
    api(hub).update_collection_item(made.slug, items[1].item_object_id, note="8 bits", position=0)
    renamed = api(hub).update_collection_metadata(made.slug, title="Small ones")
    assert renamed.slug.startswith("acme/small-ones-")
    items = api(hub).get_collection(made.slug).items
    assert [(i.item_id, i.note, i.position) for i in items] == [("acme/tiny-8bit", "8 bits", 0), (REPO, "4 bits", 1)]
    assert [c.slug for c in api(hub).list_collections(owner="acme")] == [renamed.slug]
    api(hub).delete_collection_item(made.slug, items[0].item_object_id)
    with pytest.raises(HfHubHTTPError, match="403"):
        api(hub, STRANGER).delete_collection(made.slug)
    api(hub).delete_collection(made.slug)
    assert list(api(hub).list_collections(owner="acme")) == []


# -- faults and restarts --------------------------------------------------------------------------------------


def test_state_survives_a_restart_and_a_second_hub_is_refused(hub, tmp_path):
    commit = push(hub)
    api(hub).create_tag(REPO, tag="v1")
    with pytest.raises(FolderInUse):
        LocalHub(tmp_path / "hub", TOKENS)
    hub.stop()
    with LocalHub(tmp_path / "hub", TOKENS) as again:
        assert api(again).model_info(REPO, revision="v1").sha == commit.oid
        assert push(again, parent_commit=commit.oid).oid == commit.oid
        assert again.stats.requests["lfs_put"] == 0


def test_a_killed_hub_has_the_push_whole_or_not_at_all(tmp_path):
    code = f"from publisher.localhub import *; run({str(tmp_path / 'hub')!r}, '127.0.0.1', 0, {TOKENS!r})"
    server = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        url = next(word for word in server.stdout.readline().split() if word.startswith("http"))
        client = HfApi(endpoint=url, token=WRITE)
        client.create_repo(REPO)
        adds = operations()
        client.preupload_lfs_files(REPO, additions=adds)
    finally:
        server.send_signal(signal.SIGKILL)
        server.wait()
        server.stdout.close()
    with LocalHub(tmp_path / "hub", TOKENS) as hub:
        assert api(hub).list_repo_files(REPO) == [".gitattributes"]
        push(hub)
        assert hub.stats.received["lfs_put"] == 0


def test_a_lost_answer_leaves_exactly_one_commit(hub):
    head = push(hub)
    hub.faults.add(Fault("commit", "lose_answer"))
    change = {"config.json": b'{"a": 1}'}
    with pytest.raises(httpx2.TransportError):
        push(hub, operations(**change), parent_commit=head.oid)
    assert [c.title for c in api(hub).list_repo_commits(REPO)] == ["push", "push", "initial commit"]
    again = push(hub, operations(**change), parent_commit=head.oid)
    assert again.oid == api(hub).model_info(REPO).sha
    assert hub.stats.requests["commit"] == 2
    assert [fault.kind for fault in hub.faults.fired] == ["lose_answer"]


def test_a_status_fault_hits_the_nth_request_only(hub):
    hub.faults.add(Fault("whoami", "status", nth=2, times=2, status=429, retry_after=7))
    answers = [raw(hub, "GET", "/api/whoami-v2") for _ in range(4)]
    assert [a.status_code for a in answers] == [200, 429, 429, 200]
    assert answers[1].headers["retry-after"] == "7"


def test_a_stale_head_is_a_412_with_somebody_elses_commit(hub):
    head = push(hub)
    hub.faults.add(Fault("commit", "stale_head"))
    with pytest.raises(HfHubHTTPError, match="412"):
        push(hub, operations(**{"config.json": b"[]"}), parent_commit=head.oid)
    assert next(c.title for c in api(hub).list_repo_commits(REPO)) == "another push"


def test_cut_delayed_and_corrupt_answers(hub):
    push(hub)
    hub.faults.add(Fault("lfs_put", "cut", after_bytes=5_000))
    push(hub, [CommitOperationAdd("b.bin", WEIGHTS[1:])])  # the client sends it again by itself
    assert hub.stats.requests["lfs_put"] == 3
    hub.faults.add(Fault("blob", "corrupt", match=hashlib.sha256(WEIGHTS).hexdigest()))
    wrong = Path(download(hub, "model.safetensors")).read_bytes()
    assert (len(wrong), wrong[1:]) == (len(WEIGHTS), WEIGHTS[1:])
    assert wrong != WEIGHTS
    hub.faults.add(Fault("whoami", "delay", seconds=5))
    with pytest.raises(httpx2.ReadTimeout):
        raw(hub, "GET", "/api/whoami-v2", timeout=0.1)


def test_faults_are_parsed_and_checked(hub):
    parsed = Fault.parse("lfs_put:status:nth=2:status=429:retry_after=1")
    assert parsed == Fault("lfs_put", "status", nth=2, status=429, retry_after=1)
    for text in ("commit:explode", "commit:status:colour=red", "commit:delay:seconds=x"):
        with pytest.raises(ValueError, match=r"explode|colour|number"):
            Fault.parse(text)
    with pytest.raises(ValueError, match="must be one of"):
        hub.faults.add(Fault("comit", "delay"))


# -- untrusted input ------------------------------------------------------------------------------------------


BAD_PATHS = ["../x", "/etc/x", "a/../../x", "a//b", "a\0b", ".git/config", "C:\\x", "", "a\nb", "x" * 2000]


def test_bad_paths_in_a_commit_are_refused(hub):
    api(hub).create_repo(REPO)
    for path in BAD_PATHS:
        answer = commit_lines(hub, {"file": {"path": path, "content": "eA==", "encoding": "base64"}})
        assert (answer.status_code, answer.json()["error"].count("\n")) == (400, 0), path
    assert api(hub).list_repo_files(REPO) == [".gitattributes"]


def test_bad_requests_get_one_line_and_leave_nothing_outside_the_folder(hub, tmp_path):
    api(hub).create_repo(REPO)
    before = sorted(p.name for p in tmp_path.iterdir())
    create, base = "/api/repos/create", f"/api/models/{REPO}"
    answers = [
        *(
            raw(hub, "POST", create, json={"name": n, "organization": "acme"})
            for n in ("..", "a/b", "", "a--b", "x\0y", 7)
        ),
        raw(hub, "POST", create, content=b"{not json"),
        raw(hub, "POST", create, content=b"[" * 100_000),
        raw(hub, "POST", create, content=b'{"name": ' * 100_000),
        raw(hub, "POST", create, json=[1]),
        commit_lines(hub, {"file": {"path": "\ud800", "content": ""}}),
        raw(hub, "GET", "/api/models/..%2F..%2Fetc/passwd"),
        raw(hub, "GET", f"{base}/revision/..%2F..%2Fx"),
        raw(hub, "GET", f"/{REPO}/resolve/main/..%2F..%2F..%2Fsecret"),
        raw(hub, "GET", f"{base}/tree/main/..%2F.."),
        raw(hub, "POST", f"{base}/preupload/main", json={"files": [{"path": "a", "size": "1"}]}),
        raw(hub, "POST", f"{base}/commit/main", content=b'{"key": "file", "value": {}}'),
        raw(hub, "POST", f"{base}/branch/..%2Fx", json={}),
        raw(hub, "POST", f"{base}/paths-info/main", content=b"\xff\xfe"),
        raw(hub, "POST", f"{base}/tag/main", json={"tag": "a" * 40}),
        raw(hub, "GET", "/api/collections/acme/..%2F..%2Fsecret"),
        raw(hub, "PUT", "/lfs/" + "a" * 64, token=None, content=b"x"),
        raw(hub, "PATCH", "/anything"),
        raw(hub, "GET", "/api/whoami-v2", headers={"Host": "evil.example"}),
    ]
    for answer in answers:
        assert 400 <= answer.status_code < 500, answer.request.url
        assert "\n" not in answer.json()["error"]
        assert "Traceback" not in answer.text
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_bodies_are_bounded(hub, monkeypatch):
    monkeypatch.setattr("publisher.localhub.web.JSON_BYTES", 1000)
    monkeypatch.setattr("publisher.localhub.commits.COMMIT_BYTES", 1000)
    api(hub).create_repo(REPO)
    assert raw(hub, "POST", "/api/repos/create", content=b" " * 2000).status_code == 413
    assert commit_lines(hub, summary="x" * 2000).status_code == 413


def test_a_commit_is_applied_whole_or_not(hub):
    push(hub)
    good = {"file": {"path": "ok.txt", "content": "eA==", "encoding": "base64"}}
    under_a_file = {"file": {"path": "config.json/x", "content": "", "encoding": "utf-8"}}
    bad_card = {"file": {"path": "README.md", "content": "---\nlicense: [\n---\n", "encoding": "utf-8"}}
    for bad in (under_a_file, bad_card, {"deletedFile": {"path": "nope"}}, {"surprise": {"path": "x"}}):
        assert commit_lines(hub, good, bad).status_code in (400, 404)
    large = base64.b64encode(bytes(11 << 20)).decode()
    answer = commit_lines(hub, good, {"file": {"path": "l", "content": large, "encoding": "base64"}})
    assert answer.status_code == 400
    assert "ok.txt" not in api(hub).list_repo_files(REPO)


def test_hub_listens_on_loopback_only(tmp_path):
    for host in ("0.0.0.0", "::", "192.168.0.1"):
        with pytest.raises(ValueError, match="listens on"):
            LocalHub(tmp_path, TOKENS, host=host)
    with pytest.raises(ValueError, match="role"):
        LocalHub(tmp_path, {"t": "admin"})
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="in use"):
        LocalHub(tmp_path, TOKENS, port=taken.getsockname()[1])


def test_pages_escape_what_was_pushed(hub):
    push(hub, [CommitOperationAdd("notes.md", b"x"), CommitOperationAdd("<b>.txt", b"x")])
    script = {"file": {"path": "README.md", "content": "<script>alert(1)</script>"}}
    assert commit_lines(hub, script).status_code == 200
    page = raw(hub, "GET", f"/{REPO}", token=None)
    assert "not huggingface.co" in page.text
    assert "alert(1)" not in page.text
    assert "<script>" not in page.text
    assert "<b>.txt" not in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert REPO in raw(hub, "GET", "/", token=None).text


def test_telemetry_is_harmless(hub):
    assert raw(hub, "GET", "/api/agent-harnesses").json() == {"standardEnvVars": [], "harnesses": {}}
    assert raw(hub, "HEAD", "/api/telemetry/x/y").status_code == 200


# -- cards and patterns ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "metadata",
    [
        "license: [",
        "- a list",
        "license: 4",
        "base_model: [1]",
        "base_model: a/b/c",
        "language: EN",
        "base_model_relation: cousin",
        "tags: {a: 1}",
        "license: mit\na: &a [x]\nb: [*a, *a]",
        "license: " + "[" * 5000,
        "size: 0x" + "f" * 20_000,
        "license: !!python/object/apply:os.system [id]",
    ],
    ids=lambda text: text[:20],
)
def test_a_wrong_card_is_refused_with_a_reason(metadata):
    data, errors, _ = frontmatter.read(f"---\n{metadata}\n---\n# x")
    assert data == {}
    assert errors[0]
    assert "\n" not in errors[0]


@pytest.mark.parametrize("metadata", ["language: no", "tags: [on, off]"])
def test_metadata_is_read_as_yaml_1_2(metadata):
    assert frontmatter.read(f"---\n{metadata}\n---\n")[1] == []


def test_validate_yaml_passes_a_good_card_warns_about_none_and_refuses_a_wrong_one(hub):
    def validate(content):
        return raw(hub, "POST", "/api/validate-yaml", json={"content": content, "repoType": "model"})

    good = "license: apache-2.0\nlanguage:\n- en\n- zh\nbase_model: a/b\nbase_model_relation: quantized"
    assert validate(f"---\n{good}\n---\n# x").json() == {"errors": [], "warnings": []}
    bare = validate("# no metadata")
    assert (bare.status_code, len(bare.json()["warnings"])) == (200, 1)
    api(hub).create_repo(REPO)
    with pytest.raises(ValueError, match="license"):
        api(hub).upload_file(path_or_fileobj=b"---\nlicense: 4\n---\n", path_in_repo="README.md", repo_id=REPO)


def test_metadata_is_always_plain_json():
    odd = 'odd: "\\ud800"\ndate: 2026-01-01\nnan: .nan\n2026-01-01: x'
    data, errors, _ = frontmatter.read(f"---\n{odd}\n---\n")
    assert (data["odd"], data["date"], data["nan"], errors) == ("?", "2026-01-01", "nan", [])
    json.dumps(data, allow_nan=False).encode()


def test_upload_mode_is_by_pattern_size_and_content():
    def mode(path, size=10, sample=b"text"):
        return upload_mode(path, size, sample, DEFAULT_GITATTRIBUTES)

    assert mode("model.safetensors") == mode("deep/down/x.gguf") == mode("saved_model/a/b/c.txt") == "lfs"
    assert mode("config.json") == mode("saved_model_not/x.txt") == mode("model.safetensors", size=0) == "regular"
    assert mode("tokenizer.json", size=10 << 20) == "regular"
    assert mode("tokenizer.json", size=(10 << 20) + 1) == mode("logo.png", sample=b"\x89PNG\0") == "lfs"
    assert not is_lfs("x.bin", DEFAULT_GITATTRIBUTES + "x.bin -filter\n")


def test_ignore_patterns_match_as_git_does():
    rules = "*.log\n!keep.log\nbuild/\n/top.txt\n# no\n"
    assert is_ignored("a/b.log", rules)
    assert is_ignored("a/build/x.txt", rules)
    assert is_ignored("top.txt", rules)
    assert not is_ignored("a/keep.log", rules)
    assert not is_ignored("a/top.txt", rules)
    assert not is_ignored("build", rules)


def test_an_ignored_file_is_left_out_of_the_commit(hub):
    push(
        hub,
        [
            CommitOperationAdd(".gitignore", b"*.tmp\n"),
            CommitOperationAdd("a.tmp", b"x"),
            CommitOperationAdd("a.md", b"x"),
        ],
    )
    assert sorted(api(hub).list_repo_files(REPO)) == [".gitattributes", ".gitignore", "a.md"]


def test_the_folder_can_be_thrown_away(tmp_path):
    hub = LocalHub(tmp_path / "hub", {WRITE: "write"}).start()
    assert api(hub).whoami()["name"] == "local"
    api(hub).create_repo("anyone/at-all")
    hub.stop()
    hub.stop()
    shutil.rmtree(tmp_path / "hub")
