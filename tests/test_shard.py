"""`build --shard i/n`: every host finds the same shares, they are all of the ladder, and they are even."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import EXAMPLE, PUBLISH, environment, write_ladder
from hypothesis import given
from hypothesis import strategies as st

from inference.errors import InputError
from publisher.shard import MAX_SHARDS, Shard, parse_shard, partition, partition_of
from publisher.variants import load_project

ROOT = Path(__file__).parents[1]
IDS = [f"Q{bits}_K_XL" for bits in (2, 3, 4, 5, 6, 8)]
SMALL = """\
base: {path: model, name: tiny}
owner: demo
imatrix: ./imatrix-tiny.gguf
recipe: uniform
bench: {turns: 1, turn_tokens: 4, prefill: [32], runs: 1}
smoke: {prompts: [The quick brown fox], max_tokens: 32, text_tokens: 64}
variants:
  Q3: {bits: 3}
  Q4: {bits: 4}
  Q8: {bits: 8}
"""
works = st.dictionaries(st.text("ABCDEF", min_size=1, max_size=3), st.integers(0, 10**12), max_size=12)


@given(works, st.integers(1, 9))
def test_every_variant_is_in_exactly_one_share(work, count):
    shares = partition(work, count).shares
    assert len(shares) == count
    assert sorted(itertools.chain(*shares)) == sorted(work)
    for share in shares:
        assert list(share) == [id for id in work if id in share]  # in the ladder's order


@given(works, st.integers(1, 9))
def test_the_order_of_the_file_changes_no_share(work, count):
    turned = dict(reversed(work.items()))
    assert [set(s) for s in partition(work, count).shares] == [set(s) for s in partition(turned, count).shares]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=7), st.integers(1, 3))
def test_the_largest_share_is_within_a_third_of_the_best_possible(sizes, count):
    work = {f"V{i}": size for i, size in enumerate(sizes)}
    ours = max(sum(work[id] for id in share) for share in partition(work, count).shares)
    best = min(
        max(sum(s for s, at in zip(sizes, places, strict=True) if at == i) for i in range(count))
        for places in itertools.product(range(count), repeat=len(sizes))
    )
    assert ours <= best * (4 / 3 - 1 / (3 * count)) + 1e-9


@pytest.mark.parametrize(
    "text", ["", "1", "0/2", "3/2", "1/0", "a/b", "1/2/3", "-1/2", " 1/2", "1/2\n", f"1/{MAX_SHARDS + 1}"]
)
def test_what_is_no_share_is_refused(text):
    with pytest.raises(InputError, match="expected i/n with 1 ≤ i ≤ n"):
        parse_shard(text)


def test_a_share_reads_as_it_is_written():
    assert parse_shard("2/4") == Shard(2, 4)
    assert str(Shard(2, 4)) == "2/4"


def test_a_host_that_has_built_finds_the_shares_of_one_that_has_not(built, tmp_path, quick_yaml):
    fresh = load_project(write_ladder(tmp_path / "fresh", quick_yaml))
    done = load_project(built / "variants.yaml")
    for count in (1, 2, 3, 7):
        found = [partition_of(p, IDS, count, pytest.fail) for p in (fresh, done)]
        assert found[0].shares == found[1].shares
        assert sorted(itertools.chain(*found[0].shares)) == sorted(IDS)
    assert [len(s) for s in found[0].shares] == [1, 1, 1, 1, 1, 1, 0]


def test_the_bytes_and_the_solver_make_the_work(tmp_path):
    text = SMALL.replace("Q8: {bits: 8}", "Q8: {bits: 8, solver: gptq}\n  S: {size: 4.5 bpw}")
    project = load_project(write_ladder(tmp_path, text))
    found = partition_of(project, ["Q3", "Q4", "Q8", "S"], 2, pytest.fail)
    assert found.work["Q3"] < found.work["Q4"] < 4 * found.work["Q4"] < found.work["S"] < found.work["Q8"]
    assert all("Q8" not in share or "S" not in share for share in found.shares)  # the two that take long


def test_a_wrong_share_ends_the_command_with_one_line(publish, built):
    said = publish("build", "--all", "--shard", "3/2", cwd=built).refused(2)
    assert said == f"--shard: found '3/2', expected i/n with 1 ≤ i ≤ n ≤ {MAX_SHARDS}, such as 2/4"
    assert "--push" in publish("build", "--all", "--shard", "1/2", "--push", cwd=built).refused(2)


def test_a_build_says_whose_the_variants_are_and_touches_only_its_own(publish, ladder):
    ours = json.loads(publish("build", "--all", "--shard", "1/2", "--json", cwd=ladder).ok().out)["shard"]
    shutil.rmtree(ladder / "build" / ours["left"][0])
    ran = publish("build", "--all", "--shard", "1/2", cwd=ladder).ok()
    other = json.loads(publish("build", "--all", "--shard", "2/2", "--skip", "smoke", "--json", cwd=ladder).ok().out)
    assert ran.err.startswith(f"shard 1/2 takes {', '.join(ours['takes'])} (")
    assert f"shard 2/2 is left {', '.join(ours['left'])} (" in ran.err
    assert other["shard"]["takes"] == ours["left"]
    assert [v["id"] for v in other["variants"] if v["rebuilt"]] == [ours["left"][0]]


def test_a_host_beyond_the_last_variant_has_nothing_to_do(publish, ladder):
    ran = publish("build", IDS[0], "--shard", "2/2", "--eval", cwd=ladder).ok()
    assert "shard 2/2 takes no variant" in ran.err
    assert "nothing to do" in ran.err


def test_two_workers_end_with_the_bytes_of_one_host(publish, tmp_path):
    """The example of docs/scale.md, on a smaller ladder."""
    single = write_ladder(tmp_path / "single", SMALL.replace("  Q3: {bits: 3}\n", "")).parent
    command = tmp_path / "publish"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{PUBLISH}" "$@"\n')
    command.chmod(0o755)
    env = environment(tmp_path) | {"PUBLISH": str(command)}
    ran = subprocess.run(
        ["sh", str(EXAMPLE.parent / "two_workers.sh"), "out", "single"], cwd=tmp_path, env=env, capture_output=True,
        text=True, timeout=240, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    publish("build", "--all", "--skip", "smoke", "--skip", "bench", "--skip", "card", "-q", cwd=single).ok()
    takes = {i: (tmp_path / f"out/worker-{i}.log").read_text().splitlines()[0] for i in (1, 2)}
    assert "takes Q8 (" in takes[1]
    assert "takes Q4 (" in takes[2]
    for id in ("Q4", "Q8"):
        merged, whole = tmp_path / "out/main/build" / id, single / "build" / id
        assert (merged / "manifest.json").read_bytes() == (whole / "manifest.json").read_bytes()
        for shard in whole.glob("*.safetensors"):
            assert (merged / shard.name).read_bytes() == shard.read_bytes()
        assert "not built" not in (merged / "README.md").read_text()  # a card that lists its siblings
    assert "nothing to do" in publish("build", "--all", cwd=tmp_path / "out/main").ok().err


def test_the_scripts_of_the_docs_parse():
    text = (ROOT / "docs/scale.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(bash|python)\n(.*?)^```", text, re.M | re.S)
    assert [kind for kind, _ in blocks].count("python") == 1
    assert len(blocks) >= 5
    for kind, code in blocks:
        if kind == "python":
            compile(code, "scale.md", "exec")
        else:
            subprocess.run(["bash", "-n"], input=code, text=True, check=True)
