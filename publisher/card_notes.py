"""The block of a card that is the publisher's own: kept byte for byte whenever the card is rendered again.

    <!-- notes:begin -->
    whatever a person wrote here, in the folder or on the hub
    <!-- notes:end -->

The template puts the two lines where the block belongs; what stands between them comes from the README.md that is
there. It is put in after rendering, as data: no template ever sees it. The gate looks at it as at the rest of the card.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from inference.errors import InputError

CARD_BYTES = 2 << 20  # of a card; no template makes a larger one, and the gate lets none pass
NOTES_BYTES = 64 << 10
MARK = re.compile(r"^[ \t]*<!--[ \t]*notes:(begin|end)[ \t]*-->[ \t]*(?:\r?\n|\Z)", re.M)


class CardFault(InputError):
    """A card that cannot be rendered again without losing what is in its file; its siblings' can."""


@dataclass(frozen=True)
class Notes:
    """text: what stands between the two lines, the last line's end included. fault: why it cannot be kept."""

    text: str = ""
    fault: str = ""


@dataclass(frozen=True)
class Block:
    """A card in three: up to and with the first mark, the notes, from the last mark on."""

    before: str
    notes: str
    after: str

    @property
    def first_line(self) -> int:
        """Number of the first line of the notes."""
        return self.before.count("\n") + 1

    @property
    def lines(self) -> range:
        return range(self.first_line, self.first_line + len(self.notes.splitlines()))


@dataclass(frozen=True)
class Merge:
    """Three cards compared: ours, the one last pushed, the one on the hub.

    foreign: more than the notes was changed there, or the notes on both sides (`both`). take: notes that were changed
    there only, so that ours are to become these; None: there is nothing to take over.
    """

    foreign: bool
    take: str | None = None
    both: bool = False


def read_card(path: Path) -> str | None:
    """A card as it is, line ends included; None if there is none. Raises CardFault if it is not UTF-8, or too large."""
    try:
        with open(path, "rb") as f:
            data = f.read(CARD_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as e:
        raise CardFault(f"{_name(path)}: cannot be read ({e.strerror or e}); delete it to render it again") from None
    if len(data) > CARD_BYTES:
        raise CardFault(f"{_name(path)}: larger than {CARD_BYTES} bytes; delete it to render it again")
    try:
        return data.decode()
    except UnicodeDecodeError as e:
        raise CardFault(
            f"{_name(path)}: cannot be read (not UTF-8 at byte {e.start}); delete it to render it again"
        ) from None


def read_notes(path: Path) -> Notes | None:
    """The notes of a card on disk; None where it has no such block, or is no text (then it is for others to tell)."""
    try:
        card = read_card(path)
    except InputError:
        return None
    try:
        block = split(card or "")
    except InputError as e:
        return Notes(fault=f"{_name(path)}: {e}")
    return Notes(block.notes) if block else None


def split(card: str) -> Block | None:
    """The card around its notes; None if it has no such block. Raises InputError if the marks do not make one."""
    marks = list(MARK.finditer(card))
    if not marks:
        return None
    for i, mark in enumerate(marks):
        if mark[1] != ("begin", "end")[i % 2] or i > 1:
            line = card.count("\n", 0, mark.start()) + 1
            raise InputError(f"line {line}: notes:{mark[1]} where it cannot be; keep one notes:begin and one notes:end")
    if len(marks) < 2:
        line = card.count("\n", 0, marks[0].start()) + 1
        raise InputError(
            f"line {line}: notes:begin without a notes:end; add the line <!-- notes:end --> after the notes"
        )
    notes = card[marks[0].end() : marks[1].start()]
    if len(notes.encode()) > NOTES_BYTES:
        raise InputError(f"notes:begin … notes:end hold {len(notes.encode())} bytes; at most {NOTES_BYTES} are kept")
    return Block(card[: marks[0].end()], notes, card[marks[1].start() :])


def with_notes(card: str, notes: Notes | None) -> str:
    """A rendered card with these notes in place of the template's own. Raises InputError rather than lose any."""
    if notes is None:
        return card
    if notes.fault:
        raise InputError(notes.fault)
    block = split(card)
    if block is None:
        if notes.text.strip():
            raise InputError(
                "README.md holds notes, but the template has no place for them: keep its block `notes`, or the lines "
                "<!-- notes:begin --> and <!-- notes:end -->"
            )
        return card
    return block.before + notes.text + block.after


def merge(here: str, pushed: str, there: str) -> Merge:
    """What was changed on the hub since the last push, and whether it can be taken over."""
    try:
        ours, old, theirs = split(here), split(pushed), split(there)
    except InputError:
        return Merge(foreign=True)
    if ours is None or old is None or theirs is None:
        return Merge(foreign=there != pushed)
    outside = (old.before, old.after) != (theirs.before, theirs.after)
    if theirs.notes in (old.notes, ours.notes):
        return Merge(outside)
    if ours.notes != old.notes:
        return Merge(foreign=True, both=True)
    return Merge(outside, take=theirs.notes)


def _name(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"
