"""Links and images of a card: each has to lead somewhere. Nothing is fetched.

A relative one names a file that is pushed with the card, a `#fragment` a heading or an id of the card itself, an absolute
one a well-formed https address. Code is not looked at: an address in an example is an example.
"""

from __future__ import annotations

import re
from collections.abc import Set
from dataclasses import dataclass
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

from markdown_it import MarkdownIt
from markdown_it.token import Token
from mdit_py_plugins.anchors import anchors_plugin

from .card_metadata import HEADER

URLS = ("href", "src", "poster")  # attributes of HTML that hold one
MAIL = re.compile(r"mailto:[^\s@?]+@[^\s@?]+\.[^\s@?]+(\?\S*)?")
LABEL = re.compile(r"[a-z0-9]([a-z0-9\-]{0,61}[a-z0-9])?")


@dataclass(frozen=True)
class Link:
    """line: where its paragraph, cell or heading starts."""

    line: int
    url: str
    image: bool


def link_faults(text: str, files: Set[str]) -> list[str]:
    """What does not lead anywhere, as `line N: …`. files: all that are pushed, by their path in the repo."""
    links, anchors = read_links(text)
    faults = []
    for link in links:
        fault = _fault(link, files, anchors)
        if fault:
            faults.append(f"line {link.line}: {'image' if link.image else 'link'} {link.url[:120]!r} {fault}")
    return list(dict.fromkeys(faults))


def read_links(text: str) -> tuple[list[Link], set[str]]:
    """All links and images of a card, and the fragments that lead to a place in it."""
    header = HEADER.match(text)
    if header:
        text = "\n" * len(header[0].splitlines()) + text[header.end() :]
    parser = MarkdownIt("commonmark").enable("table")
    anchors_plugin(parser, max_level=6)  # as the Hub makes them: small letters, hyphens for spaces, no punctuation
    # what it would rather not link to (javascript:, file:) is to be seen here, and as it is written
    parser.validateLink = lambda url: True
    parser.normalizeLink = lambda url: url
    links: list[Link] = []
    anchors: set[str] = set()
    tokens = parser.parse(text)
    for token in tokens:
        line = token.map[0] + 1 if token.map else 1
        if token.type == "html_block":
            _html(token.content, line, links, anchors)
        elif token.type == "inline":
            for child in token.children or ():
                _inline(child, line, links, anchors)
        elif token.type == "heading_open":
            anchors.add(str(token.attrs["id"]))
    return links, anchors


def _inline(token: Token, line: int, links: list[Link], anchors: set[str]) -> None:
    if token.type == "link_open":
        links.append(Link(line, str(token.attrs.get("href", "")), False))
    elif token.type == "image":
        links.append(Link(line, str(token.attrs.get("src", "")), True))
    elif token.type == "html_inline":
        _html(token.content, line, links, anchors)


def _html(text: str, line: int, links: list[Link], anchors: set[str]) -> None:
    tags = _Tags()
    tags.feed(text)
    tags.close()
    for row, tag, name, value in tags.found:
        if name in ("id", "name"):
            anchors.add(value)
        elif name == "srcset":
            links += [Link(line + row, part.split()[0], True) for part in value.split(",") if part.strip()]
        else:
            links.append(Link(line + row, value, tag in ("img", "source", "video")))


class _Tags(HTMLParser):
    """Attributes that hold addresses or name a place; comments hold none."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[int, str, str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in (*URLS, "srcset", "id", "name"):
                self.found.append((self.getpos()[0] - 1, tag, name, value or ""))


def _fault(link: Link, files: Set[str], anchors: Set[str]) -> str:
    """Why it leads nowhere; empty if it does not."""
    url = link.url.strip()
    if not url:
        return "names nothing"
    if url.startswith("#"):
        known = unquote(url[1:]) in anchors and not link.image
        return "" if known else "is no heading of the card"
    if re.match(r"[A-Za-z][A-Za-z0-9+.\-]*:", url):
        return _address(url)
    path = unquote(re.split(r"[?#]", url, maxsplit=1)[0])
    if path.startswith("/"):
        return "starts at the server's root; expected a file of the repo, or a whole https address"
    parts: list[str] = []
    for part in path.split("/"):
        if part == "..":
            if not parts:
                return "leads out of the repo"
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    return "" if "/".join(parts) in files else "is no file that is pushed"


def _address(url: str) -> str:
    if MAIL.fullmatch(url):
        return ""
    try:
        parts = urlsplit(url)
        host, _ = (parts.hostname or "").encode("idna").decode("ascii"), parts.port
    except ValueError:
        return "is no well-formed address"
    if parts.scheme != "https":
        return f"is {parts.scheme}; expected https"
    if re.search(r"[\s\x00-\x1f\x7f<>\"\\]", url):
        return "is no well-formed address"
    if parts.username is not None or parts.password is not None:
        return "holds a user name"
    labels = host.lower().split(".")
    if len(labels) < 2 or len(host) > 253 or not all(map(LABEL.fullmatch, labels)) or labels[-1].isdigit():
        return "names no host of the web"
    return ""
