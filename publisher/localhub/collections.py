"""Collections: named lists of repositories. A slug is `OWNER/TITLE-ID`; only the id counts, the title may change."""

from __future__ import annotations

import json
import re
import secrets
from pathlib import Path
from typing import Any

from starlette.responses import JSONResponse, Response

from publisher.localhub.store import Store, dump, now
from publisher.localhub.web import Call, HubError, field

TITLE_CHARS = 60  # the Hub's limits
DESCRIPTION_CHARS = 150
NOTE_CHARS = 500
PAGE = 100
TYPES = {"model": "models", "dataset": "datasets", "space": "spaces", "paper": None, "collection": None}


async def create(call: Call) -> Response:
    """POST /api/collections. A title the owner has already used is a 409 with the slug of that collection."""
    body = await call.json()
    namespace = field(body, "namespace", str)
    call.need_write(namespace)
    title = _short(body, "title", TITLE_CHARS)
    for other in _all(call.hub.store):
        if other["owner"] == namespace and _words(other["title"]) == _words(title):
            raise HubError(409, f"You already have a collection {title!r}", slug=_slug(other))
    collection = {
        "id": secrets.token_hex(12),
        "title": title,
        "description": _short(body, "description", DESCRIPTION_CHARS, default=""),
        "owner": namespace,
        "items": [],
        "position": sum(other["owner"] == namespace for other in _all(call.hub.store)),
        "private": field(body, "private", bool, default=False),
        "theme": "blue",
    }
    return _saved(call, collection)


async def listed(call: Call) -> Response:
    """GET /api/collections?owner=&item=models/NS/NAME&limit=. Without `position`: the client counts itself."""
    query = call.request.query_params
    owners, item = query.getlist("owner"), query.get("item")
    found = [
        _shown(collection)
        for collection in _all(call.hub.store)
        if _may_read(call, collection)
        and (not owners or collection["owner"] in owners)
        and (item is None or item in [f"{i['type']}s/{i['id']}" for i in collection["items"]])
    ]
    found.sort(key=lambda collection: collection["lastUpdated"], reverse=True)
    found, headers = call.page(found, PAGE)
    return JSONResponse(
        [{k: v for k, v in collection.items() if k != "position"} for collection in found], headers=headers
    )


def readable(call: Call) -> list[dict[str, Any]]:
    """Every collection that the caller may read, as the API shows it."""
    return [_shown(collection) for collection in _all(call.hub.store) if _may_read(call, collection)]


async def get(call: Call) -> Response:
    return JSONResponse(_shown(_find(call)))


async def update(call: Call) -> Response:
    body = await call.json()
    collection = _find(call, write=True)
    for key, limit in (("title", TITLE_CHARS), ("description", DESCRIPTION_CHARS), ("theme", 20)):
        if key in body:
            collection[key] = _short(body, key, limit)
    if "private" in body:
        collection["private"] = field(body, "private", bool)
    if "position" in body:
        collection["position"] = field(body, "position", int)
    _save(call.hub.store, collection)
    return JSONResponse({"data": _shown(collection)})


async def delete(call: Call) -> Response:
    collection = _find(call, write=True)
    _path(call.hub.store, collection["id"]).unlink()
    return JSONResponse({})


async def add_item(call: Call) -> Response:
    body = await call.json()
    collection = _find(call, write=True)
    wanted = field(body, "item", dict)
    item_id, kind = field(wanted, "id", str), field(wanted, "type", str)
    if kind not in TYPES:
        raise HubError(400, f"item type must be one of {', '.join(TYPES)}")
    if TYPES[kind]:
        call.repo(kind=TYPES[kind], repo_id=item_id)
    if any(item["id"] == item_id and item["type"] == kind for item in collection["items"]):
        raise HubError(409, f"{item_id} is already in the collection")
    item = {"_id": secrets.token_hex(12), "id": item_id, "type": kind}
    item |= _note(body)
    collection["items"].append(item)
    return _saved(call, collection)


async def update_item(call: Call) -> Response:
    body = await call.json()
    collection = _find(call, write=True)
    item = _item(collection, call.args["item"])
    item |= _note(body)
    if body.get("position") is not None:
        items = collection["items"]
        items.remove(item)
        items.insert(max(0, field(body, "position", int)), item)
    return _saved(call, collection)


async def delete_item(call: Call) -> Response:
    collection = _find(call, write=True)
    collection["items"].remove(_item(collection, call.args["item"]))
    return _saved(call, collection)


def _find(call: Call, write: bool = False) -> dict[str, Any]:
    """By the id at the end of the slug; absent, if private, to those who may not read it."""
    match = re.fullmatch(r".*-([0-9a-f]{24})", call.args["slug"])
    path = _path(call.hub.store, match[1]) if match else None
    collection = json.loads(path.read_bytes()) if path and path.exists() else None
    if collection is None or collection["owner"] != call.args["ns"] or not _may_read(call, collection):
        raise HubError(404, "Collection not found")
    if write:
        call.need_write(collection["owner"])
    return collection


def _may_read(call: Call, collection: dict[str, Any]) -> bool:
    return not collection["private"] or (call.user is not None and call.user.belongs_to(collection["owner"]))


def _item(collection: dict[str, Any], item_id: str) -> dict[str, Any]:
    for item in collection["items"]:
        if item["_id"] == item_id:
            return item
    raise HubError(404, "Collection item not found")


def _note(body: dict[str, Any]) -> dict[str, Any]:
    return {"note": {"text": _short(body, "note", NOTE_CHARS)}} if body.get("note") is not None else {}


def _short(body: dict[str, Any], key: str, limit: int, default: str | None = None) -> str:
    text = field(body, key, str, default=default)
    if len(text) > limit or (default is None and key == "title" and not _words(text)):
        raise HubError(400, f'"{key}" must have at most {limit} characters')
    return text


def _shown(collection: dict[str, Any]) -> dict[str, Any]:
    """As the API gives it: a slug instead of the id, positions instead of order."""
    value = {key: item for key, item in collection.items() if key != "id"}
    value["items"] = [item | {"position": n} for n, item in enumerate(collection["items"])]
    return value | {"slug": _slug(collection), "upvotes": 0}


def _slug(collection: dict[str, Any]) -> str:
    return f"{collection['owner']}/{_words(collection['title'])}-{collection['id']}"


def _words(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _saved(call: Call, collection: dict[str, Any]) -> Response:
    _save(call.hub.store, collection)
    return JSONResponse(_shown(collection))


def _save(store: Store, collection: dict[str, Any]) -> None:
    collection["lastUpdated"] = now()
    store.write(_path(store, collection["id"]), dump(collection))


def _all(store: Store) -> list[dict[str, Any]]:
    return [json.loads(path.read_bytes()) for path in sorted((store.folder / "collections").glob("*.json"))]


def _path(store: Store, collection_id: str) -> Path:
    return store.folder / "collections" / f"{collection_id}.json"
