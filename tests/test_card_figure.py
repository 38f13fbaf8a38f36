"""The figure of a card: the same bytes each time, only what was measured, current or said not to be."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from inference.errors import InputError
from publisher.card_figure import NAMES, THEMES, Figure, Point, draw, drawn_key, faults, write

POINTS = (
    Point("Q2", "variant", 3_000_000_000, 0.31, 0.28, 0.35),
    Point("Q4", "this", 5_000_000_000, 0.02, 0.018, 0.023),
    Point("mlx-lm uniform 4-bit", "uniform", 5_000_000_000, 0.05, 0.04, 0.06),
)
FIGURE = Figure(POINTS, 2.1e-9, 9_000_000_000, 0, "alt")


def test_the_same_figures_give_the_same_bytes_also_in_another_process() -> None:
    code = (
        "import sys, hashlib, matplotlib; matplotlib.rcParams['font.family'] = 'serif'; "  # a setting of the user's
        "matplotlib.rcParams['figure.dpi'] = 40; sys.path.insert(0, sys.argv[1]); import test_card_figure as t; "
        "print(hashlib.sha256(b''.join(t.draw(t.FIGURE, x) for x in t.THEMES)).hexdigest())"
    )
    here = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent)], check=True, capture_output=True, text=True
    )
    assert here.stdout.strip() == hashlib.sha256(b"".join(draw(FIGURE, x) for x in THEMES)).hexdigest()


def test_a_picture_says_what_it_shows(tmp_path: Path) -> None:
    assert faults(tmp_path, FIGURE) == [f"images/{n} is missing" for n in NAMES]
    assert write(tmp_path, FIGURE)
    assert faults(tmp_path, FIGURE) == []
    assert not write(tmp_path, FIGURE)
    moved = replace(FIGURE, points=(replace(POINTS[0], kld=0.30), *POINTS[1:]))
    assert faults(tmp_path, moved) == [f"images/{n} is not of today's figures" for n in NAMES]
    assert faults(tmp_path, replace(FIGURE, alt="other words")) == []  # those are in the card


def test_a_picture_of_what_is_no_longer_measured_goes(tmp_path: Path) -> None:
    write(tmp_path, FIGURE)
    assert len(faults(tmp_path, None)) == 2
    assert write(tmp_path, None)
    assert not (tmp_path / "images").exists()
    assert faults(tmp_path, None) == []
    assert not write(tmp_path, None)


def test_pictures_of_the_publishers_own_are_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("curve.png", NAMES[0]):
        (folder / name).write_bytes(b"not from here")
    assert not write(tmp_path, None)
    with pytest.raises(InputError, match=r"images/kld-light\.png: is damaged, or was not drawn by this tool; move it"):
        write(tmp_path, FIGURE)
    assert (folder / NAMES[0]).read_bytes() == b"not from here"


def test_a_damaged_picture_is_not_current(tmp_path: Path) -> None:
    write(tmp_path, FIGURE)
    path = tmp_path / "images" / NAMES[1]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert drawn_key(path) is None
    assert faults(tmp_path, FIGURE) == [f"images/{NAMES[1]} is not of today's figures"]


@pytest.mark.parametrize("change", ["one size", "far interval", "floor inside", "no floor", "other", "many"])
def test_odd_figures_are_drawn(change: str) -> None:
    figure = {
        "one size": replace(FIGURE, points=tuple(replace(p, nbytes=5_000) for p in POINTS)),
        "far interval": replace(FIGURE, points=(replace(POINTS[0], low=-1.0), *POINTS[1:])),
        "floor inside": replace(FIGURE, floor=0.019),
        "no floor": replace(FIGURE, floor=None, other=None),
        "other": replace(FIGURE, points=(*POINTS, Point("$x^$ \\frac", "other", 4_000_000_000, 1e-7, 1e-8, 1e-6))),
        "many": replace(FIGURE, points=tuple(Point(f"V{i}", "variant", 3_000 + i, 0.1, 0.1, 0.1) for i in range(30))),
    }[change]
    assert draw(figure, THEMES[0]).startswith(b"\x89PNG")
