"""What the pages show of the store: plain values for the templates, nothing of HTML in them."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import yaml

from publisher.localhub import collections, frontmatter
from publisher.localhub.pages_card import MARKDOWN_BYTES
from publisher.localhub.pages_links import HUB_HOSTS, image_type, repo_path, view_path
from publisher.localhub.store import KINDS, Commit, File, Repo, Tree
from publisher.localhub.web import Call

LISTED = 500  # rows of one table; what is left out is counted
ASIDE = 40  # rows beside a card
FIRST = ("license", "base_model", "pipeline_tag", "library_name", "language", "tags", "quantized_by")
NOT_ROWS = ("license_name", "license_link", "base_model_relation")  # told with the row that they belong to
LINKED = {"base_model": "models", "datasets": "datasets", "new_version": "models"}


@dataclass(frozen=True)
class Item:
    """A value, where it leads, and whether that is on this hub."""

    text: str
    href: str | None = None
    here: bool = True


@dataclass(frozen=True)
class Row:
    label: str
    items: list[Item]
    block: str | None = None  # a value with structure, as YAML


@dataclass(frozen=True)
class FileRow:
    path: str
    size: str
    lfs: bool
    href: str
    download: str


@dataclass(frozen=True)
class RepoRow:
    id: str
    href: str
    kind: str
    private: bool
    title: str
    labels: list[str]
    size: str
    date: str
    note: str = ""


def size(nbytes: int) -> str:
    """Decimal, three digits: 5.22 MB, as the Hub shows sizes."""
    value, unit = float(nbytes), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{nbytes} bytes" if unit == "bytes" else f"{value:.{max(0, 2 - len(str(int(value))) + 1)}f} {unit}"


def date(text: str) -> str:
    """2026-11-24 18:02 UTC, from the store's form."""
    return f"{text[:10]} {text[11:16]} UTC"


# -- repositories ---------------------------------------------------------------------------------------------


def repos(call: Call, namespace: str | None = None) -> list[RepoRow]:
    """All that the caller may read, by namespace and name."""
    found = [repo for kind in KINDS for repo in call.hub.store.repos(kind) if call.may_read(repo)]
    return [repo_row(call, repo) for repo in found if namespace in (None, repo.namespace)]


def repo_row(call: Call, repo: Repo, note: str = "") -> RepoRow:
    commit = call.commit(repo, "main")
    data = card_data(call, commit)
    labels = [str(data[key]) for key in ("pipeline_tag", "library_name", "license") if data.get(key)]
    total = sum(file.size for file in commit.tree.values())
    return RepoRow(
        repo.id, repo_path(repo.kind, repo.id), repo.kind, repo.private, commit.title, labels, size(total),
        date(commit.date), note,
    )  # fmt: skip


def frame(call: Call, repo: Repo, rev: str, commit: Commit) -> dict[str, Any]:
    """What every page of a repository has: names, tabs, where it stands."""
    pulls = [d for d in repo.discussions if d["status"] in ("open", "draft")]
    return {
        "repo": repo,
        "path": repo_path(repo.kind, repo.id),
        "rev": rev,
        "commit": commit,
        "is_main": rev in ("main", "refs/heads/main"),
        "open_count": len(pulls),
        "tree_path": view_path(repo.kind, repo.id, "tree", rev),
        "commits_path": view_path(repo.kind, repo.id, "commits", rev),
        "on_the_hub": f"https://{HUB_HOSTS[0]}{repo_path(repo.kind, repo.id)}",
    }


def refs(repo: Repo) -> dict[str, list[Item]]:
    """Branches, tags and pull requests, each leading to its files."""

    def tree(rev: str) -> str:
        return view_path(repo.kind, repo.id, "tree", rev)

    return {
        "branches": [Item(name, tree(name)) for name in repo.heads],
        "tags": [Item(name, tree(name)) for name in repo.tags],
        "pulls": [
            Item(f"#{d['num']} {d['title']} ({d['status']})", f"{repo_path(repo.kind, repo.id)}/discussions/{d['num']}")
            for d in reversed(repo.discussions)
        ],
    }


# -- files ----------------------------------------------------------------------------------------------------


def files(repo: Repo, rev: str, tree: Tree, under: str = "") -> list[FileRow]:
    prefix = f"{under}/" if under else ""
    return [
        FileRow(
            path, size(file.size), file.sha256 is not None, view_path(repo.kind, repo.id, "blob", rev, path),
            view_path(repo.kind, repo.id, "resolve", rev, path),
        )
        for path, file in sorted(tree.items())
        if path.startswith(prefix)
    ]  # fmt: skip


def total(files: Iterable[File]) -> str:
    return size(sum(file.size for file in files))


def changes(old: Tree, new: Tree) -> list[tuple[str, str, str]]:
    """(added, changed or removed; path; size or sizes) of every file that differs."""
    found = []
    for path in sorted(path for path in old.keys() | new.keys() if old.get(path) != new.get(path)):
        before, after = old.get(path), new.get(path)
        if before and after:
            sizes = size(after.size) if before.size == after.size else f"{size(before.size)} → {size(after.size)}"
            found.append(("changed", path, sizes))
        elif after:
            found.append(("added", path, size(after.size)))
        elif before:
            found.append(("removed", path, size(before.size)))
    return found


def text_of(call: Call, file: File | None, limit: int = MARKDOWN_BYTES) -> str | None:
    """A text file of git itself; None if it is absent, in LFS, no text or longer than `limit` bytes."""
    if file is None or file.sha256 or file.size > limit:
        return None
    try:
        return call.hub.store.path_of(file).read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return None


def what_is(path: str, file: File) -> str:
    if image_type(path):
        return "image"
    return "LFS" if file.sha256 else posixpath.splitext(path)[1][1:] or "text"


# -- the card's metadata --------------------------------------------------------------------------------------


def card_data(call: Call, commit: Commit) -> dict[str, Any]:
    return frontmatter.read(text_of(call, commit.tree.get("README.md")) or "")[0]


def held(call: Call, kind: str, repo_id: str) -> Collection[str] | None:
    """Paths of a repository's main; None if this hub has none of that name for this reader."""
    try:
        repo = call.hub.store.repo(kind, repo_id)
        return call.commit(repo, "main").tree.keys() if repo and call.may_read(repo) else None
    except OSError:  # deleted meanwhile
        return None


def metadata(call: Call, repo: Repo, rev: str, data: dict[str, Any], tree: Tree) -> list[Row]:
    """The front matter as rows, those first that the Hub shows at the top of its page."""
    keys = [key for key in FIRST if key in data] + [key for key in data if key not in (*FIRST, *NOT_ROWS)]
    return [_row(call, repo, rev, key, data, tree) for key in keys]


def labels(data: dict[str, Any]) -> list[str]:
    """What the Hub shows below a repository's name, each once."""
    found: list[str] = []
    for key in ("pipeline_tag", "library_name", "license", "language", "tags"):
        values = data.get(key) or []
        found += [str(value) for value in (values if isinstance(values, list) else [values])]
    return list(dict.fromkeys(found))


def _row(call: Call, repo: Repo, rev: str, key: str, data: dict[str, Any], tree: Tree) -> Row:
    value = data[key]
    values = value if isinstance(value, list) else [value]
    if any(isinstance(item, (dict, list)) for item in values):
        return Row(key, [], yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=60))
    if key == "license":
        return Row(key, [_license(repo, rev, data, tree)])
    label = f"{key} ({data['base_model_relation']})" if key == "base_model" and "base_model_relation" in data else key
    if key in LINKED:
        return Row(label, [elsewhere(call, LINKED[key], str(item)) for item in values])
    return Row(label, [Item(_plain(item)) for item in values])


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _license(repo: Repo, rev: str, data: dict[str, Any], tree: Tree) -> Item:
    text = f"{data['license']} ({data['license_name']})" if data.get("license_name") else str(data["license"])
    link = data.get("license_link") or next((n for n in ("LICENSE", "LICENSE.md", "LICENSE.txt") if n in tree), "")
    if link in tree:
        return Item(text, view_path(repo.kind, repo.id, "blob", rev, link))
    return Item(text, link, here=False) if str(link).startswith("https://") else Item(text)


def elsewhere(call: Call, kind: str, repo_id: str) -> Item:
    """A repository that metadata names: here if this hub holds it, else on the Hub."""
    if held(call, kind, repo_id) is not None:
        return Item(repo_id, repo_path(kind, repo_id))
    if not frontmatter.REPO_ID.fullmatch(repo_id):
        return Item(repo_id)
    return Item(repo_id, f"https://{HUB_HOSTS[0]}{repo_path(kind, repo_id)}", here=False)


def model_tree(call: Call, repo: Repo, data: dict[str, Any]) -> dict[str, Any] | None:
    """The bases a model names, and what else here names them."""
    bases = _bases(data)
    if repo.kind != "models" or not bases:
        return None
    others = [
        Item(other.id, repo_path("models", other.id))
        for other in call.hub.store.repos("models")
        if other.id != repo.id
        and call.may_read(other)
        and set(bases) & set(_bases(card_data(call, call.commit(other, "main"))))
    ]
    relation = data.get("base_model_relation") or "not stated"
    return {"bases": [elsewhere(call, "models", base) for base in bases], "relation": relation, "others": others}


def _bases(data: dict[str, Any]) -> list[str]:
    bases = data.get("base_model") or []
    return [bases] if isinstance(bases, str) else list(bases)


# -- collections ----------------------------------------------------------------------------------------------


def collections_of(call: Call, repo: Repo) -> list[Item]:
    return [
        Item(c["title"], f"/collections/{c['slug']}")
        for c in collections.readable(call)
        if any(item["id"] == repo.id and f"{item['type']}s" == repo.kind for item in c["items"])
    ]


def collection_rows(call: Call, collection: dict[str, Any]) -> list[RepoRow]:
    """Its items in order. Those of private repositories are absent to those who may not read them."""
    rows = []
    for item in collection["items"]:
        kind, note = f"{item['type']}s", item.get("note", {}).get("text", "")
        if kind not in KINDS:
            rows.append(RepoRow(item["id"], "", item["type"], False, "", [item["type"]], "", "", note))
            continue
        repo = call.hub.store.repo(kind, item["id"])
        if repo and call.may_read(repo):
            rows.append(repo_row(call, repo, note))
    return rows
