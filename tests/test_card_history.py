"""Weights that replace others: the notice to download again, the changelog, and the file that both are made of."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from card_ladder import DENSE, TEXT, base, build, ladder, over, quality
from card_ladder import record as keep
from huggingface_hub import HfApi

from inference.errors import InputError
from publisher.card import check_card, gather, render
from publisher.card_history import RELEASES, Changelog, changelog, record, releases
from publisher.card_links import link_faults
from publisher.hub_types import default_endpoint
from publisher.localhub import LocalHub
from publisher.schema import BuildRecord, History, Manifest, Receipt
from publisher.store import read_model, write_model
from publisher.variants import Project

SMALL = {**DENSE, "text_config": {**TEXT, "num_hidden_layers": 4}}
YAML = """\
base: {{path: base, repo: Qwen/Qwen3.5-9B}}
owner: acme
variants:
  Q4: {{bits: {bits}, group_size: {group}}}
"""
ID = "Q4"
WRITE = "hf_historyWRITEtoken"
HUB = "https://huggingface.co"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("history")
    base(root / "base", SMALL)
    return root


@pytest.fixture(autouse=True)
def _the_real_hub(monkeypatch: pytest.MonkeyPatch, root: Path):
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    yield
    shutil.rmtree(root / "build", ignore_errors=True)


def made(root: Path, bits: int, built: str | None = None, group: int = 64) -> tuple[Project, Manifest]:
    """The variant built with these bits, in place of what was there. built: the day."""
    project = ladder(root, YAML.format(bits=bits, group=group))
    shutil.rmtree(project.store.variant(ID), ignore_errors=True)
    manifest = build(project, ID, root / "base", None)
    path = project.store.results(manifest.weights_hash) / "build.json"
    if built is None:
        path.unlink()
    else:
        found = read_model(path, BuildRecord)
        assert found
        write_model(path, found.model_copy(update={"built_at": f"{built}T09:00:00+00:00"}))
    return project, manifest


def landed(
    project: Project, manifest: Manifest, tag: str, at: str = HUB, repo: str | None = None, **change: Any
) -> None:
    """What a push leaves on record."""
    repo = repo or project.repo(ID)
    receipt = Receipt(
        id=ID, repo=repo, endpoint=at, commit=f"{tag:0>40}".replace("v", "a"), weights_hash=manifest.weights_hash, files=[],
        pushed_at="2026-12-24T00:00:00+00:00", tag=tag,
    ).model_copy(update=change)  # fmt: skip
    record(project, SimpleNamespace(id=ID, repo=repo), manifest, receipt)  # type: ignore[arg-type]


def card(project: Project, root: Path) -> str:
    text = render(gather(project, root / "base"), ID, None)
    assert check_card(text) == []
    assert link_faults(text, {f.name for f in project.store.variant(ID).iterdir()}) == []
    return text


def section(text: str) -> str:
    found = re.search(r"^## Changelog\n(.*?)^## ", text, re.M | re.S)
    assert found
    return found[1]


# -- the card -------------------------------------------------------------------------------------------------


def test_first_weights_have_no_notice_before_or_after_their_push(root: Path) -> None:
    project, manifest = made(root, 4, "2026-11-20")
    before = card(project, root)
    assert "Download again" not in before
    assert "Changelog" not in before
    landed(project, manifest, "v1")
    assert card(project, root) == before


def test_weights_that_replace_others_say_so_with_both_dates(root: Path) -> None:
    project, old = made(root, 4, "2026-11-20")
    landed(project, old, "v1")
    project, new = made(root, 5, "2026-12-03", group=32)
    text = card(project, root)
    assert "> [!IMPORTANT]\n> **Download again.** These weights were built on 2026-12-03 and replace" in text
    assert "replace those of 2026-11-20 (`v1`). Files downloaded before are the old ones." in text
    told = section(text)
    assert told.index(f"**2026-12-03**, weights `{new.weights_hash[:12]}`\n") < told.index(
        f"**2026-11-20**, weights `{old.weights_hash[:12]}`, tag `v1`"
    )
    assert "- `bits: 4 → 5`\n" in told
    assert "- `group_size: 64 → 32`\n" in told
    assert re.search(r"- `size: \S+ \S+ → \S+ \S+`\n", told)
    assert "- The first release on record\n" in told
    assert "difference not measured: no figure of either weights is on record" in told


def test_the_same_bytes_come_out_each_time_and_the_push_changes_none(root: Path) -> None:
    project, old = made(root, 4, "2026-11-20")
    landed(project, old, "v1")
    project, new = made(root, 5, "2026-12-03")
    before = card(project, root)
    assert card(project, root) == before
    landed(project, new, "v2")
    assert card(project, root) == before, "the tag of the weights themselves is told by the card after them"
    landed(project, new, "v2", commit="f" * 40, pushed_at="2027-01-01T00:00:00+00:00")
    assert card(project, root) == before
    project, _ = made(root, 6, "2027-01-05")
    assert "replace those of 2026-12-03 (`v2`)" in card(project, root)


def test_going_back_to_old_weights_is_a_release_of_its_own(root: Path) -> None:
    project, old = made(root, 4, "2026-11-20")
    landed(project, old, "v1")
    project, new = made(root, 5, "2026-12-03")
    landed(project, new, "v2")
    project, again = made(root, 4, "2026-11-20")
    assert again.weights_hash == old.weights_hash
    before = card(project, root)
    assert "replace those of 2026-12-03 (`v2`)" in before
    landed(project, again, "v3")
    assert card(project, root) == before


def test_a_measured_difference_is_told_where_both_were_measured_alike(root: Path) -> None:
    project, old = made(root, 4, "2026-11-20")
    keep(project, quality(project, old, 0.02))
    landed(project, old, "v1")
    shutil.rmtree(project.store.results(old.weights_hash))  # what is on record is enough
    project, new = made(root, 5, "2026-12-03")
    assert "difference not measured: no figure of the later weights is on record" in section(card(project, root))
    keep(project, quality(project, new, 0.01))
    told = section(card(project, root))
    figures = r"evaluation text: 0\.0200 \[0\.\d+–0\.\d+\] → 0\.0100 \[0\.\d+–0\.\d+\] nats a token"
    assert re.search(figures, told)


def test_figures_of_different_teachers_never_stand_beside_each_other(root: Path) -> None:
    project, old = made(root, 4, "2026-11-20")
    other = over("text", 0.02).model_copy(update={"teacher": "f" * 64})
    keep(project, quality(project, old, 0.02, corpora=[other]))
    landed(project, old, "v1")
    project, new = made(root, 5, "2026-12-03")
    keep(project, quality(project, new, 0.01))
    told = section(card(project, root))
    assert "not measured: the original or the text was another, so the figures do not compare" in told
    assert "0.0200" not in told


def test_a_figure_measured_after_the_push_counts(root: Path) -> None:
    project, old = made(root, 4, "2026-11-20")
    landed(project, old, "v1")
    keep(project, quality(project, old, 0.02))
    project, new = made(root, 5, "2026-12-03")
    keep(project, quality(project, new, 0.01))
    assert "→ 0.0100 [" in section(card(project, root))


def test_a_date_that_is_not_on_record_is_not_invented(root: Path) -> None:
    project, old = made(root, 4)
    landed(project, old, "v1")
    project, _ = made(root, 5)
    text = card(project, root)
    assert "**Download again.** These weights replace those that were here before (`v1`)." in text
    assert section(text).count("**Date not recorded**") == 2


def test_only_releases_to_this_hub_and_repo_count(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project, old = made(root, 4, "2026-11-20")
    landed(project, old, "v1", at="http://127.0.0.1:7860")
    landed(project, old, "v1", repo="acme/another")
    project, _ = made(root, 5, "2026-12-03")
    assert "Download again" not in card(project, root), "a rehearsal is not the past of the real repo"
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:7860/")
    assert default_endpoint() == "http://127.0.0.1:7860"
    assert "Download again" in card(project, root)


def test_other_tools_and_commits_are_told_and_many_reasons_are_cut(root: Path) -> None:
    project, old = made(root, 4, "2026-11-20")
    landed(project, old, "v1")
    rules = old.inputs.rules[:1]
    many = [rules[0].model_copy(update={"match": f"*.x{i}|`<b>"}) for i in range(20)]
    base_input = old.inputs.base.model_copy(update={"commit": "9" * 40, "source_hash": "1" * 64})
    inputs = old.inputs.model_copy(update={"rules": many, "assignment": "2" * 64, "base": base_input})
    new = old.model_copy(update={"inputs": inputs, "tool": "mlx-publish 9", "weights_hash": "3" * 64})
    told = changelog(releases(project, ID, new)).changes[0]
    assert told.reasons[0] == f"base weights: {old.inputs.base.source_hash[:8]} → 11111111"
    assert len(told.reasons) == 12
    assert told.more > 8
    few = old.model_copy(update={"inputs": old.inputs.model_copy(update={"base": base_input}), "tool": "mlx-publish 9"})
    told = changelog(releases(project, ID, few.model_copy(update={"weights_hash": "3" * 64}))).changes[0]
    assert "base commit: 01234567 → 99999999" in told.reasons
    assert "made with: mlx-publish 0.1.0 → mlx-publish 9" in told.reasons
    same = old.model_copy(update={"weights_hash": "3" * 64})
    assert changelog(releases(project, ID, same)).changes[0].reasons == ("no input on record differs; the bytes do",)


def test_a_long_past_is_cut(root: Path) -> None:
    project, manifest = made(root, 4, "2026-11-20")
    for i in range(RELEASES + 5):
        landed(project, manifest.model_copy(update={"weights_hash": f"{i:064x}"}), f"v{i + 1}")
    text = card(project, root)
    assert section(text).count("weights `") == RELEASES
    assert "6 earlier releases not listed." in text


def test_a_damaged_history_is_one_line(root: Path) -> None:
    project, manifest = made(root, 4, "2026-11-20")
    landed(project, manifest, "v1")
    path = project.store.history(ID)
    path.write_text(path.read_text().replace('"releases"', '"releasez"'))
    with pytest.raises(InputError, match=r"Q4\.json \(history\): releas") as e:
        gather(project, root / "base")
    assert "\n" not in str(e.value)


def test_a_history_of_version_1_is_kept_and_its_hashes_are_not_compared_with_those_of_today(root: Path) -> None:
    """Tensors were hashed by sha256 then: nothing else can tell what was released."""
    project, manifest = made(root, 4, "2026-11-20")
    landed(project, manifest.model_copy(update={"weights_hash": "1" * 64}), "v1")
    path = project.store.history(ID)
    held = json.loads(path.read_text())
    held["schema_version"] = 1
    held["releases"][0]["inputs"]["base"]["source_hash"] = "2" * 64
    path.write_text(json.dumps(held))
    found = section(card(project, root))
    assert "tag `v1`" in found
    assert "whether the bytes do is not on record" in found
    assert "base weights" not in found
    landed(project, manifest, "v2")
    (first, second) = read_model(path, History).releases  # type: ignore[union-attr]
    assert (first.tag, first.weights_hash, second.tag) == ("v1", "1" * 64, "v2")
    path.write_text(json.dumps({"schema_version": 1, "id": ID, "releases": [{"inputs": {"base": 3}}]}))
    with pytest.raises(InputError, match=r"Q4\.json \(history\): releases\.0\."):
        gather(project, root / "base")


def test_the_file_holds_what_was_released_and_no_clock_of_its_own(root: Path) -> None:
    project, old = made(root, 4, "2026-11-20")
    keep(project, quality(project, old, 0.02))
    landed(project, old, "v1")
    path = project.store.history(ID)
    before = path.read_bytes()
    landed(project, old, "v1", commit="f" * 40)
    assert path.read_bytes() == before, "a card that is pushed again is no release"
    (release,) = read_model(path, History).releases  # type: ignore[union-attr]
    assert (release.weights_hash, release.tag, release.built_at) == (
        old.weights_hash,
        "v1",
        "2026-11-20T09:00:00+00:00",
    )
    assert release.inputs == old.inputs
    assert release.quality
    assert release.quality.kld.value == pytest.approx(0.02)
    assert changelog((release,)) == Changelog()


# -- with a hub -----------------------------------------------------------------------------------------------


def test_new_weights_under_an_existing_repo_from_build_to_push(ladder: Path, publish, tmp_path: Path) -> None:
    id, repo = "Q8_K_XL", "demo/Qwen3.5-tiny-UD-Q8_K_XL-mlx"
    history = ladder / "build/history" / f"{id}.json"
    with LocalHub(tmp_path / "hub", {WRITE: "write:demo"}) as server:
        env = {"HF_ENDPOINT": server.url, "HF_TOKEN": WRITE}

        def run(*args: str):
            return publish(*args, cwd=ladder, env=env)

        def on_the_hub() -> str:
            return Path(HfApi(server.url, WRITE).hf_hub_download(repo, "README.md", force_download=True)).read_text()

        run("push", id, "--yes").ok()
        (first,) = json.loads(history.read_text())["releases"]
        assert (first["tag"], first["endpoint"], first["repo"]) == ("v1", server.url, repo)
        assert first["built_at"]
        assert "Download again" not in on_the_hub()

        path = ladder / "variants.yaml"
        path.write_text(path.read_text().replace("Q8_K_XL: {bits: 8", "Q8_K_XL: {group_size: 32, bits: 8"))
        run("build", id, "--skip", "bench").ok()
        readme = ladder / "build" / id / "README.md"
        told = readme.read_bytes()
        assert b"**Download again.**" in told
        assert "- `group_size: 64 → 32`".encode() in told

        # another machine, which has neither history nor receipt: the hub's manifest says what stood there
        history.unlink()
        (ladder / "build/receipts" / f"{id}.json").unlink()
        run("card", id).ok()
        assert b"Download again" not in readme.read_bytes()
        said = run("push", id, "--overwrite", "--yes").refused(3)
        assert said.endswith(
            f"does not say yet that these replace them; run `HF_ENDPOINT={server.url} publish card {id}`"
        )
        run("card", id).ok()
        assert readme.read_bytes() == told

        run("push", id, "--overwrite", "--yes").ok()
        assert on_the_hub().encode() == told
        assert [r["tag"] for r in json.loads(history.read_text())["releases"]] == ["v1", "v2"]
        run("card", id, "--check").ok()
        server.stats.reset()
        run("push", id, "--yes").ok()
        assert server.stats.requests["commit"] == 0, "what the push put on record makes no card stale"
        assert server.stats.crashes == 0
