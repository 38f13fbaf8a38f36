"""A ladder appears as a whole or not at all: repos, collection, visibility and receipts of one push of several variants."""

from __future__ import annotations

import json
from unittest.mock import Mock

import pytest
from huggingface_hub import HfApi, constants
from pushes import STRANGER, WRITE
from variant_folder import make_project, make_variant

from inference.errors import AuthError, CheckFailed, InputError, RemoteChanged
from publisher import release as release_module
from publisher.hub import Hub
from publisher.localhub import Fault
from publisher.preflight import check
from publisher.prune import pruned
from publisher.push import plan_push, verify_remote
from publisher.release import Choices, release
from publisher.report import Report
from publisher.schema import LadderReceipt, Manifest, Receipt
from publisher.store import read_model
from publisher.verify import verify_folder

pytestmark = pytest.mark.usefixtures("own_home")
Q4, Q8 = "acme/Tiny-1B-UD-Q4-mlx", "acme/Tiny-1B-UD-Q8-mlx"


@pytest.fixture
def project(project):
    make_variant(project, "Q8", seed=8)
    return project


def connect(server, token=WRITE):
    return Hub(server.url, token, patience_s=0.3, pause_s=0.01)


def push(server, project, *ids, **options):
    hub, choices = connect(server), Choices(**options)
    plans = [
        plan_push(
            hub, project, id, private=choices.private, create_pr=choices.create_pr, overwrite=choices.overwrite,
            staged=choices.staged,
        )
        for id in ids or ("Q4", "Q8")
    ]  # fmt: skip
    return release(project, hub, plans, Report(quiet=True), choices)


def seen_by_a_stranger(server):
    hub = connect(server, STRANGER)
    return [repo for repo in (Q4, Q8) if hub.head(repo)]


def ours(server, repo):
    return len(HfApi(server.url, WRITE).list_repo_commits(repo)) - 1  # the first is the hub's


def edit_card(project, id="Q4"):
    with open(project.store.variant(id) / "README.md", "a") as f:
        f.write("\nA better sentence.\n")


def collection(server):
    client = HfApi(server.url, WRITE)
    (found,) = client.list_collections(owner="acme")
    return client.get_collection(found.slug)


def listed(server):
    return [(i.item_id, i.note) for i in collection(server).items]


def ladder_receipt(project):
    return read_model(project.store.ladder_receipt, LadderReceipt)


# -- visibility -----------------------------------------------------------------------------------------------


def test_new_repos_become_public_together_after_everything_else(server, project, monkeypatch):
    before = []
    make_public = Hub.make_public

    def last(hub, repo):
        before.append((repo, seen_by_a_stranger(server), set(hub.tags(Q4)), set(hub.tags(Q8)), len(listed(server))))
        make_public(hub, repo)

    monkeypatch.setattr(Hub, "make_public", last)
    done = push(server, project)
    assert not done.failed
    assert before == [(Q4, [], {"v1"}, {"v1"}, 2), (Q8, [Q4], {"v1"}, {"v1"}, 2)]
    assert seen_by_a_stranger(server) == [Q4, Q8]
    assert (done.published, done.waiting) == (["Q4", "Q8"], [])


def test_a_failed_repo_keeps_the_new_ones_private_and_the_same_command_heals(server, project):
    server.faults.add(Fault("commit", "status", status=403, match="Q4"))
    done = push(server, project)
    assert list(done.failed) == ["Q4"]
    assert isinstance(done.failed["Q4"], AuthError)
    assert [r.id for r in done.receipts] == ["Q8"], "the others are finished"
    assert done.waiting == ["Q4", "Q8"]
    assert seen_by_a_stranger(server) == []
    found = ladder_receipt(project)
    assert [(e.id, e.waiting, bool(e.commit), bool(e.error)) for e in found.repos] == [
        ("Q4", True, False, True),
        ("Q8", True, True, False),
    ]
    done = push(server, project)
    assert not done.failed
    assert done.published == ["Q4", "Q8"]
    assert seen_by_a_stranger(server) == [Q4, Q8]
    assert (ours(server, Q4), ours(server, Q8)) == (1, 1)
    assert [(e.waiting, e.error) for e in ladder_receipt(project).repos] == [(False, None)] * 2


def test_a_public_repo_moves_on_and_stays_public_when_another_fails(server, project):
    push(server, project, "Q4")
    assert seen_by_a_stranger(server) == [Q4]
    edit_card(project)
    server.faults.add(Fault("commit", "status", status=403, match="Q8"))
    done = push(server, project)
    assert list(done.failed) == ["Q8"]
    assert seen_by_a_stranger(server) == [Q4]
    assert ours(server, Q4) == 2


def test_a_push_killed_before_the_last_step_is_finished_by_the_next(server, project, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Hub, "make_public", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            push(server, project)
    assert seen_by_a_stranger(server) == []
    server.stats.reset()
    assert push(server, project).published == ["Q4", "Q8"]
    assert seen_by_a_stranger(server) == [Q4, Q8]
    assert server.stats.requests["commit"] == server.stats.requests["lfs_batch"] == 0


def test_a_push_killed_after_a_repo_was_made_still_ends_public(server, project, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Hub, "check_write", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            push(server, project)
    assert connect(server).head(Q4).private
    push(server, project)
    assert seen_by_a_stranger(server) == [Q4, Q8]


def test_what_is_to_stay_private_stays_so_whatever_comes_later(server, project):
    assert push(server, project, private=True).published == []
    edit_card(project)
    push(server, project)
    assert seen_by_a_stranger(server) == []
    assert server.stats.requests["settings"] == 0


def test_waiting_repos_are_kept_private_by_a_push_that_says_so(server, project):
    server.faults.add(Fault("commit", "status", status=403, match="Q8"))
    assert push(server, project).waiting == ["Q4", "Q8"]
    assert push(server, project, private=True).waiting == []
    assert push(server, project).published == []
    assert seen_by_a_stranger(server) == []


def test_public_from_the_start_where_private_storage_does_not_suffice(server, project):
    server.faults.add(Fault("commit", "status", status=403, match="Q8"))
    push(server, project, at_once=True)
    assert seen_by_a_stranger(server) == [Q4, Q8]
    assert server.stats.requests["settings"] == 0


def test_a_switch_that_is_refused_is_named_and_tried_again(server, project):
    server.faults.add(Fault("settings", "status", status=403, match="Q4"))
    done = push(server, project)
    assert list(done.failed) == ["Q4"]
    assert (done.published, done.waiting) == (["Q8"], ["Q4"])
    assert push(server, project).published == ["Q4"]


def test_repos_of_an_earlier_push_that_wait_are_named_by_one_that_leaves_them_out(server, project):
    server.faults.add(Fault("commit", "status", status=403, match="Q8"))
    push(server, project)
    done = push(server, project, "Q8")
    assert (done.published, done.waiting) == (["Q8"], ["Q4"])


@pytest.mark.parametrize("options", [{"private": True, "at_once": True}, {"prune": True, "create_pr": True}])
def test_options_that_contradict_each_other_are_refused(options):
    with pytest.raises(InputError, match="--p"):
        Choices(**options).check()


# -- the collection -------------------------------------------------------------------------------------------


def test_the_collection_lists_the_ladder_in_order_with_notes(server, project):
    push(server, project, "Q8")
    client = HfApi(server.url, WRITE)
    client.create_repo("acme/other")
    client.add_collection_item(collection(server).slug, "acme/other", "model", note="not ours")
    push(server, project, "Q4")
    assert (collection(server).title, collection(server).description) == ("Tiny ladder", "All rungs")
    assert listed(server) == [(Q4, "the middle"), ("acme/other", "not ours"), (Q8, None)]

    server.stats.reset()
    push(server, project)
    assert server.stats.requests["collection_items"] == 0, "nothing to change"
    project.path.write_text(project.path.read_text().replace("the middle", "another note"))
    push(server, make_project(project.path.parent, project.path.read_text()))
    assert listed(server)[0] == (Q4, "another note")


def test_an_order_that_people_changed_is_put_right(server, project):
    push(server, project)
    found = collection(server)
    HfApi(server.url, WRITE).update_collection_item(found.slug, found.items[1].item_object_id, position=0)
    assert [repo for repo, _ in listed(server)] == [Q8, Q4]
    push(server, project)
    assert [repo for repo, _ in listed(server)] == [Q4, Q8]


def test_an_order_that_the_hub_does_not_take_is_said(server, project, monkeypatch):
    push(server, project, "Q8")
    monkeypatch.setattr("huggingface_hub.HfApi.update_collection_item", lambda *args, **kwargs: None)
    done = push(server, project, "Q4")
    assert list(done.failed) == ["collection"]
    assert isinstance(done.failed["collection"], CheckFailed)


def test_without_the_collection_new_repos_wait_and_the_same_command_heals(server, project):
    server.faults.add(Fault("collections", "status", status=403))
    done = push(server, project)
    assert list(done.failed) == ["collection"]
    assert done.waiting == ["Q4", "Q8"]
    assert "403" in ladder_receipt(project).errors["collection"]
    done = push(server, project)
    assert done.published == ["Q4", "Q8"]
    assert ladder_receipt(project).errors == {}


def test_a_hub_that_fails_once_is_asked_again(server, project):
    server.faults.add(Fault("collections", "status", status=500))
    server.faults.add(Fault("settings", "status", status=503))
    assert not push(server, project).failed


# -- receipts -------------------------------------------------------------------------------------------------


def test_the_ladders_receipt_holds_every_repo_and_a_repeated_push_leaves_it_alone(server, project):
    push(server, project)
    found = ladder_receipt(project)
    receipts = {id: read_model(project.store.receipt(id), Receipt) for id in ("Q4", "Q8")}
    assert [(e.id, e.repo) for e in found.repos] == [("Q4", Q4), ("Q8", Q8)]
    assert {e.id: (e.commit, e.tag, e.weights_hash) for e in found.repos} == {
        id: (r.commit, "v1", r.weights_hash) for id, r in receipts.items()
    }
    assert (found.endpoint, found.collections) == (server.url, [collection(server).slug])
    text = project.store.ladder_receipt.read_bytes()
    server.stats.reset()
    push(server, project)
    assert project.store.ladder_receipt.read_bytes() == text
    assert server.stats.requests["commit"] == server.stats.requests["settings"] == 0


def test_a_pull_request_is_no_release(server, project):
    push(server, project)
    text = project.store.ladder_receipt.read_bytes()
    edit_card(project)
    done = push(server, project, "Q4", create_pr=True)
    assert done.receipts[0].pull_request
    assert project.store.ladder_receipt.read_bytes() == text


def test_nothing_is_created_for_a_pull_request(server, project):
    hub = connect(server)
    plan = plan_push(hub, project, "Q4", create_pr=True)
    _, errors = check(project, hub, [plan])
    assert isinstance(errors["Q4"], InputError)
    assert str(errors["Q4"]) == f"Q4: {Q4} does not exist, so nothing can be proposed to it; run `publish push Q4`"
    assert isinstance(push(server, project, "Q4", create_pr=True).failed["Q4"], InputError)
    assert not server.stats.requests["repo_create"]


def test_no_variant_can_take_the_name_of_the_ladders_receipt(tmp_path):
    with pytest.raises(InputError, match="this tool's own files"):
        make_project(tmp_path / "p", "base: {path: base, name: T}\nvariants: {Ladder: {bits: 4}}\n")


# -- others, quota, locks -------------------------------------------------------------------------------------


def test_somebody_elses_commit_names_its_files_and_offers_a_pull_request(server, project):
    push(server, project, "Q4")
    edit_card(project)
    server.faults.add(Fault("commit", "stale_head"))
    error = push(server, project, "Q4").failed["Q4"]
    assert isinstance(error, RemoteChanged)
    assert "(somebody-else.txt)" in str(error)
    assert "propose yours with --create-pr" in str(error)
    assert push(server, project, "Q4", create_pr=True).receipts[0].pull_request


@pytest.mark.parametrize(
    ("route", "status"), [("commit", 402), ("lfs_batch", 413), ("repo_create", 402), ("commit", 507)]
)
def test_a_quota_is_one_line_for_its_repo_and_the_others_go_on(server, project, route, status):
    match = "" if route == "repo_create" else "Q4"
    server.faults.add(Fault(route, "status", status=status, match=match))
    done = push(server, project)
    assert list(done.failed) == ["Q4"]
    error = done.failed["Q4"]
    assert isinstance(error, AuthError)
    assert "storage or plan does not allow it" in str(error)
    assert "\n" not in str(error)
    assert [r.id for r in done.receipts] == ["Q8"]
    assert not push(server, project).failed


def test_two_publishers_on_one_machine_do_not_push_to_one_repo_at_once(server, project):
    hub = connect(server)
    with connect(server).lock(Q4):
        done = release(project, hub, [plan_push(hub, project, "Q4", staged=True)], Report(quiet=True))
    assert "another publish on this machine is pushing to it" in str(done.failed["Q4"])
    assert server.stats.requests["repo_create"] == 0
    assert not push(server, project).failed


# -- bytes that the hub has -----------------------------------------------------------------------------------


def picture(project, name):
    images = project.store.variant("Q4") / "images"
    images.mkdir(exist_ok=True)
    for old in images.iterdir():
        old.unlink()
    (images / name).write_bytes(b"\0" * 5000)


def test_a_large_file_under_another_name_is_copied_by_the_hub(server, project):
    picture(project, "old.png")
    push(server, project, "Q4")
    picture(project, "new.png")
    hub = connect(server)
    plan = plan_push(hub, project, "Q4")
    assert [(c.path, c.source, c.repo) for c in plan.copies] == [("images/new.png", "images/old.png", None)]
    assert plan.bytes_to_send == 0
    server.stats.reset()
    commit = push(server, project, "Q4").receipts[0].commit
    names = set(hub.tree(Q4, commit))
    assert "images/new.png" in names
    assert "images/old.png" not in names
    assert server.stats.received["lfs_put"] == 0
    assert server.stats.requests["lfs_batch"] == 0


def test_a_copy_that_the_hub_refuses_is_sent_instead(server, project):
    picture(project, "old.png")
    push(server, project, "Q4")
    picture(project, "new.png")
    server.faults.add(Fault("paths_info", "status", status=403))
    done = push(server, project, "Q4")
    assert not done.failed
    assert "images/new.png" in connect(server).tree(Q4, done.receipts[0].commit)
    assert ours(server, Q4) == 2


# -- prune ----------------------------------------------------------------------------------------------------


def manifest_of(project, id="Q4"):
    return read_model(project.store.manifest(id), Manifest)


def weights(project, id="Q4"):
    return sorted(p.name for p in project.store.variant(id).glob("*.safetensors"))


def test_pruned_weights_are_gone_and_everything_says_so(server, project):
    done = push(server, project, prune=True)
    assert set(done.freed) == {"Q4", "Q8"}
    assert weights(project) == weights(project, "Q8") == []
    assert read_model(project.store.receipt("Q4"), Receipt).pruned_at
    gone = pruned(project, manifest_of(project))
    assert gone.where.startswith(Q4)
    checks = verify_folder(project.store.variant("Q4"), manifest_of(project), gone)
    unread = ["weights", "shards", "second reader", "tensors", "packed weights"]
    assert [(c.name, c.passed) for c in checks if c.passed is not True] == [(name, None) for name in unread]
    assert {c.detail for c in checks if c.passed is None} - {checks[1].detail} == {"not checked: pruned"}
    assert all(c.passed for c in verify_remote(connect(server), project, "Q4"))

    server.stats.reset()
    assert not push(server, project, prune=True).freed
    assert server.stats.requests["commit"] == 0
    edit_card(project)
    done = push(server, project)
    assert not done.failed
    assert ours(server, Q4) == 2
    assert done.receipts[0].pruned_at
    assert server.stats.received["lfs_put"] == 0


def test_nothing_is_pruned_that_the_hub_is_not_proven_to_hold(server, project, monkeypatch):
    push(server, project, "Q4")
    proven = release_module._proven

    def less(hub, receipt):
        return {p: f for p, f in proven(hub, receipt).items() if p != "model-00002-of-00002.safetensors"}

    monkeypatch.setattr(release_module, "_proven", less)
    done = push(server, project, "Q4", prune=True)
    assert "not proven to hold model-00002-of-00002.safetensors" in str(done.failed["Q4"])
    assert len(weights(project)) == 2
    assert read_model(project.store.receipt("Q4"), Receipt).pruned_at is None


def test_a_prune_that_was_killed_is_finished_by_the_next(server, project):
    push(server, project, "Q4", prune=True)
    make_variant(project, "Q4")  # the same bytes
    (project.store.variant("Q4") / "model-00002-of-00002.safetensors").unlink()
    gone = pruned(project, manifest_of(project))
    assert list(gone.files) == ["model-00002-of-00002.safetensors"]
    checks = verify_folder(project.store.variant("Q4"), manifest_of(project), gone)
    assert not [c for c in checks if c.passed is False]
    assert push(server, project, "Q4", prune=True).freed
    assert weights(project) == []


def test_a_receipt_of_other_weights_excuses_nothing(server, project):
    push(server, project, "Q4", prune=True)
    make_variant(project, "Q4", seed=1)
    (project.store.variant("Q4") / "model-00001-of-00002.safetensors").unlink()
    assert pruned(project, manifest_of(project)) is None
    failed = [c.name for c in verify_folder(project.store.variant("Q4"), manifest_of(project)) if not c.passed]
    assert "files" in failed


def test_a_damaged_small_file_of_a_pruned_variant_is_still_damage(server, project):
    push(server, project, "Q4", prune=True)
    folder, manifest = project.store.variant("Q4"), manifest_of(project)
    (folder / "tokenizer.json").write_text("{}")
    config = json.loads((folder / "config.json").read_text())
    config["quantization"]["lm_head"]["bits"] = config["quantization_config"]["lm_head"]["bits"] = 4
    (folder / "config.json").write_text(json.dumps(config))
    failed = {c.name for c in verify_folder(folder, manifest, pruned(project, manifest)) if c.passed is False}
    assert failed == {"files", "packed weights", "weights hash"}


def test_pruned_weights_that_the_hub_lost_are_not_pushed_but_asked_for(server, project):
    push(server, project, "Q4", prune=True)
    HfApi(server.url, WRITE).delete_file("model-00001-of-00002.safetensors", Q4)
    error = push(server, project, "Q4").failed["Q4"]
    assert "model-00001-of-00002.safetensors is pruned here, and was deleted on the hub in commit " in str(error)
    assert "; run `publish build Q4`, then push with --overwrite" in str(error)
    make_variant(project, "Q4")
    done = push(server, project, "Q4", overwrite=True)
    assert not done.failed
    assert done.receipts[0].pruned_at is None


def test_what_a_siblings_repo_holds_is_copied_from_there_where_the_hub_has_xet(server, project, monkeypatch):
    for id in ("Q4", "Q8"):
        (project.store.variant(id) / "images").mkdir()
        (project.store.variant(id) / "images/same.png").write_bytes(b"\0" * 5000)
    monkeypatch.setattr("publisher.push_copies.COPY_BYTES", 1000)
    hub = connect(server)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    options = {"staged": True}
    release(project, hub, [plan_push(hub, project, "Q4", **options)], Report(quiet=True))
    assert hub.tree(Q4, "main")["images/same.png"].xet
    plan = plan_push(hub, project, "Q8", **options)
    assert [(c.path, c.repo, c.source) for c in plan.copies] == [("images/same.png", Q4, "images/same.png")]
    done = release(project, hub, [plan], Report(quiet=True))
    assert not done.failed
    assert server.stats.requests["lfs_copy"] == 1
    assert hub.tree(Q8, "main")["images/same.png"].sha256 == hub.tree(Q4, "main")["images/same.png"].sha256
