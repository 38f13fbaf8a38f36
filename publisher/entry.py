"""What `publish` starts. It imports nothing before it can answer ctrl-C: imports take longer than a finger."""

from __future__ import annotations

import sys

INTERRUPTED = 130  # exit code
STOPPED = "interrupted; the same command goes on where this one stopped"


def main() -> None:
    try:
        from .cli import main as command  # noqa: PLC0415 - see above

        command(prog_name="publish")
    except KeyboardInterrupt:  # while it imported or before click took over; later `cli.Commands` answers
        sys.stderr.write(STOPPED + "\n")
        raise SystemExit(INTERRUPTED) from None
