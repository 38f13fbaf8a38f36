"""One push is one commit: compare folder, receipt and repo; send what is missing; commit; prove it; tag; list.

    plan_push   reads both sides and decides, changing nothing: that is the dry run (`push_plan`)
    execute     upload → re-hash → one commit on top of the head that was planned with → compare by hash → look what it
                landed on → receipt → tag
    (what spans several repos, collection and visibility, is `release`'s)

The folder's files are frozen while this runs: hashed before, looked at again before the commit. Whatever goes wrong
around the commit, the repo is read again, and what it holds decides: ours (the answer was lost), the old head (try
again), or something else (RemoteChanged). And where it went well, the history is read: a hub may have taken the commit on
top of another head (`push_between`). A card alone is a commit of its own and leaves tags where they are.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from inference.errors import (
    AuthError,
    CheckFailed,
    GateRefused,
    HubUnavailable,
    InputError,
    PublishError,
    RemoteChanged,
)

from .card_history import record
from .card_notes import Notes, read_card, with_notes
from .hub import Head, Hub, Progress, RemoteFile, Upload
from .push_between import Between, came_between, came_between_before, digest, mark
from .push_plan import LocalFile, PushPlan, local_files, plan_push, pull_receipt, repo_id, same
from .schema import Check, FileEntry, Manifest, Receipt, ReplacedFile
from .signing import write_signature
from .store import read_model, write_model, write_text
from .variants import Project
from .verify import file_key, sha256_of

__all__ = ["PushPlan", "RemoteState", "execute", "plan_push", "remote_state", "verify_remote"]

COMMIT_TRIES = 3
INLINE_BYTES = 10 << 20  # files up to this go up as the bytes that were hashed; the Hub takes no larger one outside LFS
CHANGES = 5  # files of somebody else's commit that an error names
NEXT = "run push again to see the difference, or propose yours with --create-pr"
TAG = re.compile(r"v([1-9]\d{0,5})")


@dataclass(frozen=True)
class RemoteState:
    """For `status --remote`. state: not built, not pushed, in sync or drifted."""

    id: str
    repo: str
    state: str
    commit: str | None
    private: bool | None
    differences: tuple[str, ...]


def execute(hub: Hub, project: Project, plan: PushPlan, progress: Progress | None = None) -> Receipt:
    """Carry out a plan; returns the receipt, which is also written. The gate comes before (`publisher.gate`).

    Raises RemoteChanged for foreign edits or a head that moved, AuthError, CheckFailed, HubUnavailable. Running it
    again with a fresh plan goes on where it stopped.
    """
    tell = progress or (lambda what, done, total: None)
    hub.require_write("push")
    if plan.breaks:
        raise GateRefused(plan.breaks)
    if plan.refusal:
        raise RemoteChanged("\n".join([plan.refusal, *(f.diff for f in plan.foreign if f.diff)]))
    if plan.signature is not None:
        write_signature(project.store.variant(plan.id), plan.signature)
    if plan.notes is not None:
        plan = _with_notes(hub, project, plan)
    commit = plan.head
    if not plan.up_to_date:
        plan = _ready(hub, plan, tell)
        commit = _send(hub, plan, tell)
    assert commit is not None
    tell("checking", 0, 0)
    tree = hub.tree(plan.repo, commit)
    failed = next((c for c in compare(plan.files, tree) if not c.passed), None)
    between = None if _recorded(hub, project, plan) else _look(hub, project, plan, commit)
    if between:
        if not failed:
            _write_receipt(hub, project, plan, commit, between.replaced)
        raise RemoteChanged(f"{plan.repo}: {between.told}")
    if failed:
        raise CheckFailed(f"{plan.repo} at {commit[:12]}: {failed.name}: {failed.detail}; run push again")
    receipt = _write_receipt(hub, project, plan, commit)
    if plan.target.create_pr:
        if receipt.pull_request is not None:
            with suppress(AuthError):  # it stays a draft, for the repo's owner to open
                hub.publish_pull(plan.repo, receipt.pull_request)
        return receipt
    tell("tagging", 0, 0)
    receipt = receipt.model_copy(update={"tag": _tag(hub, plan, receipt, commit)})
    _write_if_new(project.store.receipt(plan.id), receipt)
    manifest = read_model(project.store.manifest(plan.id), Manifest)
    if manifest is not None and manifest.weights_hash == plan.weights_hash:
        record(project, plan, manifest, receipt)
    return receipt


def _with_notes(hub: Hub, project: Project, plan: PushPlan) -> PushPlan:
    """The plan once notes that were changed on the hub are in the card here; the rest of it stays as it was planned."""
    card, target = project.store.variant(plan.id) / "README.md", plan.target
    write_text(card, with_notes(read_card(card) or "", Notes(plan.notes or "")))
    again = plan_push(
        hub, project, plan.id, private=target.private, create_pr=target.create_pr, overwrite=target.overwrite,
        staged=target.staged,
    )  # fmt: skip
    if again.head != plan.head or again.notes is not None or again.refusal:
        raise RemoteChanged(f"{plan.repo}: the card was edited on the hub meanwhile; {NEXT}")
    return again


def _ready(hub: Hub, plan: PushPlan, tell: Progress) -> PushPlan:
    """The plan with a repo, write access and, if asked for, a pull request to push to."""
    if plan.no_pull:
        raise InputError(plan.no_pull)
    if not plan.exists:
        tell("creating the repo", 0, 0)
        hub.create_repo(plan.repo, plan.target.private or plan.target.staged)
    if not plan.target.create_pr:
        hub.check_write(plan.repo)
    head = hub.head(plan.repo, plan.target.revision)
    if head is None:
        raise InputError(f"{plan.repo}: the hub says it does not exist, after creating it; run push again")
    if not plan.exists:
        taken = sorted(set(head.files) - {".gitattributes"})
        if taken:
            raise RemoteChanged(f"{plan.repo}: somebody created it meanwhile and put {taken[0]} there; run push again")
        plan = replace(plan, head=head.commit)
    elif head.commit != plan.head:
        told = changes_since(hub, plan, head)
        raise RemoteChanged(
            f"{plan.repo}: the head moved from {str(plan.head)[:8]} to {head.commit[:8]} ({told}); {NEXT}"
        )
    if plan.target.create_pr and plan.target.pull_request is None:
        text = f"Pushed by the publisher of {plan.repo}; weights {plan.weights_hash}."
        number = hub.open_pull(plan.repo, f"{plan.title} ({digest(plan)[:8]})", text)
        plan = replace(plan, target=replace(plan.target, pull_request=number))
        head = hub.head(plan.repo, plan.target.revision)
        plan = replace(plan, head=head.commit if head else plan.head)
    return plan


def _send(hub: Hub, plan: PushPlan, tell: Progress) -> str:
    """Upload and commit; returns the commit that holds our files."""
    assert plan.head is not None
    copies = {c.path: c for c in plan.copies}
    uploads = [_upload_of(f) for f in (*plan.add, *plan.update) if f.path not in copies]
    card = next((u for u in uploads if u.path == "README.md"), None)
    if card and isinstance(card.source, bytes):
        hub.check_card(card.source.decode(errors="replace"))
    attempt = 0
    while True:
        attempt += 1
        operations = hub.upload(plan.repo, plan.target.revision, uploads, tell)
        for f in plan.files:
            if f.key and not _is_as_hashed(f):
                raise CheckFailed(f"{f.path} changed while it was being pushed; nothing was committed: run push again")
        tell("committing", 0, 0)
        try:
            return hub.commit(
                plan.repo, plan.target.revision, operations, plan.delete, plan.title, plan.head, copies.values(),
                mark(plan),
            )  # fmt: skip
        except PublishError as e:
            error = e  # nothing is known yet: what the repo holds decides
        landed = _landed(hub, plan)
        if landed:
            return landed
        if copies:  # the hub may not copy these (another region, rights, an older hub): then they are sent
            uploads += [_upload_of(f) for f in (*plan.add, *plan.update) if f.path in copies]
            copies, attempt = {}, attempt - 1
            continue
        if attempt == COMMIT_TRIES or not isinstance(error, HubUnavailable | RemoteChanged):
            raise error
        tell("waiting to commit again", 0, 0)
        time.sleep(hub.pause_s * attempt)
        landed = _landed(hub, plan)  # what was read at once may have come from a cache behind the truth
        if landed:
            return landed


def _upload_of(file: LocalFile) -> Upload:
    """Small files go up as the bytes that were compared; large ones by path."""
    if file.size > INLINE_BYTES:
        return Upload(file.path, file.source, file.size, file.sha256)
    try:
        data = file.source.read_bytes()
    except FileNotFoundError:
        raise CheckFailed(f"{file.path} is gone since the push began; nothing was committed: run push again") from None
    if hashlib.sha256(data).hexdigest() != file.sha256:
        raise CheckFailed(f"{file.path} changed while it was being pushed; nothing was committed: run push again")
    return Upload(file.path, data, file.size, file.sha256)


def _is_as_hashed(file: LocalFile) -> bool:
    try:
        return file_key(file.source) == file.key or sha256_of(file.source) == file.sha256
    except FileNotFoundError:
        return False


def _landed(hub: Hub, plan: PushPlan) -> str | None:
    """After a commit that failed: the commit that holds our files, or None if the head is still the old one.

    Raises RemoteChanged if somebody else's commit is there instead.
    """
    try:
        head = hub.head(plan.repo, plan.target.revision)
    except HubUnavailable as e:
        raise HubUnavailable(f"{e}; whether the commit arrived is not known: run push again, it will see") from None
    if head is None:
        raise RemoteChanged(f"{plan.repo}: the repo was deleted while we pushed")
    if head.commit == plan.head:
        return None
    gone = not any(path in head.files for path in plan.delete)
    if gone and all(f.path in head.files and same(f, head.files[f.path]) for f in plan.files):
        return head.commit
    told = changes_since(hub, plan, head)
    raise RemoteChanged(f"{plan.repo}: somebody else committed {head.commit[:8]} ({told}) while we pushed; {NEXT}")


def changes_since(hub: Hub, plan: PushPlan, head: Head) -> str:
    """The files that somebody changed between the planned head and this one, in words."""
    before = (hub.tree(plan.repo, plan.head) if plan.head else None) or {}
    paths = sorted(p for p in before.keys() | head.files.keys() if p not in before or before[p] != head.files.get(p))
    return ", ".join(paths[:CHANGES]) + (f" and {len(paths) - CHANGES} more" if paths[CHANGES:] else "") or "no file"


def compare(files: Sequence[LocalFile], tree: Mapping[str, RemoteFile] | None) -> list[Check]:
    """Our files against a commit's, by hash."""
    if tree is None:
        return [Check(name="commit", passed=False, detail="the hub does not have it")]
    missing = [f.path for f in files if f.path not in tree]
    wrong = [f.path for f in files if f.path in tree and not same(f, tree[f.path])]
    strays = sorted(p for p in tree if p.endswith(".safetensors") and p not in {f.path for f in files})
    return [
        _check("files present", [f"{p} is missing" for p in missing], f"{len(files)} files"),
        _check("files equal", [f"{p} has other content" for p in wrong], "sizes and hashes as here"),
        _check("no other weights", [f"{p} is not ours" for p in strays], "no further safetensors"),
    ]


def _check(name: str, faults: Sequence[str], good: str) -> Check:
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return Check(name=name, passed=not faults, detail=faults[0] + more if faults else good)


def _look(hub: Hub, project: Project, plan: PushPlan, commit: str) -> Between | None:
    """What came between the plan and its commit; of a push that did not get to its receipt, between that plan and its."""
    if not plan.up_to_date:
        try:
            return came_between(hub, plan, commit)
        except PublishError as e:
            unknown = (
                f"{e}; it is committed as {commit[:12]}, what it landed on is not known: run push again, it will see"
            )
            raise type(e)(unknown) from None
    old = read_model(_receipt_path(project, plan), Receipt)
    known = old.commit if old and (old.repo, old.endpoint) == (plan.repo, hub.endpoint) else None
    return came_between_before(hub, plan, commit, known)


def _receipt_path(project: Project, plan: PushPlan) -> Path:
    return pull_receipt(project, plan.id) if plan.target.create_pr else project.store.receipt(plan.id)


def _entries(plan: PushPlan, old: Receipt | None) -> list[FileEntry]:
    """What the receipt of this plan lists."""
    entries = [FileEntry(path=f.path, size=f.size, sha256=f.sha256) for f in plan.files]
    if old and plan.keeps:
        entries = sorted((*entries, *(f for f in old.files if f.path in plan.keeps)), key=lambda f: f.path)
    return entries


def _pruned_at(plan: PushPlan, old: Receipt | None) -> str | None:
    """Of the weights that are here or not as they were when this push began."""
    return old.pruned_at if old and any(f.key is None for f in plan.files) else None


def _recorded(hub: Hub, project: Project, plan: PushPlan) -> Receipt | None:
    """The receipt that is there, if it says all that one of this plan would, and there is nothing to do."""
    old = read_model(_receipt_path(project, plan), Receipt)
    if (
        old
        and (old.repo, old.endpoint, old.weights_hash) == (plan.repo, hub.endpoint, plan.weights_hash)
        and (old.files, old.pull_request) == (_entries(plan, old), plan.target.pull_request)
        and (old.pruned_at, old.replaced) == (_pruned_at(plan, old), [])
        and plan.up_to_date
    ):
        return old
    return None


def _write_receipt(
    hub: Hub, project: Project, plan: PushPlan, commit: str, replaced: Iterable[ReplacedFile] = ()
) -> Receipt:
    """Written before the tag: from here on the next push knows what this one left."""
    if recorded := _recorded(hub, project, plan):
        return recorded
    path = _receipt_path(project, plan)
    old = read_model(path, Receipt)
    same_repo = old is not None and (old.repo, old.endpoint) == (plan.repo, hub.endpoint)
    receipt = Receipt(
        id=plan.id,
        repo=plan.repo,
        endpoint=hub.endpoint,
        commit=commit,
        pull_request=plan.target.pull_request,
        weights_hash=plan.weights_hash,
        files=_entries(plan, old),
        pushed_at=datetime.now(UTC).isoformat(timespec="seconds"),
        tag=old.tag if old and same_repo and old.weights_hash == plan.weights_hash else None,
        pruned_at=_pruned_at(plan, old),
        replaced=list(replaced),
    )
    write_model(path, receipt)
    return receipt


def _write_if_new(path: Path, receipt: Receipt) -> None:
    if read_model(path, Receipt) != receipt:
        write_model(path, receipt)


def _tag(hub: Hub, plan: PushPlan, receipt: Receipt, commit: str) -> str:
    """The tag of these weights: the newest one if it holds them, else the next number, on this commit."""
    tags = hub.tags(plan.repo)
    if receipt.tag in tags:
        return str(receipt.tag)
    numbers = sorted(int(m[1]) for m in map(TAG.fullmatch, tags) if m)
    if numbers:
        newest = f"v{numbers[-1]}"
        if tags[newest] == commit or _weights(hub.tree(plan.repo, tags[newest]) or {}) == _weights(plan.files):
            return newest
    name = f"v{numbers[-1] + 1 if numbers else 1}"
    hub.tag(plan.repo, name, commit)
    return name


def _weights(files: Iterable[LocalFile] | Mapping[str, RemoteFile]) -> set[tuple[str, str | None]]:
    values = files.values() if isinstance(files, Mapping) else files
    return {(f.path, f.sha256) for f in values if f.path.endswith(".safetensors")}


# ------------------------------------------------------------------------------------------------ looking


def remote_state(hub: Hub, project: Project, id: str) -> RemoteState:
    """Whether the repo holds what the folder holds. Large files here count as what the manifest says."""
    hub.require_online("status --remote")
    repo = repo_id(project, id)
    try:
        plan = plan_push(hub, project, id, rehash=False)
    except GateRefused as e:
        head = hub.head(repo)
        what = (str(e),)
        return RemoteState(id, repo, "not built", head and head.commit, head and head.private, what)
    if not plan.exists:
        return RemoteState(id, repo, "not pushed", None, None, ())
    edited = {f.path: f"{f.path}: {f.what}" for f in plan.foreign}
    changes = [r for r in plan.reasons if r.split(":")[0] not in edited]
    changes += [*edited.values(), *(f"{p}: weights on the hub that are not ours" for p in plan.strays)]
    return RemoteState(id, repo, "drifted" if changes else "in sync", plan.head, plan.private, tuple(sorted(changes)))


def verify_remote(hub: Hub, project: Project, id: str) -> list[Check]:
    """The repo's main branch against the folder and the receipt, by hash, without a download."""
    hub.require_online("verify --remote")
    repo = repo_id(project, id)
    head = hub.head(repo)
    if head is None:
        return [Check(name="repo", passed=False, detail=f"{repo} is not on {hub.endpoint}, or not for this token")]
    _, files = local_files(project, id)
    checks = [Check(name="repo", passed=True, detail=f"{repo} at {head.commit[:12]}"), *compare(files, head.files)]
    receipt = read_model(project.store.receipt(id), Receipt)
    if receipt is None or (receipt.repo, receipt.endpoint) != (repo, hub.endpoint):
        checks.append(Check(name="receipt", passed=None, detail="no push from here is on record"))
        return checks
    entries = [FileEntry(path=f.path, size=f.size, sha256=f.sha256) for f in files]
    changed = [f.path for f in entries if f not in receipt.files]
    checks.append(_check("receipt", [f"{p} changed here since" for p in changed], f"pushed as {receipt.commit[:12]}"))
    if receipt.tag:
        at = hub.tags(repo).get(receipt.tag)
        tree = hub.tree(repo, at) if at else None
        good = tree is not None and _weights(tree) == _weights(files)
        checks.append(_check("tag", [] if good else [f"{receipt.tag} does not hold these weights"], receipt.tag))
    return checks
