"""What the hub has to say before the first byte goes there: `check` asks it, and changes nothing.

Token, role and scope; write access, or a namespace to create the repo in; the card's metadata, checked by the hub itself;
private storage against what the push needs of it; notes that were written on the hub, against the gate; weights there that
this card would not account for. Each refusal is one line that names the one thing to do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from inference.errors import AuthError, GateRefused, InputError, PublishError, RemoteChanged

from .account import Account, private_limit
from .base import resolve_base
from .build import card_texts
from .card import gather
from .card_format import size
from .card_history import adopt, card_command
from .card_metadata import unlisted_license
from .card_notes import Notes, read_card, with_notes
from .gate import card_faults
from .hub import Hub
from .push_plan import PushPlan, repo_id
from .schema import Manifest
from .store import read_model
from .survey import survey
from .variants import Project


@dataclass(frozen=True)
class Need:
    """Bytes that a repo holds, and those of them that are sent now."""

    id: str
    held: int
    sent: int


def check(project: Project, hub: Hub, plans: Sequence[PushPlan]) -> tuple[list[PushPlan], dict[str, PublishError]]:
    """The plans, with what was found in their `told`; and what stands against them, by id.

    Writes down weights found on the hub that no push from here left there (out/history), and nothing else. Raises
    AuthError where the token itself is the fault, HubUnavailable.
    """
    account = hub.require_write("push")
    told: dict[str, list[str]] = {p.id: [] for p in plans}
    errors: dict[str, PublishError] = {}
    for plan in plans:
        try:
            told[plan.id] += _access(hub, account, plan)
            told[plan.id] += _card(project, hub, plan)
        except (AuthError, GateRefused, InputError, RemoteChanged) as e:
            errors[plan.id] = e
    for owner, needs in _private(plans).items():
        line, error = _storage(project, hub, account, owner, needs)
        told[needs[0].id].append(line)
        errors |= {n.id: error for n in needs if n.id not in errors} if error else {}
    adopted = [p.id for p in plans if p.id not in errors and adopt(project, hub, p)]
    errors |= _unaccounted(project, hub, adopted)
    return [replace(p, told=tuple(told[p.id])) for p in plans], errors


def before_building(project: Project, hub: Hub, ids: Sequence[str], private: bool, staged: bool) -> None:
    """Better refused now than after hours of quantizing. For a build whose weights go up while it runs.

    private, staged: of repos that have to be created. Raises what stands against it, every refusal on its line.
    """
    account = hub.require_write("push")
    errors: dict[str, PublishError] = {}
    needs: dict[str, list[Need]] = {}
    rungs = survey(project, lambda: hub, cards=False, ids=ids, read=False).rungs
    for id in ids:
        repo = repo_id(project, id)
        try:
            head = hub.head(repo)
            if head is not None:
                hub.check_write(repo)
            else:
                _may_create(account, id, repo)
        except (AuthError, InputError) as e:
            errors[id] = e
            continue
        plan = rungs[id].plan
        if (head.private if head else private or staged) and plan.applied is not None:
            needs.setdefault(repo.split("/")[0], []).append(Need(id, plan.nbytes, plan.nbytes))
    for owner, mine in needs.items():
        _, error = _storage(project, hub, account, owner, mine)
        errors |= {n.id: error for n in mine} if error else {}
    if errors:
        raise together(errors)


def together(errors: dict[str, PublishError]) -> PublishError:
    """Several refusals as one error: of the first's kind, each on its line."""
    lines = list(dict.fromkeys(str(e) for e in errors.values()))
    first = next(iter(errors.values()))
    return type(first)("\n  ".join(["not ready to leave:", *lines])) if len(lines) > 1 else first


def _access(hub: Hub, account: Account, plan: PushPlan) -> Iterator[str]:
    if plan.no_pull:
        raise InputError(plan.no_pull)
    if not plan.exists:
        known = _may_create(account, plan.id, plan.repo)
        yield f"{plan.repo} is new; {account.name} {'may' if known else 'will try to'} create it, {_kind(plan)}"
    elif not plan.up_to_date and not plan.target.create_pr:
        hub.check_write(plan.repo)
        yield f"{account.name} may write to {plan.repo}, {_kind(plan)}, at {str(plan.head)[:8]}"


def _may_create(account: Account, id: str, repo: str) -> bool:
    """Whether the hub says that the account may; False where it says nothing. Raises AuthError where it may not."""
    owner = repo.split("/")[0]
    found = account.owner(owner)
    if account.owners is not None and found is None:
        known = ", ".join(o.name for o in account.owners)
        raise AuthError(
            f"{id}: {repo} does not exist, and {account.name} is no member of {owner}; set owner: to one of {known}"
        )
    if found and found.role == "read":
        raise AuthError(f"{id}: {account.name} can only read in {owner}; ask its admins for the role write")
    if account.scope is not None and not account.scope & {owner.lower(), repo.lower()}:
        raise AuthError(
            f"{id}: the fine-grained token of {account.name} may not write to {owner}; give it write access to its repos"
        )
    return found is not None


def _kind(plan: PushPlan) -> str:
    if plan.exists:
        return "private" if plan.private else "public"
    return "private until all is done" if plan.target.staged else "private" if plan.target.private else "public"


def _card(project: Project, hub: Hub, plan: PushPlan) -> Iterator[str]:
    """The card as it will be there: with notes that are taken over, it is another one than the gate saw."""
    path = project.store.variant(plan.id) / "README.md"
    text = read_card(path) or ""
    if plan.notes is not None:
        text = with_notes(text, Notes(plan.notes))
        files = {f.path for f in plan.files}
        faults = card_faults(text, plan.repo, files)  # the rest of the card passed the gate
        if faults:
            raise GateRefused(
                f"{plan.id}: notes on the hub: {faults[0]}; correct them there, or push with --overwrite to have your own"
            )
        yield "notes that were changed on the hub are taken over"
    if plan.notes is None and not any(f.path == "README.md" for f in (*plan.add, *plan.update)):
        return
    try:
        warnings = hub.check_card(text)
    except InputError as e:
        step = f"correct it in variants.yaml or the template and run `publish card {plan.id}`"
        raise InputError(f"{plan.id}: {e}; {step}") from None
    yield "the hub takes the card's metadata" + "".join(f"; warning: {w}" for w in warnings)
    unlisted = unlisted_license(text)
    if unlisted:
        yield unlisted


def _private(plans: Sequence[PushPlan]) -> dict[str, list[Need]]:
    """By owner, what is private while it is pushed."""
    needs: dict[str, list[Need]] = {}
    for p in plans:
        if p.private or (not p.exists and p.target.staged):
            need = Need(p.id, sum(f.size for f in p.files), p.bytes_to_send)
            needs.setdefault(p.repo.split("/")[0], []).append(need)
    return needs


def _storage(
    project: Project, hub: Hub, account: Account, owner: str, needs: Sequence[Need]
) -> tuple[str, AuthError | None]:
    """Of an owner's repos that are private while they are pushed, all together: what to tell, and what stands against."""
    held, sent = sum(n.held for n in needs), sum(n.sent for n in needs)
    limit = private_limit(account, owner, hub.endpoint, project.private_storage)
    line = (
        f"{owner}'s private storage: these repos hold {size(held)}, at most {size(sent)} of it sent now; {limit.text}; "
        "what else is in use is not told"
    )
    if not limit.hard or limit.nbytes is None or held <= limit.nbytes or not sent:
        return line, None
    return line, AuthError(
        f"{owner}'s private repos would hold {size(held)}, {limit.text}; push with --public, or fewer variants at a time, "
        "or set private_storage in variants.yaml if the account has more"
    )


def _unaccounted(project: Project, hub: Hub, ids: Sequence[str]) -> dict[str, PublishError]:
    """Variants whose card does not say yet that weights found on the hub are replaced."""
    if not ids:
        return {}
    texts, _ = card_texts(project, gather(project, resolve_base(project, lambda: hub, weights=False).folder), ids)
    stale = [id for id in ids if texts.get(id) != read_card(project.store.variant(id) / "README.md")]
    return {
        id: GateRefused(
            f"{id}: {project.repo(id)} holds other weights, and the card does not say yet that these replace them; "
            f"run `{card_command(project, id, manifest)}`"
        )
        for id in stale
        if (manifest := read_model(project.store.manifest(id), Manifest))
    }
