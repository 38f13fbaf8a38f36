"""The block of a card that is the publisher's own: kept through rendering, taken over from the hub, never lost."""

from __future__ import annotations

from pathlib import Path

import pytest
from card_ladder import DENSE, TEXT, base, build, ladder
from huggingface_hub import HfApi
from variant_folder import CARD, make_project, make_variant

from inference.errors import InputError, RemoteChanged
from publisher.base import resolve_base
from publisher.build import card_texts, keep_own, render_cards
from publisher.card import gather, render
from publisher.card_notes import NOTES_BYTES, Notes, merge, read_notes, split, with_notes
from publisher.gate import gate
from publisher.hub import Hub
from publisher.localhub import LocalHub
from publisher.preflight import check
from publisher.push import execute, plan_push, remote_state
from publisher.variants import Project

WRITE = "hf_notesWRITEtoken"
REPO = "acme/Tiny-1B-UD-Q4-mlx"
BEGIN, END = "<!-- notes:begin -->\n", "<!-- notes:end -->\n"
YAML = """\
base: {path: base, repo: Qwen/Qwen3.5-9B}
owner: acme
variants:
  Q4_K_XL: {bits: 4}
"""
HOSTILE = "Text {{ facts.base }} {% raw %} ~~ \t \r\n\r\n\r\n   trailing   \nünïcödé\u2028 end\n"


SMALL = {**DENSE, "text_config": {**TEXT, "num_hidden_layers": 4}}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a built variant; tests change its card and variants.yaml only."""
    folder = tmp_path_factory.mktemp("notes")
    original = base(folder / "base", SMALL)
    build(ladder(folder, YAML), "Q4_K_XL", original, None)
    return folder


@pytest.fixture
def dense(root: Path) -> Path:
    return root / "base"


@pytest.fixture
def project(root: Path) -> Project:
    return ladder(root, YAML)


@pytest.fixture
def card(project: Project, dense: Path) -> Path:
    path = project.store.variant("Q4_K_XL") / "README.md"
    path.unlink(missing_ok=True)
    path.write_text(render(gather(project, dense), "Q4_K_XL", None))
    return path


def write_notes(card: Path, notes: str) -> None:
    card.write_bytes(with_notes(card.read_bytes().decode(), Notes(notes)).encode())


def rendered(project: Project, dense: Path, templates: Path | None = None) -> str:
    return render(gather(project, dense), "Q4_K_XL", templates)


# -- rendering ------------------------------------------------------------------------------------------------


def test_a_rendered_card_has_an_empty_block_with_a_hint(project: Project, dense: Path, card: Path) -> None:
    text = card.read_text()
    assert text.count(BEGIN + END) == 1
    assert "stays when this card is rendered again" in text
    assert split(text).notes == ""  # type: ignore[union-attr]


@pytest.mark.parametrize("notes", ["Mine.\n", HOSTILE, "\n\n\n", "| a | b |\r\n|---|---|\r\n", "```\n{{ x }}\n```\n"])
def test_notes_are_kept_byte_for_byte(project: Project, dense: Path, card: Path, notes: str) -> None:
    write_notes(card, notes)
    before = card.read_bytes()
    assert rendered(project, dense).encode() == before
    assert rendered(project, dense).encode() == before
    assert card_texts(project, gather(project, dense))[0]["Q4_K_XL"].encode() == before, "not stale"


def test_a_card_that_changes_keeps_its_notes(root: Path, card: Path) -> None:
    write_notes(card, HOSTILE)
    project = ladder(root, YAML + "card: {intro: A new sentence.}\n")
    resolved = resolve_base(project, lambda: pytest.fail("no hub"), weights=False)
    assert render_cards(project, resolved).changed == {"Q4_K_XL"}
    text = card.read_bytes().decode()
    assert "A new sentence." in text
    assert split(text).notes == HOSTILE  # type: ignore[union-attr]
    assert not render_cards(project, resolved).changed, "a card with line ends of its own is not stale"


def test_notes_never_run_as_a_template(project: Project, dense: Path, card: Path) -> None:
    write_notes(card, "{{ 7 * 6 }} {% for x in range(10**9) %}x{% endfor %}\n")
    assert "{{ 7 * 6 }}" in rendered(project, dense)
    assert "42" not in split(rendered(project, dense)).notes  # type: ignore[union-attr]


def test_a_template_without_the_block_does_not_lose_notes(
    project: Project, dense: Path, card: Path, tmp_path: Path
) -> None:
    templates = tmp_path / "own"
    templates.mkdir()
    (templates / "card.md.j2").write_text('{% extends "builtin/card.md.j2" %}{% block notes %}{% endblock %}')
    write_notes(card, "")
    assert "notes:begin" not in rendered(project, dense, templates)
    write_notes(card, "Mine.\n")
    with pytest.raises(InputError, match=r"Q4_K_XL: README\.md holds notes, but the template has no place for them"):
        rendered(project, dense, templates)


def test_notes_of_a_template_are_a_beginning(project: Project, dense: Path, card: Path, tmp_path: Path) -> None:
    templates = tmp_path / "own"
    templates.mkdir()
    own = f'{{% extends "builtin/card.md.j2" %}}{{% block notes %}}\n{BEGIN}Write to us.\n{END}{{% endblock %}}'
    (templates / "card.md.j2").write_text(own)
    card.unlink()
    assert split(rendered(project, dense, templates)).notes == "Write to us.\n"  # type: ignore[union-attr]
    card.write_text(rendered(project, dense, templates))
    write_notes(card, "Done.\n")
    assert split(rendered(project, dense, templates)).notes == "Done.\n"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BEGIN, "line 1: notes:begin without a notes:end"),
        (END, "line 1: notes:end where it cannot be"),
        (END + BEGIN, "line 1: notes:end where it cannot be"),
        (BEGIN + BEGIN + END, "line 2: notes:begin where it cannot be"),
        (BEGIN + END + BEGIN + END, "line 3: notes:begin where it cannot be"),
        (BEGIN + "x" * NOTES_BYTES + "\n" + END, f"hold {NOTES_BYTES + 1} bytes; at most {NOTES_BYTES} are kept"),
    ],
)
def test_marks_that_make_no_block_are_told_and_nothing_is_overwritten(
    project: Project, dense: Path, card: Path, text: str, message: str
) -> None:
    card.write_text(text)
    with pytest.raises(InputError, match=message) as e:
        rendered(project, dense)
    assert "\n" not in str(e.value)
    assert "Q4_K_XL/README.md" in str(e.value)
    assert card.read_text() == text


def test_a_rebuild_keeps_notes_and_nothing_else_of_the_card(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    for folder in (old, new):
        folder.mkdir()
    (old / "README.md").write_text("# Old\n" + BEGIN + END)
    keep_own(old, new)
    assert not (new / "README.md").exists()
    (old / "README.md").write_text("# Old\n" + BEGIN + "Mine.\n" + END)
    keep_own(old, new)
    assert read_notes(new / "README.md") == Notes("Mine.\n")


# -- the gate -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("notes", "fault"),
    [
        ("Speed: TBD\n", "placeholder 'TBD'"),
        ("See /home/somebody/models/x\n", "path of a machine '/home/somebody/models/x'"),
        ("hf_" + "a" * 20 + "\n", "access token 'hf_aaa…'"),
        ("![x](images/no.png)\n", "image 'images/no.png' is no file that is pushed"),
        ("```\nopen\n", "code block is not closed"),
    ],
)
def test_the_gate_looks_at_notes_as_at_the_rest(tmp_path: Path, notes: str, fault: str) -> None:
    project = make_project(tmp_path)
    card = make_variant(project) / "README.md"
    card.write_text(CARD.format(id="Q4") + "\n" + BEGIN + notes + END)
    (refusal,) = gate(project, "Q4")
    assert fault in refusal
    assert refusal.endswith("correct the notes in README.md")


@pytest.mark.parametrize("notes", ["Use {{ x }} and {% if y %}.\n", "a\u2028b {{ x }}\n", "```\n{{ x\n```\n"])
def test_braces_are_text_in_notes_and_nowhere_else(tmp_path: Path, notes: str) -> None:
    project = make_project(tmp_path)
    card = make_variant(project) / "README.md"
    for before, after in (("", ""), ("{{ y }}", ""), ("", "{% y\n")):
        text = CARD.format(id="Q4") + f"\nA\u2028line. {before}\n" + BEGIN + notes + END + after
        card.write_bytes(text.encode())
        assert any("placeholder" in r for r in gate(project, "Q4")) == bool(before or after)


# -- the hub --------------------------------------------------------------------------------------------------


def with_block(notes: str, title: str = "Four bits of a small model.") -> str:
    return CARD.format(id="Q4").replace("Four bits of a small model.", title) + "\n" + BEGIN + notes + END


@pytest.fixture
def server(tmp_path: Path):
    with LocalHub(tmp_path / "hub", {WRITE: "write:alice,acme"}) as server:
        yield server
        assert server.stats.crashes == 0


@pytest.fixture
def pushed(server: LocalHub, tmp_path: Path):
    """A variant on the hub, whose card says `first` in its notes."""
    project = make_project(tmp_path / "project")
    make_variant(project)
    local(project).write_text(with_block("first\n"))
    hub = Hub(server.url, WRITE, patience_s=5, pause_s=0.01)
    execute(hub, project, plan_push(hub, project, "Q4"))
    return project, hub


def local(project: Project) -> Path:
    return project.store.variant("Q4") / "README.md"


def somebody_writes(server: LocalHub, text: str) -> None:
    HfApi(server.url, WRITE).upload_file(path_or_fileobj=text.encode(), path_in_repo="README.md", repo_id=REPO)


def on_the_hub(server: LocalHub) -> str:
    path = HfApi(server.url, WRITE).hf_hub_download(REPO, "README.md", force_download=True)
    return Path(path).read_bytes().decode()


def test_notes_that_changed_on_the_hub_alone_are_taken_over_and_nothing_is_committed(server, pushed) -> None:
    project, hub = pushed
    somebody_writes(server, with_block("theirs\r\n"))
    plan = plan_push(hub, project, "Q4")
    assert (plan.foreign, plan.refusal, plan.notes) == ((), None, "theirs\r\n")
    assert "its notes were changed on the hub; push takes them over" in remote_state(hub, project, "Q4").differences[0]
    (told,), errors = check(project, hub, [plan])
    assert "notes that were changed on the hub are taken over" in told.told
    assert not errors
    assert local(project).read_text() == with_block("first\n"), "planning changes nothing"
    server.stats.reset()
    execute(hub, project, told)
    assert local(project).read_bytes().decode() == on_the_hub(server) == with_block("theirs\r\n")
    assert server.stats.requests["commit"] == 0
    assert plan_push(hub, project, "Q4").up_to_date


def test_notes_of_the_hub_join_what_changed_here(server, pushed) -> None:
    project, hub = pushed
    somebody_writes(server, with_block("theirs\n"))
    local(project).write_text(with_block("first\n", "Better words."))
    execute(hub, project, plan_push(hub, project, "Q4"))
    assert local(project).read_text() == on_the_hub(server) == with_block("theirs\n", "Better words.")


def test_the_same_notes_on_both_sides_are_no_conflict(server, pushed) -> None:
    project, hub = pushed
    somebody_writes(server, with_block("same\n"))
    local(project).write_text(with_block("same\n", "Better words."))
    plan = plan_push(hub, project, "Q4")
    assert (plan.foreign, plan.notes) == ((), None)
    execute(hub, project, plan)
    assert on_the_hub(server) == with_block("same\n", "Better words.")


def test_notes_changed_on_both_sides_stop_the_push_with_both_differences(server, pushed) -> None:
    project, hub = pushed
    somebody_writes(server, with_block("theirs\n"))
    local(project).write_text(with_block("ours\n"))
    plan = plan_push(hub, project, "Q4")
    with pytest.raises(RemoteChanged, match="notes that were changed here and on the hub") as e:
        execute(hub, project, plan)
    assert "+theirs" in str(e.value)
    assert "+ours" in str(e.value)
    assert "take over what is to stay into the notes in build/Q4/README.md and push with --overwrite" in str(e.value)
    assert "variants.yaml" not in str(e.value).splitlines()[0]
    assert on_the_hub(server) == with_block("theirs\n")
    assert local(project).read_text() == with_block("ours\n")
    execute(hub, project, plan_push(hub, project, "Q4", overwrite=True))
    assert on_the_hub(server) == with_block("ours\n")


@pytest.mark.parametrize(
    "theirs", [with_block("theirs\n", "Other words."), CARD.format(id="Q4"), with_block("x\n") + BEGIN + END]
)
def test_an_edit_outside_of_the_notes_stays_a_foreign_edit(server, pushed, theirs: str) -> None:
    project, hub = pushed
    somebody_writes(server, theirs)
    plan = plan_push(hub, project, "Q4")
    assert [f.path for f in plan.foreign] == ["README.md"]
    with pytest.raises(RemoteChanged, match=r"README\.md was edited on the hub since the last push"):
        execute(hub, project, plan)
    assert on_the_hub(server) == theirs


def test_notes_of_the_hub_that_may_not_leave_are_refused_and_not_taken_over(server, pushed) -> None:
    project, hub = pushed
    somebody_writes(server, with_block("Speed: TBD\n"))
    _, errors = check(project, hub, [plan_push(hub, project, "Q4")])
    assert "notes on the hub: line 16: placeholder 'TBD'; correct them there" in str(errors["Q4"])
    assert local(project).read_text() == with_block("first\n")


def test_without_what_was_pushed_last_an_edit_is_foreign(server, pushed) -> None:
    project, hub = pushed
    project.store.receipt("Q4").unlink()
    somebody_writes(server, with_block("theirs\n"))
    assert [f.path for f in plan_push(hub, project, "Q4").foreign] == ["README.md"]


def test_an_edit_of_another_text_file_is_shown(server, pushed) -> None:
    project, hub = pushed
    config = project.store.variant("Q4") / "config.json"
    for path, content in (("config.json", b'{"edited": 1}\n'), ("LICENSE", b"\0binary")):
        HfApi(server.url, WRITE).upload_file(path_or_fileobj=content, path_in_repo=path, repo_id=REPO)
    diffs = {f.path: f.diff for f in plan_push(hub, project, "Q4").foreign}
    assert diffs["config.json"].startswith("--- config.json as pushed\n+++ config.json on the hub\n")
    assert '+{"edited": 1}' in diffs["config.json"]
    assert "-" + config.read_text().splitlines()[0] in diffs["config.json"]
    assert diffs["LICENSE"] == ""
    project.store.receipt("Q4").unlink()
    (diff,) = (f.diff for f in plan_push(hub, project, "Q4").foreign if f.path == "config.json")
    assert diff.startswith("--- config.json here\n")


@pytest.mark.parametrize(
    ("here", "there", "foreign", "take", "both"),
    [
        ("a", "a", False, None, False),
        ("b", "a", False, None, False),
        ("a", "b", False, "b\n", False),
        ("b", "b", False, None, False),
        ("b", "c", True, None, True),
    ],
)
def test_three_cards_are_merged(here: str, there: str, foreign: bool, take: str | None, both: bool) -> None:
    found = merge(*(with_block(f"{x}\n") for x in (here, "a", there)))
    assert (found.foreign, found.take, found.both) == (foreign, take, both)
