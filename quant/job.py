"""One variant to build: what goes in, where it stands, and which of its results equal another variant's."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from inference.checkpoint import QuantSpec
from inference.errors import InputError
from inference.layout import Target

from .awq import Fold
from .folder import canonical, quantized_config
from .moments import MomentSource
from .recipe import TensorPlan
from .shards import SHARD_BYTES, Layout, Record, ShardWriter, plan_layout
from .solve import SOLVERS
from .version import QUANT_VERSION


@dataclass(frozen=True)
class Job:
    """One variant to build.

    plans: one a target (`quant.recipe.resolve`). staging: folder of this variant's work, named by the caller after a
    hash of all inputs, on the filesystem of the final place. base: folder of the original checkpoint; config: its
    config.json. folds: by target name (`quant.awq.folds`). statistics: E[x²] by module, for solvers that use them.
    inputs: anything else that the identity of the output depends on; a different value starts over.
    """

    variant: str
    plans: Sequence[TensorPlan]
    staging: Path
    base: Path
    config: Mapping[str, Any]
    folds: Mapping[str, Fold] = field(default_factory=dict)
    mtp: Literal["keep", "drop", "split"] = "keep"
    solver: str = "rtn"
    moments: MomentSource | None = None
    max_shard_bytes: int = SHARD_BYTES
    inputs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Key:
    """What distinguishes two variants' results for one target."""

    dtype: str
    fold: str  # digest, "" for none
    spec: QuantSpec | None
    solver: str = ""
    moments: str = ""


class Lane:
    """A job with its writer and the thread that feeds it."""

    def __init__(self, job: Job) -> None:
        if job.solver not in SOLVERS:
            raise InputError(f"solver {job.solver!r} is unknown; known: {', '.join(SOLVERS)}")
        self.job = job
        self.plans = sorted((p for p in job.plans if job.mtp != "drop" or p.target.part != "mtp"), key=disk_order)
        aside = [i for i, p in enumerate(self.plans) if job.mtp == "split" and p.target.part == "mtp"]
        self.mtp_tensors = sum(len(self.plans[i].stored()) for i in aside)
        self.layout: Layout = plan_layout([p.stored() for p in self.plans], job.max_shard_bytes, aside)
        self.config = quantized_config(job.config, self.plans, self.mtp_tensors)
        self.position = {p.target.name: i for i, p in enumerate(self.plans)}
        self._digests = {name: fold.digest() for name, fold in job.folds.items()}
        self._reset()

    def _reset(self) -> None:
        names = [p.target.name for p in self.plans]
        self.writer = ShardWriter(self.job.staging, self.layout, names, {"identity": self._identity()})
        self.resumed = 0

    def _identity(self) -> str:
        """sha256 of all that the bytes depend on but the source."""
        job = self.job
        return hashlib.sha256(
            canonical(
                {
                    "quant_version": QUANT_VERSION,
                    "inputs": job.inputs,
                    "layout": [[s.name, hashlib.sha256(s.header).hexdigest()] for s in self.layout.shards],
                    "specs": [
                        [p.target.name, p.spec and [p.spec.bits, p.spec.group_size, p.spec.mode]] for p in self.plans
                    ],
                    "folds": self._digests,
                    "solver": job.solver,
                    "statistics": [[p.target.module, self._moments_of(p)] for p in self.plans if p.spec],
                }
            )
        ).hexdigest()

    def _moments_of(self, plan: TensorPlan) -> str:
        """Digest of what the solver is told of a tensor's input; "" for nothing."""
        solver = SOLVERS[self.job.solver]
        if self.job.moments is None or not solver.uses_second or plan.spec is None or plan.spec.mode != "affine":
            return ""
        return self.job.moments.digest(plan.target.module, solver.uses_hessian)

    def key(self, plan: TensorPlan) -> Key:
        name, spec = plan.target.name, plan.spec
        if spec is None:
            return Key(plan.target.dtype, self._digests.get(name, ""), None)
        return Key(plan.target.dtype, self._digests.get(name, ""), spec, self.job.solver, self._moments_of(plan))

    def discard(self) -> None:
        self.writer.close()
        shutil.rmtree(self.job.staging)
        self._reset()

    def write(self, target: Target, parts: Sequence[Sequence[memoryview]]) -> None:
        """Append the next bytes of a weight: of its codes, then of its scales and biases if they are complete."""
        shard = self.layout.groups[self.position[target.name]][0].shard
        for pieces in parts:
            for piece in pieces:
                self.writer.append(shard, piece)

    def commit(self, target: Target, source: str, digests: Future[tuple[str, ...]]) -> None:
        self.writer.commit(Record(target.name, source, digests.result()))


def disk_order(plan: TensorPlan) -> tuple[str, int, str]:
    t = plan.target
    return t.source.file.name, t.source.start, t.op  # first_half before second_half
