"""provenance/ in a variant's folder: what it says, that it says nothing of a machine, and when it is stale."""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket

import yaml
from conftest import edit
from test_sizes import LADDER as SIZES
from test_sizes import build as build_sized
from test_sizes import write as write_sized
from test_sizes import write_costs

from publisher.card import machine_paths
from publisher.provenance import expected, faults, write
from publisher.push_plan import local_files
from publisher.schema import Allocation, Manifest, Provenance, Smoke
from publisher.variants import load_project

ID = "Q2_K_XL"
FILES = {"variants.yaml", "lock.json", "results/build.json", "results/smoke.json", "results/bench.json"}


def files(folder):
    return {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}


def manifest(ladder, id=ID):
    return Manifest.model_validate_json((ladder / f"build/{id}/manifest.json").read_bytes())


def row(publish, ladder, id=ID):
    (found,) = json.loads(publish("status", id, "--json", cwd=ladder).ok().out)["variants"]
    return found


def test_a_built_variant_says_how_it_was_made(built):
    folder = built / f"build/{ID}/provenance"
    found = manifest(built)
    assert set(files(folder)) == FILES
    ladder = yaml.safe_load((folder / "variants.yaml").read_text())
    assert ladder["variants"] == {ID: {"bits": 2}}
    rules = ladder["recipes"][ladder["recipe"]]["rules"]
    assert [r["bits"] for r in rules] == [r.bits for r in found.inputs.rules]
    assert all(isinstance(r["bits"], int) or r["bits"] == "bf16" for r in rules), "nothing is left to resolve"
    lock = Provenance.model_validate_json((folder / "lock.json").read_bytes())
    assert lock.weights_hash == found.weights_hash
    assert (lock.base.source_hash, lock.imatrix.sha256) == (found.inputs.base.source_hash, found.inputs.imatrix.sha256)
    assert lock.versions["python"] == platform.python_version()
    assert {"mlx", "numpy", "safetensors", "gguf"} <= set(lock.versions)
    smoke = Smoke.model_validate_json((folder / "results/smoke.json").read_bytes())
    assert smoke.weights_hash == found.weights_hash
    kept = built / "build/results" / found.weights_hash / "smoke.json"
    assert (folder / "results/smoke.json").read_bytes() == kept.read_bytes()


def test_it_is_small_and_names_no_path_host_or_user(built):
    found = files(built / f"build/{ID}/provenance")
    assert sum(p.stat().st_size for p in found.values()) < 20_000
    for name, path in found.items():
        text = path.read_text()
        assert not machine_paths(text), name
        for word in (socket.gethostname(), os.environ.get("USER") or "no user", str(built)):
            assert len(word) < 4 or word not in text, (name, word)


def test_it_is_pushed_and_known_to_verify(built, publish):
    project = load_project(built / "variants.yaml")
    _, sent = local_files(project, ID, rehash=False)
    assert {f"provenance/{name}" for name in FILES} <= {f.path for f in sent}
    publish("verify", ID, cwd=built).ok()


def test_a_stray_beside_it_is_still_a_stray(ladder, publish):
    (ladder / f"build/{ID}/provenance/results/notes.json").write_text("{}")
    assert "provenance/results/notes.json is not in the manifest" in publish("verify", ID, cwd=ladder).refused(1)


def test_what_was_changed_or_lost_is_stale_until_the_card_is_made_again(ladder, publish):
    folder = ladder / f"build/{ID}"
    before = {name: path.read_bytes() for name, path in files(folder / "provenance").items()}
    (folder / "provenance/variants.yaml").write_text("base: elsewhere\n")
    (folder / "provenance/lock.json").unlink()
    (folder / "provenance/results/quality.json").write_text("{}")
    told = [
        "provenance/variants.yaml is not what it would be now",
        "provenance/lock.json is missing",
        "provenance/results/quality.json is of other results",
    ]
    assert row(publish, ladder)["stale"]["card"] == told
    assert ID in publish("card", "--check", cwd=ladder).refused(1)
    publish("card", ID, cwd=ladder).ok()
    assert {name: path.read_bytes() for name, path in files(folder / "provenance").items()} == before
    assert row(publish, ladder)["current"]


def test_it_follows_the_results(ladder):
    project, found = load_project(ladder / "variants.yaml"), manifest(ladder)
    folder = project.store.variant(ID)
    (project.store.results(found.weights_hash) / "bench.json").unlink()
    assert faults(folder, expected(project, found)) == ["provenance/results/bench.json is of other results"]
    assert write(folder, expected(project, found))
    assert set(files(folder / "provenance")) == FILES - {"results/bench.json"}
    assert not write(folder, expected(project, found)), "nothing is left to do"


def test_results_of_other_weights_are_not_taken(ladder):
    project = load_project(ladder / "variants.yaml")
    results = ladder / "build/results" / manifest(ladder).weights_hash / "smoke.json"
    results.write_text(results.read_text().replace(manifest(ladder).weights_hash, "0" * 64))
    assert "provenance/results/smoke.json" not in expected(project, manifest(ladder))


def test_what_a_killed_write_left_is_gone_after_the_next(ladder):
    project = load_project(ladder / "variants.yaml")
    left = ladder / f"build/{ID}/provenance/.lock.json.abc.part"
    left.write_text("{")
    write(project.store.variant(ID), expected(project, manifest(ladder)))
    assert not left.exists()


def test_a_recipe_that_changed_since_is_told_as_it_was(ladder):
    """Other reasons are today's; other rules are not: the file says what was built."""
    before = expected(load_project(ladder / "variants.yaml"), manifest(ladder))
    edit(ladder, "note: smallest", "note: smallest, rules: [{match: '*.mlp.down_proj', bits: 8, awq: true}]")
    project = load_project(ladder / "variants.yaml")
    now = expected(project, manifest(ladder))
    assert before["provenance/lock.json"] == now["provenance/lock.json"]
    old, new = (yaml.safe_load(f["provenance/variants.yaml"])["recipes"]["unsloth"]["rules"] for f in (before, now))
    plain = [{k: v for k, v in r.items() if k not in ("why", "optional")} for r in old]
    assert [{k: v for k, v in r.items() if k != "optional"} for r in new] == plain
    assert faults(ladder / f"build/{ID}", now) == ["provenance/variants.yaml is not what it would be now"]


def test_a_variant_made_by_size_carries_its_allocation(tmp_path, publish):
    folder = write_sized(tmp_path, SIZES + 'allocation: {pins: [{match: "*.lm_head", bits: 8, why: mine}]}\n')
    write_costs(folder)
    build_sized(publish, folder, "as4")
    project = load_project(folder / "variants.yaml")
    found = manifest(folder, "as4")
    carried = expected(project, found)
    ladder = yaml.safe_load(carried["provenance/variants.yaml"])
    assert ladder["variants"] == {"as4": {"size": "as unsloth 4"}}
    assert ladder["allocation"] == {"pins": [{"match": "*.lm_head", "bits": 8, "why": "mine"}], "floors": []}
    frozen = Allocation.model_validate(yaml.safe_load(carried["provenance/variants.allocations/as4.yaml"]))
    assert frozen == found.allocation
    publish("card", "as4", cwd=folder).ok()
    shutil.rmtree(folder / "build/statistics")  # the costs are not needed any more
    publish("verify", "as4", "--rebuild", cwd=folder).ok()
