"""What can go wrong between here and the hub, done to the real client over real HTTP: see docs/reliability.md.

`test_push.py` holds the faults that a push as such is about; here are waits, hangs, refusals and answers that are none.
"""

from __future__ import annotations

import email.utils
import errno
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import httpx2
import pytest
from conftest import Clock
from huggingface_hub import constants
from pushes import READ, REPO, TOKENS, WRITE, api, commits, connect, edit_card, pulls, push, somebody_commits
from variant_folder import make_variant

from inference.errors import (
    AuthError,
    CheckFailed,
    HubUnavailable,
    InputError,
    PublishError,
    RemoteChanged,
    ResourceError,
)
from publisher.cli import exit_code
from publisher.hub import Hub
from publisher.hub_errors import asked_wait
from publisher.hub_watch import Limits
from publisher.localhub import Fault, LocalHub
from publisher.push import execute, plan_push

pytestmark = pytest.mark.usefixtures("own_home")
QUICK = Limits(connect_s=1, answer_s=0.5, window_s=0.4, rate=10_000)


@pytest.fixture
def raw() -> Iterator[Callable[[Callable[[socket.socket], None]], str]]:
    """A server that is no hub: raw(serve) gives its URL; each connection goes to `serve`."""
    held: list[socket.socket] = []

    def start(serve: Callable[[socket.socket], None]) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        held.append(listener)

        def accept() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                held.append(connection)
                threading.Thread(target=_until_gone, args=(serve, connection), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    yield start
    for s in held:
        s.close()


def _until_gone(serve: Callable[[socket.socket], None], connection: socket.socket) -> None:
    with closing(connection):
        with suppress(OSError):
            serve(connection)


def takes(seconds: float, call: Callable[[], object], error: type[PublishError], match: str) -> None:
    started = time.monotonic()
    with pytest.raises(error, match=match):
        call()
    assert time.monotonic() - started < seconds


# -- nothing hangs --------------------------------------------------------------------------------------------


def test_a_server_that_says_nothing_ends_in_an_error(raw):
    url = raw(lambda c: time.sleep(60))
    takes(4, Hub(url, WRITE, patience_s=0.1, limits=QUICK).account, HubUnavailable, "does not answer|no whole answer")


def test_headers_that_trickle_end_in_an_error(raw):
    """A byte every now and then is no silence: only the budget and the least rate see it."""

    def trickle(connection: socket.socket) -> None:
        connection.recv(4096)
        for byte in b"HTTP/1.1 200 OK\r\nX-Padding: " + b"x" * 1000:
            connection.sendall(bytes([byte]))
            time.sleep(0.05)

    takes(4, Hub(raw(trickle), WRITE, patience_s=0.1, limits=QUICK).account, HubUnavailable, "does not answer|no whole")


def test_informational_answers_without_an_end_end_in_an_error(raw):
    def forever(connection: socket.socket) -> None:
        connection.recv(4096)
        while True:
            connection.sendall(b"HTTP/1.1 103 Early Hints\r\n\r\n" * 100)

    url = raw(forever)
    takes(5, Hub(url, WRITE, patience_s=0.5, limits=QUICK).account, HubUnavailable, "no whole answer within 1 s")


def test_an_answer_that_trickles_ends_in_an_error_for_a_call(server):
    server.faults.add(Fault("whoami", "trickle", seconds=0.05, times=9))
    hub = connect(server, patience_s=0.1, limits=QUICK)
    takes(4, hub.account, HubUnavailable, "does not answer|no whole answer")


def test_a_download_that_trickles_is_given_up(server, project, monkeypatch):
    receipt = push(server, project)
    server.faults.add(Fault("blob", "trickle", seconds=0.02, times=99))
    hub = connect(server, limits=Limits(answer_s=0.5, window_s=0.1, rate=10_000))
    file = "model-00001-of-00002.safetensors"
    monkeypatch.setattr("huggingface_hub.file_download.time", Clock(sleep=lambda s: None))
    takes(9, lambda: hub.file(REPO, file, receipt.commit), HubUnavailable, "downloading .* does not answer")


def test_an_upload_to_a_server_that_reads_a_little_now_and_then_is_given_up(raw):
    """Buffers take the first bytes; after them the rate shows."""

    def sip(connection: socket.socket) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        while connection.recv(2048):
            time.sleep(0.1)

    from huggingface_hub.utils import get_session

    url = raw(sip)
    Hub(url, WRITE, limits=Limits(answer_s=1, window_s=0.5, rate=1_000_000))
    started = time.monotonic()
    with pytest.raises(httpx2.WriteTimeout):
        get_session().put(url, content=(bytes(65536) for _ in range(1000)))
    assert time.monotonic() - started < 5


def test_a_slow_but_steady_transfer_is_left_alone(server, project):
    """Time that is not spent waiting for bytes does not count: a file may be hashed or written between two reads."""
    hub = connect(server, limits=Limits(answer_s=5, window_s=0.05, rate=20_000))
    server.faults.add(Fault("lfs_put", "delay", seconds=0.3))  # silence before an answer is the hub's to work in
    assert execute(hub, project, plan_push(hub, project, "Q4")).tag == "v1"


def test_connections_through_a_proxy_are_watched_too(monkeypatch):
    from huggingface_hub.utils import get_session

    from publisher.hub_watch import _Backend

    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    Hub("https://huggingface.co", WRITE)
    client = get_session()
    transports = [client._transport, *filter(None, client._mounts.values())]
    assert len(transports) > 1
    assert all(isinstance(t._pool._network_backend, _Backend) for t in transports)


# -- waits ----------------------------------------------------------------------------------------------------


@pytest.fixture
def naps(monkeypatch) -> list[float]:
    """Seconds that were waited because the hub asked, not waited here."""
    found: list[float] = []
    nap = Clock(sleep=lambda s: found.append(s) if s > 1 else time.sleep(s))
    monkeypatch.setattr("publisher.hub_errors.time", nap)
    return found


# every call of a push, whether the client waits for it by itself or not
ROUTES = ["whoami", "repo_info", "tree", "repo_create", "auth_check", "validate_yaml", "preupload", "lfs_batch", "lfs_put",
          "commit", "refs", "tag"]  # fmt: skip


@pytest.mark.parametrize("route", ROUTES)
def test_retry_after_is_waited_for_once_and_told(server, project, naps, route):
    server.faults.add(Fault(route, "status", status=429, retry_after=30))
    told: list[str] = []
    hub = connect(server, tell=told.append)
    assert execute(hub, project, plan_push(hub, project, "Q4")).tag == "v1"
    assert naps == [30]
    assert told == ["the hub asks to wait 30 s (429)"]
    assert len(commits(server)) == 2


def test_retry_after_as_a_date_is_waited_for(server, project, naps):
    server.faults.add(Fault("tree", "status", status=503, retry_date=20, nth=1))
    told: list[str] = []
    hub = connect(server, tell=told.append)
    execute(hub, project, plan_push(hub, project, "Q4"))
    assert [round(n, -1) for n in naps] == [20]
    assert told[0].startswith("the hub asks to wait ")


def test_waits_in_a_row_are_bounded_in_all(server, project, monkeypatch):
    server.faults.add(Fault("tree", "status", status=429, retry_after=200, times=99))
    hub = connect(server, wait_s=330)
    api(server).create_repo(REPO)
    ticks = iter(range(0, 10**9, 100))  # every look at the clock is 100 s later
    monkeypatch.setattr("publisher.hub_errors.time", Clock(sleep=lambda s: None, monotonic=lambda: next(ticks)))
    with pytest.raises(HubUnavailable, match="asks to wait 200 s"):
        hub.head(REPO)
    assert server.stats.requests["tree"] <= 3


@pytest.mark.parametrize("value", ["999999999999999999999999", "Fri, 31 Dec 9999 23:59:59 GMT"])
def test_a_huge_retry_after_is_refused_at_once(raw, value):
    def refuse(connection: socket.socket) -> None:
        while connection.recv(65536):
            connection.sendall(f"HTTP/1.1 429 x\r\nRetry-After: {value}\r\nContent-Length: 0\r\n\r\n".encode())

    hub = Hub(raw(refuse), WRITE, patience_s=5, pause_s=0.01)
    takes(2, lambda: hub.tree(REPO, "main"), HubUnavailable, r"asks to wait \d+ s")


def test_what_a_hub_may_say_about_waiting():
    date = lambda s: email.utils.formatdate(time.time() + s, usegmt=True)  # noqa: E731

    def wait(status: int = 429, **headers: str) -> float:
        return asked_wait(httpx2.Response(status, headers={k.replace("_", "-"): v for k, v in headers.items()}))

    assert wait(retry_after="30") == 30
    assert wait(503, retry_after=" 7 ") == 7
    assert wait(retry_after=date(50), date=date(20)) == 30  # by the server's clock
    assert 38 < wait(retry_after=date(40)) <= 40
    assert wait(retry_after=date(-40)) == 0
    assert wait(ratelimit='"api";r=0;t=55') == 56
    assert wait(503, ratelimit='"api";r=0;t=55') == 0
    assert wait(ratelimit='"api";r=3;t=55') == 0
    for nonsense in ("", "soon", "-5", "1.5", "99 Luftballons"):
        assert wait(retry_after=nonsense) == 0
    assert asked_wait(httpx2.Response(429, headers=[(b"retry-after", b"\xb2")])) == 0  # a digit, for str.isdigit


def test_a_refused_try_costs_no_wait_that_nobody_asked_for(server, project, naps):
    server.faults.add(Fault("commit", "status", status=503))
    push(server, project)
    assert naps == []


# -- answers that are none ------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ["validate_yaml", "preupload", "repo_info", "whoami", "tree", "commit"])
@pytest.mark.parametrize("status", [503, 200])
def test_a_page_in_place_of_json_is_one_line(server, project, route, status):
    """The client calls .json() before it looks at the status: a bare JSONDecodeError."""
    server.faults.add(Fault(route, "status", status=status, text="we will be back", times=99))
    with pytest.raises(HubUnavailable) as e:
        push_impatiently(server, project)
    assert "\n" not in str(e.value)
    assert exit_code(e.value) == 1


def push_impatiently(server, project):
    hub = connect(server, patience_s=0.05)
    return execute(hub, project, plan_push(hub, project, "Q4"))


def test_a_page_in_place_of_json_once_is_no_matter(server, project):
    server.faults.add(Fault("validate_yaml", "status", text="back soon"))
    server.faults.add(Fault("repo_info", "status", text="back soon"))
    assert push(server, project).tag == "v1"


@pytest.mark.parametrize("route", ["whoami", "repo_info", "tree", "refs", "preupload", "commit", "lfs_batch"])
def test_a_redirect_to_another_host_brings_no_token_there(server, project, route):
    """The fixture asserts that the other host saw none."""
    server.faults.add(Fault(route, "redirect", times=9))
    with pytest.raises(PublishError) as e:
        push_impatiently(server, project)
    assert "\n" not in str(e.value)


# -- refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("route", "status", "error", "code", "match"),
    [
        ("whoami", 401, AuthError, 5, "does not know this token"),
        ("commit", 401, AuthError, 5, "does not know this token"),
        ("preupload", 401, AuthError, 5, "does not know this token"),
        ("auth_check", 403, AuthError, 5, "needs write access"),
        ("commit", 403, AuthError, 5, "needs write access"),
        ("repo_create", 402, AuthError, 5, "storage or plan"),
        ("commit", 413, AuthError, 5, "storage or plan"),
        ("commit", 507, AuthError, 5, "storage or plan"),
        ("lfs_batch", 413, AuthError, 5, "storage or plan"),
        ("lfs_batch", 507, AuthError, 5, "storage or plan"),
        ("commit", 400, InputError, 2, "answers 400"),
        ("commit", 409, RemoteChanged, 4, "changed meanwhile"),
        ("commit", 412, RemoteChanged, 4, "changed meanwhile"),
    ],
)
def test_a_refusal_is_one_line_and_its_exit_code(server, project, route, status, error, code, match):
    server.faults.add(Fault(route, "status", status=status, times=99))
    with pytest.raises(error, match=match) as e:
        push(server, project)
    assert exit_code(e.value) == code
    assert "\n" not in str(e.value)
    server.faults.clear()
    assert push(server, project).tag == "v1"  # the same command heals it
    assert len(commits(server)) == 2


@pytest.mark.parametrize("status", [400, 403, 413, 507])
def test_storage_that_refuses_all_the_while_is_one_line(server, project, status):
    server.faults.add(Fault("lfs_put", "status", status=status, times=99))
    with pytest.raises(HubUnavailable, match=rf"the storage behind the hub refuses \({status}") as e:
        push(server, project)
    assert "\n" not in str(e.value)
    assert len(commits(server)) == 1


def test_a_token_that_expires_after_the_weights_costs_only_a_login(server, project):
    server.faults.add(Fault("commit", "status", status=401))
    with pytest.raises(AuthError):
        push(server, project)
    server.stats.reset()
    push(server, project)
    assert server.stats.requests["lfs_put"] == 0
    assert len(commits(server)) == 2


def test_a_full_disk_here_is_one_line(server, project, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/cache/blob")

    monkeypatch.setattr("publisher.hub.HfApi.hf_hub_download", full)
    receipt = push(server, project)
    with pytest.raises(ResourceError, match="the disk is full") as e:
        connect(server).file(REPO, "config.json", receipt.commit)
    assert exit_code(e.value) == 2


def test_a_full_disk_at_the_hub_is_the_hubs(server, project):
    server.faults.add(Fault("lfs_put", "status", status=507, times=99))
    with pytest.raises(HubUnavailable, match="507"):
        push(server, project)


def test_a_gated_repo_says_whose_terms_are_to_be_accepted(server, project):
    push(server, project)
    api(server).update_repo_settings(REPO, gated="auto")
    hub = Hub(server.url, "hf_strangerTOKEN", patience_s=1, pause_s=0.01)
    with pytest.raises(PublishError) as e:
        hub.file(REPO, "model-00001-of-00002.safetensors", hub.resolve_commit(REPO, "main"))
    assert "gated" in str(e.value)
    assert exit_code(e.value) == 5


# -- the repo under us ----------------------------------------------------------------------------------------


def test_a_repo_that_is_deleted_during_the_push_is_not_made_again(server, project):
    push(server, project)
    make_variant(project, seed=1)

    def delete(what, done, total):
        if what == "uploaded":
            api(server).delete_repo(REPO)

    with pytest.raises(PublishError) as e:
        push(server, project, progress=delete)
    assert exit_code(e.value) in (2, 4)
    assert server.stats.requests["repo_create"] == 1
    assert not api(server).repo_exists(REPO)


def test_the_endless_conflict_of_a_create_ends(server, project):
    """The client repeats such a create without a pause and without an end."""
    text = "Cannot create repo: another conflicting operation is in progress"
    server.faults.add(Fault("repo_create", "status", status=409, text=text, times=10**6))
    takes(9, lambda: push(server, project), HubUnavailable, "creating another of your repos")
    assert server.stats.requests["repo_create"] < 40


def test_a_conflict_of_a_create_that_passes_is_waited_for(server, project):
    text = "Cannot create repo: another conflicting operation is in progress"
    server.faults.add(Fault("repo_create", "status", status=409, text=text, times=3))
    assert push(server, project).tag == "v1"


def test_a_repo_that_exists_by_now_is_no_conflict(server, project):
    hub = connect(server)
    plan = plan_push(hub, project, "Q4")
    api(server).create_repo(REPO)
    assert execute(hub, project, plan).tag == "v1"


def test_a_lost_answer_to_the_create_is_no_conflict(server, project):
    server.faults.add(Fault("repo_create", "lose_answer"))
    assert push(server, project).tag == "v1"
    assert len(commits(server)) == 2


def test_a_lost_answer_and_an_old_head_after_it_make_no_second_commit(server, project):
    """The head is read from a cache that lags: the commit looks as if it had not arrived."""
    push(server, project)
    edit_card(project)
    server.faults.add(Fault("commit", "lose_answer"))
    hub = connect(server)
    plan = plan_push(hub, project, "Q4")
    lag = Fault("repo_info", "old_head", nth=2)  # the first one is read before the commit
    server.faults.add(lag)
    execute(hub, project, plan)
    assert lag in server.faults.fired
    assert commits(server) == ["Q4: update card", *commits(server)[1:]]
    assert len(commits(server)) == 3


@pytest.mark.parametrize("late_s", [0.5, 1.0])
def test_a_commit_that_lands_after_we_gave_up_waiting_is_no_second_one(server, project, late_s):
    """We look, it is not there, we commit again on the same parent: whichever comes second finds that the head moved."""
    push(server, project)
    edit_card(project)
    server.faults.add(Fault("commit", "delay", seconds=late_s))
    hub = connect(server, limits=Limits(answer_s=0.4), pause_s=0.1)
    execute(hub, project, plan_push(hub, project, "Q4"))
    time.sleep(1)
    assert len(commits(server)) == 3


def test_an_old_head_all_the_while_makes_no_second_commit(server, project):
    push(server, project)
    edit_card(project)
    server.faults.add(Fault("commit", "lose_answer"))
    hub = connect(server)
    plan = plan_push(hub, project, "Q4")
    server.faults.add(Fault("repo_info", "old_head", nth=2, times=99))
    with pytest.raises((RemoteChanged, CheckFailed), match="run push again"):  # the client takes it for our commit
        execute(hub, project, plan)
    assert len(commits(server)) == 3
    server.faults.clear()
    push(server, project)
    assert len(commits(server)) == 3


def test_two_pushers_from_one_plan_make_one_commit(server, project):
    push(server, project)
    edit_card(project)
    first, second = connect(server), connect(server)
    plans = plan_push(first, project, "Q4"), plan_push(second, project, "Q4")
    execute(first, project, plans[0])
    with pytest.raises(RemoteChanged, match="the head moved"):
        execute(second, project, plans[1])
    assert len(commits(server)) == 3


# -- broken connections ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cut", "lose_answer"])
@pytest.mark.parametrize("route", ["lfs_put", "lfs_batch", "preupload", "tag", "whoami", "repo_info", "collections"])
def test_a_connection_that_breaks_once_is_no_matter(server, project, route, kind):
    server.faults.add(Fault(route, kind, after_bytes=1000 if route == "lfs_put" else 0))
    push(server, project)
    assert [f.route for f in server.faults.fired] == ([route] if route != "collections" else [])
    assert len(commits(server)) == 2


def test_an_upload_that_breaks_for_good_resumes_with_what_was_stored(server, project):
    server.faults.add(Fault("lfs_put", "cut", nth=2, times=99))
    with pytest.raises(HubUnavailable):
        push(server, project)
    server.faults.clear()
    server.stats.reset()
    push(server, project)
    assert server.stats.requests["lfs_put"] == 1  # the other one had arrived
    assert len(commits(server)) == 2


@pytest.mark.parametrize(
    ("route", "status", "kind", "words"),
    [
        ("xet_token", 401, AuthError, "the hub does not know this token"),
        ("xet_token", 402, AuthError, "storage or plan does not allow it"),
        ("xet_token", 403, AuthError, "the token needs write access"),
        ("xet_token", 413, AuthError, "storage or plan does not allow it"),
        ("xet_shard", 403, HubUnavailable, "the storage behind the hub refuses (403"),
        ("xet_shard", 413, HubUnavailable, "the storage behind the hub refuses (413"),
    ],
)
def test_a_refusal_by_xet_is_the_same_as_without(route, status, kind, words, server, project, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_XET_CACHE", str(tmp_path / "xet"))
    monkeypatch.setenv("HF_XET_CLIENT_RETRY_BASE_DELAY", "10ms")
    hub = connect(server)
    plan = plan_push(hub, project, "Q4")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)  # a hub on loopback goes without
    monkeypatch.setattr("publisher.push.INLINE_BYTES", 0)  # by path, as large files: bytes in memory go by LFS
    server.faults.add(Fault(route, "status", status=status, times=99))
    with pytest.raises(kind) as e:
        execute(hub, project, plan)
    assert words in str(e.value)
    assert "\n" not in str(e.value)
    assert WRITE not in str(e.value)
    assert server.stats.requests[route] == (1 if kind is AuthError else 3)
    assert len(commits(server)) == 1
    server.faults.clear()
    execute(hub, project, plan_push(hub, project, "Q4"))
    assert len(commits(server)) == 2


def test_a_second_pull_request_is_not_opened_after_a_failure(server, project):
    push(server, project)
    make_variant(project, seed=1)
    server.faults.add(Fault("commit", "status", status=403))
    with pytest.raises(AuthError):
        push(server, project, create_pr=True)
    receipt = push(server, project, create_pr=True)
    assert pulls(server) == [receipt.pull_request]


def test_other_peoples_files_are_never_in_our_way(server, project):
    push(server, project)
    somebody_commits(server, "notes.md", b"mine")
    edit_card(project)
    server.faults.add(Fault("commit", "lose_answer"))
    push(server, project)
    assert len(commits(server)) == 4


@pytest.mark.parametrize("token", ["", " ", "hf_a b"])
def test_a_token_that_is_none_is_refused_before_any_request(server, token):
    with pytest.raises(AuthError):
        Hub(server.url, token)
    assert not server.stats.requests


def test_a_read_token_is_refused_though_create_repo_would_succeed(server, project):
    push(server, project)
    edit_card(project)
    with pytest.raises(AuthError, match="can only read"):
        push(server, project, token=READ)
    assert server.stats.requests["repo_create"] == 1


# -- the folder under us --------------------------------------------------------------------------------------


def _grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0" * 100)


def _shrink(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _edit(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


@pytest.mark.parametrize("how", [_grow, _shrink, _edit, Path.unlink])
@pytest.mark.parametrize("when", ["uploading", "uploaded"])
@pytest.mark.parametrize("inline", [10 << 20, 0])
def test_weights_that_change_during_the_push_are_never_committed(server, project, monkeypatch, how, when, inline):
    monkeypatch.setattr("publisher.push.INLINE_BYTES", inline)  # sent as bytes, or by path as large files are
    path = project.store.variant("Q4") / "model-00001-of-00002.safetensors"
    with pytest.raises(PublishError, match=r"model-00001-of-00002\.safetensors") as e:
        push(server, project, progress=lambda what, done, total: how(path) if what == when and path.exists() else None)
    assert "\n" not in str(e.value)
    assert len(commits(server)) == 1


def test_two_files_of_the_same_bytes_are_both_there(server, project):
    images = project.store.variant("Q4") / "images"
    images.mkdir()
    for name in ("a.png", "b.png"):
        (images / name).write_bytes(bytes(20_000))
    receipt = push(server, project)
    tree = connect(server).tree(REPO, receipt.commit)
    assert tree["images/a.png"].sha256 == tree["images/b.png"].sha256 is not None


# -- a hub that goes away -------------------------------------------------------------------------------------


def test_a_hub_that_goes_down_during_the_push_is_said_and_the_next_push_goes_on(tmp_path, project):
    with LocalHub(tmp_path / "hub", TOKENS) as server:
        hub = connect(server, patience_s=0.1)
        plan = plan_push(hub, project, "Q4")

        def stop(what, done, total):
            if what == "uploaded":
                server.stop()

        with pytest.raises(HubUnavailable, match=r"whether the commit arrived is not known|cannot be reached"):
            execute(hub, project, plan, stop)
    with LocalHub(tmp_path / "hub", TOKENS) as server:
        push(server, project)
        assert server.stats.requests["lfs_put"] == 0  # what was stored is not sent again
        assert len(commits(server)) == 2


# -- what the client offers and we do not take ---------------------------------------------------------------


def test_nothing_but_a_single_commit_is_ever_used():
    """`upload_folder` may split a push in several commits and repeats one whose answer was lost; others are built on it."""
    forbidden = re.compile(r"\b(upload_folder|upload_large_folder|upload_file|delete_file|super_squash|delete_repo)\b")
    for path in sorted((Path(__file__).parents[1] / "publisher").glob("*.py")):
        assert not forbidden.search(path.read_text()), path.name


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("tree", "fault kind ''"),
        ("nowhere:status", "fault route 'nowhere'"),
        ("tree:status:status=many", "status must be a number, found 'many'"),
        ("tree:status:colour=red", "unknown option 'colour'"),
        ("tree:stale_head", "for the route commit only"),
    ],
)
def test_a_fault_that_is_none_is_refused(publish, tmp_path, fault, said):
    line = publish("hub", "--dir", "hub", "--port", "0", "--fault", fault, cwd=tmp_path).refused(2)
    assert said in line


def test_a_rehearsal_may_misbehave(tmp_path):
    faults = [Fault.parse("commit:lose_answer"), Fault.parse("tree:status:status=429:retry_after=1:nth=2:match=demo")]
    assert faults == [
        Fault("commit", "lose_answer"),
        Fault("tree", "status", nth=2, status=429, retry_after=1, match="demo"),
    ]
