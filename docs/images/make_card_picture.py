"""Makes the picture of a card in the README: a built variant's card, rendered as a Hub page would show it.

    python docs/images/make_card_picture.py demo-out/build/Q4_K_XL/README.md docs/images/card.png

Needs markdown-it-py (which rich brings) and a Chromium on the path. The picture ends with the figure of
the card, or, where it has none, before the heading `UNTIL`.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from markdown_it import MarkdownIt

WIDTH = 1000  # CSS pixels, and pixels of the picture
QUALITY, UNTIL = "<h2>Quality</h2>", "<h2>Speed of This Variant</h2>"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
STYLE = """
* { box-sizing: border-box; }
body { margin: 0; padding: 28px 36px 12px; width: 1000px; background: #fff; color: #1f2328;
       font: 15px/1.5 "Noto Sans", "Liberation Sans", "Segoe UI", Helvetica, Arial, sans-serif; }
h1, h2 { line-height: 1.25; padding-bottom: .3em; border-bottom: 1px solid #d1d9e0b3; margin: 22px 0 14px; }
h1 { font-size: 28px; margin-top: 0; } h2 { font-size: 21px; }
p { margin: 0 0 14px; } a { color: #0969da; text-decoration: none; }
code { font: 85% "Liberation Mono", ui-monospace, monospace; background: #818b981f; padding: .2em .4em; border-radius: 6px; }
table { border-collapse: collapse; margin: 0 0 14px; font-size: 12.5px; }
th, td { border: 1px solid #d1d9e0; padding: 5px 9px; text-align: left; }
th { font-weight: 600; } tr:nth-child(2n) td { background: #f6f8fa; }
thead tr th:empty { padding: 0 11px; }
img { max-width: 760px; display: block; } img[src$="#hf-dark-mode-only"] { display: none; }
details { margin: 0 0 14px; }
"""


def page(card: str, folder: Path) -> str:
    """HTML of the card's top part, without the metadata. folder: where its pictures are."""
    text = re.sub(r"\A---\n.*?\n---\n", "", card, count=1, flags=re.S)
    body = MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><base href="{folder.resolve().as_uri()}/">'
    head += f"<style>{STYLE}</style>"
    top, heading, rest = body.partition(QUALITY)
    shown = top + heading + rest.split("<table>")[0] if "<img" in rest else body.split(UNTIL)[0]
    return f"{head}<body>{shown}</body></html>"


def browser() -> str:
    for name in BROWSERS:
        found = shutil.which(name)
        if found:
            return found
    sys.exit(f"no browser found; one of {', '.join(BROWSERS)} is needed")


def run(*arguments: str) -> str:
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--force-device-scale-factor=1")
    return subprocess.run(
        [browser(), *flags, *arguments], check=True, capture_output=True, text=True, timeout=120
    ).stdout


def main(card: Path, picture: Path) -> None:
    html = page(card.read_text(encoding="utf-8"), card.parent)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "card.html"
        # first the height of the page, which the page itself writes down; then a window of just that height
        measure = "<script>document.title = document.documentElement.scrollHeight</script>"
        source.write_text(html.replace("</body>", f"{measure}</body>"), encoding="utf-8")
        found = re.search(r"<title>(\d+)</title>", run(f"--window-size={WIDTH},100", "--dump-dom", source.as_uri()))
        height = int(found[1]) if found else 1000
        source.write_text(html, encoding="utf-8")
        run(f"--window-size={WIDTH},{height}", f"--screenshot={picture.resolve()}", source.as_uri())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
