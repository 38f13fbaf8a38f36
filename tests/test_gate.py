"""The release gate: each thing that may be wrong gives one line that names it."""

from __future__ import annotations

import json

import pytest
from variant_folder import CARD, LADDER, make_project, make_variant, seal, write_config, write_smoke

from publisher.gate import gate
from publisher.schema import Manifest


def manifest(project):
    return Manifest.model_validate_json(project.store.manifest("Q4").read_bytes())


def test_a_complete_variant_may_go(project):
    assert gate(project, "Q4") == []
    assert gate(project, "Q4", expected_card=CARD.format(id="Q4")) == []


def only(refusals, *words):
    assert len(refusals) == 1, refusals
    assert all(w in refusals[0] for w in words), refusals[0]
    assert "\n" not in refusals[0]


def test_an_unbuilt_variant_is_refused(project):
    only(gate(project, "Q8"), "Q8: not built", "publish build Q8")


def test_a_missing_manifest_is_refused(project, folder):
    (folder / "manifest.json").unlink()
    only(gate(project, "Q4"), "manifest.json is missing")


def test_a_manifest_that_does_not_parse_is_refused(project, folder):
    (folder / "manifest.json").write_text("{")
    only(gate(project, "Q4"), "manifest.json")


def test_a_manifest_of_another_variant_is_refused(project, folder):
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"id": "Q4"', '"id": "Q9"'))
    only(gate(project, "Q4"), "manifest.json is of Q9")


def test_a_changed_file_is_refused(project, folder):
    (folder / "tokenizer.json").write_text('{"version": "1.1"}\n')
    # a plain build trusts names and sizes, and would find nothing to do
    only(gate(project, "Q4"), "files: tokenizer.json has sha256", "; run `publish build Q4 --force`")


def test_a_missing_file_is_refused(project, folder):
    (folder / "LICENSE").unlink()
    only(gate(project, "Q4"), "files: LICENSE", "No such file")


@pytest.mark.parametrize("name", [".DS_Store", "model-00003-of-00003.safetensors", "notes/x.txt"])
def test_a_stray_file_is_refused(project, folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"x")
    assert any(r.endswith(f"{name} is not in the manifest; remove it") for r in gate(project, "Q4"))


def test_images_of_the_card_are_no_strays(project, folder):
    (folder / "images").mkdir()
    (folder / "images" / "kld.svg").write_text("<svg/>")
    assert gate(project, "Q4") == []


def test_without_a_smoke_test_of_these_weights_it_is_refused(project):
    path = project.store.results(manifest(project).weights_hash) / "smoke.json"
    text = path.read_text()
    path.unlink()
    only(gate(project, "Q4"), "no smoke test of these weights", "publish smoke Q4")
    path.write_text(text.replace(manifest(project).weights_hash, "0" * 64))
    only(gate(project, "Q4"), "no smoke test of these weights")


def test_a_failed_smoke_test_is_refused(project):
    write_smoke(project, "Q4", manifest(project).weights_hash, passed=False)
    only(gate(project, "Q4"), "the smoke test failed: divergence: 0.02 nats")


def test_what_the_caller_knows_to_be_stale_is_refused_where_something_is_built(project):
    stale = ["weights are stale (bits: 4 → 3); run `publish build Q4`"]
    only(gate(project, "Q4", stale=stale), "Q4: weights are stale (bits: 4 → 3)", "publish build Q4")
    only(gate(project, "Q8", stale=stale), "Q8: not built")


def test_new_weights_need_a_new_smoke_test(project):
    make_variant(project, seed=1, smoke=False)
    only(gate(project, "Q4"), "no smoke test of these weights")


def test_a_missing_card_is_refused(project, folder):
    (folder / "README.md").unlink()
    only(gate(project, "Q4"), "README.md is missing", "publish card Q4")


def test_a_stale_card_is_refused(project):
    only(gate(project, "Q4", expected_card="other"), "README.md is not what it would be now", "publish card Q4")


def test_a_path_of_a_machine_in_the_config_is_refused(project, folder):
    config = json.loads((folder / "config.json").read_text())
    write_config(folder, {**config, "source": "/home/somebody/models/tiny", "url": "https://example.org/home/x"})
    seal(project, "Q4")
    only(gate(project, "Q4"), "Q4: config.json: path of a machine '/home/somebody/models/tiny'", "publish build Q4")


def test_a_path_of_a_machine_in_the_manifest_is_refused(project, folder):
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"name": "Tiny-1B"', '"name": "/Users/somebody/Tiny-1B"'))
    only(gate(project, "Q4"), "Q4: manifest.json: path of a machine '/Users/somebody/Tiny-1B'")


@pytest.mark.parametrize("text", ["TBD", "{{ size"])
def test_a_card_with_a_placeholder_is_refused(project, folder, text):
    with open(folder / "README.md", "a") as f:
        f.write(f"\nSpeed: {text}\n")
    only(gate(project, "Q4"), "README.md: line")


def test_a_card_that_is_no_text_is_refused(project, folder):
    (folder / "README.md").write_bytes(b"\xff\xfe")
    only(gate(project, "Q4"), "not UTF-8")


def test_without_any_licence_it_is_refused(project, folder):
    (folder / "LICENSE").unlink()
    seal(project, "Q4")
    assert gate(project, "Q4") == []  # the card still names one
    card = folder / "README.md"
    card.write_text(card.read_text().replace("license: apache-2.0\n", ""))
    assert any("no licence in the folder or the card" in r for r in gate(project, "Q4"))


def test_without_an_owner_it_is_refused(tmp_path):
    project = make_project(tmp_path, LADDER.replace("owner: acme\n", ""))
    make_variant(project)
    only(gate(project, "Q4"), "owner is not set in variants.yaml")


@pytest.mark.parametrize(
    ("pattern", "message"), [("x" * 95 + "{id}", "characters"), ("a--{id}", "no name"), ("{id}.git", "no name")]
)
def test_a_name_that_the_hub_would_refuse_is_refused(tmp_path, pattern, message):
    project = make_project(tmp_path, LADDER + f"repo: '{pattern}'\n")
    make_variant(project)
    only(gate(project, "Q4"), message)


def test_every_reason_is_told_at_once(project, folder):
    (folder / "tokenizer.json").write_text("{}")
    (folder / "README.md").unlink()
    write_smoke(project, "Q4", manifest(project).weights_hash, passed=False)
    assert len(gate(project, "Q4")) == 3


def test_a_path_of_a_machine_in_the_provenance_is_refused(project, folder):
    (folder / "provenance").mkdir()
    (folder / "provenance/variants.yaml").write_text("# why: see /home/somebody/notes.txt\n")
    only(
        gate(project, "Q4"),
        "variants.yaml: path of a machine '/home/somebody/notes.txt'",
        "take it out of variants.yaml",
    )
