"""A build that was killed ends with the bytes of one that was not, and a changed source starts over."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from quant_jobs import BAND, contents, job, ladder

from inference.checkpoint import read_checkpoint
from quant.convert import convert

ROOT = Path(__file__).parents[1]


def kill_after(bands: int, base: Path, out: Path) -> None:
    """Build a ladder in a process that dies by SIGKILL."""
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    run = subprocess.run([sys.executable, "-m", "quant_jobs", str(base), str(out), str(bands)], env=env, check=False)
    assert run.returncode == -signal.SIGKILL


def build(base: Path, out: Path, band: int = BAND):
    done = convert(ladder(base, out), band_bytes=band)
    return done, [contents(d.folder) for d in done]


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    done, files = build(tiny, tmp_path_factory.mktemp("undisturbed"))
    return done, files


@pytest.fixture
def half(tiny, tmp_path):
    """Staging folders of a ladder that was interrupted about half way, and how many weights each has."""

    def stop(p):
        if p.bytes_done > p.bytes_total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(ladder(tiny, tmp_path / "out"), stop, BAND)
    return tmp_path / "out"


def test_killed_again_and_again_it_ends_with_the_same_bytes(tiny, tmp_path, undisturbed):
    for bands in (1, 7, random.Random(3).randrange(30, 250)):
        kill_after(bands, tiny, tmp_path)
    done, files = build(tiny, tmp_path)
    assert files == undisturbed[1]
    assert [d.files for d in done] == [d.files for d in undisturbed[0]]
    assert [d.tensors for d in done] == [d.tensors for d in undisturbed[0]]
    assert done[0].resumed > 5


def test_bands_need_not_be_of_the_size_they_had(tiny, half, undisturbed):
    assert build(tiny, half, 100 << 10)[1] == undisturbed[1]


def test_only_what_is_missing_is_read_again(tiny, half):
    total = sum(t.nbytes for t in read_checkpoint(tiny).tensors.values())
    done, _ = build(tiny, half)
    assert 0 < done[0].bytes_read < 0.7 * total
    assert all(d.resumed for d in done)
    again, _ = build(tiny, half)
    assert again[0].bytes_read == 0
    assert again[0].bytes_written == 0


def test_one_finished_variant_does_not_hold_up_another(tiny, tmp_path, undisturbed):
    jobs = ladder(tiny, tmp_path)
    convert(jobs[:1])
    done, files = build(tiny, tmp_path)
    assert files == undisturbed[1]
    assert done[0].bytes_written == 0 < done[1].bytes_written


@pytest.mark.parametrize("harm", ["flip", "cut", "grow", "journal", "line", "older", "header", "gone", "stale"])
def test_whatever_was_damaged_meanwhile_is_made_again(tiny, half, undisturbed, harm):
    staging = half / "4bit"
    weights, journal = staging / "files/model.safetensors", staging / "journal.jsonl"
    data = bytearray(weights.read_bytes())
    if harm == "flip":
        data[len(data) // 3] ^= 1
        weights.write_bytes(data)
    elif harm == "cut":
        weights.write_bytes(data[: len(data) // 3])
    elif harm == "grow":
        weights.write_bytes(data + b"x" * 5000)
    elif harm == "journal":
        journal.write_bytes(journal.read_bytes()[:-30])
    elif harm == "line":
        journal.write_bytes(journal.read_bytes() + b"not json\n")
    elif harm == "older":  # as builds before BLAKE3 wrote it
        journal.write_bytes(journal.read_bytes().replace(b'"blake3":', b'"sha256":'))
    elif harm == "header":
        data[20] ^= 1
        weights.write_bytes(data)
    elif harm == "gone":
        weights.unlink()
    else:
        (staging / "files/model-00001-of-00002.safetensors").write_bytes(b"stale")
        (staging / "files/extra").mkdir()
    assert build(tiny, half)[1] == undisturbed[1]


def flip_source(base: Path, keep_times: bool) -> None:
    """Change the lowest bit of one weight that every half-built variant has already."""
    first = json.loads((base.parent / "out/4bit/journal.jsonl").read_text().splitlines()[3])["target"]
    info = next(p.target.source for p in job(base, base).plans if p.target.name == first)
    before = info.file.stat()
    with open(info.file, "r+b") as f:
        f.seek(info.start)
        byte = f.read(1)[0]
        f.seek(info.start)
        f.write(bytes([byte ^ 1]))
    if keep_times:
        os.utime(info.file, ns=(before.st_atime_ns, before.st_mtime_ns))
    else:
        os.utime(info.file, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000_000))


@pytest.fixture
def copy(tiny, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny, base)

    def stop(p):
        if p.bytes_done > p.bytes_total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(ladder(base, tmp_path / "out"), stop, BAND)
    return base


def test_a_changed_source_byte_starts_over(copy, tmp_path, undisturbed):
    flip_source(copy, keep_times=False)
    done, files = build(copy, tmp_path / "out")
    assert all(d.resumed == 0 for d in done)
    assert files == build(copy, tmp_path / "fresh")[1]
    assert done[1].source_hash != undisturbed[0][1].source_hash


def test_a_changed_source_is_seen_wherever_it_is_read_again(copy, tmp_path):
    """Even with the file's time unchanged, if any variant needs that tensor."""
    flip_source(copy, keep_times=True)
    shutil.rmtree(tmp_path / "out/2bit")
    done, files = build(copy, tmp_path / "out")
    assert all(d.resumed == 0 for d in done)
    assert files == build(copy, tmp_path / "fresh")[1]


def test_a_touched_source_is_hashed_again_and_kept(copy, tmp_path, undisturbed):
    for file in copy.glob("*.safetensors"):
        os.utime(file)
    done, files = build(copy, tmp_path / "out")
    assert all(d.resumed for d in done)
    assert files == undisturbed[1]
    assert done[0].bytes_read == sum(t.nbytes for t in read_checkpoint(copy).tensors.values())


def test_other_inputs_start_over(tiny, tmp_path):
    j = job(tiny, tmp_path / "v")
    convert([j])
    (same,) = convert([j])
    (other,) = convert([replace(j, inputs={"key": "another"})])
    assert same.resumed == len(j.plans)
    assert other.resumed == 0
