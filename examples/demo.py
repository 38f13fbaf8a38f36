"""The whole way on the bundled tiny model, with the real command line and a hub on this machine: no account, no network.

    python examples/demo.py [--out FOLDER] [--quick]

Copies examples/tiny into a work folder, starts `publish hub` on a free port of the loopback interface with a random
token, then runs build, card, verify, push and status as a person would. What is in the folder is replaced. Settings of
the Hugging Face client that the caller has (tokens, endpoint, cache) are left out: nothing can reach the real Hub.
"""

from __future__ import annotations

import argparse
import os
import re
import secrets
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

TINY = Path(__file__).parent / "tiny"
PUBLISH = Path(sys.executable).with_name("publish")  # of the environment that runs this file
FOREIGN = ("HF_", "HUGGING", "PUBLISH_HUB_TOKEN")  # variables of the caller that are not passed on
START_S = 60  # for the hub to answer; it takes about one
MARK = "demo.log"  # a folder that holds it is ours to replace
# --quick: one short run each, and a short smoke test, for tests; the figures say even less
QUICK = {
    "turns: 4": "turns: 2",
    "turn_tokens: 32": "turn_tokens: 8",
    "prefill: [64, 256]": "prefill: [64]",
    "runs: 2": "runs: 1\nsmoke: {prompts: [The quick brown fox], max_tokens: 32, text_tokens: 64}",
}


class Failed(Exception):
    """A step did not do what it should; the message says which."""


class Log:
    """Lines to the terminal and to demo.log, as they come."""

    def __init__(self, file: TextIO) -> None:
        self.file = file

    def write(self, line: str) -> None:
        for out in (sys.stdout, self.file):
            out.write(line.rstrip("\n") + "\n")
            out.flush()


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    options.add_argument("--out", type=Path, default=Path("demo-out"), metavar="FOLDER", help="work folder [demo-out]")
    options.add_argument("--quick", action="store_true", help="a short smoke test, a benchmark of one short run")
    given = options.parse_args()
    started = time.monotonic()
    try:
        prepare(given.out, given.quick)
        with open(given.out / MARK, "w", encoding="utf-8") as file:
            log = Log(file)
            try:
                rehearse(given.out, log)
            except Failed as e:
                log.write(f"demo: {e}")
                return 1
            except KeyboardInterrupt:
                log.write("demo: interrupted")
                return 130
            log.write("")
            log.write(f"Done in {time.monotonic() - started:.0f} s. Below the work folder lie:")
            log.write("  build/<ID>/README.md   the cards")
            log.write("  variants.yaml          the ladder; change it and run `publish status` there")
            log.write("  hub/                   what was pushed; `publish hub --dir hub` serves it again")
            log.write("  demo.log               these lines")
    except Failed as e:
        print(f"demo: {e}", file=sys.stderr)
        return 2
    print(f"Work folder: {given.out}")  # not into the log, which names no path of this machine
    return 0


def prepare(out: Path, quick: bool) -> None:
    """A fresh work folder with the ladder, the model and the imatrix."""
    if not PUBLISH.is_file():
        raise Failed("no `publish` beside this Python; run: sh scripts/demo.sh")
    if out.exists():
        if not out.is_dir() or (any(out.iterdir()) and not (out / MARK).is_file()):
            raise Failed(f"{out} is there already and not of an earlier demo; give another with --out")
        shutil.rmtree(out)
    out.mkdir(parents=True)
    (out / MARK).touch()
    shutil.copytree(TINY / "model", out / "model")
    shutil.copyfile(TINY / "imatrix-tiny.gguf", out / "imatrix-tiny.gguf")
    text = (TINY / "variants.yaml").read_text(encoding="utf-8")
    if quick:
        for long, short in QUICK.items():
            if long not in text:
                raise Failed(f"examples/tiny/variants.yaml: {long!r} is gone; change QUICK as well")
            text = text.replace(long, short)
    (out / "variants.yaml").write_text(text, encoding="utf-8")


def rehearse(out: Path, log: Log) -> None:
    """Every step in order. Raises Failed at the first that does not succeed."""
    token = f"hf_{secrets.token_hex(17)}"  # lives in the environment of the processes that need it, nowhere else
    clean = {k: v for k, v in os.environ.items() if not k.startswith(FOREIGN)}
    clean |= {"HF_HOME": str((out / "hf-home").absolute()), "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONUNBUFFERED": "1"}
    offline = clean | {"HF_HUB_OFFLINE": "1"}
    with hub(out, clean | {"PUBLISH_HUB_TOKEN": token}, log) as endpoint:
        online = clean | {"HF_ENDPOINT": endpoint, "HF_TOKEN": token}
        publish(out, offline, log, "plan")
        publish(out, offline, log, "build", "--all")
        publish(out, offline, log, "card", "--all", "--check")
        publish(out, offline, log, "verify")
        publish(out, online, log, "push", "--all", "--yes")
        publish(out, online, log, "verify", "--remote")
        publish(out, online, log, "status", "--remote")
    log.write("The hub is stopped.")


def publish(out: Path, env: dict[str, str], log: Log, *arguments: str) -> None:
    """One command in the work folder, its output as it comes."""
    log.write("")
    log.write(f"$ publish {' '.join(arguments)}")
    command = subprocess.Popen(
        [str(PUBLISH), *arguments], cwd=out, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, encoding="utf-8", errors="replace",
    )  # fmt: skip
    try:
        assert command.stdout
        for line in command.stdout:
            log.write(line)
        if command.wait():
            raise Failed(f"`publish {' '.join(arguments)}` ended with exit code {command.returncode}")
    finally:
        stop(command)


@contextmanager
def hub(out: Path, env: dict[str, str], log: Log) -> Iterator[str]:
    """`publish hub` in the work folder, until the block ends; gives its URL once it listens."""
    log.write("$ publish hub --dir hub --port 0")
    server = subprocess.Popen(
        [str(PUBLISH), "hub", "--dir", "hub", "--port", "0"], cwd=out, env=env, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace",
    )  # fmt: skip
    watchdog = threading.Timer(START_S, server.kill)
    watchdog.start()
    try:
        assert server.stdout
        line = server.stdout.readline()
        watchdog.cancel()
        found = re.search(r"http://127\.0\.0\.1:\d+", line)
        if not found:
            raise Failed(f"the hub did not start: {line.strip() or 'it ended'}")
        log.write(line)
        # an unread pipe would stop the server when it is full
        threading.Thread(
            target=lambda: [log.write(f"hub: {text}") for text in server.stdout or ()], daemon=True
        ).start()
        yield found[0]
    finally:
        watchdog.cancel()
        stop(server)


def stop(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


if __name__ == "__main__":
    sys.exit(main())
