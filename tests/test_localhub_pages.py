"""The hub's pages: what a person sees of a rehearsed release, and that nothing a card holds can run there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import pytest
from hub_cards import CARD, HOSTILE, PIECES, SVG, Seen, check_harmless, png
from huggingface_hub import CommitOperationAdd, HfApi
from hypothesis import given, settings
from hypothesis import strategies as st

from publisher.card_links import read_links
from publisher.localhub import LocalHub, pages
from publisher.localhub.pages_card import MARKDOWN_BYTES, render
from publisher.localhub.pages_links import Links

TOKEN, READ = "hf_write", "hf_read"
CLIENT = httpx2.Client(trust_env=False)  # one for all: making one takes longer than a page
REPO, BASE, HIDDEN = "acme/tiny-4bit", "acme/Tiny", "acme/secret"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    """A hub with a model, its base, a private one, a tag, a pull request and a collection. Not to be changed."""
    tokens = {TOKEN: "write:alice,acme", READ: "read:bob"}
    with LocalHub(tmp_path_factory.mktemp("pages") / "hub", tokens) as hub:
        fill(HfApi(endpoint=hub.url, token=TOKEN))
        yield hub
        assert hub.stats.crashes == 0


def fill(api: HfApi) -> None:
    push(api, BASE, {"README.md": b"---\nlicense: apache-2.0\n---\n# Base\n"})
    files = {"README.md": CARD.encode(), "LICENSE": b"Apache\n", "images/a.png": png(), "images/b.svg": SVG}
    files |= {"page.html": b"<script>alert(1)</script>", "<b>.txt": b"x", "model.safetensors": b"\0" * 5_220_000}
    first = push(api, REPO, files)
    api.create_tag(REPO, tag="v1")
    push(api, REPO, {"LICENSE": b"Apache 2\n"}, title="Licence <i>again</i>")
    push(api, REPO, {"README.md": b"# Proposed\n"}, title="Another card", create_pr=True)
    push(api, HIDDEN, {"README.md": b"# Secret\n"}, private=True)
    collection = api.create_collection("The ladder", namespace="acme", description="All <b>variants</b>")
    for repo, note in ((REPO, "5.22 MB"), (HIDDEN, "not yet"), (BASE, "the original & more")):
        api.add_collection_item(collection.slug, repo, "model", note=note)
    assert first


def push(
    api: HfApi,
    repo: str,
    files: dict[str, bytes],
    title: str = "Weights",
    private: bool = False,
    create_pr: bool = False,
) -> str:
    api.create_repo(repo, private=private, exist_ok=True)
    adds = [CommitOperationAdd(path, data) for path, data in files.items()]
    api.preupload_lfs_files(repo, additions=adds)
    return api.create_commit(repo, operations=adds, commit_message=title, create_pr=create_pr).oid


def get(hub: LocalHub, path: str, token: str | None = None, **headers: str) -> httpx2.Response:
    headers |= {"Authorization": f"Bearer {token}"} if token else {}
    return CLIENT.get(hub.url + path, headers=headers)


def page(hub: LocalHub, path: str, token: str | None = None) -> str:
    answer = get(hub, path, token)
    assert answer.status_code == 200, answer.text
    return answer.text


def collection_path(hub: LocalHub) -> str:
    return "/collections/" + HfApi(endpoint=hub.url).list_collections(owner="acme").__next__().slug


def head_of(hub: LocalHub) -> str:
    return HfApi(endpoint=hub.url).model_info(REPO).sha or ""


def rendered(text: str, *paths: str) -> str:
    return render(text, Links("models", REPO, "main", paths, "", lambda kind, id: None)).html


# -- what every page is ---------------------------------------------------------------------------------------

PAGES = (
    "/", "/acme", f"/{REPO}", f"/{REPO}/tree/main", f"/{REPO}/tree/v1", f"/{REPO}/tree/refs%2Fpr%2F1",
    f"/{REPO}/tree/main/images", f"/{REPO}/blob/main/README.md", f"/{REPO}/blob/main/images/a.png",
    f"/{REPO}/blob/main/model.safetensors", f"/{REPO}/blob/main/page.html", f"/{REPO}/commits/main",
    f"/{REPO}/discussions", f"/{REPO}/discussions/1",
)  # fmt: skip
ABSENT = (
    "/nobody", "/acme/none", f"/{HIDDEN}", f"/{REPO}/tree/none", f"/{REPO}/tree/main/none", f"/{REPO}/blob/main/none",
    f"/{REPO}/discussions/9", "/collections/acme/none-000000000000000000000000", f"/{REPO}/commit/{'0' * 40}",
)  # fmt: skip


FOREIGN_HOSTS = (
    "evil.example", "evil.example:{port}", "127.0.0.1", "localhost", "127.0.0.1.evil.example:{port}", "[::1]:{port}",
    "0.0.0.0:{port}",
)  # fmt: skip


def check_page(answer: httpx2.Response, url: str) -> None:
    text = answer.text
    assert "a rehearsal hub on this machine, not huggingface.co" in text
    assert "<script" not in text
    assert " style=" not in text
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert (policy["img-src"], policy["style-src"]) == ("'self'", "'self'")
    assert (policy["frame-ancestors"], policy["form-action"], policy["base-uri"]) == ("'none'",) * 3
    assert "script-src" not in policy
    assert "allow-scripts" not in policy["sandbox"]
    assert "unsafe" not in answer.headers["content-security-policy"]
    check_answer(answer)
    # what a page loads by itself is of this hub
    seen = Seen(text)
    loaded = seen.values("img", "src") + seen.values("link", "href") + seen.values("source", "srcset")
    assert all(urlsplit(url).netloc == "" and url.startswith("/-/") for url in loaded), loaded


def check_answer(answer: httpx2.Response) -> None:
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["x-frame-options"] == "DENY"
    assert answer.headers["cross-origin-resource-policy"] == "same-origin"
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "set-cookie" not in answer.headers
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("path", PAGES)
def test_every_page_says_that_it_is_not_the_hub_and_lets_nothing_run(hub, path):
    answer = get(hub, path)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    check_page(answer, hub.url)


@pytest.mark.parametrize("path", ABSENT)
def test_what_is_absent_or_private_is_a_page_as_well(hub, path):
    answer = get(hub, path)
    assert answer.status_code == 404
    check_page(answer, hub.url)


def test_commit_and_collection_pages_are_pages_too(hub):
    for path in (f"/{REPO}/commit/{head_of(hub)}", f"/{REPO}/tree/{head_of(hub)}", collection_path(hub)):
        check_page(get(hub, path), hub.url)


def test_an_unknown_address_is_a_page_for_a_browser_and_json_for_a_client(hub):
    browser = get(hub, "/api/nothing/here", Accept="text/html")
    assert browser.status_code == 404
    check_page(browser, hub.url)
    assert "error" in get(hub, "/api/nothing/here").json()


@pytest.mark.parametrize(
    "path", ["/api/models", f"/api/models/{REPO}", "/-/hub.css", f"/{REPO}/resolve/main/LICENSE", "/api/x"]
)
def test_answers_that_are_no_pages_have_the_headers_as_well(hub, path):
    check_answer(get(hub, path))


@pytest.mark.parametrize("host", FOREIGN_HOSTS)
@pytest.mark.parametrize(
    "path", ["/", f"/{REPO}", f"/-/image/models/{REPO}/main/images/a.png", f"/{REPO}/resolve/main/LICENSE"]
)
def test_a_foreign_host_header_is_refused(hub, path, host):
    """DNS rebinding: a page of another site whose name leads to this machine."""
    answer = get(hub, path, Host=host.format(port=urlsplit(hub.url).port))
    assert answer.status_code == 400
    assert "Apache" not in answer.text
    assert "Tiny" not in answer.text


def test_localhost_leads_to_the_pages(hub):
    port = urlsplit(hub.url).port
    answer = get(hub, f"/{REPO}/tree/refs%2Fpr%2F1", Host=f"localhost:{port}")
    assert (answer.status_code, answer.headers["location"]) == (307, f"{hub.url}/{REPO}/tree/refs%2Fpr%2F1")


def test_another_sites_page_can_neither_ask_nor_write(hub):
    """No cookie identifies anyone, and no preflight is answered: a write needs a header that a foreign page cannot send."""
    for method, headers in (("OPTIONS", {"Access-Control-Request-Method": "POST"}), ("POST", {})):
        answer = CLIENT.request(
            method, f"{hub.url}/api/repos/create", headers={"Origin": "https://evil.example"} | headers
        )
        assert answer.status_code in (400, 401, 404)
        assert not [name for name in answer.headers if name.startswith("access-control")]


# -- the card -------------------------------------------------------------------------------------------------


def test_a_card_is_shown_as_the_hub_shows_it(hub):
    seen = Seen(page(hub, f"/{REPO}"))
    cells = [attrs.get("align") for tag, attrs in seen.elements if tag == "td" and "class" not in attrs][:3]
    assert cells == ["left", "right", "center"]
    assert ("s", {}) in seen.elements
    boxes = [attrs for tag, attrs in seen.elements if tag == "input"]
    assert ["checked" in box for box in boxes] == [True, False]
    assert all(box["type"] == "checkbox" and "disabled" in box for box in boxes)
    assert 'print("<b>")' in seen.text
    assert any("markdown-alert-warning" in attrs.get("class", "") for _, attrs in seen.elements)
    assert "tiny" in seen.values("h1", "id")


def test_links_and_images_lead_to_the_files_of_that_revision(hub):
    for path, rev in ((f"/{REPO}", "main"), (f"/{REPO}/tree/v1", "v1")):
        seen = Seen(page(hub, path))
        images = [url for url in seen.values("img", "src") if url.startswith("/-/image/")]
        image = f"/-/image/models/{REPO}/{rev}/images/"
        assert images == [f"{image}a.png#hf-light-mode-only", f"{image}a.png"]
        assert seen.values("source", "srcset") == [f"{image}b.svg"]
        links = seen.values("a", "href")
        for link in (
            f"/{REPO}/blob/{rev}/LICENSE",
            f"/{REPO}/tree/{rev}/images",
            "#tiny",
            f"/{BASE}",
            "https://huggingface.co/else/where",
        ):
            assert link in links
        assert get(hub, images[1]).content == png()
    assert get(hub, f"/{REPO}/blob/v1/LICENSE").text != get(hub, f"/{REPO}/blob/main/LICENSE").text


@pytest.mark.parametrize(
    ("given", "link", "image"),
    [
        ("b.md", f"/{REPO}/blob/v1/docs/b.md", None),
        ("b.md?x=1#part", f"/{REPO}/blob/v1/docs/b.md#part", None),
        ("i%20j.png", f"/{REPO}/blob/v1/docs/i%20j.png", f"/-/image/models/{REPO}/v1/docs/i%20j.png"),
        ("../x.png", f"/{REPO}/blob/v1/x.png", f"/-/image/models/{REPO}/v1/x.png"),
        ("../../x.png", None, None),
        ("..", f"/{REPO}/tree/v1", None),
        ("#part", "#part", None),
        ("/x.png", "https://huggingface.co/x.png", "https://huggingface.co/x.png"),
        ("//far.example/x.png", "https://far.example/x.png", "https://far.example/x.png"),
        ("/\\far.example/x.png", "https://far.example/x.png", "https://far.example/x.png"),
        ("/acme/Tiny", "/acme/Tiny", "https://huggingface.co/acme/Tiny"),
        ("/acme/Tiny/resolve/main/x.png", "/acme/Tiny/blob/main/x.png", "/-/image/models/acme/Tiny/main/x.png"),
        ("https://hf.co/acme/Tiny/raw/main/x.png", "/acme/Tiny/blob/main/x.png", "/-/image/models/acme/Tiny/main/x.png"),
        ("https://hf.co/acme/Other", "https://hf.co/acme/Other", "https://hf.co/acme/Other"),
        ("https://hf.co@far.example/acme/Tiny", "https://hf.co@far.example/acme/Tiny", "https://hf.co@far.example/acme/Tiny"),
        ("mailto:a@b.example", "mailto:a@b.example", None),
        ("javascript:alert(1)", None, None),
        (" java\nscript:alert(1)", None, None),
        ("data:image/png;base64,x", None, None),
        ("https:far.example", None, None),
        ("http://[::1", None, None),
    ],
)  # fmt: skip
def test_an_address_leads_where_a_browser_would_take_it_or_nowhere(given, link, image):
    held = {("models", "acme/Tiny"): {"x.png"}}
    links = Links("models", REPO, "v1", {"docs/b.md", "docs/i j.png", "x.png"}, "docs", lambda k, i: held.get((k, i)))
    assert (links.href(given), links.image(given)) == (link, image)


def test_what_leads_nowhere_is_told(hub):
    text = page(hub, f"/{REPO}")
    for problem in (
        "link nowhere.md: no such file", "link ../../etc/passwd: no such file", "image images/no.png: no such file",
        "link #nothing: no such heading",
    ):  # fmt: skip
        assert problem in text
    assert "nowhere.md" not in Seen(text).values("a", "href")


def test_images_of_other_sites_are_links_and_the_page_says_so(hub):
    text = page(hub, f"/{REPO}")
    assert "https://tracker.example/p.png" in Seen(text).values("a", "href")
    assert "1 image of other sites: this page loads nothing from outside and shows it as a link" in text


def test_metadata_model_tree_files_and_versions_stand_beside_the_card(hub):
    text = page(hub, f"/{REPO}")
    seen = Seen(text)
    for value in ("apache-2.0", "text-generation", "mlx", "4-bit", "zh", "nested:", "base_model (quantized)"):
        assert value in seen.text
    links = set(seen.values("a", "href"))
    assert {f"/{BASE}", "https://huggingface.co/datasets/someone/else", f"/{REPO}/blob/main/LICENSE"} <= links
    assert {f"/{REPO}/tree/v1", f"/{REPO}/discussions/1", f"/{REPO}/commit/{head_of(hub)}"} <= links
    assert "5.22 MB" in seen.text
    assert "/collections/acme/the-ladder-" in text
    assert "license: apache-2.0" not in seen.text  # the front matter is no part of the card


def test_metadata_that_the_hub_would_refuse_is_told(hub):
    """A README.md with it does not get in; other Markdown does."""
    push(HfApi(endpoint=hub.url, token=TOKEN), "acme/wrong", {"draft.md": b"---\nlicense: [a]\n---\n# X\n"})
    text = page(hub, "/acme/wrong/blob/main/draft.md")
    assert "The Hub would refuse" in text
    assert "&#34;license&#34; must be a string" in text


def test_names_and_texts_that_were_pushed_are_escaped(hub):
    for path in (
        f"/{REPO}",
        f"/{REPO}/tree/main",
        f"/{REPO}/commits/main",
        collection_path(hub),
        f"/{REPO}/blob/main/page.html",
    ):
        text = page(hub, path)
        assert "<b>" not in text
        assert "<i>again" not in text
    assert "&lt;script&gt;alert(1)" in page(hub, f"/{REPO}/blob/main/page.html")


def test_a_collection_has_its_items_in_order_with_notes(hub):
    text = page(hub, collection_path(hub))
    assert (
        text.index("tiny-4bit")
        < text.index("5.22 MB")
        < text.index("acme/Tiny")
        < text.index("the original &amp; more")
    )
    assert "secret" not in text
    assert "not yet" not in text


def test_history_and_pull_requests_show_what_changed(hub):
    text = page(hub, f"/{REPO}/commits/main")
    assert text.index("Licence &lt;i&gt;again") < text.index("Weights") < text.index("initial commit")
    assert "tag v1" in text
    text = page(hub, f"/{REPO}/discussions/1")
    assert "Another card" in text
    assert re.search(r"changed</span></td><td>README.md", text)
    assert f"/{REPO}/tree/refs%2Fpr%2F1" in text
    assert "Proposed</h1>" in page(hub, f"/{REPO}/tree/refs%2Fpr%2F1")


def test_private_repositories_are_on_no_page_without_their_token(hub):
    for path in ("/", "/acme", collection_path(hub)):
        assert "secret" not in page(hub, path)
        assert "secret" not in page(hub, path, READ)
        assert "secret" in page(hub, path, TOKEN)
    missing, private = get(hub, "/acme/missing"), get(hub, f"/{HIDDEN}")
    assert (missing.status_code, missing.text) == (private.status_code, private.text)
    assert "Secret</h1>" in page(hub, f"/{HIDDEN}", TOKEN)


def test_a_gated_repository_shows_its_card_and_not_its_files(hub):
    api = HfApi(endpoint=hub.url, token=TOKEN)
    push(api, "acme/gated", {"README.md": b"# Shown\n\n![](a.png)\n", "a.png": png(), "config.json": b"{}"})
    api.update_repo_settings("acme/gated", gated="manual")
    assert "Shown</h1>" in page(hub, "/acme/gated")
    assert "config.json" in page(hub, "/acme/gated/tree/main")
    for path in ("/acme/gated/blob/main/config.json", "/-/image/models/acme/gated/main/a.png"):
        assert get(hub, path).status_code == 401
        assert get(hub, path, READ).status_code == 403
        assert get(hub, path, TOKEN).status_code == 200


# -- files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["page.html", "images/b.svg", "images/a.png", "README.md", "LICENSE"])
def test_a_file_itself_has_no_type_that_runs(hub, name):
    answer = CLIENT.get(f"{hub.url}/{REPO}/resolve/main/{name}", follow_redirects=True)
    assert answer.status_code == 200
    kind = answer.headers["content-type"].split(";")[0]
    assert kind in ("text/plain", "application/octet-stream")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "sandbox" in answer.headers["content-security-policy"]


def test_images_have_their_type_and_an_svg_runs_nothing(hub):
    base = f"/-/image/models/{REPO}/main"
    assert get(hub, f"{base}/images/a.png").headers["content-type"] == "image/png"
    svg = get(hub, f"{base}/images/b.svg")
    assert svg.headers["content-type"] == "image/svg+xml"
    assert "sandbox" in svg.headers["content-security-policy"]
    assert "allow-" not in svg.headers["content-security-policy"]
    for name in ("page.html", "model.safetensors", "images/none.png", "README.md"):
        assert get(hub, f"{base}/{name}").status_code == 404


# -- hostile cards --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("card", HOSTILE)
def test_a_hostile_card_comes_out_harmless(card):
    check_harmless(rendered(card, "images/a.png"))
    check_harmless(rendered(f"<div>\n\n{card}\n\n</div>\n\n> {card}", "images/a.png"))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(HOSTILE + PIECES), st.text(max_size=8)), max_size=14).map("".join))
def test_no_mixture_of_hostile_pieces_comes_out_harmful(card):
    html = rendered(card.encode("utf-8", "replace").decode(), "images/a.png")
    check_harmless(html)


def test_a_card_too_long_to_render_is_not_rendered(hub):
    api = HfApi(endpoint=hub.url, token=TOKEN)
    push(api, "acme/long", {"README.md": b"x" * (MARKDOWN_BYTES + 1)})
    assert "no README.md that could be shown" in page(hub, "/acme/long")


@pytest.mark.parametrize(
    ("heading", "anchor"),
    [
        ("All Variants", "all-variants"),
        ("Per-Tensor Bit Assignments (N=4)", "per-tensor-bit-assignments-n4"),
        ("What's `new`?", "whats-new"),
        ("Größe & Mass", "größe--mass"),
        ("a_b  c", "a_b--c"),
    ],
)
def test_anchors_are_those_of_github_here_and_for_the_gate(heading, anchor):
    text = f"## {heading}\n\n## {heading}\n"
    assert Seen(rendered(text)).values("h2", "id") == [anchor, f"{anchor}-1"]
    assert read_links(text)[1] == {anchor, f"{anchor}-1"}


def test_the_style_sheet_loads_nothing():
    css = (Path(pages.__file__).parent / "html/hub.css").read_text()
    assert "url(" not in css
    assert "@import" not in css
