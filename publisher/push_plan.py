"""What a push would do: the folder, the receipts of earlier pushes and the repo, compared by hash. Changes nothing.

A file on the hub that is neither ours nor as the last push left it was edited by somebody: `foreign`, never overwritten
silently. So is one of the last push that somebody deleted there: never put back silently. A file on the hub that no push
from here knows is kept, whatever it is, but weights among them (`strays`) stop a push: loaders read every `model*.safetensors`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

from inference.errors import GateRefused, InputError

from .hub import Copy, Head, Hub, RemoteFile
from .prune import WEIGHTS, pruned
from .push_cards import BOTH, CardEdit, card_edit, edit_between, text_edit
from .push_copies import find_copies
from .schema import Manifest, Receipt
from .signing import MAX_BYTES, Signed, covers, is_ignored, read_signature
from .store import MANIFEST_BYTES, read_model
from .variants import Project
from .verify import SIGNATURE, beside_manifest, file_key, is_plain, sha256_of

CARD = "README.md"
TEXT_BYTES = 1 << 20  # of a file whose difference is shown
LOOKED_AT = 20  # commits that are listed to find where a file was deleted


@dataclass(frozen=True)
class LocalFile:
    """A file to publish, as it was hashed. key: size, times and inode then; None: it was pruned, and is not here. data: of
    one that is written only when the plan is carried out."""

    path: str
    source: Path
    size: int
    sha256: str
    key: tuple[int, ...] | None
    data: bytes | None = None


@dataclass(frozen=True)
class ForeignEdit:
    """A file on the hub that differs from ours and from what the last push left. diff: unified, for text; deleted: it is
    there no more."""

    path: str
    what: str
    diff: str = ""
    deleted: bool = False


@dataclass(frozen=True)
class Target:
    """Where a push goes, and how. private: of a repo that has to be created; overwrite: foreign edits too; staged: a repo
    that has to be created is private at first, and a release makes it public at its end."""

    id: str
    repo: str
    endpoint: str
    private: bool
    create_pr: bool
    pull_request: int | None
    overwrite: bool
    staged: bool = False

    @property
    def revision(self) -> str:
        return "main" if self.pull_request is None else f"refs/pr/{self.pull_request}"


@dataclass(frozen=True)
class PushPlan:
    """What a push would do. head: the commit it was planned on, None if there is no repo yet.

    add, update, unchanged: our files; delete: of an earlier push, ours no more; kept: on the hub, not from here;
    foreign: ours, but edited or deleted on the hub; strays: weights on the hub that are not from here; copies: of what is
    to be added or updated, the bytes that the hub has, in this repo or in another one.
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
    copies: tuple[Copy, ...] = ()
    notes: str | None = None  # of the card, changed on the hub alone: ours are to become these
    told: tuple[str, ...] = ()  # by the hub before the push, see `preflight`
    keeps: tuple[str, ...] = ()  # of an earlier push, not here, to stay on the hub: the signature, where it stays true
    breaks: str = ""  # why it may not leave, as one line: it would make the signature on the hub a false one

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
    def signature(self) -> bytes | None:
        """One that was made for this push, to be written when it is carried out."""
        return next((f.data for f in (*self.add, *self.update) if f.path == SIGNATURE), None)

    @property
    def weights_here(self) -> tuple[LocalFile, ...]:
        """What --prune deletes in the folder once the hub is proven to hold it."""
        return tuple(f for f in self.files if f.path.endswith(WEIGHTS) and f.key is not None)

    @property
    def bytes_to_send(self) -> int:
        """At most; what the hub has stored already for any repo is not sent again."""
        copied = {c.path for c in self.copies}
        return sum(f.size for f in (*self.add, *self.update) if f.path not in copied)

    @property
    def up_to_date(self) -> bool:
        return self.exists and not (self.add or self.update or self.delete)

    @property
    def refusal(self) -> str | None:
        """Why `push` would not carry it out, as one line; None if it would."""
        gone = next((f for f in (*self.add, *self.update) if f.key is None), None)
        if gone:
            lost = next((f.what for f in self.foreign if f.deleted and f.path == gone.path), "")
            where, then = (lost, ", then push with --overwrite") if lost else ("not on the hub", "")
            return f"{self.repo}: {gone.path} is pruned here, and {where}; run `publish build {self.id}`{then}"
        if self.strays:
            return (
                f"{self.repo}: {self.strays[0]} on the hub is no file of {self.id}, and loaders would read it; "
                "delete it on the hub"
            )
        if self.foreign and not (self.target.overwrite or self.target.create_pr):
            first = self.foreign[0]
            more = f" (and {len(self.foreign) - 1} more)" if len(self.foreign) > 1 else ""
            step = "take it over into variants.yaml or the templates and push with --overwrite"
            if first.deleted:
                step = "push with --overwrite to put it back"
            if first.what == BOTH:
                step = f"take over what is to stay into the notes in build/{self.id}/{CARD} and push with --overwrite"
            return f"{self.repo}: {first.path}{more} {first.what}; {step}, or propose with --create-pr"
        return None

    @property
    def no_pull(self) -> str | None:
        """Why no pull request can be opened, as one line; None if one can, or none is asked for."""
        if self.exists or not self.target.create_pr:
            return None
        return f"{self.id}: {self.repo} does not exist, so nothing can be proposed to it; run `publish push {self.id}`"

    @property
    def title(self) -> str:
        """The commit's message."""
        paths = [*(f.path for f in (*self.add, *self.update)), *self.delete]
        if any(path.endswith(".safetensors") for path in paths):
            return f"{self.id}: weights {self.weights_hash[:12]}"
        if all(path != "manifest.json" and beside_manifest(path) for path in paths):
            return f"{self.id}: update card"
        return f"{self.id}: update {', '.join(paths[:4])}"


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
    found = pruned(project, manifest)
    gone = found.files if found else {}
    extra = [
        path for p in folder.rglob("*") if p.is_file() and beside_manifest(path := p.relative_to(folder).as_posix())
    ]
    files = []
    for path in sorted({*known, "manifest.json", "README.md", *extra}):
        source = folder / path
        if not is_plain(path) or source.resolve() != folder.resolve() / path:  # a link, or in a folder that is one
            raise GateRefused(f"{id}: {path} leads out of the folder; run `publish build {id}`")
        if path in gone:
            files.append(LocalFile(path, source, known[path].size, known[path].sha256, None))
            continue
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
    staged: bool = False,
    rehash: bool = True,
    signature: bytes | None = None,
) -> PushPlan:
    """Compare the folder with the repo. Reads only. private: of a repo that is created. overwrite: foreign edits too.
    staged: a new repo is made private at first. signature: a new one, in place of the folder's.

    Raises GateRefused (see local_files), InputError, AuthError, HubUnavailable.
    """
    hub.require_online("push")
    repo = repo_id(project, id)
    manifest, files = local_files(project, id, rehash)
    if signature is not None:
        files = _with_signature(files, project.store.variant(id) / SIGNATURE, signature)
    receipt, pull = read_model(project.store.receipt(id), Receipt), read_model(pull_receipt(project, id), Receipt)
    receipt, pull = (r if r and (r.repo, r.endpoint) == (repo, hub.endpoint) else None for r in (receipt, pull))
    number = pull.pull_request if create_pr and pull else None
    if number is not None and hub.pull_status(repo, number) not in ("open", "draft"):
        number = None
    revision = "main" if number is None else f"refs/pr/{number}"
    head = hub.head(repo, revision)
    last = receipt if number is None else pull
    known = Known(
        _pushed(hub, repo, head, receipt, pull),
        _listed(hub, repo, head, receipt, files),
        _deleted(hub, repo, head, last, files),
    )
    target = Target(id, repo, hub.endpoint, private, create_pr, number, overwrite, staged)
    plan = _spare_signature(hub, decide(target, manifest.weights_hash, files, head, known), head)
    plan = replace(plan, copies=tuple(find_copies(hub, project, plan, head)))
    if head is None:
        return plan
    if plan.foreign:
        plan = _with_edits(hub, project, plan, head, last)
    known_edits = {f.path for f in plan.foreign}
    return replace(
        plan, foreign=(*plan.foreign, *(f for f in _replaced(hub, plan, head, last) if f.path not in known_edits))
    )


def _with_edits(hub: Hub, project: Project, plan: PushPlan, head: Head, last: Receipt | None) -> PushPlan:
    """The plan with the difference of each foreign edit."""
    id, repo, files = plan.id, plan.repo, plan.files
    if any(f.path == CARD and not f.deleted for f in plan.foreign):
        plan = with_edit(
            plan, card_edit(hub, repo, head.commit, last and last.commit, project.store.variant(id) / CARD)
        )
    ours = {f.path: f for f in files}
    return replace(
        plan,
        foreign=tuple(
            f if f.deleted or f.path in (CARD, SIGNATURE) or max(ours[f.path].size, head.files[f.path].size) > TEXT_BYTES
            else replace(f, diff=text_edit(hub, repo, head.commit, last and last.commit, ours[f.path].source, f.path))
            for f in plan.foreign
        ),
    )  # fmt: skip


def _replaced(hub: Hub, plan: PushPlan, head: Head, last: Receipt | None) -> Iterable[ForeignEdit]:
    """Edits that our last push replaced before it could know of them (`push_between`), for as long as neither side has
    taken them back."""
    ours = {f.path: f for f in plan.files}
    for file in last.replaced if last else ():
        path, tree = file.path, hub.tree(plan.repo, file.commit)
        theirs, there, here = (tree or {}).get(path), head.files.get(path), ours.get(path)
        if tree is not None and (theirs and theirs.identity) == (there and there.identity):
            continue
        if tree is not None and (same(here, theirs) if here and theirs else here is theirs):
            continue
        diff = edit_between(hub, plan.repo, file.before, file.commit, path)
        what = f"was changed on the hub in commit {file.commit[:8]}, which the last push replaced without knowing it"
        yield ForeignEdit(path, what, diff)


def _with_signature(files: Sequence[LocalFile], path: Path, data: bytes) -> list[LocalFile]:
    key = (len(data),)  # no file's: it counts by its hash
    new = LocalFile(SIGNATURE, path, len(data), hashlib.sha256(data).hexdigest(), key, data)
    return sorted((*(f for f in files if f.path != SIGNATURE), new), key=lambda f: f.path)


def _spare_signature(hub: Hub, plan: PushPlan, head: Head | None) -> PushPlan:
    """The plan, where the repo is signed and the folder is not: the signature stays if it stays as true as it is. If not,
    it goes with --overwrite, and else the push may not leave."""
    if head is None or SIGNATURE not in head.files or any(f.path == SIGNATURE for f in plan.files):
        return plan
    fault = _breaks(hub, plan, head)
    if fault and not plan.target.overwrite:
        breaks = (
            f"{plan.id}: {plan.repo} is signed, and this push would make the signature invalid ({fault}); give --sign-key, "
            f"or delete {SIGNATURE} on the hub (--overwrite does so)"
        )
        return replace(plan, breaks=breaks)
    rest = tuple(path for path in plan.delete if path != SIGNATURE)
    reason = f"{SIGNATURE}: stale on the hub"
    reasons = tuple(r for r in plan.reasons if r != reason)
    if fault:
        kept = tuple(path for path in plan.kept if path != SIGNATURE)
        return replace(plan, delete=(*rest, SIGNATURE), kept=kept, reasons=(*reasons, reason))
    keeps = (SIGNATURE,) if SIGNATURE in plan.delete else ()
    return replace(plan, delete=rest, keeps=keeps, reasons=reasons)


def _breaks(hub: Hub, plan: PushPlan, head: Head) -> str:
    """What of this push the signature on the hub would not be of; "" if it stays as true as it is."""
    changed = sorted({f.path for f in (*plan.add, *plan.update)} | set(plan.delete) - {SIGNATURE})
    if not changed:
        return ""
    signed: Signed | None = None
    if head.files[SIGNATURE].size <= MAX_BYTES:
        with suppress(InputError):  # of another tool, or of another kind: it counts as one of all that must be signed
            signed = read_signature(hub.read_range(plan.repo, head.commit, SIGNATURE, 0, MAX_BYTES))
    first = next((p for p in changed if not is_ignored(p) or (signed and p in signed.files)), None)
    if first is None:
        return ""
    if signed is None:
        return f"{first} changes"
    ours = {f.path: f.sha256 for f in plan.files}
    stay = (head.files.keys() & signed.files.keys()) - ours.keys() - set(plan.delete)
    return covers(signed, {**ours, **{path: signed.files[path] for path in stay}})


def with_edit(plan: PushPlan, edit: CardEdit) -> PushPlan:
    """The plan, knowing what was edited of the card. Notes are left as they are where all of it is to be overwritten."""
    others = tuple(f for f in plan.foreign if f.path != CARD)
    if edit.foreign or (plan.target.overwrite and edit.take is not None):
        (mine,) = (f for f in plan.foreign if f.path == CARD)
        edited = replace(mine, diff=edit.diff, what=edit.what or mine.what)
        return replace(plan, foreign=tuple(edited if f.path == CARD else f for f in plan.foreign))
    plan = replace(plan, foreign=others, notes=edit.take)
    if edit.take is None:
        return plan
    reasons = (r for r in plan.reasons if not r.startswith(f"{CARD}:"))
    plan = replace(plan, reasons=(*reasons, f"{CARD}: its notes were changed on the hub; push takes them over"))
    if edit.same:  # nothing to send of it, once the notes are here
        same = tuple(f for f in plan.update if f.path == CARD)
        update = tuple(f for f in plan.update if f.path != CARD)
        plan = replace(plan, update=update, unchanged=(*plan.unchanged, *same))
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


def _deleted(
    hub: Hub, repo: str, head: Head | None, last: Receipt | None, files: Sequence[LocalFile]
) -> dict[str, str]:
    """Our files that the last push left on the hub and somebody deleted there, by path: the commit that did, "" if it is
    far back. None where that push is not in the history of the head: the repo was made anew, or its history squashed."""
    if head is None or last is None or head.commit == last.commit:
        return {}
    lost = {f.path for f in files if f.path not in head.files} & {f.path for f in last.files}
    history = [c.id for c in hub.history(repo, head.commit, last.commit)] if lost else []
    if last.commit not in history:
        return {}
    found = dict.fromkeys(sorted(lost), "")
    since = history[: history.index(last.commit) + 1]
    for later, commit in pairwise(since[: LOOKED_AT + 1]):
        for path in lost & (hub.tree(repo, commit) or {}).keys():
            found[path] = later
            lost.remove(path)
        if not lost:
            break
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
    manifest on the hub, where there is no receipt; deleted: commit by path, of ours that are no more there."""

    pushed: Mapping[str, set[str]]
    listed: Mapping[str, str]
    deleted: Mapping[str, str] = field(default_factory=dict)


def decide(target: Target, weights_hash: str, files: Sequence[LocalFile], head: Head | None, known: Known) -> PushPlan:
    """The plan from both sides' files. Small files that are not in LFS are read for git's hash, nothing else is."""
    there = head.files if head else {}
    ours = {f.path: f for f in files}
    add = tuple(f for f in files if f.path not in there)
    unchanged = tuple(f for f in files if f.path in there and same(f, there[f.path]))
    update = tuple(f for f in files if f.path in there and f not in unchanged)
    stale, kept, strays = [], [], []
    foreign = [ForeignEdit(path, _deletion(commit), deleted=True) for path, commit in known.deleted.items()]
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


def _deletion(commit: str) -> str:
    return f"was deleted on the hub{f' in commit {commit[:8]}' if commit else ''} since the last push"


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
    """Whether both have the same bytes, by sha256, or by git's hash of a file outside of LFS, which is read for it."""
    if local.size != remote.size:
        return False
    if remote.sha256 is not None:
        return local.sha256 == remote.sha256
    if local.key is None:
        return False
    data = local.source.read_bytes() if local.data is None else local.data  # a file outside of LFS: at most 10 MB
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest() == remote.blob
