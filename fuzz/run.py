"""Runs the fuzz targets with atheris for a stated time each, and says what came of it.

    python fuzz/run.py [TARGET...] [--seconds 300] [--jobs 1] [--out fuzz-out] [--json]

Every target runs in a process of its own, `--jobs` of them at a time, from its corpus in fuzz/corpus/TARGET. What an execution
raises is kept once by its type and place, below OUT/findings/TARGET, and the run goes on; a hang or a loss of memory ends
the process, is kept too, and the target goes on in a new one with the time that is left. Inputs that reach new code are
below OUT/corpus/TARGET; `--minimise` then takes the few that reach what no smaller one does into the repository's corpus.

Needs the dependency group `fuzz`; the tests replay corpus and findings without it (tests/test_hostile_corpus.py).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"
sys.path[:0] = [str(HERE), str(HERE.parent)]

RSS_MB = 2048  # memory of one process, above which an execution counts as a finding
SLOW_S = 30  # of one execution; a hundred times what any takes on an idle machine
MAX_LEN = 4096  # bytes of an input
CORPUS_BYTES = 16_000  # of one target in the repository, beside its seeds


def child(name: str, arguments: list[str], findings: Path) -> None:
    """Fuzz one target in this process."""
    import atheris

    with atheris.instrument_imports(
        include=["publisher", "quant", "inference", "yaml", "jinja2", "targets", "answering"]
    ):
        import targets

        for seed in (CORPUS / name).glob("seed-*"):
            targets.TARGETS[name](seed.read_bytes())  # what is imported on the way is instrumented too
    run = targets.TARGETS[name]
    seen: set[str] = set()

    def one(data: bytes) -> None:
        try:
            run(data)
        except Exception as e:  # noqa: BLE001 - that is what is looked for
            place = where(e)
            if place not in seen:
                seen.add(place)
                keep(findings, data, place, e)

    atheris.Setup([sys.argv[0], *arguments], one)
    atheris.Fuzz()


def where(error: Exception) -> str:
    """Type and the innermost line of ours."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if str(HERE.parent) in f.filename]
    last = frames[-1] if frames else traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno} ({last.name})"


def keep(folder: Path, data: bytes, place: str, error: Exception) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(data).hexdigest()[:16]
    (folder / name).write_bytes(data)
    (folder / f"{name}.txt").write_text(f"{place}\n{error!s:.500}\n")


def fuzz(name: str, seconds: int, out: Path) -> dict[str, Any]:
    """One target for that long; several processes if it hangs or runs out of memory on the way."""
    new, findings = out / "corpus" / name, out / "findings" / name
    for folder in (new, findings):
        folder.mkdir(parents=True, exist_ok=True)
    executions, peak_mb, coverage, restarts, began = 0, 0, 0, 0, time.monotonic()
    while (left := seconds - (time.monotonic() - began)) > 1 and restarts < 10:
        # the fuzzer leaves without cleaning up behind the targets
        shm = "/dev/shm" if Path("/dev/shm").is_dir() else None
        with tempfile.TemporaryDirectory(prefix="publish-fuzz-", dir=shm) as temp:
            made = subprocess.run(
                [
                    sys.executable, str(HERE / "run.py"), "--child", name, str(findings), str(new), str(CORPUS / name),
                    f"-max_total_time={int(left)}", f"-rss_limit_mb={RSS_MB}", f"-timeout={SLOW_S}", f"-max_len={MAX_LEN}",
                    "-print_final_stats=1", f"-artifact_prefix={findings}/", *dictionary(name),
                ],
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace",
                env={**os.environ, **QUIET, "TMPDIR": temp},
            )  # fmt: skip
        told = made.stderr
        executions += max([0, *map(int, re.findall(r"number_of_executed_units:\s*(\d+)", told))])
        if not re.search("number_of_executed_units", told):
            executions += max([0, *map(int, re.findall(r"^#(\d+)", told, re.M))])
        peak_mb = max([peak_mb, *map(int, rss(told))])
        coverage = max([coverage, *map(int, re.findall(r"cov: (\d+)", told))])
        if made.returncode:
            restarts += 1
            tail = [line for line in told.splitlines() if "ERROR" in line or "SUMMARY" in line]
            (findings / f"process-{restarts}.txt").write_text("\n".join(tail[-4:]) + "\n" + told[-3000:])
    found = sorted(p for p in findings.glob("*") if p.suffix != ".txt")
    return {
        "target": name,
        "executions": executions,
        "seconds": round(time.monotonic() - began),
        "peak_mb": peak_mb,
        "coverage": coverage,
        "corpus": sum(1 for _ in (CORPUS / name).glob("*")),
        "findings": [why(p) for p in found],
    }


def rss(text: str) -> list[str]:
    return [a or b for a, b in re.findall(r"peak_rss_mb:\s*(\d+)|rss: (\d+)Mb", text)]


def why(path: Path) -> str:
    told = path.with_name(f"{path.name}.txt")
    return f"{path.name}: {told.read_text().splitlines()[0]}" if told.is_file() else path.name


def dictionary(name: str) -> list[str]:
    path = HERE / "dictionaries" / f"{name}.txt"
    return [f"-dict={path}"] if path.is_file() else []


def minimise(name: str, out: Path) -> None:
    """Keep, smallest first, what reaches lines or jumps that no smaller input reaches: the repository's corpus."""
    import targets

    folder = CORPUS / name
    known = {p.read_bytes() for p in (*folder.glob("*"), *(out / "corpus" / name).glob("*"))}
    reached: set[tuple[str, int, int]] = set()
    for seed in sorted(folder.glob("seed-*")):
        reached |= jumps(targets.TARGETS[name], seed.read_bytes())
        known.discard(seed.read_bytes())
    for path in set(folder.glob("*")) - set(folder.glob("seed-*")):
        path.unlink()
    left = CORPUS_BYTES
    for data in sorted(known, key=lambda d: (len(d), d)):
        new = jumps(targets.TARGETS[name], data) - reached
        if new and len(data) <= left:
            reached |= new
            left -= len(data)
            (folder / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)


def jumps(run: Callable[[bytes], None], data: bytes) -> set[tuple[str, int, int]]:
    """From line to line, in the project's own code and in PyYAML's and Jinja's."""
    found: set[tuple[str, int, int]] = set()

    def trace(frame: Any, event: str, _: Any) -> Any:
        file, before = frame.f_code.co_filename, 0
        if not TRACED.search(file):
            return None

        def line(frame: Any, event: str, _: Any) -> Any:
            nonlocal before
            found.add((file, before, frame.f_lineno))
            before = frame.f_lineno
            return line

        return line

    sys.settrace(trace)
    try:
        run(data)
    except Exception:  # noqa: BLE001 - a finding; the replay tells it
        pass
    finally:
        sys.settrace(None)
    return found


TRACED = re.compile(r"/(publisher|quant|inference|yaml|jinja2)/[^/]+(/[^/]+)?\.py$")
QUIET = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| target | executions | s | a second | peak MB | edges | corpus | findings |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for r in rows:
        speed = r["executions"] // max(1, r["seconds"])
        lines.append(
            f"| `{r['target']}` | {r['executions']:,} | {r['seconds']} | {speed:,} | {r['peak_mb']} | {r['coverage']} "
            f"| {r['corpus']} | {len(r['findings'])} |"
        )
    return "\n".join(lines)


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        # address space beyond this is a MemoryError, as on a small machine; libFuzzer's own limit is on resident memory
        resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 20, 64 << 20))
        child(sys.argv[2], sys.argv[4:], Path(sys.argv[3]))
        return
    import targets

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", choices=[[], *targets.TARGETS], metavar="TARGET")
    parser.add_argument("--seconds", type=int, default=300)
    parser.add_argument(
        "--jobs", type=int, default=1, help="targets at a time; more than there are cores slow each other"
    )
    parser.add_argument("--out", type=Path, default=Path("fuzz-out"))
    parser.add_argument("--minimise", action="store_true", help="merge what OUT holds into the corpus; fuzz nothing")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    chosen = given.targets or list(targets.TARGETS)
    if given.minimise:
        for name in chosen:
            minimise(name, given.out)
        return
    rows: list[dict[str, Any]] = []
    summary = {"python": platform.python_version(), "machine": platform.machine(), "rows": rows}
    given.out.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(given.jobs) as pool:
        runs = [pool.submit(fuzz, name, given.seconds, given.out) for name in chosen]
        for run in as_completed(runs):
            print(json.dumps(run.result()), file=sys.stderr, flush=True)
            rows[:] = [run.result() for run in runs if run.done()]
            # at every end of a target: a run that is cut off leaves a record too
            (given.out / "fuzz.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary, indent=1) if given.json else table(rows))


if __name__ == "__main__":
    main()
