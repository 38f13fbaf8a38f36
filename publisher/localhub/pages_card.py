"""Markdown of a repository to HTML that is safe in a page: rendered as GitHub and the Hub do, then sanitised.

    Markdown ──► markdown-it, GFM ──► nh3: allowed elements, attributes resolved ──► images replaced ──► nh3 again

Whatever the steps before it did wrong, the last one lets through only the elements of TAGS, attributes that run nothing and
addresses of the forms below. The page's content security policy is a second line, not the first.

What a card may have on the Hub and gets no place here: inline styles and video (left out), formulas (shown as written).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from html.parser import HTMLParser
from urllib.parse import unquote

import nh3
from markdown_it import MarkdownIt
from markdown_it.rules_core import StateCore
from mdit_py_plugins.anchors import anchors_plugin
from mdit_py_plugins.gfm import gfm_plugin

from publisher.localhub.pages_links import PROBLEMS, Links

MARKDOWN_BYTES = 256 << 10  # longer texts are shown as they are: hostile ones of this size take seconds
TAGS = """
a abbr b blockquote br caption center cite code col colgroup dd del details dfn div dl dt em figcaption figure font
h1 h2 h3 h4 h5 h6 hr i img input ins kbd li mark ol p picture pre q rp rt ruby s samp section small source span strike
strong sub summary sup table tbody td tfoot th thead tr tt u ul var wbr
"""
DROPPED_WITH_CONTENT = {
    "script",
    "style",
    "title",
    "textarea",
    "noscript",
    "template",
    "iframe",
    "object",
    "svg",
    "math",
}
ATTRIBUTES = {
    "*": {"id", "align", "dir", "lang", "title"},
    "a": {"href", "name"},
    "abbr": {"title"},
    "col": {"span", "width"},
    "details": {"open"},
    "img": {"src", "alt", "width", "height"},
    "input": {"checked"},
    "li": {"value"},
    "ol": {"start"},
    "source": {"srcset", "media"},
    "table": {"width"},
    "td": {"colspan", "rowspan", "width"},
    "th": {"colspan", "rowspan", "width"},
}
# Markdown's own, and the Tailwind classes that cards use to show one of two images by colour scheme.
CLASSES = """
contains-task-list task-list-item task-list-item-checkbox header-anchor footnotes footnotes-sep footnotes-list
footnote-item footnote-ref footnote-backref markdown-alert markdown-alert-title markdown-alert-note markdown-alert-tip
markdown-alert-important markdown-alert-warning markdown-alert-caution hidden block dark:hidden dark:block outside missing
"""
Filter = Callable[[str, str, str], str | None]  # element, attribute, value → value
OWN_ID = "hub-"  # prefix of the page's own ids
MEDIA = re.compile(r"\(prefers-color-scheme: ?(?:dark|light)\)|\((?:min|max)-width: ?\d{1,5}px\)")
SAFE_HREF = re.compile(r"#|/(?!/)|https?://|mailto:", re.IGNORECASE)


@dataclass(frozen=True)
class Rendered:
    """html: safe as it stands. problems: links and images that lead nowhere. outside: images of other sites, as links."""

    html: str
    problems: list[str]
    outside: list[str]


def render(markdown: str, links: Links) -> Rendered:
    """The text, without front matter, as HTML. Pure but for `links`, which collects what it finds."""
    html = _cleaner(_resolver(links)).clean(PARSER.render(markdown))
    page = _Images()
    page.feed(html)
    page.close()
    html = _cleaner(_last_check).clean("".join(page.out))
    missing = [f"link #{name[:80]}: no such heading" for name in page.targets if name not in page.ids]
    return Rendered(html, [*links.problems, *dict.fromkeys(missing)][:PROBLEMS], links.outside)


# -- Markdown -------------------------------------------------------------------------------------------------


def _parser() -> MarkdownIt:
    md = MarkdownIt("commonmark", {"html": True})
    gfm_plugin(md)
    anchors_plugin(md, max_level=6, permalink=True, permalinkSymbol="#", permalinkBefore=True)
    md.core.ruler.push("cell_align", _cell_align)
    # The page resolves addresses itself, and tells of those that it refuses.
    md.validateLink = lambda url: True
    return md


def _cell_align(state: StateCore) -> None:
    """Alignment of table cells as an attribute: a content security policy without inline styles ignores style=."""
    for token in state.tokens:
        if token.type in ("th_open", "td_open"):
            style = str(token.attrs.pop("style", ""))
            if style.startswith("text-align:"):
                token.attrSet("align", style.removeprefix("text-align:"))


PARSER = _parser()


# -- sanitising -----------------------------------------------------------------------------------------------


def _cleaner(attribute_filter: Filter) -> nh3.Cleaner:
    return nh3.Cleaner(
        tags=set(TAGS.split()),
        clean_content_tags=DROPPED_WITH_CONTENT,
        attributes=ATTRIBUTES,
        attribute_filter=attribute_filter,
        allowed_classes={tag: set(CLASSES.split()) for tag in TAGS.split()},
        set_tag_attribute_values={"input": {"type": "checkbox", "disabled": ""}},
        url_schemes={"http", "https", "mailto"},
        link_rel="noopener noreferrer nofollow",
    )


def _resolver(links: Links) -> Filter:
    def resolve(tag: str, name: str, value: str) -> str | None:
        # An exception in here would be printed by nh3, not raised; `links` raises none.
        if (tag, name) == ("a", "href"):
            return links.href(value)
        if (tag, name) == ("img", "src"):
            return links.image(value)
        if (tag, name) == ("source", "srcset"):
            return _srcset(value, links)
        return value

    return resolve


def _srcset(value: str, links: Links) -> str | None:
    """Candidates on this hub only."""
    kept = []
    for candidate in re.split(r",\s+|,$", value.strip()):
        url, _, descriptor = candidate.strip().partition(" ")
        found = links.image(url) if url else None
        if found and found.startswith("/") and re.fullmatch(r"(?:\d{1,5}w|\d(?:\.\d{1,3})?x)?", descriptor.strip()):
            kept.append(f"{found} {descriptor}".strip())
    return ", ".join(kept) or None


def _last_check(tag: str, name: str, value: str) -> str | None:
    """What leaves: links that navigate or stay, images of this hub, no id of the page's own."""
    if name == "href":
        return value if SAFE_HREF.match(value) else None
    if name in ("src", "srcset"):
        return value if all(part.startswith("/-/image/") for part in value.split(", ")) else None
    if name == "media":
        return value if MEDIA.fullmatch(value) else None
    if name in ("id", "name"):
        return None if value.lower().startswith(OWN_ID) else value
    return value


class _Images(HTMLParser):
    """Replaces the images that are not of this hub. Fed with the sanitiser's output only, which is well-formed."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=False)
        self.out: list[str] = []
        self.ids: set[str] = set()
        self.targets: list[str] = []
        self._links = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids |= {given[key] or "" for key in ("id", "name") if key in given}
        self._links += tag == "a"
        href = given.get("href") or ""
        if len(href) > 1 and href.startswith("#"):
            self.targets.append(unquote(href[1:]))
        if tag == "img" and not (given.get("src") or "").startswith("/"):
            self.out.append(self._instead(given.get("src"), given.get("alt") or "image"))
        else:
            self.out.append(self.get_starttag_text() or "")

    def handle_endtag(self, tag: str) -> None:
        self._links -= tag == "a"
        self.out.append(f"</{tag}>")

    def handle_data(self, data: str) -> None:
        self.out.append(data)

    def handle_entityref(self, name: str) -> None:
        self.out.append(f"&{name};")

    def handle_charref(self, name: str) -> None:
        self.out.append(f"&#{name};")

    def _instead(self, src: str | None, alt: str) -> str:
        if src is None:
            return f'<span class="missing">{escape(alt)}</span>'
        if self._links:  # a link cannot hold another one
            return f'<span class="outside" title="{escape(src)}">{escape(alt)}</span>'
        return f'<a class="outside" href="{escape(src)}" title="{escape(src)}">{escape(alt)}</a>'
