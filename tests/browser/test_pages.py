"""The hub's pages in headless Chromium: what a card shows really shows, and nothing that a hostile one holds runs.

    sh scripts/browser.sh

A ladder of the bundled tiny model is built, measured and pushed to a hub on loopback by `publish` itself. With
PUBLISH_PICTURES=FOLDER that is the ladder of ladder.yaml, which takes minutes, and the picture of the docs is written
there; PUBLISH_WORK=FOLDER keeps what was built. Without Chromium on the path, or in PUBLISH_CHROMIUM, they are skipped.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest
from conftest import EXAMPLE, QUICK, run_process
from hub_cards import HOSTILE, SVG, png
from huggingface_hub import CommitOperationAdd, HfApi

from publisher.localhub import LocalHub

sync_api = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.browser

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --force-device-scale-factor=1"
)
TOKEN = "hf_browser"
QUICK_LADDER = f"""\
base: {{path: model, name: Qwen3.5-tiny}}
owner: demo
repo: "{{base}}-UD-{{id}}-mlx"
recipe: unsloth
imatrix: ./imatrix-tiny.gguf
evaluation: {{windows: 3, context: 64, chat_context: 160, greedy_tokens: 6}}
{QUICK}collection: {{title: "Qwen3.5 tiny, quantized for MLX"}}
variants:
  Q2_K_XL: {{bits: 2, note: smallest}}
  Q4_K_XL: {{bits: 4}}
  Q8_K_XL: {{bits: 8, note: closest to BF16}}
"""
REPO = "/demo/Qwen3.5-tiny-UD-Q4_K_XL-mlx"
WIDE, NARROW = (1280, 1000), (390, 844)  # CSS pixels


@pytest.fixture(scope="module")
def pictures() -> Path | None:
    """Where the pictures of the docs go, if they are to be made."""
    folder = os.environ.get("PUBLISH_PICTURES")
    return Path(folder).resolve() if folder else None


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, pictures: Path | None) -> Iterator[LocalHub]:
    """A hub with a ladder that `publish` built, measured and pushed, and a repository with a hostile card."""
    kept = os.environ.get("PUBLISH_WORK")
    work = Path(kept).resolve() if kept else tmp_path_factory.mktemp("browser") / "ladder"
    write(work, (Path(__file__).parent / "ladder.yaml").read_text() if pictures else QUICK_LADDER)
    with LocalHub(tmp_path_factory.mktemp("hub") / "hub", {TOKEN: "write:demo"}) as hub:
        if pictures:
            run_process("calibrate", cwd=work, timeout=1800).ok()
        run_process("build", "--all", "--eval", cwd=work, timeout=1800).ok()
        if pictures:
            run_process("eval", "--all", "--baselines", cwd=work, timeout=1800).ok()
            run_process("card", "--all", cwd=work).ok()
        env = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN}
        shutil.rmtree(work / "build/receipts", ignore_errors=True)  # of another hub
        run_process("push", "--all", "--yes", cwd=work, env=env, timeout=600).ok()
        push_hostile(HfApi(endpoint=hub.url, token=TOKEN))
        yield hub
        assert hub.stats.crashes == 0


def write(work: Path, ladder: str) -> None:
    work.mkdir(parents=True, exist_ok=True)
    for name in ("model", "imatrix-tiny.gguf"):
        if not (work / name).exists():
            (work / name).symlink_to(EXAMPLE / name)
    (work / "variants.yaml").write_text(ladder)


def push_hostile(api: HfApi) -> None:
    """All hostile pieces as one README, and each as a Markdown file."""
    files = {f"pieces/{n}.md": f"# Piece {n}\n\n{text}\n".encode() for n, text in enumerate(HOSTILE)}
    files |= {"README.md": "\n\n".join(["# Hostile", *HOSTILE]).encode(), "page.html": b"<script>window.ran=1</script>"}
    files |= {"images/a.png": png(), "images/b.svg": SVG, "pieces/images/a.png": png()}
    api.create_repo("demo/hostile")
    adds = [CommitOperationAdd(path, data) for path, data in files.items()]
    api.preupload_lfs_files("demo/hostile", additions=adds)
    api.create_commit("demo/hostile", operations=adds, commit_message="hostile")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    path = os.environ.get("PUBLISH_CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip("no Chromium on the path")
    with sync_api.sync_playwright() as playwright:
        # launch() makes an empty profile of its own and removes it
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS.split())
        yield browser
        browser.close()


@dataclass
class Watch:
    """What a page does beside showing itself."""

    foreign: list[str] = field(default_factory=list)  # requests that would have left the hub
    messages: list[str] = field(default_factory=list)
    dialogs: list[str] = field(default_factory=list)
    popups: list[str] = field(default_factory=list)

    def still(self) -> None:
        """Nothing left the hub, nothing opened, and the browser had nothing to say: no policy had to stop anything."""
        assert self == Watch()

    def harmless(self) -> None:
        """The same, while the test itself drives the page: its own scripts are among what the browser tells of."""
        assert (self.foreign, self.dialogs, self.popups) == ([], [], [])


class Visitor:
    """A window a size and colour scheme, used again; requests to anywhere but the hub are recorded and cut."""

    def __init__(self, hub: LocalHub, chromium: Any) -> None:
        self.hub, self.chromium = hub, chromium
        self.watch = Watch()
        self.pages: dict[Any, Any] = {}

    def __call__(self, path: str, size: tuple[int, int] = WIDE, scheme: str = "light") -> tuple[Any, Watch]:
        page = self.pages.get((size, scheme)) or self.window(size, scheme)
        self.pages[size, scheme] = page
        page.goto("about:blank")
        self.watch = Watch()
        page.goto(self.hub.url + path, wait_until="load")
        return page, self.watch

    def instead(self, body: str, policy: bool = True) -> tuple[Any, Watch]:
        """A page of the hub with another body, with the hub's own headers or without any policy."""
        url = f"{self.hub.url}/demo/hostile"
        headers = dict(httpx2.get(url).headers) if policy else {"content-type": "text/html"}
        headers.pop("content-length", None)
        # without a policy a page may never come to rest: it gets a window of its own
        page = self.window(WIDE, "light") if not policy else self("/demo/hostile")[0]
        self.watch = Watch()
        page.route(url, lambda route: route.fulfill(status=200, headers=headers, body=body))
        page.goto(url, wait_until="domcontentloaded")
        page.wait_for_timeout(50)
        page.unroute(url)
        return page, self.watch

    def window(self, size: tuple[int, int], scheme: str) -> Any:
        context = self.chromium.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
        context.route("**/*", self.guard)
        page = context.new_page()
        page.on("console", lambda message: self.watch.messages.append(message.text))
        page.on("dialog", lambda dialog: (self.watch.dialogs.append(dialog.message), dialog.dismiss()))
        page.on("popup", lambda other: self.watch.popups.append(other.url))
        return page

    def guard(self, route: Any) -> None:
        if route.request.url.startswith(f"{self.hub.url}/"):
            route.continue_()
        else:
            self.watch.foreign.append(route.request.url)
            route.abort()


@pytest.fixture(scope="module")
def visit(hub: LocalHub, chromium: Any) -> Visitor:
    return Visitor(hub, chromium)


def shown_images(page: Any) -> list[dict[str, Any]]:
    script = """[...document.querySelectorAll('article img')].map(i => ({src: i.getAttribute('src'),
        width: i.naturalWidth, seen: i.checkVisibility() && i.getBoundingClientRect().width > 0}))"""
    return page.evaluate(script)


# -- a rehearsed release --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_rehearsed_card_shows_its_tables_and_the_figure_of_the_colour_scheme(visit, scheme, pictures, tmp_path):
    page, watch = visit(REPO, scheme=scheme)
    images = shown_images(page)
    assert len(images) == 2
    assert all(image["width"] > 0 for image in images)
    assert [f"kld-{scheme}.png" in image["src"] for image in images if image["seen"]] == [True]
    table = page.locator("h2#quality ~ table").first
    rows = table.evaluate("t => [...t.rows].map(r => [...r.cells].map(c => c.innerText))")
    assert rows[0][:4] == ["Model", "Size", "Bits per weight", "Mean KLD [95 %]"]
    assert any(row[0].startswith("Q4_K_XL") and float(row[3].split()[0]) > 0 for row in rows[1:]), rows
    assert page.locator("article table").count() >= 5
    assert table.bounding_box()["height"] > 100
    assert page.get_by_text("a rehearsal hub on this machine, not huggingface.co").first.is_visible()
    watch.still()
    bottom = table.bounding_box()
    name = "hub.png" if scheme == "light" else "hub-dark.png"
    folder = pictures if pictures and scheme == "light" else tmp_path
    clip = {"x": 0, "y": 0, "width": WIDE[0], "height": bottom["y"] + bottom["height"] + 10}
    page.screenshot(path=folder / name, full_page=True, clip=clip)
    assert (folder / name).stat().st_size > 50_000


def test_a_narrow_window_needs_no_scrolling_sideways(visit, tmp_path):
    for path in ("/", REPO, f"{REPO}/tree/main", f"{REPO}/commits/main"):
        page, watch = visit(path, size=NARROW)
        assert page.evaluate("document.documentElement.scrollWidth") <= NARROW[0], path
        watch.still()
    page.screenshot(path=tmp_path / "narrow.png")


def test_the_ladder_can_be_walked_through_by_its_links(visit):
    page, watch = visit("/")
    page.get_by_role("link", name="Qwen3.5 tiny, quantized for MLX").click()
    assert page.locator("ol.repos > li").count() >= 3
    assert "closest to BF16" in page.locator("ol.repos .note").all_inner_texts()
    page.locator("ol.repos a.repo", has_text="Q4_K_XL").click()
    assert page.url.endswith(REPO)
    page.locator("article a", has_text="Q8_K_XL").or_(page.locator("article a", has_text="Q6_K_XL")).first.click()
    assert "/demo/Qwen3.5-tiny-UD-Q" in page.url  # the card's address of the Hub, here
    page.locator("nav.tabs a", has_text="Files").click()
    page.locator("table.files a", has_text="images/kld-light.png").click()
    assert page.locator("img.picture").evaluate("i => i.naturalWidth") > 0
    page.locator("nav.tabs a", has_text="Commits").click()
    page.get_by_text("initial commit").wait_for()
    page.goto(f"{page.url.rsplit('/commits', 1)[0]}#quality")
    assert page.locator("h2#quality").bounding_box()["y"] < WIDE[1] / 2
    watch.harmless()


# -- a hostile one --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["/demo/hostile", *(f"/demo/hostile/blob/main/pieces/{n}.md" for n in range(len(HOSTILE)))]
)
def test_a_hostile_card_runs_nothing_and_loads_nothing(visit, path):
    """Not even for the policy to stop: a browser reports what a policy stops, and it reports nothing."""
    page, watch = visit(path)
    page.wait_for_timeout(20)
    watch.still()
    for part in page.locator("article :is(summary, a[href^='#'], img, p, input)").all()[:20]:
        for event in ("click", "mouseover", "focus", "toggle", "error", "load"):
            part.dispatch_event(event)
    assert page.evaluate("window.ran") is None
    wrong = ":is(script, style, iframe, svg, math, form, button, object, embed, video, audio, link, meta, base)"
    assert page.evaluate(f"document.querySelectorAll('article {wrong}').length") == 0
    names = page.evaluate("[...document.querySelectorAll('article *')].flatMap(e => e.getAttributeNames())")
    assert not [name for name in set(names) if name.startswith("on") or name in ("style", "srcdoc", "ping", "target")]
    assert page.locator("article h1").first.inner_text().lstrip("#").split()[0] in ("Hostile", "Piece")
    assert urlsplit(page.url).path == path
    watch.harmless()


@pytest.mark.parametrize("n", range(len(HOSTILE)))
def test_the_policy_alone_stops_what_no_sanitiser_saw(visit, n):
    """The second line: the hub's own headers around the hostile text as it is."""
    page, watch = visit.instead(f"<!doctype html><body>{HOSTILE[n]}<p>the end</p>")
    assert page.evaluate("window.ran") is None
    assert page.url.endswith("/demo/hostile")
    watch.harmless()


@pytest.mark.parametrize("start", ["<script>", "<img src=x onerror", "<svg onload", "<iframe", "<style>", "<p style"])
def test_without_both_such_texts_do_run_or_load(visit, start):
    """The two tests above can fail."""
    text = next(text for text in HOSTILE if text.startswith(start))
    page, watch = visit.instead(f"<!doctype html><body>{text}", policy=False)
    for _ in range(100):
        if watch.foreign or page.evaluate("window.ran") == 1:
            break
        page.wait_for_timeout(50)
    assert watch.foreign or page.evaluate("window.ran") == 1
    page.context.close()


@pytest.mark.parametrize(
    "path",
    [
        "/-/image/models/demo/hostile/main/images/b.svg",
        "/demo/hostile/blob/main/page.html",
        "/demo/hostile/blob/main/images/b.svg",
    ],
)
def test_a_file_that_is_opened_by_itself_runs_nothing(visit, path):
    page, watch = visit(path)
    page.wait_for_timeout(100)
    assert page.evaluate("window.ran") is None
    watch.harmless()


def test_another_site_cannot_frame_a_page_or_use_its_images(visit, hub):
    body = f"<iframe src='{hub.url}{REPO}'></iframe><img src='{hub.url}/-/icon.svg'>"
    page, _ = visit("/")
    page.context.route(
        "http://evil.example/", lambda route: route.fulfill(status=200, body=body, content_type="text/html")
    )
    page.goto("http://evil.example/")
    page.wait_for_timeout(300)
    assert page.evaluate("document.images[0].naturalWidth") == 0
    frame = next((f for f in page.frames if f != page.main_frame), None)
    assert frame is None or "rehearsal hub" not in frame.content()
