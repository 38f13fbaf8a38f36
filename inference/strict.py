"""Files and JSON of strangers: read within a bound, and refused where two readers could see two things in them.

A pipe would make us wait and a device never ends, so that only regular files are opened. JSON may not name a key twice,
nor hold what JSON has no word for (NaN, infinities, halves of characters); how deep it is and how many values it holds
is bounded before it costs memory.
"""

from __future__ import annotations

import json
import re
import stat
from pathlib import Path
from typing import Any

from .errors import CheckpointError

MAX_DEPTH = 64  # of nested arrays and objects; configs are below 10. The encoder takes about 300
MAX_VALUES = 2_000_000  # in one document, about 70 bytes each in memory; the largest index published is below 200,000
MAX_DIGITS = 40  # of an integer
HALF = re.compile(r"\\u[dD][89a-fA-F]")  # may be half a character: a surrogate


def read_file(path: Path, limit: int) -> bytes:
    """The bytes of a regular file of at most `limit` bytes. Raises CheckpointError for anything else."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(f"{path}: is no regular file")
        with open(path, "rb") as f:
            data = f.read(limit + 1)  # whatever size it had a moment ago
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except OSError as e:
        raise CheckpointError(f"{path}: {e.strerror}") from None
    except ValueError:  # a NUL in the name
        raise CheckpointError(f"{str(path)[:60]!r}: is no path") from None
    if len(data) > limit:
        raise CheckpointError(f"{path.name}: larger than {limit} bytes")
    return data


def parse_json(data: bytes | str) -> Any:
    """The value of a JSON text. Raises ValueError, always of one line, for whatever is wrong with it."""
    try:
        text = data if isinstance(data, str) else data.decode()
        if sum(map(text.count, ",[{")) > MAX_VALUES:
            raise ValueError(f"more than {MAX_VALUES} values")
        value = json.loads(
            text, object_pairs_hook=_object, parse_constant=_constant, parse_float=_float, parse_int=_int
        )
        if HALF.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("a string holds half a character") from None
    except RecursionError:
        raise ValueError(f"nested more than {MAX_DEPTH} deep") from None
    except ValueError as e:
        raise ValueError(" ".join(str(e).split())[:120]) from None
    _check_depth(value)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        name = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
        raise ValueError(f"key {name[:60]!r} appears twice")
    return out


def _constant(text: str) -> Any:
    raise ValueError(f"found {text}, which is no JSON")


def _float(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"found {text[:40]}, which is no finite number")
    return value


def _int(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"found an integer of {len(text)} digits, expected at most {MAX_DIGITS}")
    return int(text)


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            x
            for v in level
            for x in (v.values() if isinstance(v, dict) else v if isinstance(v, list) else ())
            if isinstance(x, dict | list)
        ]
        if not level:
            return
    raise ValueError(f"nested more than {MAX_DEPTH} deep")
