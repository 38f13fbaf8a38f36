"""A card that somebody edited on the hub: what was edited, and whether it can be taken over without losing anything.

Three cards are compared: as last pushed, as it is on the hub, as it is here. An edit of the notes alone (`card_notes`) is
taken over; one of anything else is a foreign edit, as is one of notes that were changed here, too.
"""

from __future__ import annotations

import difflib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from inference.errors import InputError

from .card_notes import CARD_BYTES, Notes, merge, split, with_notes
from .hub import Hub

DIFF_LINES = 200
LINE_CHARS = 2000
BOTH = "has notes that were changed here and on the hub since the last push"


@dataclass(frozen=True)
class CardEdit:
    """foreign: it must not be overwritten. what: why, if there is more to say than that it was edited. diff: for people.

    take: notes that ours are to become; same: with these our card is the one on the hub.
    """

    foreign: bool
    what: str
    diff: str
    take: str | None = None
    same: bool = False


def card_edit(hub: Hub, repo: str, commit: str, pushed: str | None, card: Path) -> CardEdit:
    """commit: of the card on the hub; pushed: that the last push from here left, None if there was none."""
    here, there, before = card.read_bytes(), hub.read_range(repo, commit, "README.md", 0, CARD_BYTES), None
    if pushed:
        with suppress(InputError):  # that commit is gone
            before = hub.read_range(repo, pushed, "README.md", 0, CARD_BYTES)
    if before is None:
        return CardEdit(True, "", _diff(here, there, "README.md here", "README.md on the hub"))
    diff = _diff(before, there, "README.md as pushed", "README.md on the hub")
    try:
        ours, old, theirs = here.decode(), before.decode(), there.decode()
    except UnicodeDecodeError:
        return CardEdit(True, "", diff)
    found = merge(ours, old, theirs)
    if found.both:
        notes = [b.notes.encode() if (b := split(text)) else b"" for text in (old, ours)]
        return CardEdit(True, BOTH, f"{diff}\n{_diff(notes[0], notes[1], 'notes as pushed', 'notes here')}")
    if found.foreign or found.take is None:
        return CardEdit(found.foreign, "", diff)
    return CardEdit(False, "", diff, found.take, with_notes(ours, Notes(found.take)) == theirs)


def text_edit(hub: Hub, repo: str, commit: str, pushed: str | None, here: Path, path: str) -> str:
    """What was edited of another file; empty where it is no text. commit, pushed: as of `card_edit`."""
    try:
        ours = here.read_bytes()
    except FileNotFoundError:  # pruned
        return ""
    there, before = hub.read_range(repo, commit, path, 0, CARD_BYTES), None
    if pushed:
        with suppress(InputError):  # that commit is gone, or did not have it
            before = hub.read_range(repo, pushed, path, 0, CARD_BYTES)
    first = ours if before is None else before
    if any(b"\0" in text for text in (first, there)):
        return ""
    return _diff(first, there, f"{path} here" if before is None else f"{path} as pushed", f"{path} on the hub")


def edit_between(hub: Hub, repo: str, old: str, new: str, path: str) -> str:
    """What changed of a file between two commits; empty where it is no text."""
    texts = []
    for commit in (old, new):
        text = b""
        with suppress(InputError):  # that commit is gone, or does not have it
            text = hub.read_range(repo, commit, path, 0, CARD_BYTES)
        texts.append(text)
    if any(b"\0" in text for text in texts):
        return ""
    return _diff(texts[0], texts[1], f"{path} in {old[:8]}", f"{path} in {new[:8]}")


def _diff(before: bytes, after: bytes, old: str, new: str) -> str:
    first, second = (text.decode(errors="replace").splitlines() for text in (before, after))
    lines = [
        line if len(line) <= LINE_CHARS else f"{line[:LINE_CHARS]}…"
        for line in difflib.unified_diff(first, second, old, new, lineterm="")
    ]
    if len(lines) > DIFF_LINES:
        lines = [*lines[:DIFF_LINES], f"… {len(lines) - DIFF_LINES} lines more"]
    return "\n".join(lines)
