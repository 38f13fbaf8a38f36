"""What the smoke test and the benchmark do, as values: versions, settings and their hashes. No MLX.

A result names the hash of the settings it was measured under; another hash makes it stale.
"""

from __future__ import annotations

from importlib.resources import files

from .schema import BenchSpec
from .source import Source, read_source
from .store import digest
from .variants import Project

# Bump with a reason when the same model would get another result.
SMOKE_VERSION = 2  # on CUDA some rows of experts had been others' (`inference.linear`)
BENCH_VERSION = 2  # peaks of memory had counted the model that was measured before
QUALITY_VERSION = 2  # as for smoke

# The chat of the benchmark: one user message a turn, cycled. Long enough that turn 4 decodes over a real context.
CHAT = (
    "Explain in a few sentences what a package manager does.",
    "How does it decide which version of a library to install?",
    "What happens if two packages need different versions?",
    "Write a short example of a configuration file for such a case.",
)
# files of publisher/data
EVALUATION_TEXT, EVALUATION_CHAT, CALIBRATION_TEXT = "evaluation.txt", "evaluation_chat.json", "calibration.txt"
CALIBRATION_CHAT = "calibration_chat.json"
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


def ceiling(project: Project, id: str, nominal: int) -> float:
    """Largest mean divergence that the smoke test lets pass for a variant: the recipe's, by base bits.

    nominal: the N of a variant that is made by size and names none.
    """
    table = dict(project.recipe(id).smoke_kld)
    bits = project.variant(id).bits or nominal
    return table[bits] if bits in table else table[min(table, key=lambda b: (abs(b - bits), b))]


def kld_ceiling(project: Project, id: str, nominal: int) -> float | None:
    """Largest mean divergence over the evaluation text with which a variant may be released; None: any. nominal: as above."""
    return dict(project.recipe(id).kld_ceiling).get(project.variant(id).bits or nominal)


def evaluation_sources(project: Project) -> tuple[Source, Source]:
    """Evaluation text and conversations, the user's or the package's."""
    spec = project.ladder.evaluation
    return (
        read_source(project.local(spec.text) if spec.text else None, "evaluation.text", EVALUATION_TEXT),
        read_source(project.local(spec.chat) if spec.chat else None, "evaluation.chat", EVALUATION_CHAT),
    )


def calibration_sources(project: Project) -> list[Source]:
    """What statistics are collected over: a text, and conversations unless they are left out."""
    spec = project.ladder.calibration
    found = [read_source(project.local(spec.text) if spec.text else None, "calibration.text", CALIBRATION_TEXT)]
    if spec.chat is not False:
        path = project.local(spec.chat) if isinstance(spec.chat, str) else None
        found.append(read_source(path, "calibration.chat", CALIBRATION_CHAT))
    return found


def calibration_hash(project: Project) -> str:
    return digest([source.sha256 for source in calibration_sources(project)])


def quality_settings(project: Project) -> str:
    text, chat = evaluation_sources(project)
    spec = project.ladder.evaluation.model_dump(mode="json", exclude={"text", "chat"})
    return digest({**spec, "text": text.sha256, "chat": chat.sha256, "prompts": project.ladder.smoke.prompts})


def protocol_line(spec: BenchSpec) -> str:
    """The benchmark in one sentence, for cards."""
    return (
        f"Multi-turn chat, {spec.turns} turns of {spec.turn_tokens} generated tokens; decode and time to first token at "
        f"turn {spec.turns}; prefill at {', '.join(map(str, spec.prefill))} tokens; "
        + (f"median of {spec.runs} runs after a warm-up" if spec.runs > 1 else "one run after a warm-up")
    )
