"""What the smoke test and the benchmark do, as values: versions, settings and their hashes. No MLX.

A result names the hash of the settings it was measured under; another hash makes it stale.
"""

from __future__ import annotations

from importlib.resources import files

from .schema import BenchSpec
from .store import digest
from .variants import Project

# Bump with a reason when the same model would get another result.
SMOKE_VERSION = 1
BENCH_VERSION = 1

# The chat of the benchmark: one user message a turn, cycled. Long enough that turn 4 decodes over a real context.
CHAT = (
    "Explain in a few sentences what a package manager does.",
    "How does it decide which version of a library to install?",
    "What happens if two packages need different versions?",
    "Write a short example of a configuration file for such a case.",
)
CHAT_TURN = "Describe what the program prints and why."  # the smoke test's one turn through the template


def smoke_text(project: Project) -> str:
    """The fixed text over which a variant's logits are compared with BF16's."""
    path = project.ladder.smoke.text
    if path:
        return project.local(path).read_text(encoding="utf-8")
    return files("publisher").joinpath("smoke_text.txt").read_text(encoding="utf-8")


def smoke_settings(project: Project) -> str:
    return digest({**project.ladder.smoke.model_dump(mode="json"), "text": smoke_text(project), "turn": CHAT_TURN})


def bench_settings(project: Project) -> str:
    return digest({**project.ladder.bench.model_dump(mode="json"), "chat": CHAT, "text": smoke_text(project)})


def ceiling(project: Project, id: str) -> float:
    """Largest mean divergence that the smoke test lets pass for a variant: the recipe's, by base bits."""
    table = dict(project.recipe(id).smoke_kld)
    bits = project.variant(id).bits
    return table[bits] if bits in table else table[min(table, key=lambda b: (abs(b - bits), b))]


def protocol_line(spec: BenchSpec) -> str:
    """The benchmark in one sentence, for cards."""
    return (
        f"Multi-turn chat, {spec.turns} turns of {spec.turn_tokens} generated tokens; decode and time to first token at "
        f"turn {spec.turns}; prefill at {', '.join(map(str, spec.prefill))} tokens; "
        + (f"median of {spec.runs} runs after a warm-up" if spec.runs > 1 else "one run after a warm-up")
    )
