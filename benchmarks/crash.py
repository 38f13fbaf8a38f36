"""Kill `publish build` and `publish push` (SIGKILL) at every boundary and at random moments; the same command must heal it.

    python benchmarks/crash.py [--random 20] [--every 1] [--scenarios build,push] [--json OUT] [--work FOLDER]
                               [--workers N] [--until SECONDS] [--continue RECORD]

Each run starts from the same folders and the same hub (the built-in one, with the real client), is killed, and after
that the same command runs again to its end. Then folders, receipts, results, the remote's history, trees, tags, pull
requests and collection must be what an undisturbed run leaves, times apart; and after the kill alone no commit may be
on the hub that an undisturbed run does not make. Boundaries:

    file     before a change of the file system below the project or the client's home; before and after a call to the hub
    request  when the hub has a request, before it acts on it
    answer   when the hub has acted on a request, before it answers
    random   anywhere

Undisturbed runs take a few seconds: commands run in forks of a process that has imported everything (`crash_server.py`).
The kills of all scenarios come in one shuffled order, and the record is written as they are made: a run that is cut off, or
ends by itself at `--until`, leaves an even spread and the list of what is left, which `--continue` takes up. `--workers`
shares the kills out to processes with a folder, a port and a hub each.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx2
from starlette.types import Message, Receive, Scope, Send

from publisher.localhub import LocalHub
from publisher.localhub.app import HubApp

ROOT = Path(__file__).parents[1]
TOKEN = "hf_crashTESTtoken"  # noqa: S105 - of the built-in hub
LADDER = """\
base: {path: model, name: tiny}
owner: demo
repo: "{base}-{id}-mlx"
imatrix: ./imatrix-tiny.gguf
recipe: uniform
bench: {turns: 1, turn_tokens: 4, prefill: [32], runs: 1}
smoke: {prompts: [The quick brown fox], max_tokens: 32, text_tokens: 64}
collection: {title: Tiny, description: Two rungs.}
variants:
  Q4: {bits: 4, note: smaller}
  Q8: {bits: 8, note: closer}
"""
# what two runs of the same command may differ in
TIMES = {"built_at", "pushed_at", "measured_at", "released_at", "tagged_at", "wall_s", "run", "at"}
UNLIKE = {"build.json": {"variants", "bytes_read", "bytes_written", "peak_gb"}}  # how a build went, not what it made
NAMES = re.compile(r"demo/\S+|(?<=\.)[a-z0-9_]{8}(?=\.part)|\b[0-9a-f]{16,}\b")  # drawn anew by every run
RUN_S = 120  # of one run; a machine may be busy
WRITE_S = 10  # between two records of a run that goes on


@dataclass(frozen=True)
class Scenario:
    """A command to kill, on the state that the commands before it leave. ladder: variants.yaml, by step."""

    name: str
    args: tuple[str, ...]
    before: tuple[tuple[str, tuple[str, ...]], ...] = ()
    ladder: str = LADDER


BUILD, PUSH = ("build", "--all", "-q"), ("push", "--all", "--yes", "-q")
OTHER = LADDER.replace("bits: 4,", "bits: 3,").replace("smaller", "smallest")
ONE, TWO = (
    LADDER.replace("owner: demo", f"owner: demo\noutput: {name}") for name in ("one", "two")
)  # other hosts' outputs
SHARES = ((ONE, ("build", "Q4", "-q")), (TWO, ("build", "Q8", "-q")))
MERGE = ("merge", "one", "two", "-q")
SCENARIOS = (
    Scenario("build", BUILD),
    Scenario("rebuild", BUILD, ((LADDER, BUILD),), OTHER),
    Scenario("push", PUSH, ((LADDER, BUILD),)),
    Scenario("push again", PUSH, ((LADDER, BUILD), (LADDER, PUSH), (OTHER, BUILD)), OTHER),
    Scenario("build and push", (*BUILD, "--push")),
    Scenario("merge", MERGE, SHARES),
    Scenario("merge over old", (*MERGE, "--move"), (*SHARES, (OTHER, BUILD))),
    Scenario("pull request", (*PUSH, "--create-pr"), ((LADDER, BUILD), (LADDER, PUSH), (OTHER, BUILD)), OTHER),
)


@dataclass
class State:
    """What is left after a run, in a form that two runs can be compared in."""

    files: dict[str, str]
    remote: dict[str, Any]


@dataclass
class Kills:
    """What happened to one scenario."""

    scenario: str
    undisturbed_s: float = 0.0
    boundaries: int = 0
    requests: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    places: Counter[str] = field(default_factory=Counter)  # where: the file or call of a `file` boundary
    ended_before: int = 0
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0
    left: set[str] = field(default_factory=set)  # kills that were planned and not tried yet

    def row(self) -> dict[str, Any]:
        return self.__dict__ | {
            "kills": dict(self.kills),
            "places": dict(sorted(self.places.items())),
            "seconds": round(self.seconds, 1),
            "left": sorted(self.left),
        }


# ------------------------------------------------------------------------------------------------ running


class Runner:
    """The fork server, and one work folder: `project`, `home` and `hub` in it are restored before every run."""

    def __init__(self, work: Path, share: int) -> None:
        self.work, self.project = work, work / "project"
        self.port = _free_port(share)
        shutil.rmtree(work / "templates", ignore_errors=True)  # of another run, and another hub
        for name in ("home", "templates"):
            (work / name).mkdir(parents=True, exist_ok=True)
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        env = kept | {
            "HF_ENDPOINT": f"http://127.0.0.1:{self.port}", "HF_HOME": str(work / "home"), "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_XET": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",  # the work is tiny, and other workers have the other cores
        }  # fmt: skip
        self.server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("crash_server.py"))], env=env, cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=1,
        )  # fmt: skip
        self._answer()

    def close(self) -> None:
        assert self.server.stdin
        self.server.stdin.close()
        self.server.wait()

    def run(self, args: tuple[str, ...], kill: int | None = None, after_s: float | None = None) -> Ended:
        """One command to its end, or until it is killed: at boundary `kill`, or `after_s` seconds from its start."""
        assert self.server.stdin
        job = {
            "args": args,
            "root": str(self.work),
            "cwd": str(self.project),
            "kill": kill,
            "log": str(self.work / "log"),
        }
        started = time.monotonic()
        self.server.stdin.write(json.dumps(job) + "\n")
        pid = self._answer()["pid"]
        wire.pid = pid
        timer = threading.Timer(RUN_S if after_s is None else after_s, _kill, [pid])
        timer.start()
        answer = self._answer()
        timer.cancel()
        wire.pid = None
        return Ended(answer["status"], answer["boundaries"], time.monotonic() - started)

    def _answer(self) -> dict[str, Any]:
        assert self.server.stdout
        line = self.server.stdout.readline()
        if not line:
            raise SystemExit("the fork server died")
        return json.loads(line)

    def log(self) -> str:
        return (self.work / "log").read_text(errors="replace")[-3000:]

    @contextmanager
    def hub(self) -> Iterator[LocalHub]:
        with LocalHub(self.work / "hub", {TOKEN: "write:demo"}, port=self.port) as hub:
            yield hub

    def save(self, name: str) -> None:
        target = self.work / "templates" / name
        shutil.rmtree(target, ignore_errors=True)
        for part in ("project", "home", "hub"):
            shutil.copytree(self.work / part, target / part, symlinks=True)

    def restore(self, name: str) -> None:
        for part in ("project", "home", "hub"):
            shutil.rmtree(self.work / part, ignore_errors=True)
            shutil.copytree(self.work / "templates" / name / part, self.work / part, symlinks=True)


@dataclass(frozen=True)
class Ended:
    status: int
    boundaries: list[str]
    seconds: float

    @property
    def killed(self) -> bool:
        return self.status == -signal.SIGKILL


class Wire:
    """The hub's side of a run: counts requests, and kills who sent the n-th. when: `request` or `answer`."""

    def __init__(self) -> None:
        self.pid: int | None = None
        self.when, self.nth, self.count = "", 0, 0

    def expect(self, when: str, nth: int) -> None:
        self.when, self.nth, self.count = when, nth, 0

    def due(self, when: str) -> bool:
        return self.pid is not None and when == self.when and self.count == self.nth

    def kill(self) -> None:
        if self.pid is not None:
            _kill(self.pid)


wire = Wire()
answer_to = HubApp.__call__


async def watched(self: HubApp, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] != "http" or wire.pid is None:
        await answer_to(self, scope, receive, send)
        return
    wire.count += 1
    if wire.due("request"):
        wire.kill()  # and go on: a server acts on what it has received, whether or not somebody still listens
    hold = wire.due("answer")

    async def held(message: Message) -> None:
        if not hold:
            await send(message)

    await answer_to(self, scope, receive, held)
    if hold:
        wire.kill()
        scope["localhub.drop"]()
        while (await receive())["type"] != "http.disconnect":
            pass


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _free_port(share: int) -> int:
    """Below the ports that systems draw for outgoing connections: the hub comes back to its port for every run, and with
    several workers one of their connections would have it now and then."""
    import socket

    for port in range(first := 20000 + 200 * (share % 50) + os.getpid() % 100, first + 100):
        with socket.socket() as s, suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port
    raise SystemExit(f"no free port from {first} on")


# ------------------------------------------------------------------------------------------------ looking


def look(runner: Runner, url: str) -> State:
    remote = remote_state(url)
    names = {oid: f"<{repo} {i}>" for repo, r in remote.items() if repo != "collections" for i, oid in r.pop("ids")}
    out = runner.project / "build"
    found = {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != ".lock"}
    # receipts hold the hashes of files that hold times: these count by what such a file must be
    for path, data in found.items():
        if not path.startswith("receipts/"):
            names[hashlib.sha256(data).hexdigest()] = hashlib.sha256(_plain(path, data, names)).hexdigest()
    return State({path: hashlib.sha256(_plain(path, found[path], names)).hexdigest() for path in sorted(found)}, remote)


def _plain(name: str, data: bytes, names: dict[str, str]) -> bytes:
    """What of a file must be the same in every run: JSON without times, with the ids of commits, which hold the time, by
    their place in the history, and a card without the day and without in how many runs its benchmarks came to be."""
    name = name.rsplit("/", 1)[-1]
    if len(data) > 1 << 20:
        return data
    if name.endswith(".json"):
        text = json.dumps(_timeless(json.loads(data), TIMES | UNLIKE.get(name, set())), sort_keys=True)
        text = re.sub(r"(?<=-)[0-9a-f]{24}\b", "", text)  # of a collection's address, drawn when it is made
        return re.sub(r"\b([0-9a-f]{40}|[0-9a-f]{64})\b", lambda m: names.get(m[0], m[0]), text).encode()
    if name.endswith(".md"):
        return re.sub(rb" in \d+ benchmark runs,|\d{4}-\d\d-\d\d", b"", data)
    if name.endswith(".sig"):
        return b"a signature"  # over files that hold times; `publish verify` checks it
    return data


def _timeless(value: Any, drop: set[str]) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"path", "size", "sha256"}:  # of a file that is looked at by itself
            drop = drop | {"size"}
        return {k: _timeless(v, drop) for k, v in value.items() if k not in drop}
    return [_timeless(v, drop) for v in value] if isinstance(value, list) else value


def remote_state(url: str) -> dict[str, Any]:
    """Every repo's history with trees, tags and pull requests, and the collections, as any client can read them."""
    with httpx2.Client(
        base_url=url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60, follow_redirects=True, trust_env=False
    ) as client:
        return _remote_state(client)


def _remote_state(client: httpx2.Client) -> dict[str, Any]:
    repos: dict[str, Any] = {}
    for info in _get(client, "/api/models?author=demo"):
        repo = info["id"]
        api = f"/api/models/{repo}"
        commits = _get(client, f"{api}/commits/main")[::-1]
        history, titles = [c["id"] for c in commits], [c["title"] for c in commits]
        refs = _get(client, f"{api}/refs?include_prs=1")
        at = {oid: i for i, oid in enumerate(history)}
        proposed = {
            p["ref"]: [c["id"] for c in reversed(_get(client, f"{api}/commits/{_quote(p['ref'])}"))]
            for p in refs.get("pullRequests", ())
        }
        repos[repo] = {
            "ids": [(i, oid) for oid, i in at.items()]
            + [(f"{ref} {i}", oid) for ref, ids in proposed.items() for i, oid in enumerate(ids) if oid not in at],
            "private": _get(client, api)["private"],
            "commits": [[title, _tree(client, repo, oid)] for title, oid in zip(titles, history, strict=True)],
            "branches": {b["name"]: at.get(b["targetCommit"]) for b in refs["branches"]},
            "tags": {t["name"]: at.get(t["targetCommit"]) for t in refs["tags"]},
            "pulls": {ref: [_tree(client, repo, oid) for oid in ids] for ref, ids in proposed.items()},
        }
    found = [_get(client, f"/api/collections/{c['slug']}") for c in _get(client, "/api/collections?owner=demo")]
    repos["collections"] = [
        {
            "title": c["title"],
            "description": c.get("description"),
            "private": c.get("private"),
            "items": [[i["id"], (i.get("note") or {}).get("text")] for i in c["items"]],
        }
        for c in found
    ]
    return repos


_trees: dict[tuple[str, str], str] = {}  # what a commit holds never changes: read once


def _tree(client: httpx2.Client, repo: str, oid: str) -> str:
    """One hash over all files of a commit. Raises AssertionError for a commit that is not whole."""
    if (repo, oid) in _trees:
        return _trees[repo, oid]
    entries = [e for e in _get(client, f"/api/models/{repo}/tree/{oid}?recursive=true") if e["type"] == "file"]
    files = {e["path"]: (e.get("lfs") or e)["oid"] for e in entries}
    if set(files) != {".gitattributes"}:
        assert "manifest.json" in files, f"{repo}: commit {oid[:8]} has files, but no manifest.json"
        manifest = json.loads(_read(client, f"/{repo}/resolve/{oid}/manifest.json"))
        listed = {f["path"]: (f["size"], f["sha256"]) for f in manifest["files"]}
        for path, (size, sha256) in listed.items():
            data = _read(client, f"/{repo}/resolve/{oid}/{path}") if path in files else b""
            whole = len(data) == size and hashlib.sha256(data).hexdigest() == sha256
            assert whole, f"{repo}: commit {oid[:8]}: {path} is not what its manifest.json says"
        assert "README.md" in files, f"{repo}: commit {oid[:8]} has no card"
        stray = {p for p in files if p.endswith(".safetensors")} - set(listed)
        assert not stray, f"{repo}: commit {oid[:8]} holds {sorted(stray)}, which its manifest.json does not list"
    for path in files:
        if path.endswith((".json", ".md", ".sig")):
            data = _plain(path, _read(client, f"/{repo}/resolve/{oid}/{path}"), {})
            files[path] = hashlib.sha256(data).hexdigest()
    _trees[repo, oid] = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    return _trees[repo, oid]


def _get(client: httpx2.Client, path: str) -> Any:
    return json.loads(_read(client, path))


def _read(client: httpx2.Client, path: str) -> bytes:
    answer = client.get(path)
    answer.raise_for_status()
    return answer.content


def _quote(ref: str) -> str:
    return ref.replace("/", "%2F")


def differences(want: State, have: State) -> list[str]:
    found = [f"file {p}: {'missing' if p not in have.files else 'left over' if p not in want.files else 'differs'}"
             for p in sorted({*want.files, *have.files}) if want.files.get(p) != have.files.get(p)]  # fmt: skip
    for repo in sorted({*want.remote, *have.remote}):
        a, b = want.remote.get(repo), have.remote.get(repo)
        if a != b:
            found.append(f"remote {repo}: {a} became {b}")
    return found


def unknown_commits(want: State, have: State) -> list[str]:
    """Commits after a kill that an undisturbed run does not make, or in another order."""
    found = []
    for repo, r in have.remote.items():
        if repo == "collections":
            continue
        known = want.remote.get(repo, {"commits": [], "pulls": {}})
        if r["commits"] != known["commits"][: len(r["commits"])]:
            found.append(f"{repo}: commits {[t for t, _ in r['commits']]} are no beginning of an undisturbed run's")
        for ref, trees in r["pulls"].items():
            if trees != known["pulls"].get(ref, [])[: len(trees)]:
                found.append(f"{repo}: {ref} holds what no undisturbed run puts there")
    return found


# ------------------------------------------------------------------------------------------------ killing


def prepare(runner: Runner, scenario: Scenario) -> None:
    """Save the scenario's state before its command. What scenarios have in common of it is made once."""
    start(runner, scenario.before)
    (runner.project / "variants.yaml").write_text(scenario.ladder)
    runner.save(scenario.name)


def start(runner: Runner, steps: tuple[tuple[str, tuple[str, ...]], ...]) -> None:
    name = "after " + hashlib.sha256(repr(steps).encode()).hexdigest()[:16]
    if (runner.work / "templates" / name).is_dir():
        runner.restore(name)
        return
    if not steps:
        for part in ("project", "home", "hub"):
            shutil.rmtree(runner.work / part, ignore_errors=True)
            (runner.work / part).mkdir()
        for file in ("model", "imatrix-tiny.gguf"):
            (runner.project / file).symlink_to(ROOT / "examples/tiny" / file)
        return
    start(runner, steps[:-1])
    ladder, args = steps[-1]
    (runner.project / "variants.yaml").write_text(ladder)
    with runner.hub():
        ended = runner.run(args)
    if ended.status:
        raise SystemExit(f"preparing with {args} exited {ended.status}\n{runner.log()}")
    runner.save(name)


@dataclass(frozen=True)
class Target:
    """A scenario, what an undisturbed run of it leaves, and what came of its kills. boundaries: names, in their order."""

    scenario: Scenario
    want: State
    boundaries: list[str]
    kills: Kills

    def label(self, when: str, at: float) -> str:
        return f"{when} {at} ({self.boundaries[int(at) - 1]})" if when == "file" else f"{when} {at}"


@dataclass(frozen=True)
class Kill:
    """One kill. when: `file`, `request`, `answer` or `random`. at: which one, from 1; seconds from the start if random."""

    target: Target
    key: str  # the same in every run with the same seed
    when: str
    at: float


def undisturbed(runner: Runner, scenario: Scenario) -> Target:
    prepare(runner, scenario)
    wire.expect("", 0)
    with runner.hub() as hub:
        ended = runner.run(scenario.args)
        if ended.status:
            raise SystemExit(f"{scenario.name}: undisturbed it exited {ended.status}\n{runner.log()}")
        want = look(runner, hub.url)
    kills = Kills(scenario.name, round(ended.seconds, 2), len(ended.boundaries), wire.count)
    return Target(scenario, want, ended.boundaries, kills)


def plan(target: Target, every: int, offset: int, at_random: int, seed: int, share: tuple[int, int]) -> list[Kill]:
    """Kills of one scenario. every, offset: each n-th boundary only, from that one on. share: k, N, for the k-th of N."""
    k, chance = target.kills, random.Random(seed)
    kills = [Kill(target, f"file {n}", "file", n) for n in range(1, k.boundaries + 1)]
    kills += [Kill(target, f"{w} {n}", w, n) for n in range(1, k.requests + 1) for w in ("request", "answer")]
    kills = kills[offset::every]
    moments = [chance.uniform(0, k.undisturbed_s) for _ in range(at_random)]
    kills += [Kill(target, f"random {n}", "random", at) for n, at in enumerate(moments, 1)]
    return kills[share[0] :: share[1]]


def disturb(runner: Runner, kill: Kill) -> None:
    target, k = kill.target, kill.target.kills
    if kill.when == "file":
        k.places[NAMES.sub("*", target.boundaries[int(kill.at) - 1])] += 1
    name = f"{k.scenario}: {target.label(kill.when, kill.at)}"
    started = time.monotonic()
    try:
        faults = _cycle(runner, target.scenario, target.want, kill.when, kill.at, k)
    except AssertionError as e:
        faults = [str(e)]
    k.seconds += time.monotonic() - started
    k.left.remove(kill.key)
    if faults:
        print(f"  {name}: {'; '.join(faults)[:2000]}", flush=True)
        k.failures += [f"{name}: {f}" for f in faults]


def _cycle(runner: Runner, scenario: Scenario, want: State, when: str, at: float, result: Kills) -> list[str]:
    """Kill one run, look, run again, look."""
    runner.restore(scenario.name)
    with runner.hub() as hub:
        wire.expect(when, int(at) if when in ("request", "answer") else 0)
        ended = runner.run(scenario.args, int(at) if when == "file" else None, at if when == "random" else None)
        if ended.killed:
            result.kills[when] += 1
        elif ended.status == 0:  # it was faster than the undisturbed run, or made fewer calls
            result.ended_before += 1
        else:
            return [f"it exited {ended.status} instead of being killed\n{runner.log()}"]
        faults = unknown_commits(want, look(runner, hub.url)) if ended.killed else []
        wire.expect("", 0)
        ended = runner.run(scenario.args)
        if ended.status:
            return [*faults, f"the same command then exited {ended.status}: {runner.log()}"]
        return [*faults, *differences(want, look(runner, hub.url))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", type=int, default=20, help="kills at random moments, a scenario")
    parser.add_argument("--every", type=int, default=1, help="of the boundaries take each n-th")
    parser.add_argument("--offset", type=int, default=0, help="from this boundary on, to spread all over several runs")
    parser.add_argument("--scenarios", default="", help="names, separated by commas; default all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="processes that share the kills")
    parser.add_argument("--until", type=float, default=float("inf"), help="start no kill after so many seconds")
    parser.add_argument("--continue", type=Path, dest="resume", help="only what this record says is left; added to it")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--merge", type=Path, nargs="+", help="kill nothing; put the records of several runs into one")
    parser.add_argument("--work", type=Path, help="default: a new folder, removed at the end")
    parser.add_argument("--share", type=int, nargs=2, default=(0, 1), metavar=("K", "N"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.merge:
        write(args.json, merged(rows_of(args.merge)))
        return 0
    before = rows_of([args.resume]) if args.resume else []
    with tempfile.TemporaryDirectory() as temp:
        work = args.work.absolute() if args.work else Path(temp)
        rows, failed = share_out(args, work, before) if args.workers > 1 else (work_through(args, work, before), False)
    for row in rows:
        print(
            f"{row['scenario']}: undisturbed {row['undisturbed_s']} s, {row['boundaries']} boundaries, {row['requests']} "
            f"requests; {sum(row['kills'].values())} kills {row['kills']} in {row['seconds']} s, "
            f"{len(row['left'])} left, {len(row['failures'])} faults",
            flush=True,
        )
    total, faults = sum(sum(row["kills"].values()) for row in rows), sum(len(row["failures"]) for row in rows)
    print(f"{total} kills, {sum(len(row['left']) for row in rows)} left, {faults} faults", flush=True)
    return 1 if faults or failed else 0


def work_through(args: argparse.Namespace, work: Path, before: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The kills of one process. before: rows of a record to go on with; what a share returns is its own part alone."""
    began, told = time.monotonic(), time.monotonic()
    only = {row["scenario"]: row["left"] for row in before} if args.resume else None
    base = before if tuple(args.share) == (0, 1) else []
    chosen = [s for s in SCENARIOS if not args.scenarios or s.name in args.scenarios.split(",")]
    chosen = [s for s in chosen if only is None or only.get(s.name)]
    HubApp.__call__ = watched
    runner = Runner(work, args.share[0])
    targets = [undisturbed(runner, scenario) for scenario in chosen]
    kills: list[Kill] = []
    for target in targets:
        new = plan(target, args.every, args.offset, args.random, args.seed, args.share)
        new = [kill for kill in new if only is None or kill.key in only[target.scenario.name]]
        target.kills.left = {kill.key for kill in new}
        kills += new
    random.Random(args.seed).shuffle(kills)

    def rows() -> list[dict[str, Any]]:
        return continued(base, [target.kills.row() for target in targets])

    for n, kill in enumerate(kills):
        if n == 0 or time.monotonic() - told > WRITE_S:
            told = time.monotonic()
            print(f"  worker {args.share[0]}: {n} of {len(kills)}, {told - began:.0f} s", file=sys.stderr, flush=True)
            if args.json:
                write(args.json, rows())
        if time.monotonic() - began > args.until:
            break
        disturb(runner, kill)
    runner.close()
    if args.json:
        write(args.json, rows())
    return rows()


def share_out(args: argparse.Namespace, work: Path, before: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], bool]:
    """Processes of this script, each with its share of the kills; their records are put into one as they grow.

    Returns the rows, and whether a share was not worked through (its process has said why).
    """
    passed = ["--random", args.random, "--every", args.every, "--offset", args.offset, "--scenarios", args.scenarios]
    passed += ["--seed", args.seed, "--until", args.until]
    passed += ["--continue", args.resume.absolute()] if args.resume else []
    parts = [work / f"{k}.json" for k in range(args.workers)]
    began, processes = time.monotonic(), []
    for k, part in enumerate(parts):
        part.unlink(missing_ok=True)
        own = ["--share", k, args.workers, "--json", part, "--work", work / str(k)]
        command = [sys.executable, __file__, *map(str, [*passed, *own])]
        processes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))  # what it prints is in its part
    rows: list[dict[str, Any]] = []
    told, going = {fault for row in before for fault in row["failures"]}, True
    while going:
        time.sleep(1)
        going = any(p.poll() is None for p in processes)
        there = [part for part in parts if part.is_file()]
        if going and len(there) < len(parts):
            continue  # a record that says what is left must know of every share
        rows = continued(before, merged(rows_of(there)))
        faults = {fault for row in rows for fault in row["failures"]}
        for fault in sorted(faults - told):
            print(f"  {fault[:2000]}", flush=True)
        told |= faults
        if args.json:
            write(args.json, rows)
    failed = False
    for k, (process, part) in enumerate(zip(processes, parts, strict=True)):
        if process.returncode not in (0, 1) or not part.is_file():
            after_s = time.monotonic() - began
            print(f"worker {k} ended with {process.returncode} after {after_s:.0f} s, its share not done", flush=True)
            failed = True
        for row in rows_of([part]) if part.is_file() else ():
            all_of = next(r for r in rows if r["scenario"] == row["scenario"])
            for what in ("boundaries", "requests"):
                if row[what] != all_of[what]:
                    print(f"worker {k}: {row['scenario']} has {row[what]} {what}, not {all_of[what]}", flush=True)
                    failed = True
    return rows, failed


def rows_of(records: Sequence[Path]) -> list[dict[str, Any]]:
    """Rows of several records. `left` is empty in those of before it was recorded."""
    return [{"left": []} | row for path in records for row in json.loads(path.read_text())["scenarios"]]


def continued(before: list[dict[str, Any]], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a record and of the run that goes on with it; the latter says what is left now."""
    now = {row["scenario"] for row in rows}
    return merged([row | {"left": [] if row["scenario"] in now else row["left"]} for row in before] + rows)


def merged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a scenario, of runs that took different boundaries."""
    out: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["scenario"] not in out:
            out[row["scenario"]] = dict(row)
            continue
        into = out[row["scenario"]]
        into |= {key: into[key] + row[key] for key in ("ended_before", "failures", "left")}
        into |= {key: dict(Counter(into[key]) + Counter(row[key])) for key in ("kills", "places")}
        into["seconds"] = round(into["seconds"] + row["seconds"], 1)
    order = [s.name for s in SCENARIOS]
    return sorted(out.values(), key=lambda row: order.index(row["scenario"]))


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(record(rows), indent=1) + "\n")
    part.replace(path)


def record(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "kills": sum(sum(row["kills"].values()) for row in rows),
        "faults": sum(len(row["failures"]) for row in rows),
        "left": sum(len(row["left"]) for row in rows),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "scenarios": rows,
    }


if __name__ == "__main__":
    sys.exit(main())
