"""Runs `publish` in forks of a process that has imported everything, and kills a fork at the n-th boundary if asked to.

A part of `crash.py`, which starts it. Reads one JSON line a run from stdin, {"args", "root", "cwd", "kill", "log"}; answers with
the fork's process id when it runs, and with {"status", "boundaries"} when it has ended. The product knows nothing of
this: boundaries are seen from outside, as Python's audit events of whatever changes a file below the work folder, and
as the start and end of every call to the hub.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import pkgutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Audit events that come right before a file system call: event → which of its arguments hold paths.
CHANGES = {
    "os.rename": (0, 1), "os.remove": (0,), "os.rmdir": (0,), "os.mkdir": (0,), "os.link": (0, 1), "os.symlink": (1,),
    "os.truncate": (0,), "os.chmod": (0,),
}  # fmt: skip
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    preload()
    say(answers, ready=True)
    for line in sys.stdin:
        job = json.loads(line)
        count, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(count)
            answers.close()
            run(job, write)
        os.close(write)
        say(answers, pid=pid)
        _, status = os.waitpid(pid, 0)
        with os.fdopen(count) as pipe:
            names = pipe.read().splitlines()
        say(answers, status=os.waitstatus_to_exitcode(status), boundaries=names)


def say(out: Any, **answer: Any) -> None:
    out.write(json.dumps(answer) + "\n")
    out.flush()


def preload() -> None:
    """Everything that a command imports late. Nothing here may compute with MLX: its threads do not survive a fork."""
    for package in ("publisher", "quant", "inference"):
        for module in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
    importlib.import_module("matplotlib.backends.backend_agg")
    gc.collect()
    gc.freeze()  # a fork's collections need not look through all of this again, nor copy its pages by doing so


def run(job: dict[str, Any], count: int) -> None:
    """One command, in the fork; never returns."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    out = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    null = os.open(os.devnull, os.O_RDONLY)
    for fd, to in ((null, 0), (out, 1), (out, 2)):
        os.dup2(fd, to)
    os.chdir(job["cwd"])
    passed = boundaries(job["kill"], lambda name: os.write(count, name.encode() + b"\n"))
    watch_files(Path(job["root"]), passed)
    watch_calls(passed)
    fix_speeds()
    from publisher.cli import main as publish

    sys.argv = ["publish", *job["args"]]
    code = 0
    try:
        publish()
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 1
    except BaseException:  # noqa: BLE001 - the end of a fork, whatever it was
        import traceback

        traceback.print_exc()
        code = 70
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def boundaries(kill: int | None, tell: Callable[[str], Any]) -> Callable[[str], None]:
    passed = 0

    def boundary(name: str) -> None:
        nonlocal passed
        passed += 1
        tell(name)
        if passed == kill:
            os.kill(os.getpid(), signal.SIGKILL)

    return boundary


def watch_files(root: Path, passed: Callable[[str], None]) -> None:
    """A boundary before each change of a file below root."""
    prefix = str(root) + os.sep

    def below(path: Any) -> str | None:
        if not isinstance(path, str | bytes | os.PathLike):
            return None
        text = os.path.abspath(os.fsdecode(path))
        return text.removeprefix(prefix) if text.startswith(prefix) else None

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and args[2] is not None and args[2] & WRITING:
            touched = below(args[0])
        elif event in CHANGES:
            touched = next((p for i in CHANGES[event] if (p := below(args[i])) is not None), None)
        else:
            return
        if touched is not None:
            passed(f"{event} {Path(touched).name}")

    sys.addaudithook(hook)


def watch_calls(passed: Callable[[str], None]) -> None:
    """A boundary before and after each call to the hub."""
    from publisher.hub_errors import Calls

    plain = Calls.__call__

    def call(self: Any, doing: str, *args: Any, **kwargs: Any) -> Any:
        passed(f"before {doing}")
        value = plain(self, doing, *args, **kwargs)
        passed(f"after {doing}")
        return value

    Calls.__call__ = call


def fix_speeds() -> None:
    """The benchmark runs, and its figures are replaced by constants: cards of two runs must be comparable."""
    import publisher.measure as measure

    plain = measure.measure

    def fixed(*args: Any, **kwargs: Any) -> Any:
        from publisher.schema import Speed, Stat

        plain(*args, **kwargs)
        stat = Stat(median=100.0, low=99.0, high=101.0, runs=1)
        return Speed(decode_tps=stat, prefill_tps={32: stat}, ttft_s=stat, peak_gb=0.1)

    measure.measure = fixed


if __name__ == "__main__":
    main()
