"""Where the links and images of a card lead, on this hub.

A card names files of its repository by relative paths, and other repositories by addresses of the Hub. Both lead to this
hub's pages where it holds what they name, so that a release can be walked through as it will be. What is named and is not
there is a fault that a rehearsal should find: it is kept as a line for the page to show.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from urllib.parse import SplitResult, quote, unquote, urlsplit

HUB_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
OUTSIDE_SCHEMES = ("http", "https", "mailto")
# What an <img> may show, with the only type it is served as. No other file is ever given a type that a browser renders.
IMAGE_TYPES = {
    "png": "image/png",
    "jpg": "image/jpeg",
    "jpeg": "image/jpeg",
    "gif": "image/gif",
    "webp": "image/webp",
    "avif": "image/avif",
    "svg": "image/svg+xml",
}
IGNORED_BY_BROWSERS = re.compile(r"[\t\n\r]|^[\x00-\x20]+|[\x00-\x20]+$")
REPO_PATH = re.compile(
    r"/(?:(?P<kind>datasets|spaces)/)?(?P<id>[\w.-]+/[\w.-]+?)(?:/(?P<view>resolve|raw|blob|tree)/(?P<rev>[^/]+)(?:/(?P<path>.+))?)?/?"
)
PROBLEMS = 20  # told on one page


def repo_path(kind: str, repo_id: str) -> str:
    return f"/{repo_id}" if kind == "models" else f"/{kind}/{repo_id}"


def view_path(kind: str, repo_id: str, view: str, rev: str, path: str = "") -> str:
    """Path of a page: view is tree, blob, resolve or commits."""
    tail = f"/{quote(path)}" if path else ""
    return f"{repo_path(kind, repo_id)}/{view}/{quote(rev, safe='')}{tail}"


def image_path(kind: str, repo_id: str, rev: str, path: str) -> str:
    return f"/-/image/{kind}/{repo_id}/{quote(rev, safe='')}/{quote(path)}"


def image_type(path: str) -> str | None:
    return IMAGE_TYPES.get(posixpath.splitext(path)[1][1:].lower())


@dataclass
class Links:
    """Resolves what one text of a repository names.

    rev: as the page's address has it. paths: the files of that revision. folder: of the text, "" at the top.
    held(kind, repo_id): paths of that repository's main if the reader may read it, else None.
    problems: what is named and is not there, in the order found, each once. outside: images on other sites.
    """

    kind: str
    repo_id: str
    rev: str
    paths: Collection[str]
    folder: str
    held: Callable[[str, str], Collection[str] | None]
    problems: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)

    def href(self, url: str) -> str | None:
        """An address that a link may have; None: none at all."""
        url = _as_browsers_read(url)
        if url.startswith("#"):
            return url
        parts = _split(url)
        if parts is None or parts.scheme not in ("", *OUTSIDE_SCHEMES):
            return None
        fragment = f"#{parts.fragment}" if parts.fragment else ""
        if parts.scheme == "mailto":
            return url
        if parts.netloc:
            here = self._here(parts.path, fragment) if _is_hub(parts) else None
            return here or url
        if parts.path.startswith("/"):
            # A path from the root is one of the Hub's own; not all of them exist here.
            return self._here(parts.path, fragment) or f"https://{HUB_HOSTS[0]}{url}"
        path = self._inside(parts.path, "link")
        if path is None:
            return None
        if path in self.paths:
            return view_path(self.kind, self.repo_id, "blob", self.rev, path) + fragment
        return view_path(self.kind, self.repo_id, "tree", self.rev, path) + fragment

    def image(self, url: str) -> str | None:
        """An address on this hub, or an outside one that no page may load; None: there is no such image."""
        url = _as_browsers_read(url)
        parts = _split(url)
        if parts is None or parts.scheme not in ("", "http", "https") or not url or url.startswith("#"):
            self._problem(f"image {_short(url)}: not an address of an image")
            return None
        fragment = f"#{parts.fragment}" if parts.fragment else ""
        if parts.netloc or parts.path.startswith("/"):
            here = self._image_here(parts.path) if _is_hub(parts) or not parts.netloc else None
            outside = url if parts.netloc else f"https://{HUB_HOSTS[0]}{url}"
            if not here and outside not in self.outside:
                self.outside.append(outside)
            return here + fragment if here else outside
        path = self._inside(parts.path, "image")
        if path is None:
            return None
        if image_type(path) is None:
            self._problem(f"image {_short(path)}: not a file that browsers show as an image")
            return None
        return image_path(self.kind, self.repo_id, self.rev, path) + fragment

    def _inside(self, raw: str, what: str) -> str | None:
        """The path in the repository that a relative address means; None, and a problem, if there is none."""
        path = posixpath.normpath(posixpath.join("/", self.folder, unquote(raw)))[1:]
        climbs = posixpath.normpath(posixpath.join(self.folder, unquote(raw))).startswith("..")
        there = path in self.paths or (what == "link" and any(p.startswith(f"{path}/") for p in self.paths))
        if what == "link" and not path and not climbs:
            return path  # the repository itself
        if climbs or not there:
            self._problem(f"{what} {_short(unquote(raw))}: no such file in this revision")
            return None
        return path

    def _here(self, path: str, fragment: str) -> str | None:
        """The page of this hub for a path of the Hub's, if it holds that repository."""
        match = REPO_PATH.fullmatch(path)
        if match is None or self.held(match["kind"] or "models", match["id"]) is None:
            return None
        if match["view"] in ("resolve", "raw"):
            where = match["kind"] or "models", match["id"]
            return view_path(*where, "blob", unquote(match["rev"]), unquote(match["path"] or ""))
        return path + fragment

    def _image_here(self, path: str) -> str | None:
        match = REPO_PATH.fullmatch(path)
        if match is None or not match["path"] or unquote(match["rev"]) != "main":
            return None
        name = unquote(match["path"])
        held = self.held(match["kind"] or "models", match["id"])
        if held is None or name not in held or image_type(name) is None:
            return None
        return image_path(match["kind"] or "models", match["id"], "main", name)

    def _problem(self, line: str) -> None:
        if line not in self.problems and len(self.problems) < PROBLEMS:
            self.problems.append(line)


def _as_browsers_read(url: str) -> str:
    """Without what browsers leave out of an address, with their reading of backslashes; `//host/path` is https."""
    url = IGNORED_BY_BROWSERS.sub("", IGNORED_BY_BROWSERS.sub("", url)).replace("\\", "/")
    return f"https:{url}" if url.startswith("//") else url


def _split(url: str) -> SplitResult | None:
    """The parts of an address; None if it has none."""
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - raises for a port that is no number
    except ValueError:
        return None
    if parts.scheme in ("http", "https") and not parts.netloc:
        return None  # `https:path`: browsers and this parser disagree on what it means
    return parts


def _is_hub(parts: SplitResult) -> bool:
    return parts.scheme in ("http", "https") and parts.hostname in HUB_HOSTS


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."
