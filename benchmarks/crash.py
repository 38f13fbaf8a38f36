"""Kill `publish build` and `publish push` (SIGKILL) at every boundary and at random moments; the same command must heal it.

    python benchmarks/crash.py [--random 20] [--every 1] [--scenarios build,push] [--json OUT] [--work FOLDER]

Each run starts from the same folders and the same hub (the built-in one, with the real client), is killed, and after
that the same command runs again to its end. Then folders, receipts, results, the remote's history, trees, tags, pull
requests and collection must be what an undisturbed run leaves, times apart; and after the kill alone no commit may be
on the hub that an undisturbed run does not make. Boundaries:

    file     before a change of the file system below the project or the client's home; before and after a call to the hub
    request  when the hub has a request, before it acts on it
    answer   when the hub has acted on a request, before it answers
    random   anywhere

Undisturbed runs take a second or two: commands run in forks of a process that has imported everything (`crash_server.py`).
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
from collections.abc import Iterator
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

    def row(self) -> dict[str, Any]:
        return self.__dict__ | {"kills": dict(self.kills), "places": dict(sorted(self.places.items()))}


# ------------------------------------------------------------------------------------------------ running


class Runner:
    """The fork server, and one work folder: `project`, `home` and `hub` in it are restored before every run."""

    def __init__(self, work: Path) -> None:
        self.work, self.project = work, work / "project"
        self.port = _free_port()
        for name in ("home", "templates"):
            (work / name).mkdir(parents=True, exist_ok=True)
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        env = kept | {
            "HF_ENDPOINT": f"http://127.0.0.1:{self.port}", "HF_HOME": str(work / "home"), "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_XET": "1",
            "PYTHONPATH": str(ROOT),
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


def _free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


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
    repos: dict[str, Any] = {}
    for info in _get(url, "/api/models?author=demo"):
        repo = info["id"]
        api = f"/api/models/{repo}"
        history = [c["id"] for c in reversed(_get(url, f"{api}/commits/main"))]
        titles = [c["title"] for c in reversed(_get(url, f"{api}/commits/main"))]
        refs = _get(url, f"{api}/refs?include_prs=1")
        at = {oid: i for i, oid in enumerate(history)}
        proposed = {
            p["ref"]: [c["id"] for c in reversed(_get(url, f"{api}/commits/{_quote(p['ref'])}"))]
            for p in refs.get("pullRequests", ())
        }
        repos[repo] = {
            "ids": [(i, oid) for oid, i in at.items()]
            + [(f"{ref} {i}", oid) for ref, ids in proposed.items() for i, oid in enumerate(ids) if oid not in at],
            "private": _get(url, api)["private"],
            "commits": [[title, _tree(url, repo, oid)] for title, oid in zip(titles, history, strict=True)],
            "branches": {b["name"]: at.get(b["targetCommit"]) for b in refs["branches"]},
            "tags": {t["name"]: at.get(t["targetCommit"]) for t in refs["tags"]},
            "pulls": {ref: [_tree(url, repo, oid) for oid in ids] for ref, ids in proposed.items()},
        }
    found = [_get(url, f"/api/collections/{c['slug']}") for c in _get(url, "/api/collections?owner=demo")]
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


def _tree(url: str, repo: str, oid: str) -> str:
    """One hash over all files of a commit. Raises AssertionError for a commit that is not whole."""
    entries = [e for e in _get(url, f"/api/models/{repo}/tree/{oid}?recursive=true") if e["type"] == "file"]
    files = {e["path"]: (e.get("lfs") or e)["oid"] for e in entries}
    if set(files) != {".gitattributes"}:
        assert "manifest.json" in files, f"{repo}: commit {oid[:8]} has files, but no manifest.json"
        manifest = json.loads(_read(url, f"/{repo}/resolve/{oid}/manifest.json"))
        listed = {f["path"]: (f["size"], f["sha256"]) for f in manifest["files"]}
        for path, (size, sha256) in listed.items():
            data = _read(url, f"/{repo}/resolve/{oid}/{path}") if path in files else b""
            whole = len(data) == size and hashlib.sha256(data).hexdigest() == sha256
            assert whole, f"{repo}: commit {oid[:8]}: {path} is not what its manifest.json says"
        assert "README.md" in files, f"{repo}: commit {oid[:8]} has no card"
        stray = {p for p in files if p.endswith(".safetensors")} - set(listed)
        assert not stray, f"{repo}: commit {oid[:8]} holds {sorted(stray)}, which its manifest.json does not list"
    for path in files:
        if path.endswith((".json", ".md", ".sig")):
            data = _plain(path, _read(url, f"/{repo}/resolve/{oid}/{path}"), {})
            files[path] = hashlib.sha256(data).hexdigest()
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _get(url: str, path: str) -> Any:
    return json.loads(_read(url, path))


_trees: dict[str, bytes] = {}  # what a commit holds never changes: read once


def _read(url: str, path: str) -> bytes:
    fixed = re.search(r"/(tree|resolve)/[0-9a-f]{40}", path)
    if fixed and path in _trees:
        return _trees[path]
    answer = httpx2.get(
        url + path, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60, follow_redirects=True, trust_env=False
    )
    answer.raise_for_status()
    if fixed:
        _trees[path] = answer.content
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
    for part in ("project", "home", "hub"):
        shutil.rmtree(runner.work / part, ignore_errors=True)
        (runner.work / part).mkdir()
    for name in ("model", "imatrix-tiny.gguf"):
        (runner.project / name).symlink_to(ROOT / "examples/tiny" / name)
    for ladder, args in scenario.before:
        (runner.project / "variants.yaml").write_text(ladder)
        with runner.hub():
            ended = runner.run(args)
        if ended.status:
            raise SystemExit(f"{scenario.name}: preparing with {args} exited {ended.status}\n{runner.log()}")
    (runner.project / "variants.yaml").write_text(scenario.ladder)
    runner.save(scenario.name)


def disturb(runner: Runner, scenario: Scenario, every: int, offset: int, at_random: int, seed: int) -> Kills:
    """All kills of one scenario. every, offset: take each n-th boundary only, from that one on."""
    prepare(runner, scenario)
    result = Kills(scenario.name)
    started = time.monotonic()
    wire.expect("", 0)
    with runner.hub() as hub:
        ended = runner.run(scenario.args)
        if ended.status:
            raise SystemExit(f"{scenario.name}: undisturbed it exited {ended.status}\n{runner.log()}")
        want = look(runner, hub.url)
    result.undisturbed_s = round(ended.seconds, 2)
    result.boundaries, result.requests = len(ended.boundaries), wire.count
    chance = random.Random(seed)
    plan = [("file", n) for n in range(1, len(ended.boundaries) + 1)]
    plan += [(when, n) for n in range(1, wire.count + 1) for when in ("request", "answer")]
    plan = plan[offset::every]
    plan += [("random", chance.uniform(0, ended.seconds)) for _ in range(at_random)]
    for when, at in plan:
        if when == "file":
            result.places[NAMES.sub("*", ended.boundaries[int(at) - 1])] += 1
        name = f"{scenario.name}: {when} {at if when != 'file' else f'{at} ({ended.boundaries[int(at) - 1]})'}"
        try:
            faults = _cycle(runner, scenario, want, when, at, result)
        except AssertionError as e:
            faults = [str(e)]
        if sum(result.kills.values()) % 10 == 0:
            print(f"  {scenario.name}: {result.kills.total()} of {len(plan)}", file=sys.stderr, flush=True)
        if faults:
            print(f"  {name}: {'; '.join(faults)[:2000]}", flush=True)
            result.failures += [f"{name}: {f}" for f in faults]
    result.seconds = round(time.monotonic() - started, 1)
    return result


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
    parser.add_argument("--json", type=Path)
    parser.add_argument("--merge", type=Path, nargs="+", help="kill nothing; put the records of several runs into one")
    parser.add_argument("--work", type=Path, help="default: a new folder, removed at the end")
    args = parser.parse_args()
    if args.merge:
        rows = [row for path in args.merge for row in json.loads(path.read_text())["scenarios"]]
        args.json.write_text(json.dumps(record(merged(rows)), indent=1) + "\n")
        return 0
    chosen = [s for s in SCENARIOS if not args.scenarios or s.name in args.scenarios.split(",")]
    HubApp.__call__ = watched
    with tempfile.TemporaryDirectory() as temp:
        runner = Runner(args.work.absolute() if args.work else Path(temp))
        done = []
        for scenario in chosen:
            done.append(disturb(runner, scenario, args.every, args.offset, args.random, args.seed))
            k = done[-1]
            print(
                f"{k.scenario}: undisturbed {k.undisturbed_s} s, {k.boundaries} boundaries, {k.requests} requests; "
                f"{k.kills.total()} kills {dict(k.kills)} in {k.seconds} s, {len(k.failures)} faults",
                flush=True,
            )
            if args.json:
                args.json.write_text(json.dumps(record([k.row() for k in done]), indent=1) + "\n")
        runner.close()
    total, faults = sum(k.kills.total() for k in done), sum(len(k.failures) for k in done)
    print(f"{total} kills, {faults} faults", flush=True)
    return 1 if faults else 0


def merged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a scenario, of runs that took different boundaries."""
    out: dict[str, dict[str, Any]] = {}
    for row in rows:
        into = out.setdefault(row["scenario"], row)
        if into is not row:
            into |= {key: into[key] + row[key] for key in ("ended_before", "failures", "seconds")}
            into |= {key: dict(Counter(into[key]) + Counter(row[key])) for key in ("kills", "places")}
    order = [s.name for s in SCENARIOS]
    return sorted(out.values(), key=lambda row: order.index(row["scenario"]))


def record(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "kills": sum(sum(row["kills"].values()) for row in rows),
        "faults": sum(len(row["failures"]) for row in rows),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "scenarios": rows,
    }


if __name__ == "__main__":
    sys.exit(main())
