"""The card's figure: KL divergence against size, as PNG for light and dark pages, from measured figures alone.

`write` draws what is not there yet and removes what is measured no more; `faults` says what of it is not current. Each
file names the hash of what it shows, so both know without drawing: the same figures on another machine, whose libraries
compress in another way, are no other picture. Files of these names that this tool did not draw are never touched.

Colours are Okabe and Ito's, markers differ too, so that neither colour nor shade is needed to tell the models apart.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

from inference.errors import InputError

from .store import digest, discard_leftovers, write_bytes

FIGURE_VERSION = 1  # bump it, with the reason, when the same figures give another picture
FOLDER = "images"
KEYWORD = "mlx-publish figure"  # of the text chunk that names the hash
SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_BYTES = 4 << 20
INCHES, DPI = (7.2, 4.6), 150
FAR = 30  # times below the lowest point, a control row is named instead of drawn: it would flatten all else
Kind = Literal["this", "variant", "uniform", "unsloth", "other"]
LEGEND: dict[Kind, str] = {
    "this": "this variant",
    "variant": "other variants",
    "uniform": "uniform, as by mlx-lm",
    "unsloth": "unsloth, as published",
    "other": "other models",
}
MARKERS: dict[Kind, str] = {"this": "*", "variant": "o", "uniform": "s", "unsloth": "^", "other": "D"}


@dataclass(frozen=True)
class Theme:
    name: str
    page: str
    ink: str
    faint: str
    colours: tuple[str, ...]  # in the order of LEGEND


THEMES = (
    Theme("light", "#ffffff", "#1f2328", "#c8ced6", ("#D55E00", "#0072B2", "#E69F00", "#009E73", "#CC79A7")),
    Theme("dark", "#0b0f19", "#e6e8ec", "#3a4150", ("#E69F00", "#56B4E9", "#F0E442", "#009E73", "#CC79A7")),
)
NAMES = tuple(f"kld-{theme.name}.png" for theme in THEMES)


@dataclass(frozen=True)
class Point:
    """nbytes: of the stored tensors; kld, low, high: nats a token."""

    name: str
    kind: Kind
    nbytes: int
    kld: float
    low: float
    high: float


@dataclass(frozen=True)
class Figure:
    """floor: mean KL divergence of the control row. text_params, other: of the language model, and bytes beside it, for an
    axis of bits per weight; other None: not the same for all points, so that there is no such axis."""

    points: tuple[Point, ...]
    floor: float | None
    text_params: int
    other: int | None
    alt: str  # tells it in words

    def key(self, theme: str) -> str:
        points = [[p.name, p.kind, p.nbytes, p.kld, p.low, p.high] for p in self.points]
        return digest(
            {
                "version": FIGURE_VERSION,
                "theme": theme,
                "points": points,
                "floor": self.floor,
                "axis": [self.text_params, self.other],
            }
        )


def faults(folder: Path, figure: Figure | None) -> list[str]:
    """What of a variant's pictures is not what it would be now, a line each."""
    found = []
    for theme, name in zip(THEMES, NAMES, strict=True):
        path = folder / FOLDER / name
        there = path.is_file() or path.is_symlink()
        if figure is None:
            if there and drawn_key(path):
                found.append(f"{FOLDER}/{name} shows what is no longer measured")
        elif not there:
            found.append(f"{FOLDER}/{name} is missing")
        elif drawn_key(path) != figure.key(theme.name):
            found.append(f"{FOLDER}/{name} is not of today's figures")
    return found


def write(folder: Path, figure: Figure | None) -> bool:
    """Bring a variant's pictures up to date; tells whether anything changed. Raises InputError for a file of such a name
    that was not drawn here."""
    changed = False
    for theme, name in zip(THEMES, NAMES, strict=True):
        path = folder / FOLDER / name
        discard_leftovers(path)
        there = path.is_file() or path.is_symlink()
        key = drawn_key(path) if there else None
        if figure is None:
            if key:
                path.unlink()
                changed = True
        elif key != figure.key(theme.name):
            if there and key is None:
                raise InputError(f"{folder.name}/{FOLDER}/{name}: is damaged, or was not drawn by this tool; move it")
            write_bytes(path, draw(figure, theme))
            changed = True
    if figure is None and changed and not any((folder / FOLDER).iterdir()):
        (folder / FOLDER).rmdir()
    return changed


def drawn_key(path: Path) -> str | None:
    """The hash that a picture of ours names; None for anything else, a damaged one included."""
    try:
        if path.is_symlink() or path.stat().st_size > MAX_BYTES:
            return None
        data = path.read_bytes()
    except OSError:
        return None
    key, ended = None, False
    for kind, body in _chunks(data):
        if kind == b"tEXt" and body.startswith(KEYWORD.encode() + b"\0"):
            key = body.partition(b"\0")[2].decode("latin-1")
        ended = kind == b"IEND"
    return key if ended else None


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Chunks of a PNG as long as their checksums are right."""
    at = len(SIGNATURE) if data.startswith(SIGNATURE) else len(data)
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        kind, body = data[at + 4 : at + 8], data[at + 8 : end]
        if zlib.crc32(kind + body).to_bytes(4, "big") != data[end : end + 4]:
            return
        yield kind, body
        at = end + 4


# ------------------------------------------------------------------------------------------------ drawing


def draw(figure: Figure, theme: Theme) -> bytes:
    """The picture as PNG: the same bytes each time. Needs no display, and no setting of the user's has a part in it."""
    import matplotlib  # noqa: PLC0415 - 0.3 s, only where there is something to draw
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure as Sheet  # noqa: PLC0415

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "font.family": "DejaVu Sans",
                "font.size": 9,
                "text.parse_math": False,
                "text.color": theme.ink,
                "axes.edgecolor": theme.faint,
                "axes.labelcolor": theme.ink,
                "xtick.color": theme.ink,
                "ytick.color": theme.ink,
            }
        )
        sheet = Sheet(figsize=INCHES, dpi=DPI, facecolor=theme.page)
        canvas = FigureCanvasAgg(sheet)
        axes = sheet.add_axes((0.105, 0.2, 0.865, 0.685), facecolor=theme.page)
        _axes(axes, figure, theme)
        _points(axes, figure, theme)
        _floor(axes, figure, theme)
        sheet.legend(
            loc="lower center",
            ncols=5,
            frameon=False,
            fontsize=8.5,
            handletextpad=0.3,
            columnspacing=1.4,
            bbox_to_anchor=(0.53, 0.005),
        )
        _labels(axes, canvas.get_renderer(), figure, theme)
        out = BytesIO()
        sheet.savefig(
            out, format="png", facecolor=theme.page, metadata={"Software": None, KEYWORD: figure.key(theme.name)}
        )
    return out.getvalue()


def _unit(figure: Figure) -> tuple[float, str]:
    return (1e9, "GB") if max(p.nbytes for p in figure.points) >= 1e9 else (1e6, "MB")


def _axes(axes: Any, figure: Figure, theme: Theme) -> None:
    unit, name = _unit(figure)
    xs = [p.nbytes / unit for p in figure.points]
    lows = [p.low if p.low > 0 else p.kld for p in figure.points]
    margin = 0.08 * (max(xs) - min(xs)) or 0.1 * max(xs)
    floor = [figure.floor] if figure.floor and figure.floor > min(lows) / FAR else []
    axes.set_xlim(min(xs) - margin, max(xs) + 2 * margin)  # names stand to the right
    axes.set_yscale("log")
    axes.set_ylim(min([*lows, *floor]) / 1.8, max(p.high for p in figure.points) * 1.8)
    axes.yaxis.set_major_formatter(lambda v, _: f"{v:.0e}".replace("e-0", "e-") if v < 1e-4 else f"{v:g}")
    axes.yaxis.set_minor_formatter(lambda v, _: "")
    axes.set_xlabel(f"size, {name}")
    axes.set_ylabel("mean KL divergence from BF16, nats a token")
    axes.grid(True, which="major", color=theme.faint, linewidth=0.6, alpha=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if figure.other is not None:
        per, rest = 8 * unit / figure.text_params, figure.other / unit
        above = axes.secondary_xaxis("top", functions=(lambda x: (x - rest) * per, lambda b: b / per + rest))
        above.set_xlabel("bits per weight of the language model" if figure.other else "bits per weight")
        above.spines["top"].set_visible(False)


def _points(axes: Any, figure: Figure, theme: Theme) -> None:
    unit, _ = _unit(figure)
    bottom = axes.get_ylim()[0]
    for (kind, label), colour in zip(LEGEND.items(), theme.colours, strict=True):
        mine = [p for p in figure.points if p.kind == kind]
        if not mine:
            continue
        own = kind in ("this", "variant")
        axes.errorbar(
            [p.nbytes / unit for p in mine],
            [p.kld for p in mine],
            [[p.kld - max(p.low, bottom) for p in mine], [p.high - p.kld for p in mine]],
            label=label,
            fmt=MARKERS[kind],
            markersize=14 if kind == "this" else 7,
            color=colour,
            markerfacecolor=colour if own else theme.page,
            markeredgecolor=theme.page if own else colour,
            markeredgewidth=0.8 if own else 1.6,
            elinewidth=1.2,
            capsize=3,
            zorder=5 if kind == "this" else 4 if own else 3,
        )


def _floor(axes: Any, figure: Figure, theme: Theme) -> None:
    """BF16 against BF16 computed another way: a line, or words where it lies far below."""
    if figure.floor is None:
        return
    bottom, words = axes.get_ylim()[0], f"BF16 against BF16 computed another way: {figure.floor:.1e}"
    if figure.floor > bottom:
        axes.axhline(figure.floor, color=theme.ink, linewidth=1, linestyle="--", zorder=2)
        at, coords = figure.floor, axes.get_yaxis_transform()
    else:
        words, at, coords = f"↓ {words}, far below this axis", 0.0, axes.transAxes
    axes.annotate(words, (0.006, at), (0, 4), coords, "offset points", fontsize=7.5, color=theme.ink, alpha=0.8)


CLOSE = 40  # pixels
PLACES = ((9, 3), (9, -11), (-9, 3), (-9, -11), (0, 11), (0, -18), (9, 13), (9, -21), (-9, 13), (-9, -21))


def _labels(axes: Any, renderer: Any, figure: Figure, theme: Theme) -> None:
    """Each point's name at the first place beside it that holds nothing yet; points come before names."""
    from matplotlib.transforms import Bbox  # noqa: PLC0415

    unit, _ = _unit(figure)
    bounds = axes.get_window_extent(renderer)
    spots = {p: axes.transData.transform((p.nbytes / unit, p.kld)) for p in figure.points}
    taken = [Bbox.from_bounds(x - 9, y - 9, 18, 18) for x, y in spots.values()]
    for p in sorted(figure.points, key=lambda p: (p.kind != "this", p.nbytes, p.kld, p.name)):
        best, least = None, None
        x, y = spots[p]
        crowded = any(abs(x - u) < CLOSE and 0 < v - y < CLOSE for u, v in spots.values())  # by a point above
        for dx, dy in sorted(PLACES, key=lambda place: place[1] > 0) if crowded else PLACES:
            text = axes.annotate(
                _short(p.name),
                (p.nbytes / unit, p.kld),
                (dx, dy),
                textcoords="offset points",
                ha="left" if dx > 0 else "right" if dx < 0 else "center",
                fontsize=8,
                fontweight="bold" if p.kind == "this" else "normal",
                color=theme.ink,
                zorder=6,
            )
            box = text.get_window_extent(renderer)
            cost = _hidden(box, taken) + (0 if bounds.x0 <= box.x0 and box.x1 <= bounds.x1 + 40 else box.width * 20)
            if least is None or cost < least:
                if best is not None:
                    best.remove()
                best, least = text, cost
            else:
                text.remove()
            if least == 0:
                break
        if best is not None:
            taken.append(best.get_window_extent(renderer))


def _hidden(box: Any, taken: Sequence[Any]) -> float:
    """Area of `box` that others cover."""
    return sum(
        max(min(box.x1, o.x1) - max(box.x0, o.x0), 0.0) * max(min(box.y1, o.y1) - max(box.y0, o.y0), 0.0) for o in taken
    )


def _short(name: str) -> str:
    """One printable line of a name."""
    one = "".join(c if c.isprintable() else " " for c in " ".join(name.split()))
    return one if len(one) <= 40 else one[:39] + "…"
