"""Whether the base has moved on since the lock, for `status --remote`: by the hub's hashes, without a weight downloaded.

A new commit of the base is no reason to build again by itself: the lock holds. But a corrected chat template, or other
weights, are what a publisher wants to know of.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from inference.errors import InputError
from inference.strict import parse_json

from .fetch import BASE_FILES
from .hub import Head, Hub, RemoteFile
from .variants import Project

TEMPLATES = ("chat_template.jinja", "chat_template.json")
TOKENIZER = "tokenizer_config.json"  # older ones hold the template
MAX_BYTES = 16 << 20


@dataclass(frozen=True)
class BaseDrift:
    """state: folder (on no hub), not locked, gone, unreadable, current or moved. changed: files that a build reads or copies;
    weights, template: whether these are among them (None: not compared)."""

    name: str
    state: str
    revision: str | None = None
    locked: str | None = None
    head: str | None = None
    changed: tuple[str, ...] = ()
    weights: bool | None = None
    template: bool | None = None
    detail: str = ""

    @property
    def text(self) -> str:
        """One line for people."""
        if self.state != "moved":
            return f"base {self.name}: {self.detail}"
        what = [word for word, yes in (("the weights", self.weights), ("the chat template", self.template)) if yes]
        rest = [p for p in self.changed if not (self.weights and p.endswith(".safetensors"))]
        shown = f" ({', '.join(rest[:4])}{' …' if rest[4:] else ''})" if rest else ""
        said = f"{' and '.join(what) or 'neither weights nor chat template'} changed{shown}" if self.changed else ""
        return f"base {self.name}: {self.detail}; {said or 'no file that a build reads changed'}"


def base_drift(hub: Hub, project: Project) -> BaseDrift:
    """Reads two file lists of the base's repo, and a tokenizer_config.json of each side where these differ."""
    base, name = project.ladder.base, project.base_name
    if base.path is not None or base.repo is None:
        of = f", taken for a download of {base.repo}" if base.repo else ""
        return BaseDrift(name, "folder", detail=f"a local folder{of}: nothing to compare with on a hub")
    lock = project.lock().base
    if lock is None or (lock.repo, lock.revision) != (base.repo, base.revision):
        return BaseDrift(name, "not locked", base.revision, detail="not locked yet; run publish plan")
    try:
        head = hub.head(base.repo, base.revision)
        old = hub.tree(base.repo, lock.commit) if head and head.commit != lock.commit else None
    except InputError as e:
        reason = str(e).partition("; set `repo:")[0]
        return BaseDrift(name, "unreadable", base.revision, lock.commit, detail=f"cannot be compared: {reason}")
    at = (base.revision, lock.commit)
    if head is None:
        return BaseDrift(name, "gone", *at, detail=f"not on {hub.endpoint}, or not for this token")
    if head.commit == lock.commit:
        return BaseDrift(name, "current", *at, head.commit, detail=f"{base.revision} is {head.commit[:12]}, as locked")
    moved = f"{base.revision} moved from {lock.commit[:12]} to {head.commit[:12]} since the lock"
    if old is None:
        return BaseDrift(name, "gone", *at, head.commit, detail=f"{moved}, and the locked commit is no longer there")
    return _compare(hub, BaseDrift(name, "moved", *at, head.commit, detail=moved), base.repo, old, head)


def _compare(hub: Hub, found: BaseDrift, repo: str, old: dict[str, RemoteFile], head: Head) -> BaseDrift:
    changed = [path for path in sorted({*old, *head.files}) if _identity(old, path) != _identity(head.files, path)]
    changed = [path for path in changed if any(fnmatchcase(path, pattern) for pattern in BASE_FILES)]
    template = any(path in changed for path in TEMPLATES)
    if TOKENIZER in changed and not template:
        before = _template(hub, repo, str(found.locked), old.get(TOKENIZER))
        template = before != _template(hub, repo, head.commit, head.files.get(TOKENIZER))
    weights = any(path.endswith(".safetensors") for path in changed)
    return BaseDrift(
        found.name, "moved", found.revision, found.locked, head.commit, tuple(changed), weights, template, found.detail
    )


def _identity(files: dict[str, RemoteFile], path: str) -> str | None:
    return files[path].identity if path in files else None


def _template(hub: Hub, repo: str, commit: str, file: RemoteFile | None) -> Any:
    """What tokenizer_config.json says for a template; of one that does not read, its bytes."""
    if file is None:
        return None
    data = hub.read_range(repo, commit, TOKENIZER, 0, MAX_BYTES)
    try:
        value = parse_json(data)
    except ValueError:
        return data
    return value.get("chat_template") if isinstance(value, dict) else data
