"""Cards for the tests of the hub's pages: one that has everything, and hostile ones; and what is looked for in HTML."""

from __future__ import annotations

import re
import struct
import zlib
from html.parser import HTMLParser

from publisher.localhub.pages_card import ATTRIBUTES, CLASSES, TAGS

CARD = """---
license: apache-2.0
license_link: LICENSE
base_model: acme/Tiny
base_model_relation: quantized
pipeline_tag: text-generation
library_name: mlx
language: [en, zh]
tags: [mlx, 4-bit]
datasets: [someone/else]
own: {nested: [1, 2]}
---
# Tiny

| left | right | middle |
|:-----|------:|:------:|
| a | ~~gone~~ | `code` |

- [x] smoke test
- [ ] the rest

```python
print("<b>")
```

> [!WARNING]
> Text only.

![light](images/a.png#hf-light-mode-only)
<picture><source media="(prefers-color-scheme: dark)" srcset="./images/b.svg"><img src="images/a.png" width="10"></picture>

[licence](LICENSE) [folder](images) [top](#tiny) [base](https://huggingface.co/acme/Tiny) [far](https://huggingface.co/else/where)
[gone](nowhere.md) [up](../../etc/passwd) [nothing](#nothing) ![shot](https://tracker.example/p.png) ![no](images/no.png)
"""


def png() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0\0\0\0")) + chunk(b"IEND", b"")


SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'


class Seen(HTMLParser):
    """Every element of a fragment: (tag, attributes); and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.text += data

    def values(self, tag: str, name: str) -> list[str]:
        return [attrs[name] for t, attrs in self.elements if t == tag and name in attrs]


HOSTILE = (
    "<script>window.ran=1</script>",
    "<img src=x onerror=window.ran=1>",
    "<img src='images/a.png' onload=window.ran=1>",
    "[x](javascript:window.ran=1)",
    "[x](JaVa\tScRiPt:window.ran=1)",
    "<a href='java&#10;script:window.ran=1'>x</a>",
    "<a href='&#1;javascript:window.ran=1'>x</a>",
    "<a href=vbscript:x>x</a> <a href='data:text/html,<script>window.ran=1</script>'>x</a>",
    "<iframe src=//evil.example></iframe><iframe srcdoc='<script>parent.ran=1</script>'></iframe>",
    "<svg onload=window.ran=1><script>window.ran=1</script></svg>",
    "<svg><a xlink:href=javascript:window.ran=1><text>x</text></a></svg>",
    "<math><mtext><table><mglyph><style><img src=x onerror=window.ran=1>",
    "<style>*{background:url(//evil.example/x)}</style>",
    "<link rel=stylesheet href=//evil.example/x.css>",
    "<p style='background:url(//evil.example/x)'>x</p>",
    "<meta http-equiv=refresh content='0;url=https://evil.example'>",
    "<base href=//evil.example>",
    "<form action=//evil.example><input name=q><button formaction=javascript:window.ran=1>x</button></form>",
    "<object data=//evil.example></object><embed src=//evil.example>",
    "<video src=//evil.example autoplay onplay=window.ran=1></video><audio src=//evil.example>",
    "![x](data:image/svg+xml;base64,PHN2Zy8+)",
    "![x](//evil.example/a.png) ![y](\\\\\\\\evil.example\\\\a.png)",
    "<img src='/\\evil.example/a.png'><img src='https:evil.example/a.png'><img src='http://[::1'>",
    "<img srcset='//evil.example/a.png 2x' src='images/a.png'>",
    "<picture><source srcset='images/a.png, https://evil.example/a.png 2x'><img src='images/a.png'></picture>",
    "<a href='//evil.example'>x</a><a href='/\\evil.example'>x</a>",
    "<noscript><p title=\"</noscript><img src=x onerror=window.ran=1>\">",
    "<textarea><img src=x onerror=window.ran=1></textarea><title><img src=x onerror=window.ran=1></title>",
    "<template><script>window.ran=1</script></template><xmp><script>window.ran=1</script></xmp>",
    "<!--><script>window.ran=1</script--><!--x--!><img src=x onerror=window.ran=1>",
    "<details open ontoggle=window.ran=1><summary>x</summary></details>",
    "<p id=hub-x class='notice banner' hidden popover autofocus tabindex=0 accesskey=x onfocus=window.ran=1>x</p>",
    "<a id=__proto__ name=attributes href=#x ping=//evil.example target=_top download>x</a>",
    "<img src=images/a.png usemap=#m><map name=m><area href=javascript:window.ran=1></map>",
    "```\n</code></pre><script>window.ran=1</script>\n```",
    "# <img src=x onerror=window.ran=1> \"><script>window.ran=1</script>",
    "| <script>window.ran=1</script> | <b onclick=window.ran=1>x</b> |\n|---|---|\n| [x](javascript:window.ran=1) | `<script>` |",
    "[^1]\n\n[^1]: <img src=x onerror=window.ran=1>",
    "<javascript:window.ran=1> <https://evil.example/\" onmouseover=window.ran=1>",
    "[x]: javascript:window.ran=1 \"t\"\n\n[x]",
    "<img src=x alt='\"><script>window.ran=1</script>'> ![\"><script>window.ran=1</script>](https://evil.example/a)",
    "<a href='https://evil.example/?\"><script>window.ran=1</script>'><img src='https://evil.example/\"onerror=1'></a>",
    "&lt;script&gt;window.ran=1&lt;/script&gt; &#60;script&#62;",
    "<b><i><u>" * 200,
)  # fmt: skip
PIECES = (  # to mix with them
    "<", ">", '"', "'", "`", "](", "![", "[", "<!--", "-->", "<![CDATA[", "]]>", "\n\n", "\n", "    ", "> ",
    "- ", "|", "\0", "&", "<a href=", "<img src=", " onerror=x", "</a>", "</p>", "<svg>", "<math>", "<style>", "</style>",
    "<table>", "<td>", "javascript:", "//e.x", "\\", "&colon;", "&Tab;", "\u2028", "<picture>", "<source srcset=",
)  # fmt: skip
HREF = re.compile(r"(#|/(?![/\\])|https?://|mailto:)", re.IGNORECASE)


def check_harmless(html: str) -> None:
    """What a browser makes of it: known elements, known attributes, addresses that navigate or are of this hub."""
    tags, classes = set(TAGS.split()), set(CLASSES.split())
    for tag, attrs in Seen(html).elements:
        assert tag in tags, tag
        allowed = ATTRIBUTES.get(tag, set()) | ATTRIBUTES["*"] | {"class", "rel"}
        allowed |= {"type", "disabled"} if tag == "input" else set()
        assert attrs.keys() <= allowed, attrs
        assert set(attrs.get("class", "").split()) <= classes
        assert not attrs.get("id", "").startswith("hub-")
        assert HREF.match(attrs.get("href", "#")), attrs
        for name in ("src", "srcset"):
            urls = [part.split()[0] for part in attrs.get(name, "/-/image/").split(", ")]
            assert all(url.startswith("/-/image/") for url in urls), attrs
        if tag == "input":
            assert attrs["type"] == "checkbox"
        if tag == "a" and "href" in attrs:
            assert attrs["rel"] == "noopener noreferrer nofollow"
