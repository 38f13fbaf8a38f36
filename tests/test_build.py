"""`publish build` and `status`: what is done again, what is left alone, and what survives a kill."""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import engine_checkpoints
import pytest
from conftest import EXAMPLE, PUBLISH, edit, environment, own_base, write_ladder

import quant.convert
from inference.errors import ResourceError
from publisher.variants import load_project
from quant.stream import default_jobs

IDS = ["Q2_K_XL", "Q3_K_XL", "Q4_K_XL", "Q5_K_XL", "Q6_K_XL", "Q8_K_XL"]
CURRENT = {id: {} for id in IDS}  # as `stale` gives it
Q4 = "  Q4_K_XL: {bits: 4}"


def snapshot(folder: Path) -> dict[str, tuple[int, str]]:
    """path → (mtime, sha256) of every file built."""
    return {
        p.relative_to(folder).as_posix(): (p.stat().st_mtime_ns, hashlib.sha256(p.read_bytes()).hexdigest())
        for p in sorted((folder / "build").rglob("*"))
        if p.is_file() and p.name != ".lock"
    }


def changed(before: dict, after: dict) -> set[str]:
    return {p for p in before.keys() | after.keys() if before.get(p) != after.get(p)}


def stale(publish, ladder: Path) -> dict[str, dict[str, list[str]]]:
    """id → step → reasons, steps without any left out."""
    rows = json.loads(publish("status", "--json", cwd=ladder).ok().out)["variants"]
    return {r["id"]: {step: why for step, why in r["stale"].items() if why} for r in rows}


def manifest(ladder: Path, id: str) -> dict:
    return json.loads((ladder / "build" / id / "manifest.json").read_text())


def result(ladder: Path, id: str, kind: str) -> Path:
    return ladder / "build/results" / manifest(ladder, id)["weights_hash"] / f"{kind}.json"


# ------------------------------------------------------------------------------------------------ staleness


def test_a_hub_that_cannot_have_its_folder_names_it(publish, tmp_path):
    (tmp_path / "file").write_text("x")
    line = publish("hub", "--dir", "file/x", "--port", "0", cwd=tmp_path).refused(2)
    assert "file/x: " in line
    assert "Not a directory" in line
    assert "port" not in line


def test_when_everything_is_current_nothing_is_done_and_no_file_changes(ladder, publish):
    before = snapshot(ladder)
    ran = publish("build", "--all", cwd=ladder).ok()
    assert "nothing to do" in ran.err
    assert snapshot(ladder) == before
    rows = json.loads(publish("build", "--all", "--json", cwd=ladder).ok().out)["variants"]
    assert [r["id"] for r in rows] == IDS
    assert not any(r["rebuilt"] or r["smoked"] or r["benched"] or r["card_changed"] for r in rows)
    assert all(r["current"] for r in json.loads(publish("status", "--json", cwd=ladder).ok().out)["variants"])


def test_a_rule_added_to_one_variant_rebuilds_its_weights_alone_and_every_card(ladder, publish):
    edit(ladder, Q4, '  Q4_K_XL: {bits: 4, rules: [{match: "*.mlp.down_proj", bits: 8, awq: true}]}')
    found = stale(publish, ladder)
    assert found.pop("Q4_K_XL")["weights"] == ["rules[*.mlp.down_proj].bits: 5 → 8"]
    assert all("weights" not in why for why in found.values())
    told = publish("status", "Q4_K_XL", cwd=ladder).ok().out
    assert re.search(r"Q4_K_XL +stale +weights: rules\[\*\.mlp\.down_proj\]\.bits: 5 → 8", told)

    before = snapshot(ladder)
    rows = {r["id"]: r for r in json.loads(publish("build", "--all", "--json", cwd=ladder).ok().out)["variants"]}
    assert {id for id, r in rows.items() if r["rebuilt"]} == {"Q4_K_XL"}
    assert {id for id, r in rows.items() if r["smoked"]} == {"Q4_K_XL"}
    assert {id for id, r in rows.items() if r["card_changed"]} == set(IDS)  # each lists its siblings
    touched = changed(before, snapshot(ladder))
    assert {f for f in touched if f.endswith(".safetensors")} == {"build/Q4_K_XL/model.safetensors"}
    outside = {f for f in touched if "/results/" not in f and "/Q4_K_XL/" not in f} - {"build/base.json"}
    assert outside == {f"build/{id}/README.md" for id in IDS if id != "Q4_K_XL"}
    assert stale(publish, ladder) == CURRENT


def test_a_changed_reason_changes_one_card_and_nothing_else(ladder, publish):
    rule = '{{match: "*.lm_head", bits: 8, why: {}}}'
    edit(ladder, Q4, f"  Q4_K_XL: {{bits: 4, rules: [{rule.format('the output deserves it')}]}}")
    assert {id: set(why) for id, why in stale(publish, ladder).items() if why} == {"Q4_K_XL": {"card"}}
    before = snapshot(ladder)
    publish("build", "--all", cwd=ladder).ok()
    assert changed(before, snapshot(ladder)) == {
        f"build/Q4_K_XL/{n}" for n in ("README.md", "provenance/variants.yaml")
    }
    assert "the output deserves it" in (ladder / "build/Q4_K_XL/README.md").read_text()


def test_a_recipe_that_is_renamed_or_reworded_makes_no_weights_stale(ladder, publish):
    edit(ladder, "recipe: unsloth", "recipe: mine\nrecipes: {mine: {extends: unsloth, origin: here}}")
    found = stale(publish, ladder)
    assert all(not {"weights", "smoke", "bench"} & set(why) for why in found.values())


def test_a_smoke_ceiling_makes_only_the_smoke_test_stale(ladder, publish):
    edit(ladder, Q4, "  Q4_K_XL: {bits: 4, smoke_kld: 0.4}")
    assert {id: why for id, why in stale(publish, ladder).items() if why}["Q4_K_XL"]["smoke"] == [
        "smoke_kld: 0.5 → 0.4"
    ]
    before = snapshot(ladder)
    rows = {r["id"]: r for r in json.loads(publish("build", "--all", "--json", cwd=ladder).ok().out)["variants"]}
    assert {id for id, r in rows.items() if r["smoked"]} == {"Q4_K_XL"}
    assert not any(r["rebuilt"] or r["benched"] for r in rows.values())
    assert result(ladder, "Q4_K_XL", "smoke").relative_to(ladder).as_posix() in changed(before, snapshot(ladder))


def test_a_benchmark_protocol_makes_only_the_benchmarks_stale(ladder, publish):
    edit(ladder, "turn_tokens: 6", "turn_tokens: 7")
    for why in stale(publish, ladder).values():
        assert set(why) <= {"bench", "card"}
        assert why["bench"] == ["bench: protocol or text changed"]


def test_smoke_prompts_make_the_smoke_tests_stale(ladder, publish):
    edit(ladder, "The quick brown fox", "In the beginning")
    for why in stale(publish, ladder).values():
        assert why["smoke"] == ["smoke: prompts, text or seed changed"]
        assert "weights" not in why


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("recipe: unsloth", "recipe: uniform", "recipe: unsloth → uniform"),
        (Q4, "  Q4_K_XL: {bits: 5}", "bits: 4 → 5"),
        (Q4, "  Q4_K_XL: {bits: 4, group_size: 32}", "group_size: 64 → 32"),
        (Q4, "  Q4_K_XL: {bits: 4, awq_exponent: 0.5}", "awq_exponent: 1.0 → 0.5"),
        (Q4, "  Q4_K_XL: {bits: 4, imatrix: false}", "imatrix: imatrix-tiny.gguf"),
        (Q4, "  Q4_K_XL: {bits: 4, mtp: keep}", "mtp: drop → keep"),
        (Q4, "  Q4_K_XL: {bits: 4, vision: drop}", "vision: keep → drop"),
    ],
)
def test_what_the_weights_depend_on_is_named_when_it_changes(old, new, reason, ladder, publish):
    edit(ladder, old, new)
    found = stale(publish, ladder)["Q4_K_XL"]["weights"]
    assert any(reason in r for r in found), found


def test_one_changed_byte_of_the_base_makes_everything_stale(ladder, publish):
    (shard,) = own_base(ladder).glob("*.safetensors")
    assert stale(publish, ladder) == CURRENT  # a copy with another time is the same base
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    for why in stale(publish, ladder).values():
        (reason,) = why["weights"]
        assert re.fullmatch(r"base weights: [0-9a-f]{8} → [0-9a-f]{8}", reason)


def test_another_imatrix_makes_what_it_scales_stale(ladder, publish):
    path = ladder / "imatrix-tiny.gguf"
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data + b"\0")
    edit(ladder, "  Q8_K_XL: {bits: 8", "  Q8_K_XL: {recipe: mxfp8, bits: 8")
    found = stale(publish, ladder)
    for id in IDS[:-1]:
        (reason,) = found[id]["weights"]
        assert re.fullmatch(r"imatrix: imatrix-tiny.gguf [0-9a-f]{8} → imatrix-tiny.gguf [0-9a-f]{8}", reason)


def test_the_reasons_are_told_before_the_work_starts(ladder, publish):
    edit(ladder, Q4, "  Q4_K_XL: {bits: 4, group_size: 32}")
    ran = publish("build", "Q4_K_XL", "--skip", "bench", "--skip", "smoke", cwd=ladder).ok()
    assert ran.err.splitlines()[0] == "Q4_K_XL: weights: group_size: 64 → 32"


# ------------------------------------------------------------------------------------------------ what lies around


def test_a_stray_shard_of_an_earlier_build_does_not_survive_a_rebuild(ladder, publish):
    folder = ladder / "build/Q4_K_XL"
    shutil.copy(folder / "model.safetensors", folder / "model-00002-of-00002.safetensors")
    edit(ladder, Q4, "  Q4_K_XL: {bits: 4, group_size: 32}")
    publish("build", "Q4_K_XL", "--skip", "bench", "--skip", "smoke", cwd=ladder).ok()
    assert [p.name for p in folder.glob("*.safetensors")] == ["model.safetensors"]
    publish("verify", "Q4_K_XL", cwd=ladder).ok()
    assert {p.name for p in (ladder / "build").iterdir()} <= {*IDS, "results", "staging", "base.json", ".lock"}
    assert not list((ladder / "build").glob("staging/*"))


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff\xfe", b'{"schema_version": 1}', b'{"schema_version": 2}'])
def test_a_damaged_result_counts_as_missing_and_is_measured_again(damage, ladder, publish):
    path = result(ladder, "Q4_K_XL", "smoke")
    path.write_bytes(damage)
    found = stale(publish, ladder)
    assert found["Q4_K_XL"]["smoke"] == ["not run on these weights"]
    assert all("smoke" not in why for id, why in found.items() if id != "Q4_K_XL")
    if damage == b"{":
        publish("build", "--all", cwd=ladder).ok()
        assert json.loads(path.read_text())["passed"] is True
        assert stale(publish, ladder) == CURRENT


@pytest.mark.parametrize("damage", [b"", b"\xff\xfe", b'{"schema_version": 1}'])
@pytest.mark.parametrize(
    "command", [("status",), ("build", "--all"), ("verify",), ("plan",), ("card", "--all")], ids=" ".join
)
def test_a_damaged_manifest_is_one_line_that_says_what_to_do(damage, command, ladder, publish):
    (ladder / "build/Q4_K_XL/manifest.json").write_bytes(damage)
    told = publish(*command, cwd=ladder).refused(2)
    assert told.startswith("manifest.json (Q4_K_XL): ")
    assert "delete the folder" in told
    if b"1" in damage:
        assert "schema_version: found 1, expected 2; another version of this tool wrote it" in told


def test_a_manifest_of_another_variant_is_refused(ladder, publish):
    shutil.copy(ladder / "build/Q2_K_XL/manifest.json", ladder / "build/Q4_K_XL/manifest.json")
    assert "is of variant Q2_K_XL" in publish("status", cwd=ladder).refused(2)


def test_a_damaged_cache_of_base_hashes_is_made_again(ladder, publish):
    (ladder / "build/base.json").write_text("{")
    assert stale(publish, ladder) == CURRENT


def test_a_disk_that_is_too_small_is_one_line_before_anything_is_written(ladder, publish, monkeypatch):
    edit(ladder, Q4, "  Q4_K_XL: {bits: 4, group_size: 32}")
    before = snapshot(ladder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1_000_000))
    told = publish("build", "Q4_K_XL", cwd=ladder).refused(2)
    assert re.search(r"0\.01 GB needed at .*, 0\.00 GB free", told)
    assert changed(before, snapshot(ladder)) == set()


def test_a_skipped_benchmark_is_named_on_the_card(ladder, publish):
    result(ladder, "Q4_K_XL", "bench").unlink()
    publish("build", "Q4_K_XL", "--skip", "bench", cwd=ladder).ok()
    assert not result(ladder, "Q4_K_XL", "bench").exists()
    text = (ladder / "build/Q4_K_XL/README.md").read_text()
    section = text[text.index("## Speed of This Variant") :].split("\n## ")[0]
    assert re.search(r"Not measured: .{10,}\.", section)
    assert stale(publish, ladder)["Q4_K_XL"] == {"bench": ["not run on these weights"]}


def test_unbuilt_siblings_are_neither_built_nor_listed_as_built(tmp_path, publish, quick_yaml):
    write_ladder(tmp_path, quick_yaml)
    publish("build", "Q2_K_XL", "--skip", "bench", "--skip", "smoke", cwd=tmp_path).ok()
    assert {p.name for p in (tmp_path / "build").iterdir()} - {"results", "base.json", "staging", ".lock"} == {
        "Q2_K_XL"
    }
    rows = {r["id"]: r for r in json.loads(publish("status", "--json", cwd=tmp_path).ok().out)["variants"]}
    assert [id for id, r in rows.items() if r["built"]] == ["Q2_K_XL"]
    assert set(rows["Q2_K_XL"]["stale"]["smoke"]) == {"not run on these weights"}


# ------------------------------------------------------------------------------------------------ parts of a model


@pytest.fixture
def parts(tmp_path, publish, quick_yaml):
    """Variants that keep or split the MTP head and drop the vision tower."""
    head, _, _ = quick_yaml.partition("variants:\n")
    rows = "variants:\n  keep: {bits: 4, mtp: keep}\n  split: {bits: 4, mtp: split}\n  text: {bits: 4, vision: drop}\n"
    write_ladder(tmp_path, head + rows)
    publish("build", "--all", "--skip", "bench", cwd=tmp_path).ok()
    return tmp_path


def test_mtp_and_vision_are_kept_split_or_dropped_and_every_variant_verifies_and_passes(parts, publish):
    names, indexes = {}, {}
    for id in ("keep", "split", "text"):
        names[id] = {t["name"].partition(".")[0] for t in manifest(parts, id)["tensors"]}
        index = json.loads((parts / "build" / id / "model.safetensors.index.json").read_text())["weight_map"]
        indexes[id] = {n.partition(".")[0] for n in index}
        assert json.loads(result(parts, id, "smoke").read_text())["passed"] is True
    assert names["keep"] == names["split"] == {"language_model", "vision_tower", "mtp"}
    assert indexes["split"] == {"language_model", "vision_tower"}  # mlx-lm must not meet the head
    assert (parts / "build/split/mtp.safetensors").is_file()
    assert names["text"] == indexes["text"] == {"language_model"}
    checks = json.loads(publish("verify", "--json", cwd=parts).ok().out)
    assert all(c["passed"] is not False for found in checks.values() for c in found)
    cards = {id: (parts / "build" / id / "README.md").read_text() for id in names}
    assert "head is kept" in cards["keep"]
    assert "in a file of its own" in cards["split"]
    assert "vision tower was left out" in cards["text"]


def test_a_mixture_of_experts_builds_and_passes(tmp_path, publish, monkeypatch, quick_yaml):
    config = json.loads(json.dumps(engine_checkpoints.MOE_CONFIG))
    config["text_config"]["vocab_size"] = 4096  # that of the example's tokenizer
    monkeypatch.setattr(engine_checkpoints, "MOE_CONFIG", config)
    base = engine_checkpoints.write_moe(tmp_path / "Qwen3.5-MoE")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja", "LICENSE"):
        shutil.copy(EXAMPLE / "model" / name, base / name)
    rest = quick_yaml[quick_yaml.index("bench:") : quick_yaml.index("collection:")]
    (tmp_path / "variants.yaml").write_text(
        f"base: ./Qwen3.5-MoE\ncard: {{license: apache-2.0}}\n{rest}"
        "variants:\n  Q8: {bits: 8}\n  U8: {bits: 8, recipe: uniform}\n"
    )
    publish("build", "--all", cwd=tmp_path).ok()
    publish("verify", cwd=tmp_path).ok()
    for id in ("Q8", "U8"):
        smoke = json.loads(result(tmp_path, id, "smoke").read_text())
        assert smoke["passed"] is True
        assert 0 < smoke["kld"] < smoke["ceiling"]
        assert json.loads(result(tmp_path, id, "bench").read_text())["variant"]["decode_tps"]["median"] > 0


def test_jobs_reach_the_pass_and_must_be_at_least_one(tmp_path, publish, monkeypatch):
    write_ladder(tmp_path, "base: {path: model, name: tiny}\nvariants: {Q4: {bits: 4}}\n")
    asked = []
    run_pass = quant.convert.run_pass
    monkeypatch.setattr(quant.convert, "run_pass", lambda *a: (asked.append(a[-1]), run_pass(*a))[1])
    skip = ("--skip", "smoke", "--skip", "bench", "--skip", "card")
    ran = publish("build", "Q4", "--jobs", "0", *skip, cwd=tmp_path)
    assert ran.code == 2
    assert "--jobs" in ran.err
    publish("build", "Q4", "--jobs", "5", *skip, cwd=tmp_path).ok()
    publish("build", "Q4", "--force", *skip, cwd=tmp_path).ok()
    assert asked == [5, default_jobs()]


# ------------------------------------------------------------------------------------------------ kills

# Where a build is killed, one after the other on the same folder: (module, attribute, which call of it). One of each kind:
# benchmarks/crash.py kills at every boundary.
POINTS = [
    ("quant.shards", "ShardWriter.append", 40),  # early in the pass
    ("quant.shards", "ShardWriter.commit", 120),  # late in the pass
    ("publisher.build", "finish", 2),  # one variant is in place
    ("quant.folder", "shutil.rmtree", 1),  # the other is in place, its staging is not gone
    ("publisher.measure", "smoke", 2),
    ("publisher.measure", "write_model", 1),
    ("publisher.store", "os.replace", 3),  # one card is in place, the other lies in its temporary file
]
DYING = """
import importlib, os, signal
module = importlib.import_module({module!r})
*path, name = {attribute!r}.split(".")
for part in path:
    module = getattr(module, part)
real, calls = getattr(module, name), 0
def dying(*args, **kwargs):
    global calls
    calls += 1
    if calls == {nth}:
        os.kill(os.getpid(), signal.{signal})
    return real(*args, **kwargs)
setattr(module, name, dying)
from publisher.cli import main
main()
"""


def dying(cwd: Path, module: str, attribute: str, nth: int, *args: str, signal: str = "SIGKILL") -> int:
    code = DYING.format(module=module, attribute=attribute, nth=nth, signal=signal)
    return subprocess.run(
        [sys.executable, "-c", code, *args], cwd=cwd, env=environment(cwd), capture_output=True
    ).returncode


CLOCKS = (
    "built_at",
    "measured_at",
    "wall_s",
    "peak_gb",
    "bytes_read",
    "bytes_written",
    "run",
    "variant",
    "bf16",
    "variants",
)


def timeless(folder: Path) -> dict[str, object]:
    """Every file built: hashes; for what holds times and speeds, its content without them."""
    out: dict[str, object] = {}
    for path in sorted(p for p in (folder / "build").rglob("*") if p.is_file()):
        name = path.relative_to(folder / "build").as_posix()
        if name.startswith("results/") or "/provenance/results/" in name:
            out[name] = {k: v for k, v in json.loads(path.read_text()).items() if k not in CLOCKS}
        elif name.endswith("README.md"):
            text = re.sub(r"(?ms)^## (All Variants|Speed of This Variant)$.*?(?=^## )", "", path.read_text())
            out[name] = re.sub(r"\d{4}-\d\d-\d\d", "DATE", text)
        elif name == "base.json":
            out[name] = json.loads(path.read_text())["hashes"]
        else:
            out[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return out


def assert_same_as_undisturbed(folder: Path, built: Path) -> None:
    """What was built in `folder`, all of the ladder or less, is what `built` holds, and nothing else lies there."""
    ids = {p.parent.name for p in folder.glob("build/*/manifest.json")}
    places = {*ids, ".lock", "base.json", *(f"results/{manifest(built, id)['weights_hash']}" for id in ids)}
    got = timeless(folder)
    want = {n: v for n, v in timeless(built).items() if any(n == p or n.startswith(f"{p}/") for p in places)}
    assert got.keys() == want.keys()
    assert {n for n in want if got[n] != want[n]} == set()


def test_a_build_killed_at_any_point_ends_like_an_undisturbed_one(
    tmp_path, built, quick_yaml, publish, publish_process
):
    write_ladder(tmp_path, quick_yaml.partition("  Q4_K_XL")[0])
    for module, attribute, nth in POINTS:
        code = dying(tmp_path, module, attribute, nth, "build", "--all")
        assert code == -signal.SIGKILL, f"{module}.{attribute} was called fewer than {nth} times"
    publish_process("build", "--all", cwd=tmp_path).ok()
    assert_same_as_undisturbed(tmp_path, built)
    publish("card", "--check", cwd=tmp_path).ok()
    publish("verify", cwd=tmp_path).ok()
    assert stale(publish, tmp_path) == {id: {} for id in IDS[:2]}


def test_a_build_killed_again_and_again_at_random_moments_ends_like_an_undisturbed_one(
    tmp_path, built, quick_yaml, publish_process
):
    write_ladder(tmp_path, quick_yaml.partition("  Q3_K_XL")[0])
    moments = random.Random(20).sample(range(400, 1600), 3)
    for ms in moments:
        child = subprocess.Popen(
            [sys.executable, "-c", PUBLISH, "build", "--all"], cwd=tmp_path, env=environment(tmp_path),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        time.sleep(ms / 1000)
        child.kill()
        child.wait()
    publish_process("build", "--all", cwd=tmp_path).ok()
    assert_same_as_undisturbed(tmp_path, built)


@pytest.mark.parametrize("nth", [1, 2])
def test_a_rebuild_killed_while_it_moves_into_place_loses_nothing(nth, ladder, built, publish):
    """`finish` sets the old folder aside, then moves the new one in: killed before either, the next build heals it."""
    assert (
        dying(
            ladder,
            "quant.folder",
            "os.rename",
            nth,
            "build",
            "Q2_K_XL",
            "--force",
            "--skip",
            "smoke",
            "--skip",
            "bench",
        )
        == -9
    )
    publish("build", "Q2_K_XL", cwd=ladder).ok()
    assert_same_as_undisturbed(ladder, built)


def test_what_a_killed_pass_kept_is_not_made_again(tmp_path, quick_yaml, publish_process):
    write_ladder(tmp_path, quick_yaml)
    args = ("build", "Q2_K_XL", "--skip", "smoke", "--skip", "bench")
    assert dying(tmp_path, "quant.shards", "ShardWriter.commit", 60, *args) == -9
    publish_process(*args, cwd=tmp_path).ok()
    record = json.loads(result(tmp_path, "Q2_K_XL", "build").read_text())
    assert record["bytes_written"] < 0.7 * manifest(tmp_path, "Q2_K_XL")["nbytes"]


@pytest.mark.parametrize(
    ("module", "attribute", "skip"),
    [
        ("quant.shards", "ShardWriter.commit", ["--skip", "smoke"]),
        ("publisher.measure", "smoke", []),
        ("publisher.build", "write_text", ["--skip", "smoke"]),
    ],
)
def test_ctrl_c_exits_130_with_one_line_and_no_traceback(module, attribute, skip, tmp_path, quick_yaml):
    write_ladder(tmp_path, quick_yaml)
    code = DYING.format(module=module, attribute=attribute, nth=1, signal="SIGINT")
    args = [sys.executable, "-c", code, "build", "Q2_K_XL", "--skip", "bench", *skip]
    done = subprocess.run(args, cwd=tmp_path, env=environment(tmp_path), text=True, capture_output=True)
    assert done.returncode == 130, done.stderr
    assert done.stderr.splitlines()[-1] == "interrupted; the same command goes on where this one stopped"
    assert "Traceback" not in done.stderr
    assert not done.stdout


def test_a_closed_pipe_is_no_error(built):
    line = f"{sys.executable} -c '{PUBLISH}' plan | head -1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line], cwd=built, env=environment(built), text=True, capture_output=True
    )
    assert "Traceback" not in done.stderr
    assert "Error" not in done.stderr
    assert done.stdout.startswith("Qwen3.5-tiny")


def test_a_second_build_in_the_same_folder_waits_for_nobody_and_says_so(ladder: Path, publish) -> None:
    with load_project(ladder / "variants.yaml").store.lock("build"):
        line = publish("build", "--all", cwd=ladder).refused(2)
    assert "another publish is at work there" in line


# ------------------------------------------------------------------------------------------------ what counts as a change


def test_a_changed_tokenizer_or_config_of_the_base_makes_everything_stale(ladder, publish):
    model = own_base(ladder)
    publish("status", cwd=ladder).ok()
    template = model / "chat_template.jinja"
    template.write_text(template.read_text() + "{# changed #}")
    found = stale(publish, ladder)
    assert all("base config, tokenizer or licence" in found[id]["weights"][0] for id in IDS)
    publish("build", "Q2_K_XL", "--skip", "smoke", "--skip", "bench", cwd=ladder).ok()
    assert (ladder / "build/Q2_K_XL/chat_template.jinja").read_bytes() == template.read_bytes()


def test_another_name_for_the_same_base_or_imatrix_rebuilds_nothing(ladder, publish):
    (ladder / "renamed.gguf").write_bytes((EXAMPLE / "imatrix-tiny.gguf").read_bytes())
    text = (ladder / "variants.yaml").read_text()
    text = re.sub(r"imatrix: .*", "imatrix: ./renamed.gguf", text, count=1)
    text = re.sub(r"name: Qwen3.5-tiny", "name: Another-name", text, count=1)
    (ladder / "variants.yaml").write_text(text)
    assert all("weights" not in why for why in stale(publish, ladder).values())


def test_plan_reads_no_weights_of_a_base_whose_files_were_touched(ladder, publish, monkeypatch):
    (shard,) = own_base(ladder).glob("*.safetensors")
    shard.touch()

    def refuse(targets):
        raise AssertionError("weights were read")

    monkeypatch.setattr("publisher.survey.source_hash_of", refuse)
    rows = json.loads(publish("plan", "--json", cwd=ladder).ok().out)["variants"]
    assert all("changed size or time" in r["stale"]["weights"][0] for r in rows)
    monkeypatch.undo()
    assert stale(publish, ladder) == CURRENT  # the copy holds the same bytes


def test_an_awq_exponent_of_zero_scales_nothing(ladder, publish):
    edit(ladder, Q4, "  Q4_K_XL: {bits: 4, awq_exponent: 0}")
    publish("build", "Q4_K_XL", "--skip", "smoke", "--skip", "bench", cwd=ladder).ok()
    inputs = manifest(ladder, "Q4_K_XL")["inputs"]
    assert inputs["awq_exponent"] is None
    assert inputs["imatrix"] is None
    assert "+ AWQ" not in (ladder / "build/Q4_K_XL/README.md").read_text()


def test_a_damaged_folder_is_named_and_rebuilt_and_does_not_stop_its_siblings(ladder, publish):
    shard = ladder / "build/Q2_K_XL/model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    found = stale(publish, ladder)
    assert "its folder is damaged" in found["Q2_K_XL"]["weights"][0]
    publish("build", "Q4_K_XL", cwd=ladder).ok()
    publish("build", "--all", cwd=ladder).ok()
    publish("verify", "Q2_K_XL", cwd=ladder).ok()
    assert stale(publish, ladder) == CURRENT


def test_pictures_of_the_publishers_own_survive_a_rebuild(ladder, publish):
    picture = ladder / "build/Q4_K_XL/images/curve.png"
    picture.parent.mkdir()
    picture.write_bytes(b"not really a picture")
    edit(ladder, Q4, "  Q4_K_XL: {bits: 4, group_size: 32}")
    publish("build", "Q4_K_XL", "--skip", "smoke", "--skip", "bench", cwd=ladder).ok()
    assert picture.read_bytes() == b"not really a picture"
    publish("verify", "Q4_K_XL", cwd=ladder).ok()


# ------------------------------------------------------------------------------------------------ memory


def test_a_variant_that_does_not_fit_is_reported_and_not_condemned(ladder, publish, monkeypatch):
    from inference import load as engine

    real = engine.load
    reason = "the weights need 99.0 GB, usable are 16.0 GB"

    def load(folder, **how):
        if Path(folder).name == "Q4_K_XL":
            raise ResourceError(f"Q4_K_XL: {reason}")
        return real(folder, **how)

    monkeypatch.setattr("publisher.measure.load", load)
    result(ladder, "Q4_K_XL", "smoke").unlink()
    result(ladder, "Q4_K_XL", "bench").unlink()
    publish("build", "--all", cwd=ladder).ok()
    assert not result(ladder, "Q4_K_XL", "smoke").exists()
    assert json.loads(result(ladder, "Q4_K_XL", "bench").read_text())["variant"]["reason"] == reason
    assert reason in (ladder / "build/Q4_K_XL/README.md").read_text()
    assert stale(publish, ladder)["Q4_K_XL"]["smoke"] == ["not run on these weights"]


def test_each_model_is_gone_before_the_next_one_is_loaded(ladder, publish, monkeypatch):
    """Else its peak counts in the next one's figures."""
    from inference import load as engine
    from inference.backend import mx

    active = []

    def load(folder, **how):
        active.append(mx.get_active_memory())
        return engine.load(folder, **how)

    monkeypatch.setattr("publisher.measure.load", load)
    publish("bench", *IDS[:3], cwd=ladder).ok()
    assert len(active) == 4  # and BF16
    assert max(active) - min(active) < 1 << 20, active


def test_running_out_of_memory_in_a_benchmark_is_reported(ladder, publish, monkeypatch):
    def measure(*args):
        raise RuntimeError("[malloc] Unable to allocate 99 bytes.")

    monkeypatch.setattr("publisher.measure.measure", measure)
    publish("bench", "Q4_K_XL", cwd=ladder).ok()
    bench = json.loads(result(ladder, "Q4_K_XL", "bench").read_text())
    assert "out of memory" in bench["variant"]["reason"]
    assert "out of memory" in bench["bf16"]["reason"]


def test_a_chat_beyond_the_context_names_the_keys_to_lower(ladder, publish):
    text = (ladder / "variants.yaml").read_text()
    (ladder / "variants.yaml").write_text(re.sub(r"turn_tokens: \d+", "turn_tokens: 4090", text))
    line = publish("bench", "Q4_K_XL", cwd=ladder).refused(2)
    assert "bench.turns or bench.turn_tokens" in line


# ------------------------------------------------------------------------------------------------ what a build may replace


def test_a_folder_that_no_build_made_is_never_replaced(ladder, publish):
    own_base(ladder)
    thesis = ladder / "out/docs/thesis.txt"
    thesis.parent.mkdir(parents=True)
    thesis.write_text("years of work")
    (ladder / "model").rename(ladder / "out/model")
    text = (ladder / "variants.yaml").read_text().replace("path: model", "path: out/model")
    (ladder / "variants.yaml").write_text(
        re.sub(r"variants:.*", "output: out\nvariants:\n  docs: {bits: 4}\n  model: {bits: 4}\n", text, flags=re.S)
    )
    before = {p: p.read_bytes() for p in (ladder / "out/model").iterdir()}
    for id in ("docs", "model"):
        assert str(ladder / "out" / id) in publish("build", id, cwd=ladder).refused(2)
    assert thesis.read_text() == "years of work"
    assert {p: p.read_bytes() for p in (ladder / "out/model").iterdir()} == before


def test_a_file_of_somebody_elses_in_a_variants_folder_stops_a_rebuild(ladder, publish):
    (ladder / "build/Q4_K_XL/notes.txt").write_text("mine")
    edit(ladder, Q4, "  Q4_K_XL: {bits: 4, group_size: 32}")
    line = publish("build", "Q4_K_XL", cwd=ladder).refused(2)
    assert "notes.txt" in line
    assert (ladder / "build/Q4_K_XL/notes.txt").read_text() == "mine"


def test_nothing_is_built_into_the_base_models_folder(ladder, publish):
    own_base(ladder)
    text = (ladder / "variants.yaml").read_text()
    (ladder / "variants.yaml").write_text(text + "output: ./model/out\n")
    assert "lies in the base model's folder" in publish("build", "Q4_K_XL", cwd=ladder).refused(2)
    assert not (ladder / "model/out/Q4_K_XL").exists()


@pytest.mark.parametrize("harm", ["missing", "shorter"])
def test_a_file_that_is_missing_or_shorter_is_noticed_and_built_again(harm, ladder, publish):
    licence = ladder / "build/Q3_K_XL/LICENSE"
    whole = licence.read_bytes()
    if harm == "missing":
        licence.unlink()
    else:
        licence.write_bytes(whole[:-1])
    assert "its folder is damaged: LICENSE" in stale(publish, ladder)["Q3_K_XL"]["weights"][0]
    publish("build", "Q3_K_XL", cwd=ladder).ok()
    assert licence.read_bytes() == whole
    assert stale(publish, ladder) == CURRENT


def test_a_folder_without_a_manifest_is_nobodys_to_replace_and_what_the_error_says_helps(ladder, publish):
    folder = ladder / "build/Q4_K_XL"
    (folder / "manifest.json").write_text("{")
    assert "delete the folder" in publish("build", "Q4_K_XL", cwd=ladder).refused(2)
    (folder / "manifest.json").unlink()
    assert "no build put there" in publish("build", "Q4_K_XL", cwd=ladder).refused(2)
    shutil.rmtree(folder)
    publish("build", "Q4_K_XL", "--skip", "smoke", "--skip", "bench", cwd=ladder).ok()
