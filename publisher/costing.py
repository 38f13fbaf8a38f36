"""The allocator's prices: measured once for statistics and solver, kept beside them as costs.json."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from quant.version import ALLOCATED_SOLVER, SENSITIVITY_VERSION

from .base import ResolvedBase
from .report import Report
from .schema import CostProbe, Costs
from .store import read_result, write_model

if TYPE_CHECKING:
    from quant.statistics import Statistics

    from .variants import Project

COSTS = "costs.json"


def solver_of(project: Project) -> str:
    """The solver that variants made by size use; the first one's word if they differ."""
    return next((project.solver(id) for id in project.ladder.variants if project.size(id)), ALLOCATED_SOLVER)


def current(statistics: Statistics, solver: str) -> Costs | None:
    """Prices on record that hold for these statistics, this solver and today's way of measuring."""
    found = read_result(statistics.folder / COSTS, Costs)
    wanted = (statistics.digest, solver, SENSITIVITY_VERSION)
    return found if found and (found.statistics, found.solver, found.version) == wanted else None


def measure_costs(
    project: Project,
    base: ResolvedBase,
    statistics: Statistics,
    windows: Sequence[Sequence[int]],
    report: Report,
    force: bool = False,
) -> Costs:
    """Find them, or measure them with the base's weights."""
    solver = solver_of(project)
    known = None if force else current(statistics, solver)
    if known:
        return known
    from quant.moments import FromStatistics  # noqa: PLC0415 - MLX only where there is something to measure
    from quant.sensitivity import measure  # noqa: PLC0415

    from .plan import quant_table  # noqa: PLC0415 - it asks this module for prices

    started = time.perf_counter()
    table = quant_table(base.checkpoint.config)
    with report.bar("costs") as tick:
        found = measure(
            base.folder,
            base.targets,
            table.CLASSES,
            FromStatistics(statistics),
            windows,
            solver,
            lambda what, done, total: tick(done + (total if what == "probes" else 0), 2 * total),
        )
    costs = Costs(
        statistics=statistics.digest,
        solver=solver,
        version=SENSITIVITY_VERSION,
        modules=found.modules,
        probes=[
            CostProbe(label=p.label, bits=p.bits, group_size=p.group_size, predicted=p.predicted, measured=p.measured)  # type: ignore[arg-type]
            for p in found.probes
        ],
        probe_tokens=found.probe_tokens,
        wall_s=round(time.perf_counter() - started, 3),
    )
    write_model(statistics.folder / COSTS, costs)
    report.line(f"costs of {len(costs.modules)} tensors measured in {costs.wall_s:.0f} s")
    return costs
