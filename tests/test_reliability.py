"""docs/reliability.md is true: its tests exist, its bounds are the code's, its faults are the hub's."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from publisher import hub, hub_errors, push
from publisher.hub_watch import Limits
from publisher.localhub.faults import KINDS, Fault

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs/reliability.md"
TEXT = PAGE.read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`(test_\w+\.py)::(test_\w+)`", TEXT)))


@pytest.mark.parametrize("file", sorted({file for file, _ in NAMED}))
def test_every_test_that_is_named_exists(file):
    source = (TESTS / file).read_text(encoding="utf-8")
    missing = [name for f, name in NAMED if f == file and not re.search(rf"^def {name}\(", source, re.M)]
    assert not missing


def test_every_row_names_a_test():
    rows = [line for line in TEXT.split("## Killed anywhere")[0].splitlines() if line.startswith("| ")]
    bare = [row for row in rows if "::" not in row and not row.startswith(("| fault |", "| where it"))]
    assert len(rows) > 50
    assert not bare


def test_the_bounds_are_those_of_the_code():
    limits = Limits()
    for said in (
        f"{limits.connect_s:.0f} s to open",
        f"{limits.answer_s:.0f} s of silence",
        f"{limits.rate / 1024:.0f} KiB/s over every {limits.window_s:.0f} s",
        f"{hub.PATIENCE_S + limits.answer_s:.0f} s for all its tries",
        f"{hub.WAIT_S} s at most at once",
        f"{hub.PATIENCE_S} s of tries",
        f"ends after {hub_errors.CONFLICTS}",
    ):
        assert said in TEXT, said
    assert push.COMMIT_TRIES == hub.UPLOAD_TRIES == 3
    assert "three commits, three times an upload" in TEXT


def test_every_fault_of_the_hub_is_described_and_every_example_parses():
    rehearsing = TEXT.split("## Rehearsing it")[1]
    assert set(re.findall(r"^\| `(\w+)` \|", rehearsing, re.M)) == set(KINDS)
    examples = re.findall(r"`--fault ([a-z_]+:[^`]+)`", rehearsing)
    assert len(examples) >= 2
    for example in examples:
        Fault.parse(example)


def test_the_crash_table_is_the_record():
    record = json.loads((TESTS.parent / "benchmarks/results/crash.json").read_text())
    assert record["kills"] == sum(sum(row["kills"].values()) for row in record["scenarios"]) >= 200
    assert f"{record['kills']:,} kills" in TEXT
    for row in record["scenarios"]:
        assert f"| {row['scenario']} |" in TEXT
        assert row["failures"] == []
