"""`publish verify --download`: what a stranger gets, hashed and loaded; and what `status --remote` says of the base."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from conftest import EXAMPLE
from huggingface_hub import HfApi

from publisher.localhub import LocalHub

WRITE = "hf_downloadWRITEtoken"
ID = "Q2_K_XL"
REPO, BASE = f"demo/Qwen3.5-tiny-UD-{ID}-mlx", "demo/Tiny-base"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Where the hub keeps its files."""
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def hub(store):
    with LocalHub(store, {WRITE: "write:demo"}) as hub:
        yield hub
        assert hub.stats.crashes == 0


@pytest.fixture
def online(hub, tmp_path):
    return {"HF_ENDPOINT": hub.url, "HF_TOKEN": WRITE, "HF_HOME": str(tmp_path / "home")}


@pytest.fixture(scope="module")
def released(built, hub, tmp_path_factory):
    """A ladder of which one variant was pushed; not to be changed."""
    from conftest import run_here

    folder = tmp_path_factory.mktemp("released") / "ladder"
    shutil.copytree(built, folder, symlinks=True)
    env = {"HF_ENDPOINT": hub.url, "HF_TOKEN": WRITE}
    run_here("push", ID, "--yes", cwd=folder, env=env).ok()
    return folder


def checks(ran):
    return {c["name"]: c for c in json.loads(ran.out)[ID]}


def nothing_stays(folder, tmp_path):
    assert not list(folder.glob("**/publish-download-*"))
    assert not list((tmp_path / "home").rglob("*.safetensors"))


def test_what_was_pushed_arrives_whole_and_runs(released, publish, online, hub, tmp_path):
    hub.stats.reset()
    found = checks(publish("verify", ID, "--download", "--json", cwd=released, env=online).ok())
    assert all(c["passed"] for c in found.values())
    assert found["downloaded files"]["detail"].endswith("sha256 as in the receipt")
    assert re.fullmatch(r"\d+ tokens run", found["loads"]["detail"])
    assert {"repo", "same weights as here", "tensors", "packed weights", "weights hash"} <= set(found)
    assert sum(hub.stats.sent.values()) > (released / f"build/{ID}/model.safetensors").stat().st_size
    nothing_stays(released, tmp_path)


def test_nothing_comes_from_the_cache(released, publish, online, hub, tmp_path):
    api = HfApi(hub.url, WRITE)
    api.snapshot_download(REPO, cache_dir=tmp_path / "home/hub")
    hub.stats.reset()
    publish("verify", ID, "--download", cwd=released, env=online).ok()
    assert sum(hub.stats.sent.values()) > (released / f"build/{ID}/model.safetensors").stat().st_size


def test_bytes_that_the_hub_lost_are_found_although_their_size_is_right(
    released, publish, online, hub, store, tmp_path
):
    sha = next(s.lfs.sha256 for s in HfApi(hub.url, WRITE).model_info(REPO, files_metadata=True).siblings if s.lfs)
    (blob,) = (p for p in store.rglob(sha) if p.is_file())
    before = blob.read_bytes()
    try:
        blob.chmod(0o644)
        blob.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        publish("verify", ID, "--remote", cwd=released, env=online).ok()  # by what the hub says
        told = publish("verify", ID, "--download", cwd=released, env=online).refused(1)
    finally:
        blob.write_bytes(before)
    assert re.search(rf"{ID}: downloaded files: \S+ has sha256 \w{{12}}, the receipt says {sha[:12]}", told)
    nothing_stays(released, tmp_path)


def test_without_a_receipt_the_head_is_checked_against_its_own_manifest(released, publish, online):
    receipt = released / f"build/receipts/{ID}.json"
    text = receipt.read_text()
    receipt.unlink()
    try:
        found = checks(publish("verify", ID, "--download", "--json", cwd=released, env=online).ok())
    finally:
        receipt.write_text(text)
    assert found["downloaded files"]["detail"].endswith("sha256 as in its manifest")


def test_a_disk_that_is_too_small_is_told_before_anything_is_fetched(
    released, publish, online, hub, monkeypatch, tmp_path
):
    hub.stats.reset()
    monkeypatch.setattr("publisher.fetch.shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    told = publish("verify", ID, "--download", cwd=released, env=online).refused(2)
    assert "1.00 kB free" in told
    assert not hub.stats.requests["resolve"]
    nothing_stays(released, tmp_path)


def test_a_repo_that_is_not_there_is_told(released, publish, online):
    assert "repo: demo/Qwen3.5-tiny-UD-Q3_K_XL-mlx is not on" in publish(
        "verify", "Q3_K_XL", "--download", cwd=released, env=online
    ).refused(1)


def test_a_head_that_moved_is_told_with_both_commits(released, publish, online, hub):
    api = HfApi(hub.url, WRITE)
    pushed = api.model_info(REPO).sha
    now = api.upload_file(path_or_fileobj=b"hello\n", path_in_repo="NOTES.txt", repo_id=REPO).oid
    ran = publish("status", ID, "--remote", cwd=released, env=online).ok()
    assert f"{ID}: the head is {now[:8]}, not {pushed[:8]} that was pushed last" in ran.out
    assert "base Qwen3.5-tiny: a local folder: nothing to compare with on a hub" in ran.out
    publish("verify", ID, "--download", cwd=released, env=online).ok()  # of what was pushed


# ------------------------------------------------------------------------------------------------ the base


@pytest.fixture(scope="module")
def base(hub):
    api = HfApi(hub.url, WRITE)
    api.create_repo(BASE)
    api.upload_folder(repo_id=BASE, folder_path=EXAMPLE / "model")
    return api


@pytest.fixture
def locked(base, hub, publish, online, tmp_path):
    """A ladder over a base on the hub, locked at today's head."""
    folder = tmp_path / "locked"
    folder.mkdir()
    (folder / "variants.yaml").write_text(f"base: {BASE}\nowner: demo\nvariants: {{A: {{bits: 4, recipe: uniform}}}}\n")
    publish("plan", cwd=folder, env=online).ok()
    return folder


def drift(publish, folder, online, hub):
    hub.stats.reset()
    ran = publish("status", "--remote", "--json", cwd=folder, env=online).ok()
    assert sum(hub.stats.sent.values()) < 200_000, "no weights were downloaded"
    return json.loads(ran.out)["base"]


def change(api, **files):
    return api.create_commit(
        BASE, [_add(path.replace("__", "."), data) for path, data in files.items()], commit_message="news"
    ).oid


def _add(path, data):
    from huggingface_hub import CommitOperationAdd

    return CommitOperationAdd(path, data)


def test_a_base_that_stayed_is_current(locked, publish, online, hub, base):
    found = drift(publish, locked, online, hub)
    assert (found["state"], found["locked"], found["head"]) == ("current", base.model_info(BASE).sha, found["locked"])


def test_a_new_chat_template_is_told_wherever_it_stands(locked, publish, online, hub, base):
    before = base.model_info(BASE).sha
    now = change(base, chat_template__jinja=b"{{ messages }} mended")
    found = drift(publish, locked, online, hub)
    assert (found["state"], found["locked"], found["head"]) == ("moved", before, now)
    assert (found["template"], found["weights"], found["changed"]) == (True, False, ["chat_template.jinja"])
    assert found["text"] == (
        f"base {BASE}: main moved from {before[:12]} to {now[:12]} since the lock; "
        "the chat template changed (chat_template.jinja)"
    )
    config = json.loads((EXAMPLE / "model/tokenizer_config.json").read_text())
    publish("plan", cwd=locked, env=online).ok()  # the lock holds

    (locked / "variants.lock").unlink()
    publish("plan", cwd=locked, env=online).ok()
    change(base, tokenizer_config__json=json.dumps({**config, "model_max_length": 7}).encode())
    found = drift(publish, locked, online, hub)
    assert (found["template"], found["changed"]) == (False, ["tokenizer_config.json"])
    assert "neither weights nor chat template changed (tokenizer_config.json)" in found["text"]
    change(base, tokenizer_config__json=json.dumps({**config, "chat_template": "new"}).encode())
    assert drift(publish, locked, online, hub)["template"] is True


def test_new_weights_are_told_and_not_downloaded(locked, publish, online, hub, base):
    (shard,) = (EXAMPLE / "model").glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    base.upload_file(path_or_fileobj=bytes(data), path_in_repo=shard.name, repo_id=BASE)
    found = drift(publish, locked, online, hub)
    assert (found["weights"], found["template"]) == (True, False)
    assert "since the lock; the weights changed" in found["text"]


def test_news_that_no_build_reads_is_no_alarm(locked, publish, online, hub, base):
    base.upload_file(path_or_fileobj=b"x", path_in_repo="NEWS", repo_id=BASE)
    found = drift(publish, locked, online, hub)
    assert (found["weights"], found["template"], found["changed"]) == (False, False, [])
    assert found["text"].endswith("; no file that a build reads changed")


def test_a_base_that_is_gone_is_told(locked, publish, online, hub, base):
    base.delete_repo(BASE)
    found = drift(publish, locked, online, hub)
    assert found["state"] == "gone"
    assert found["text"].startswith(f"base {BASE}: not on {hub.url}, or not for this token")
