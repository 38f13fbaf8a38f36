"""What a push would do: the folder, the receipts of earlier pushes and the repo, compared by hash. Changes nothing.

A file on the hub that is neither ours nor as the last push left it was edited by somebody: `foreign`, never overwritten
silently. A file on the hub that no push from here knows is kept, whatever it is, but weights among them (`strays`) stop
a push: loaders read every `model*.safetensors`.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from inference.errors import GateRefused, InputError

from .hub import Head, Hub, RemoteFile
from .schema import Manifest, Receipt
from .store import read_model
from .variants import Project
from .verify import file_key, is_plain, sha256_of

MANIFEST_BYTES = 50 << 20
CARD_BYTES = 2 << 20
DIFF_LINES = 200


@dataclass(frozen=True)
class LocalFile:
    """A file to publish, as it was hashed. key: size, times and inode then."""

    path: str
    source: Path
    size: int
    sha256: str
    key: tuple[int, ...]


@dataclass(frozen=True)
class ForeignEdit:
    """A file on the hub that differs from ours and from what the last push left. diff: unified, for the card."""

    path: str
    what: str
    diff: str = ""


@dataclass(frozen=True)
class Target:
    """Where a push goes, and how. private: of a repo that has to be created; overwrite: foreign edits too."""

    id: str
    repo: str
    endpoint: str
    private: bool
    create_pr: bool
    pull_request: int | None
    overwrite: bool

    @property
    def revision(self) -> str:
        return "main" if self.pull_request is None else f"refs/pr/{self.pull_request}"


@dataclass(frozen=True)
class PushPlan:
    """What a push would do. head: the commit it was planned on, None if there is no repo yet.

    add, update, unchanged: our files; delete: of an earlier push, ours no more; kept: on the hub, not from here;
    foreign: ours, but edited on the hub; strays: weights on the hub that are not from here.
    """

    target: Target
    weights_hash: str
    exists: bool
    private: bool
    head: str | None
    add: tuple[LocalFile, ...]
    update: tuple[LocalFile, ...]
    unchanged: tuple[LocalFile, ...]
    delete: tuple[str, ...]
    kept: tuple[str, ...]
    foreign: tuple[ForeignEdit, ...]
    strays: tuple[str, ...]
    reasons: tuple[str, ...]

    @property
    def id(self) -> str:
        return self.target.id

    @property
    def repo(self) -> str:
        return self.target.repo

    @property
    def files(self) -> tuple[LocalFile, ...]:
        return tuple(sorted((*self.add, *self.update, *self.unchanged), key=lambda f: f.path))

    @property
    def bytes_to_send(self) -> int:
        """At most; what the hub has stored already for any repo is not sent again."""
        return sum(f.size for f in (*self.add, *self.update))

    @property
    def up_to_date(self) -> bool:
        return self.exists and not (self.add or self.update or self.delete)

    @property
    def refusal(self) -> str | None:
        """Why `push` would not carry it out, as one line; None if it would."""
        if self.strays:
            return (
                f"{self.repo}: {self.strays[0]} on the hub is no file of {self.id}, and loaders would read it; "
                "delete it on the hub"
            )
        if self.foreign and not (self.target.overwrite or self.target.create_pr):
            first = self.foreign[0]
            more = f" (and {len(self.foreign) - 1} more)" if len(self.foreign) > 1 else ""
            return (
                f"{self.repo}: {first.path}{more} {first.what}; take it over into variants.yaml or the templates and "
                "push with --overwrite, or propose with --create-pr"
            )
        return None

    @property
    def title(self) -> str:
        """The commit's message."""
        weights = [f for f in (*self.add, *self.update) if f.path.endswith(".safetensors")]
        if weights or self.delete:
            return f"{self.id}: weights {self.weights_hash[:12]}"
        if all(f.path == "README.md" or f.path.startswith("images/") for f in (*self.add, *self.update)):
            return f"{self.id}: update card"
        return f"{self.id}: update {', '.join(f.path for f in (*self.add, *self.update)[:4])}"


def local_files(project: Project, id: str, rehash: bool = True) -> tuple[Manifest, list[LocalFile]]:
    """The manifest and every file that belongs into the repo, hashed.

    rehash False: files in the manifest count as what it says if their size is right. Raises GateRefused if a file is
    missing or not what the manifest says, or if there is no manifest.
    """
    folder = project.store.variant(id)
    manifest = read_model(project.store.manifest(id), Manifest)
    if manifest is None:
        raise GateRefused(f"{id}: not built; run `publish build {id}`")
    known = {f.path: f for f in manifest.files}
    extra = [p.relative_to(folder).as_posix() for p in sorted(folder.glob("images/*")) if p.is_file()]
    files = []
    for path in sorted({*known, "manifest.json", "README.md", *extra}):
        source = folder / path
        if not is_plain(path) or source.is_symlink():
            raise GateRefused(f"{id}: {path} leads out of the folder; run `publish build {id}`")
        try:
            key = file_key(source)
            entry = known.get(path)
            sha = entry.sha256 if entry and not rehash else sha256_of(source)
        except OSError:
            step = "card" if path == "README.md" else "build"
            raise GateRefused(f"{id}: {path} is missing; run `publish {step} {id}`") from None
        if entry and (key[0], sha) != (entry.size, entry.sha256):
            raise GateRefused(f"{id}: {path} is not what manifest.json says; run `publish build {id}`")
        files.append(LocalFile(path, source, key[0], sha, key))
    return manifest, files


def plan_push(
    hub: Hub,
    project: Project,
    id: str,
    *,
    private: bool = False,
    create_pr: bool = False,
    overwrite: bool = False,
    rehash: bool = True,
) -> PushPlan:
    """Compare the folder with the repo. Reads only. private: of a repo that is created. overwrite: foreign edits too.

    Raises GateRefused (see local_files), InputError, AuthError, HubUnavailable.
    """
    hub.require_online("push")
    repo = repo_id(project, id)
    manifest, files = local_files(project, id, rehash)
    receipt, pull = read_model(project.store.receipt(id), Receipt), read_model(pull_receipt(project, id), Receipt)
    receipt, pull = (r if r and (r.repo, r.endpoint) == (repo, hub.endpoint) else None for r in (receipt, pull))
    number = pull.pull_request if create_pr and pull else None
    if number is not None and hub.pull_status(repo, number) not in ("open", "draft"):
        number = None
    revision = "main" if number is None else f"refs/pr/{number}"
    head = hub.head(repo, revision)
    known = Known(_pushed(hub, repo, head, receipt, pull), _listed(hub, repo, head, receipt, files))
    target = Target(id, repo, hub.endpoint, private, create_pr, number, overwrite)
    plan = decide(target, manifest.weights_hash, files, head, known)
    if head and any(f.path == "README.md" for f in plan.foreign):
        diff = _card_diff(hub, repo, head, receipt, project.store.variant(id) / "README.md")
        edits = tuple(replace(f, diff=diff) if f.path == "README.md" else f for f in plan.foreign)
        plan = replace(plan, foreign=edits)
    return plan


def repo_id(project: Project, id: str) -> str:
    """Raises InputError while no owner is set."""
    repo = project.repo(id)
    if "/" not in repo:
        raise InputError(f"{project.path.name}: owner is not set; a push needs the Hub user or organization")
    return repo


def pull_receipt(project: Project, id: str) -> Path:
    """Of the last push to a pull request: a file of its own, for it says nothing about main."""
    return project.store.receipt(id).parent / "pulls" / f"{id}.json"


def _pushed(hub: Hub, repo: str, head: Head | None, *receipts: Receipt | None) -> dict[str, set[str]]:
    """What earlier pushes from here left, by path: the identities of its content (main's and a pull request's)."""
    found: dict[str, set[str]] = {}
    for receipt in receipts:
        if receipt is None or head is None:
            continue
        paths = {f.path for f in receipt.files}
        at = head.files if receipt.commit == head.commit else hub.tree(repo, receipt.commit)
        for path, remote in (at or {}).items():
            if path in paths:
                found.setdefault(path, set()).add(remote.identity)
        for f in receipt.files:  # should the commit be gone (squashed), LFS files are still known by their sha256
            found.setdefault(f.path, set()).add(f.sha256)
    return found


def _listed(
    hub: Hub, repo: str, head: Head | None, receipt: Receipt | None, files: Sequence[LocalFile]
) -> dict[str, str]:
    """sha256 by path of what the manifest on the hub lists: without a receipt, how stale shards of ours are known."""
    if head is None or receipt is not None or "manifest.json" not in head.files:
        return {}
    if not {p for p in head.files if p.endswith(".safetensors")} - {f.path for f in files}:
        return {}
    try:
        there = Manifest.model_validate_json(hub.read_range(repo, head.commit, "manifest.json", 0, MANIFEST_BYTES))
    except ValueError:
        return {}
    return {f.path: f.sha256 for f in there.files}


@dataclass(frozen=True)
class Known:
    """What on the hub is from here. pushed: identities by path, from receipts; listed: sha256 by path, from the
    manifest on the hub, where there is no receipt."""

    pushed: Mapping[str, set[str]]
    listed: Mapping[str, str]


def decide(target: Target, weights_hash: str, files: Sequence[LocalFile], head: Head | None, known: Known) -> PushPlan:
    """The plan from both sides' files. Small files that are not in LFS are read for git's hash, nothing else is."""
    there = head.files if head else {}
    ours = {f.path: f for f in files}
    add = tuple(f for f in files if f.path not in there)
    unchanged = tuple(f for f in files if f.path in there and same(f, there[f.path]))
    update = tuple(f for f in files if f.path in there and f not in unchanged)
    stale, kept, strays = [], [], []
    foreign = []
    for f in update:
        if there[f.path].identity not in known.pushed.get(f.path, ()):
            what = (
                "was edited on the hub since the last push" if f.path in known.pushed else "on the hub is not from here"
            )
            foreign.append(ForeignEdit(f.path, what))
    for path, remote in sorted(there.items()):
        if path in ours:
            continue
        if remote.identity in known.pushed.get(path, ()) or remote.sha256 == known.listed.get(path, ""):
            stale.append(path)
        elif path.endswith(".safetensors"):
            strays.append(path)
        elif path != ".gitattributes":  # the hub's own
            kept.append(path)
    return PushPlan(
        target=target,
        weights_hash=weights_hash,
        exists=head is not None,
        private=head.private if head else target.private,
        head=head.commit if head else None,
        add=add,
        update=update,
        unchanged=unchanged,
        delete=tuple(stale),
        kept=tuple(kept),
        foreign=tuple(foreign),
        strays=tuple(strays),
        reasons=tuple(_reasons(head, add, update, stale)),
    )


def _reasons(
    head: Head | None, add: Sequence[LocalFile], update: Sequence[LocalFile], stale: Sequence[str]
) -> Iterable[str]:
    if head is None:
        yield "the repo does not exist yet"
    else:
        yield from (f"{f.path}: not on the hub" for f in add)
    yield from (f"{f.path}: differs on the hub" for f in update)
    yield from (f"{path}: stale on the hub" for path in stale)


def same(local: LocalFile, remote: RemoteFile) -> bool:
    if local.size != remote.size:
        return False
    if remote.sha256 is not None:
        return local.sha256 == remote.sha256
    data = local.source.read_bytes()  # a file outside of LFS: at most 10 MB
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest() == remote.blob


def _card_diff(hub: Hub, repo: str, head: Head, receipt: Receipt | None, card: Path) -> str:
    """What was edited: from the card as last pushed (else ours) to the one on the hub."""
    before, label = None, "README.md as pushed"
    if receipt:
        with suppress(InputError):  # that commit is gone
            before = hub.read_range(repo, receipt.commit, "README.md", 0, CARD_BYTES)
    if before is None:
        before, label = card.read_bytes(), "README.md here"
    there = hub.read_range(repo, head.commit, "README.md", 0, CARD_BYTES)
    old, new = (text.decode(errors="replace").splitlines() for text in (before, there))
    lines = list(difflib.unified_diff(old, new, label, "README.md on the hub", lineterm=""))
    if len(lines) > DIFF_LINES:
        lines = [*lines[:DIFF_LINES], f"… {len(lines) - DIFF_LINES} lines more"]
    return "\n".join(lines)
