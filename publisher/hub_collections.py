"""The Hub collection that lists a ladder: made once, filled and put in order, and left alone where it is right already.

What other people's hands put into it stays, and stays where it is: the ladder's repos share the places that they have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from inference.errors import CheckFailed

from .hub_errors import Calls


@dataclass(frozen=True)
class Item:
    """A repo of the ladder and what the collection says of it."""

    repo: str
    note: str


def arrange(
    call: Calls, api: Any, owner: str, title: str, description: str, ladder: Sequence[Item], add: set[str]
) -> str:
    """List `add` in the owner's collection of that title, with the notes and the order of `ladder`; returns its slug.

    Repos of the ladder that are neither in the collection nor in `add` are left out: they may not exist yet. Raises what
    the hub's errors become, and CheckFailed if the order is not the ladder's afterwards.
    """
    doing = f"the collection {title!r}"
    found = call(doing, api.create_collection, title, namespace=owner, description=description or None, exists_ok=True)
    if (found.description or "") != description:
        call(doing, api.update_collection_metadata, found.slug, description=description)
    missing = [i for i in ladder if i.repo in add and i.repo not in _ours(found, ladder)]
    for item in missing:
        call(doing, api.add_collection_item, found.slug, item.repo, "model", note=item.note or None, exists_ok=True)
    if missing:
        found = call(doing, api.get_collection, found.slug)
    for item in ladder:
        there = _ours(found, ladder).get(item.repo)
        if there is not None and (there.note or "") != item.note:
            call(doing, api.update_collection_item, found.slug, there.item_object_id, note=item.note)
    if _sort(call, api, doing, found, ladder):
        found = call(doing, api.get_collection, found.slug)
        if _current(found, ladder) != _wanted(found, ladder):
            raise CheckFailed(f"{doing}: the hub did not take the order of the ladder; run push again")
    return str(found.slug)


def _ours(collection: Any, ladder: Sequence[Item]) -> dict[str, Any]:
    names = {i.repo for i in ladder}
    return {i.item_id: i for i in collection.items if i.item_type == "model" and i.item_id in names}


def _current(collection: Any, ladder: Sequence[Item]) -> list[str]:
    return list(_ours(collection, ladder))


def _wanted(collection: Any, ladder: Sequence[Item]) -> list[str]:
    there = _ours(collection, ladder)
    return [i.repo for i in ladder if i.repo in there]


def _sort(call: Calls, api: Any, doing: str, collection: Any, ladder: Sequence[Item]) -> bool:
    """Move what stands in another's place, front to back; each move shifts what follows it. Says whether anything moved.

    Positions are the hub's own figures for the places, whatever it counts from.
    """
    ours = _ours(collection, ladder)
    wanted = iter(_wanted(collection, ladder))
    line = list(collection.items)
    positions = [i.position for i in line]
    target = [ours[next(wanted)] if i.item_type == "model" and i.item_id in ours else i for i in line]
    moved = False
    for place, item in enumerate(target):
        if line[place] is not item:
            call(doing, api.update_collection_item, collection.slug, item.item_object_id, position=positions[place])
            line.remove(item)
            line.insert(place, item)
            moved = True
    return moved
