"""Build a whole ladder of variants in one pass over the original checkpoint.

The source is read once, in disk order, in bands of rows. A band is turned into the model's type (1 + w, folds: float32,
rounded once), then every distinct format that any variant wants of it is solved once, and the result appended to each
of those variants' shards while the next band is being read. Where nothing changes, bytes are copied as they are.

Threads: one reads the source, one hashes it, `jobs` solve (one on a GPU), two hash stored tensors, one a variant writes
and hashes its files. The order within every file is that of the source, so the output does not depend on timing, on the
number of threads, on the size of a band, or on which variants are built together. `gptq` alone sees the size of a band:
a matrix product may round otherwise with other rows beside it, and so may choose another code. Its bands have the same
size in every build on one kind of device.

Memory, beyond the interpreter and whatever the model's size: jobs + 1 bands in solving and as many in writing, each
the source (8 MiB) and one packed copy a format (at most 5 MiB), and in each solver what it works with (3 × 16 MiB while
it folds; four times `gptq.CHOICE_BYTES` and its Hessian's factor by `gptq`); scales and biases of one weight, kept until
its codes are written (4 / group_size bytes an element a format: 64 MB for each distinct format of a 248320 × 4096
embedding in groups of 64). docs/benchmarks.md has measured peaks.

Peak disk: all variants of the run, beside what they replace.
"""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from inference.backend import BACKEND, mx
from inference.errors import InputError, ResourceError

from .folder import (
    INDEX,
    copy_side_files,
    finish,
    hash_files,
    index_json,
    side_files,
    sync,
    weights_hash,
    write_json,
)
from .job import Job, Lane
from .recipe import TensorPlan
from .shards import MTP_FILE, Stored
from .solve import SOLVERS
from .source import source_hash
from .stream import Progress, SourceChanged, default_jobs, run_pass

__all__ = ["Converted", "Job", "Progress", "convert", "finish", "unquantized"]

BAND_BYTES = 8 << 20  # of the source; two variants on two cores took 25 s so, and 31 s with 32 MiB
# where columns are worked on one after the other, a GPU wants all rows at once: 12,288 × 4,096 are 100 MB
COLUMN_BAND_BYTES = BAND_BYTES if BACKEND == "cpu" else 128 << 20
CACHE_BYTES = 256 << 20  # freed buffers that MLX may keep


@dataclass(frozen=True)
class Converted:
    """A finished variant in `folder` (staging/files), to be moved by `quant.folder.finish`.

    files: (name, bytes, sha256), sorted. tensors: (name, dtype, shape, BLAKE3) in file order. source_hash: over the
    sorted (target, BLAKE3 of its source bytes). bytes_read, bytes_written, resumed: of this run, in which `resumed`
    weights were kept from an earlier one; bytes_read is the whole ladder's.
    """

    variant: str
    folder: Path
    weights_hash: str
    source_hash: str
    files: list[tuple[str, int, str]]
    tensors: list[tuple[str, str, tuple[int, ...], str]]
    bytes_read: int
    bytes_written: int
    resumed: int
    wall_s: float


def convert(
    jobs: Sequence[Job],
    progress: Callable[[Progress], None] | None = None,
    band_bytes: int | None = None,
    at_once: int | None = None,
) -> list[Converted]:
    """Build all jobs in one pass; each ends as a complete folder at job.staging/files.

    at_once: bands to solve at once, for more speed or less memory; the bytes are the same. None: by the cores.

    A run that was killed is picked up where its journals and files agree, unless the source has changed since. Raises
    ResourceError if the disk is too small (before anything is written, if it can be known), CheckpointError for values
    in the source that are not finite, InputError for a base folder that cannot be copied.
    """
    started = time.perf_counter()
    at_once = default_jobs() if at_once is None else at_once
    lanes = [Lane(job) for job in jobs]
    if band_bytes is None:
        by_column = any(SOLVERS[job.solver].uses_hessian for job in jobs)
        band_bytes = COLUMN_BAND_BYTES if by_column else BAND_BYTES
    sides = {job.base: side_files(job.base) for job in jobs}
    cache = mx.set_cache_limit(CACHE_BYTES)
    try:
        _check_disk(lanes, sides)
        try:
            read = run_pass(lanes, progress, band_bytes, at_once)
        except SourceChanged:
            for lane in lanes:
                lane.discard()
            read = run_pass(lanes, progress, band_bytes, at_once)
        done = [_finish(lane, sides[lane.job.base], read, started) for lane in lanes]
        sync(d.folder / name for d in done for name, _, _ in d.files)
        return done
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(f"disk is full at {jobs[0].staging.parent}; free some space and run again") from None
        raise InputError(f"{e.filename or jobs[0].staging.parent}: {e.strerror}") from None
    finally:
        mx.set_cache_limit(cache)


def unquantized(plans: Sequence[TensorPlan], dtype: str = "F32") -> list[TensorPlan]:
    """The same tensors with nothing quantized, stored in `dtype`: what a fold alone does to a model."""
    return [
        replace(p, spec=None, target=replace(p.target, dtype=dtype if p.target.part == "text" else p.target.dtype))
        for p in plans
    ]


def _check_disk(lanes: Sequence[Lane], sides: Mapping[Path, Sequence[Path]]) -> None:
    need: dict[int, int] = {}
    free: dict[int, tuple[int, Path]] = {}
    for lane in lanes:
        existing = next(p for p in (lane.job.staging, *lane.job.staging.absolute().parents) if p.exists())
        device = existing.stat().st_dev
        have = sum(f.stat().st_size for f in lane.job.staging.rglob("*.safetensors"))
        extra = sum(f.stat().st_size for f in sides[lane.job.base])
        need[device] = need.get(device, 0) + max(0, lane.layout.nbytes - have) + extra
        free[device] = (shutil.disk_usage(existing).free, lane.job.staging)
    for device, nbytes in need.items():
        if nbytes > free[device][0]:
            raise ResourceError(
                f"disk: {nbytes / 1e9:.2f} GB needed at {free[device][1].parent}, {free[device][0] / 1e9:.2f} GB free"
            )


def _finish(lane: Lane, sides: Sequence[Path], bytes_read: int, started: float) -> Converted:
    folder, shards = lane.writer.folder, lane.layout.shards
    tensors: list[tuple[str, str, tuple[int, ...], str]] = []
    indexed: list[tuple[Stored, str]] = []
    for group, record in zip(lane.layout.groups, lane.writer.records, strict=True):
        for stored, found in zip(group, record.blake3, strict=True):
            tensors.append((stored.name, stored.dtype, stored.shape, found))
            if shards[stored.shard].name != MTP_FILE:
                indexed.append((stored, shards[stored.shard].name))
    params = sum(
        p.target.params
        for p, g in zip(lane.plans, lane.layout.groups, strict=True)
        if shards[g[0].shard].name != MTP_FILE
    )
    write_json(folder / "config.json", lane.config)
    write_json(folder / INDEX, index_json(indexed, params))
    copy_side_files(sides, folder)
    return Converted(
        lane.job.variant, folder, weights_hash(tensors, lane.config.get("quantization")),
        source_hash((r.target, r.source) for r in lane.writer.records),
        hash_files(folder, lane.writer.shard_hashes()), tensors,
        bytes_read, lane.writer.written, lane.resumed, time.perf_counter() - started,
    )  # fmt: skip
