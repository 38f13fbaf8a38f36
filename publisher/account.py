"""Whose token it is, what it may write to, and what the account's plan holds: `account_of` reads the answer to whoami.

The answer is a server's: every field may be missing or of another type, and then it is not known. How much private storage
a plan has is in the Hub's documentation, not in its answers; how much of it is used is in neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from .card_format import size

# https://huggingface.co/docs/hub/storage-limits, 2026; paid plans may go beyond theirs, at a price
FREE_NBYTES, PRO_NBYTES = 100 * 10**9, 10**12
PAID = ("team", "enterprise", "plus")


@dataclass(frozen=True)
class Owner:
    """A namespace. role: the user's in an organization, "" if not told; plan: free, pro, team …, "" if not told."""

    name: str
    role: str = ""
    plan: str = ""


@dataclass(frozen=True)
class Account:
    """Whose token this is. role: read, write, fineGrained, or "" if the hub does not say.

    owners: namespaces with what is known of them, the user's own first; None: not told. scope: names of users,
    organizations and repos that a fine-grained token may write to; None: not told, or no such token.
    """

    name: str
    role: str
    owners: tuple[Owner, ...] | None = None
    scope: frozenset[str] | None = None

    def owner(self, name: str) -> Owner | None:
        return next((o for o in self.owners or () if o.name.lower() == name.lower()), None)


@dataclass(frozen=True)
class Limit:
    """Private storage. nbytes None: not known, `why` says why. hard: no byte above it is taken."""

    nbytes: int | None
    hard: bool
    why: str

    @property
    def text(self) -> str:
        return f"limit {size(self.nbytes)} ({self.why})" if self.nbytes is not None else f"limit unknown ({self.why})"


def account_of(who: Any) -> Account | None:
    """None for an answer that names nobody."""
    if not isinstance(who, Mapping) or not _text(who.get("name")):
        return None
    auth = _mapping(_mapping(who.get("auth")).get("accessToken"))
    pro = who.get("isPro")
    own = Owner(who["name"], "admin", "pro" if pro is True else "free" if pro is False else "")
    orgs = who.get("orgs")
    owners = None
    if isinstance(orgs, list):
        named = [o for o in orgs if isinstance(o, Mapping) and _text(o.get("name"))]
        owners = (own, *(Owner(o["name"], _text(o.get("roleInOrg")), _plan(o)) for o in named))
    return Account(who["name"], _text(auth.get("role")), owners, _scope(auth))


def _plan(org: Mapping[str, Any]) -> str:
    plan = _text(org.get("plan")).lower()
    return plan or ("enterprise" if org.get("isEnterprise") is True else "")


def _scope(auth: Mapping[str, Any]) -> frozenset[str] | None:
    scoped = _mapping(auth.get("fineGrained")).get("scoped")
    if auth.get("role") != "fineGrained" or not isinstance(scoped, list):
        return None
    names = set()
    for entry in filter(lambda e: isinstance(e, Mapping), scoped):
        name, permissions = _text(_mapping(entry.get("entity")).get("name")), entry.get("permissions")
        rights = [_text(p) for p in permissions] if isinstance(permissions, list) else []
        if name and any(p.startswith("repo.") and p.endswith("write") for p in rights):
            names.add(name.lower())
    return frozenset(names)


def private_limit(account: Account, owner: str, endpoint: str, given: int | None) -> Limit:
    """Of an owner's private repos together. given: what variants.yaml says."""
    if given is not None:
        return Limit(given, True, "private_storage in variants.yaml")
    if urlsplit(endpoint).hostname != "huggingface.co":
        return Limit(None, False, f"{endpoint} documents none; set private_storage in variants.yaml")
    found = account.owner(owner)
    plan = found.plan if found else ""
    if plan == "free":
        return Limit(FREE_NBYTES, True, f"{owner} has no paid plan; as the Hub documents it")
    if plan == "pro":
        return Limit(PRO_NBYTES, False, f"{owner} has PRO; as the Hub documents it, more is billed")
    if plan in PAID:
        return Limit(None, False, f"{owner} has {plan}: 1 TB a seat, and the seats are not told")
    return Limit(None, False, f"the Hub does not say which plan {owner} has; set private_storage in variants.yaml")


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
