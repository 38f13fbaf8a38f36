"""Before the first byte: what is wrong here (`gate`), and what the hub has to say (`preflight`), a line each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from variant_folder import CARD, LADDER, make_project, make_variant, seal

from inference.errors import AuthError, GateRefused, HubUnavailable, InputError
from publisher.account import Account, Owner, account_of, private_limit
from publisher.card_links import link_faults
from publisher.card_metadata import LICENSES, metadata_faults, unlisted_license
from publisher.gate import gate
from publisher.hub import Hub
from publisher.localhub import Fault, LocalHub
from publisher.preflight import check, together
from publisher.push import execute, plan_push
from publisher.variants import Project, load_project

WRITE, READ, STRANGER = "hf_preflightWRITE", "hf_preflightREAD", "hf_preflightSTRANGER"
TOKENS = {WRITE: "write:alice,acme", READ: "read:alice,acme", STRANGER: "write:bob,elsewhere"}
REPO = "acme/Tiny-1B-UD-Q4-mlx"
HUGGING_FACE = "https://huggingface.co"


@pytest.fixture
def project(tmp_path: Path) -> Project:
    project = make_project(tmp_path / "project")
    make_variant(project)
    return project


@pytest.fixture
def server(tmp_path: Path):
    with LocalHub(tmp_path / "hub", TOKENS) as server:
        yield server
        assert server.stats.crashes == 0


def connect(server: LocalHub, token: str | None = WRITE) -> Hub:
    return Hub(server.url, token, patience_s=5, pause_s=0.01)


def card(project: Project) -> Path:
    return project.store.variant("Q4") / "README.md"


def nothing_was_sent(server: LocalHub) -> bool:
    routes = ("repo_create", "commit", "preupload", "lfs_batch", "lfs_put", "tag_create")
    return not any(server.stats.requests[route] for route in routes)


# -- the card's metadata --------------------------------------------------------------------------------------


def front(lines: str) -> str:
    return f"---\n{lines}\n---\n\n# Card\n"


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        ("license: 7", "line 2: license: found 7, expected text, or a list of texts"),
        ("license: Apache 2.0", "line 2: license: found 'Apache 2.0', expected an id such as apache-2.0"),
        ("license: [mit, 3]", "line 2: license: found ['mit', 3], expected text, or a list of texts"),
        ("license: mit\nlanguage: EN", "line 3: language: found 'EN', expected a code of two or three small letters"),
        ("license: mit\nlanguage: [en, english]", "line 3: language: found 'english', expected a code"),
        ("license: mit\ntags: mlx", "line 3: tags: found 'mlx', expected a list of texts"),
        ("license: mit\ntags: [mlx, 4]", "line 3: tags: found ['mlx', 4], expected a list of texts"),
        ("license: mit\ntags: [mlx, null]", "line 3: tags: found ['mlx', None], expected a list of texts"),
        (
            "license: mit\npipeline_tag: [text-generation]",
            "line 3: pipeline_tag: found ['text-generation'], expected text",
        ),
        (
            "license: mit\npipeline_tag: Text Generation",
            "line 3: pipeline_tag: found 'Text Generation', expected a task",
        ),
        ("license: mit\npipeline_tag:", "line 3: pipeline_tag: found nothing, expected text"),
        ("license: mit\nlibrary_name: 1.5", "line 3: library_name: found 1.5, expected text"),
        ("license: mit\nbase_model: ./model", "line 3: base_model: found './model', expected a model id"),
        ("license: mit\nbase_model: /data/model", "line 3: base_model: found '/data/model', expected a model id"),
        ("license: mit\nbase_model: Kokoro 82M", "line 3: base_model: found 'Kokoro 82M', expected a model id"),
        ("license: mit\nbase_model: acme/x", "line 3: base_model: found acme/x, which is this repo itself"),
        (
            "license: mit\nbase_model_relation: finetuned",
            "line 3: base_model_relation: found 'finetuned', expected one of",
        ),
        ("license: mit\nmodel-index: none", "line 3: model-index: found 'none', expected a list"),
        ("license: mit\nlicense: mit", "line 3: license stands in the front matter twice"),
        ("license: [", "front matter is not YAML"),
        ("license: mit\nx: " + "[" * 4000, "front matter is nested more than 50 deep"),
        ("license: mit\nx: " + "y" * 70_000, "front matter is larger than 65536 bytes"),
        ("tags: [mlx]", "front matter names no license"),
        (
            "license: mit\nlicense_link: LICENCE.md",
            "line 3: license_link: found LICENCE.md, which is no file of the repo",
        ),
    ],
)
def test_metadata_that_the_hub_refuses_is_refused_here(lines: str, fault: str) -> None:
    faults = metadata_faults(front(lines), "acme/x", {"README.md", "config.json"})
    assert len(faults) == 1, faults
    assert fault in faults[0]
    assert "\n" not in faults[0]


@pytest.mark.parametrize(
    "lines",
    [
        "license: mit",
        "license: [mit]\nlanguage: no",  # Norwegian, to the Hub's YAML
        "license: other\nlicense_name: x\nlicense_link: https://example.org/license",
        "license: other\nlicense_link: LICENSE.txt",
        "license: other",
        "license: mit\nlanguage: [en, zh-Hant, code, multilingual, yue]",
        "license: mit\nbase_model: [Qwen/Qwen3.5-9B, gpt2]\nbase_model_relation: merge",
        "license: mit\nanything_else: {is: [free]}",
    ],
)
def test_metadata_that_the_hub_takes_passes(lines: str) -> None:
    assert metadata_faults(front(lines), "acme/x", {"LICENSE.txt"}) == []


def test_a_licence_that_needs_its_text_needs_a_file(project: Project) -> None:
    card(project).write_text(CARD.format(id="Q4").replace("license: apache-2.0", "license: other"))
    assert gate(project, "Q4") == []
    (project.store.variant("Q4") / "LICENSE").unlink()
    seal(project, "Q4")
    (refusal,) = gate(project, "Q4")
    assert "license: other needs its text: expected a file LICENSE" in refusal


def test_an_unlisted_licence_is_told_and_left_to_the_hub() -> None:
    assert all(unlisted_license(front(f"license: {name}")) is None for name in LICENSES)
    assert "perhaps apache-2.0" in (unlisted_license(front("license: apache2.0")) or "")
    assert "perhaps gpl-3.0" in (unlisted_license(front("license: gpl-3.0-or-later")) or "")
    assert metadata_faults(front("license: gpl-3.0-or-later")) == []


# -- links and images -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[a](docs/missing.md)", "link 'docs/missing.md' is no file that is pushed"),
        ("![a](images/no.png)", "image 'images/no.png' is no file that is pushed"),
        ("![a](Images/kld.png)", "image 'Images/kld.png' is no file that is pushed"),
        ('<img src="images/no.png">', "image 'images/no.png' is no file that is pushed"),
        ('<picture><source srcset="images/no.png 2x"></picture>', "image 'images/no.png' is no file"),
        ("| a |\n|---|\n| [x](gone.txt) |", "link 'gone.txt' is no file that is pushed"),
        ("[a][r]\n\n[r]: gone.txt", "link 'gone.txt' is no file that is pushed"),
        ("[a](../other/README.md)", "leads out of the repo"),
        ("[a](/Qwen/Qwen3.5-9B)", "starts at the server's root"),
        ("[a](#nowhere)", "is no heading of the card"),
        ("[a](http://example.org)", "is http; expected https"),
        ("<http://example.org>", "is http; expected https"),
        ("[a](javascript:alert(1))", "is javascript; expected https"),
        ("[a](file:///etc/passwd)", "is file; expected https"),
        ("[a](https://localhost:8000/x)", "names no host of the web"),
        ("[a](https://127.0.0.1/x)", "names no host of the web"),
        ("[a](https://me:secret@example.org)", "holds a user name"),
        ("[a](<https://exa mple.org>)", "is no well-formed address"),
        ("[a](https://example.org:99999)", "is no well-formed address"),
        ("[a](https://-bad-.org)", "names no host of the web"),
        ("[a]()", "names nothing"),
    ],
)
def test_a_link_that_leads_nowhere_is_refused(text: str, fault: str) -> None:
    faults = link_faults(front("license: mit") + text, {"README.md", "images/kld.png"})
    assert len(faults) == 1, faults
    assert fault in faults[0]
    assert faults[0].startswith("line ")


@pytest.mark.parametrize(
    "text",
    [
        "![a](images/kld.png#hf-light-mode-only) [b](./images/kld.png?download=true) [c](images/../LICENSE)",
        "## Speed & `size`, twice!\n\n## Speed & `size`, twice!\n\n[a](#speed--size-twice) [b](#speed--size-twice-1)",
        '<a id="here"></a> [a](#here) [card](#card)',
        "[a](https://huggingface.co/acme/x?b=1#c) <https://example.org> [m](mailto:a@example.org)",
        "[a](https://bücher.example/ü)",
        "`[a](gone)` \n\n```\n[a](gone)\n```\n\n<!-- [a](gone) -->",
        "[a](with%20space.txt)",
    ],
)
def test_a_link_that_leads_somewhere_passes(text: str) -> None:
    assert link_faults(front("license: mit") + text, {"images/kld.png", "LICENSE", "with space.txt"}) == []


def test_the_gate_knows_the_files_that_are_pushed(project: Project) -> None:
    with open(card(project), "a") as f:
        f.write("\n[licence](LICENSE) [manifest](manifest.json) [missing](NOTICE)\n")
    (refusal,) = gate(project, "Q4")
    assert "link 'NOTICE' is no file that is pushed; correct the template" in refusal


@pytest.mark.parametrize("text", ["TBD", "N/A", "[More Information Needed]", "Lorem ipsum dolor", "Speed: ???", "{{ x"])
def test_a_placeholder_does_not_leave(project: Project, text: str) -> None:
    with open(card(project), "a") as f:
        f.write(f"\n{text}\n")
    assert any("placeholder" in r for r in gate(project, "Q4"))


# -- names ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        (LADDER.replace("owner: acme", "owner: -acme"), "is no name the Hub takes"),
        (LADDER.replace("owner: acme", "owner: ac--me"), "is no name the Hub takes"),
        (LADDER + "repo: '{base}.ipynb{id}.ipynb'\n", "is no name the Hub takes"),
        (LADDER + "repo: 'a..{id}'\n", "is no name the Hub takes"),
        (LADDER + "repo: '" + "x" * 89 + "{id}'\n", "has 96 characters"),
        (
            LADDER.replace("base: {path: base, name: Tiny-1B}", f"base: {{path: base, repo: {REPO}}}").replace(
                "bits: 4,", f"bits: 4, repo: {REPO},"
            ),
            "is the original's own repo",
        ),
    ],
)
def test_a_repo_id_that_cannot_be_is_refused(tmp_path: Path, yaml: str, message: str) -> None:
    project = make_project(tmp_path, yaml)
    make_variant(project)
    found = gate(project, "Q4")
    if "has 96" in message:
        assert found == [], "96 characters are what the Hub takes"
    else:
        assert len(found) == 1
        assert message in found[0]


# -- token, role, access --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "message"), [(READ, "the token of alice can only read"), ("hf_nobodyknows", "run `hf auth login`")]
)
def test_a_token_that_cannot_push_is_refused_before_anything(server, project, token: str, message: str) -> None:
    hub = connect(server, token)
    with pytest.raises(AuthError, match=message) as e:
        check(project, hub, [plan_push(hub, project, "Q4")])
    assert token not in str(e.value)
    assert nothing_was_sent(server)


@pytest.mark.parametrize("name", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"])
def test_a_token_of_the_environment_is_to_be_corrected_there(server, monkeypatch, name: str) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv(name, "hf_nobodyknows\n")
    with pytest.raises(AuthError, match=f"does not know this token .*; correct {name}, which is set in the env") as e:
        connect(server, None).require_write("push")
    assert "hf_nobodyknows" not in str(e.value)


def test_the_hub_is_asked_once_whose_token_it_is(server, project) -> None:
    hub = connect(server)
    plans, _ = check(project, hub, [plan_push(hub, project, "Q4")])
    execute(hub, project, plans[0])
    assert server.stats.requests["whoami"] == 1


def test_without_a_token_nothing_is_asked(server, monkeypatch, tmp_path) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(AuthError, match="a token with write access: run `hf auth login`, or set HF_TOKEN"):
        connect(server, None).require_write("push")
    assert not server.stats.requests


def test_a_new_repo_needs_a_namespace_of_the_account(server, project) -> None:
    hub = connect(server, STRANGER)
    _, errors = check(project, hub, [plan_push(hub, project, "Q4")])
    assert isinstance(errors["Q4"], AuthError)
    said = str(errors["Q4"])
    assert f"{REPO} does not exist, and bob is no member of acme; set owner: to one of bob, elsewhere" in said
    assert nothing_was_sent(server)


def test_an_existing_repo_is_asked_for_write_access(server, project) -> None:
    hub = connect(server)
    execute(hub, project, plan_push(hub, project, "Q4"))
    with open(card(project), "a") as f:
        f.write("\nMore.\n")
    stranger = connect(server, STRANGER)
    server.stats.reset()
    _, errors = check(project, stranger, [plan_push(stranger, project, "Q4")])
    assert f"checking write access to {REPO}: refused" in str(errors["Q4"])
    assert nothing_was_sent(server)
    (told,), errors = check(project, hub, [plan_push(hub, project, "Q4")])
    assert not errors
    assert any(line.startswith(f"alice may write to {REPO}, public, at ") for line in told.told)
    proposed = plan_push(stranger, project, "Q4", create_pr=True)
    assert check(project, stranger, [proposed])[1] == {}, "who may only read can propose"


@pytest.mark.parametrize(
    ("who", "account"),
    [
        (
            {"name": "alice", "isPro": True, "orgs": [{"name": "acme", "roleInOrg": "read", "plan": "Team"}],
             "auth": {"accessToken": {"role": "write"}}},
            Account("alice", "write", (Owner("alice", "admin", "pro"), Owner("acme", "read", "team"))),
        ),
        (
            {"name": "alice", "isPro": False, "orgs": [{"name": "acme", "isEnterprise": True}], "auth": {"accessToken": {
                "role": "fineGrained", "fineGrained": {"scoped": [
                    {"entity": {"type": "org", "name": "Acme"}, "permissions": ["repo.content.read", "repo.write"]},
                    {"entity": {"type": "user", "name": "alice"}, "permissions": ["repo.content.read", "discussion.write"]},
                ]}}}},
            Account("alice", "fineGrained", (Owner("alice", "admin", "free"), Owner("acme", "", "enterprise")),
                    frozenset({"acme"})),
        ),
        ({"name": "alice"}, Account("alice", "")),
        ({"name": "alice", "isPro": [], "orgs": [7, {"name": 3}], "auth": [1]}, Account("alice", "", (Owner("alice", "admin"),))),
        ({"name": "a", "auth": {"accessToken": {"role": "fineGrained", "fineGrained": {"scoped": [3, {"entity": 4}]}}}},
         Account("a", "fineGrained", None, frozenset())),
        ({"name": 7}, None),
        ([], None),
    ],
)  # fmt: skip
def test_what_whoami_says_is_read_and_never_trusted(who: object, account: Account | None) -> None:
    assert account_of(who) == account


def told_of(project: Project, server: LocalHub, account: Account, monkeypatch: pytest.MonkeyPatch) -> str:
    hub = connect(server)
    monkeypatch.setattr(hub, "account", lambda: account)
    (plan,), errors = check(project, hub, [plan_push(hub, project, "Q4")])
    return str(errors.get("Q4") or "\n".join(plan.told))


def test_roles_and_scopes_of_an_organization_count(server, project, monkeypatch) -> None:
    def said(owner: Owner, scope: frozenset[str] | None = None) -> str:
        account = Account("alice", "fineGrained", (Owner("alice"), owner), scope)
        return told_of(project, server, account, monkeypatch)

    assert "alice can only read in acme; ask its admins for the role write" in said(Owner("acme", "read"))
    assert "the fine-grained token of alice may not write to acme" in said(Owner("acme", "write"), frozenset({"alice"}))
    for scope in ({"acme"}, {REPO.lower()}):
        assert f"{REPO} is new; alice may create it" in said(Owner("acme", "write"), frozenset(scope))
    unknown = told_of(project, server, Account("alice", ""), monkeypatch)
    assert f"{REPO} is new; alice will try to create it" in unknown


# -- the hub and the card -------------------------------------------------------------------------------------


def test_the_hub_checks_the_metadata_before_anything_is_sent(server, project) -> None:
    card(project).write_text(CARD.format(id="Q4").replace("library_name", "language: zh-Hant\nlibrary_name"))
    assert gate(project, "Q4") == []  # which codes there are is the hub's to say
    hub = connect(server)
    _, errors = check(project, hub, [plan_push(hub, project, "Q4")])
    assert isinstance(errors["Q4"], InputError)
    said = str(errors["Q4"])
    assert said.startswith("Q4: README.md: the hub refuses its metadata: \"language\": 'zh-Hant' must be")
    assert said.endswith("run `publish card Q4`")
    assert nothing_was_sent(server)


def test_an_unlisted_licence_and_the_hubs_verdict_are_told(server, project) -> None:
    card(project).write_text(CARD.format(id="Q4").replace("apache-2.0", "apache2.0"))
    hub = connect(server)
    (plan,), _ = check(project, hub, [plan_push(hub, project, "Q4")])
    assert "the hub takes the card's metadata" in plan.told
    assert any(line.startswith("licence apache2.0 is not on the Hub's documented list") for line in plan.told)


def test_a_hub_that_is_down_is_an_error_of_the_whole_push(server, project) -> None:
    hub = Hub(server.url, WRITE, patience_s=0.2, pause_s=0.05)
    plan = plan_push(hub, project, "Q4")
    server.faults.add(Fault("validate_yaml", "status", times=9, status=503))
    with pytest.raises(HubUnavailable, match="checking the card's metadata"):
        check(project, hub, [plan])
    assert nothing_was_sent(server)


# -- private storage ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "endpoint", "given", "text"),
    [
        ("free", HUGGING_FACE, None, "limit 100 GB (acme has no paid plan; as the Hub documents it)"),
        ("pro", HUGGING_FACE, None, "limit 1000 GB (acme has PRO; as the Hub documents it, more is billed)"),
        ("team", HUGGING_FACE, None, "limit unknown (acme has team: 1 TB a seat, and the seats are not told)"),
        ("", HUGGING_FACE, None, "limit unknown (the Hub does not say which plan acme has; set private_storage in"),
        (
            "free",
            "http://127.0.0.1:1",
            None,
            "limit unknown (http://127.0.0.1:1 documents none; set private_storage in",
        ),
        ("free", HUGGING_FACE, 5 * 10**11, "limit 500 GB (private_storage in variants.yaml)"),
    ],
)
def test_the_limit_is_what_is_documented_or_unknown(plan: str, endpoint: str, given: int | None, text: str) -> None:
    account = Account("alice", "write", (Owner("alice"), Owner("acme", "write", plan)))
    assert private_limit(account, "acme", endpoint, given).text.startswith(text)


def test_a_push_beyond_the_private_storage_is_refused_before_the_first_byte(tmp_path: Path, server) -> None:
    project = make_project(tmp_path, LADDER + "private_storage: 0.001 MB\n")
    make_variant(project)
    make_variant(project, "Q8", seed=1)
    hub = connect(server)
    plans = [plan_push(hub, project, id, staged=True) for id in ("Q4", "Q8")]
    plans, errors = check(project, hub, plans)
    assert set(errors) == {"Q4", "Q8"}
    said = str(together(errors))
    assert said.startswith("acme's private repos would hold ")
    assert "limit 1.00 kB (private_storage in variants.yaml); push with --public" in said
    assert "\n" not in said, "one fault, one line"
    assert any("acme's private storage: these repos hold" in line for line in plans[0].told)
    assert nothing_was_sent(server)
    public = [plan_push(hub, project, id) for id in ("Q4", "Q8")]
    assert check(project, hub, public)[1] == {}, "public repos take none of it"


@pytest.mark.parametrize("value", ["4.5 bpw", "fits 16 GB", "lots"])
def test_private_storage_is_a_size_in_bytes(tmp_path: Path, value: str) -> None:
    make_project(tmp_path)
    (tmp_path / "variants.yaml").write_text(LADDER + f"private_storage: {value}\n")
    with pytest.raises(InputError, match=r"private_storage: .*expected"):
        load_project(tmp_path / "variants.yaml")


# -- all of it, as a user sees it -----------------------------------------------------------------------------


def test_several_refusals_are_told_at_once_by_the_first_ones_kind() -> None:
    one, two = AuthError("Q4: no"), GateRefused("Q8: neither")
    assert together({"Q4": one}) is one
    both = together({"Q4": one, "Q8": two})
    assert isinstance(both, AuthError)
    assert str(both) == "not ready to leave:\n  Q4: no\n  Q8: neither"


def test_a_dry_run_shows_what_the_hub_says_and_refuses_as_the_push_would(ladder: Path, publish, tmp_path: Path) -> None:
    tokens = {WRITE: "write:demo", READ: "read:demo", STRANGER: "write:bob"}
    with LocalHub(tmp_path / "hub", tokens) as server:

        def env(token: str) -> dict[str, str]:
            return {"HF_ENDPOINT": server.url, "HF_TOKEN": token}

        ran = publish("push", "Q2_K_XL", "--dry-run", cwd=ladder, env=env(WRITE)).ok()
        repo = "demo/Qwen3.5-tiny-UD-Q2_K_XL-mlx"
        assert f"Q2_K_XL: {repo} is new; demo may create it, private until all is done" in ran.out
        assert "Q2_K_XL: the hub takes the card's metadata" in ran.out
        assert f"limit unknown ({server.url} documents none" in ran.out
        ran = publish("push", "Q2_K_XL", "--dry-run", "--json", cwd=ladder, env=env(WRITE)).ok()
        assert len(json.loads(ran.out)["plans"][0]["told"]) == 3
        for extra in ("--dry-run", "--yes"):
            assert "can only read" in publish("push", "Q2_K_XL", extra, cwd=ladder, env=env(READ)).refused(5)
            assert "no member of demo" in publish("push", "Q2_K_XL", extra, cwd=ladder, env=env(STRANGER)).refused(5)
        assert nothing_was_sent(server)
        assert not HfApi(server.url, WRITE).repo_exists(repo)


def test_build_and_push_asks_the_hub_before_it_builds(ladder: Path, publish, tmp_path: Path) -> None:
    path = ladder / "variants.yaml"
    changed = path.read_text().replace("Q8_K_XL: {bits: 8", "Q8_K_XL: {group_size: 32, bits: 8")
    with LocalHub(tmp_path / "hub", {WRITE: "write:demo", STRANGER: "write:bob"}) as server:
        for token, extra, message in (
            (STRANGER, "", "bob is no member of demo"),
            (WRITE, "private_storage: 0.1 MB\n", "demo's private repos would hold"),
        ):
            path.write_text(changed + extra)
            env = {"HF_ENDPOINT": server.url, "HF_TOKEN": token}
            ran = publish("build", "Q8_K_XL", "--push", "--skip", "bench", cwd=ladder, env=env)
            assert message in ran.refused(5)
            assert "quantizing" not in ran.err
        assert nothing_was_sent(server)
