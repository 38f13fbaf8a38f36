"""Where things lie below the output folder, and how they are written: atomically, as sorted JSON.

out/<ID>/                        one variant, exactly what is pushed: weights, config, tokenizer, README.md, manifest.json
out/results/<weights hash>/      build.json smoke.json bench.json quality.json
out/teacher/<key>/               what BF16 says over a corpus, for `publish eval`
out/statistics/<key>/            what `publish calibrate` collected: statistics.json, layer-*.safetensors, imatrix.gguf
out/baselines.json               names of the foreign models that were measured
out/receipts/<ID>.json           what was pushed
out/receipts/ladder.json         the release: every repo, and the collection
out/history/<ID>.json            the releases of a variant, oldest first
out/base.json                    content hashes of the base's tensors, kept while its files' size and time stay
out/staging/<ID>-<inputs>/       a build under way
"""

from __future__ import annotations

import functools
import glob
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from pydantic import BaseModel, ValidationError

from inference.errors import InputError

from .locks import hold

Model = TypeVar("Model", bound=BaseModel)
PART = ".part"  # of a file that is being written
REDO = "; delete the file to redo it"  # how a message of `read_model` ends
MANIFEST_BYTES = 50 << 20  # of one that is not ours: in a repo, in a folder that was downloaded
# no variant can have such an id
RESERVED = (
    "results",
    "receipts",
    "history",
    "staging",
    "headers",
    "teacher",
    "statistics",
    "base.json",
    "baselines.json",
    "ladder",  # receipts/ladder.json
)


class Store:
    """Paths below one output folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def variant(self, id: str) -> Path:
        return self.root / id

    def manifest(self, id: str) -> Path:
        return self.root / id / "manifest.json"

    def results(self, weights_hash: str) -> Path:
        return self.root / "results" / weights_hash

    def receipt(self, id: str) -> Path:
        return self.root / "receipts" / f"{id}.json"

    @property
    def ladder_receipt(self) -> Path:
        return self.root / "receipts" / "ladder.json"

    def staging(self, id: str, key: str) -> Path:
        return self.root / "staging" / f"{id}-{key[:16]}"

    def history(self, id: str) -> Path:
        return self.root / "history" / f"{id}.json"

    @property
    def base(self) -> Path:
        return self.root / "base.json"

    @property
    def teacher(self) -> Path:
        return self.root / "teacher"

    @property
    def statistics(self) -> Path:
        return self.root / "statistics"

    @property
    def baselines(self) -> Path:
        return self.root / "baselines.json"

    @contextmanager
    def lock(self, doing: str) -> Iterator[None]:
        """One command at a time that writes here. doing: which, for the message that others get.

        Raises InputError if another process is at work in this folder, or if nothing can be written there.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            file = open(self.root / ".lock", "a+")  # noqa: SIM115 - closed below
        except OSError as e:
            raise InputError(f"output {self.root}: cannot be written to ({e.strerror})") from None

        def busy(who: str) -> InputError:
            told = f" ({who})" if who else ""
            return InputError(
                f"output {self.root}: another publish is at work there{told}; wait for it to end, then run this again"
            )

        with file, hold(file, doing, busy):
            yield


P = ParamSpec("P")
R = TypeVar("R")


def exclusive(doing: str) -> Callable[[Callable[Concatenate[Any, P], R]], Callable[Concatenate[Any, P], R]]:
    """For functions of a project that write below its output folder: they hold the lock while they run. doing: the command."""

    def wrap(f: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
        @functools.wraps(f)
        def locked(project: Any, *args: P.args, **kwargs: P.kwargs) -> R:
            with project.store.lock(doing):
                return f(project, *args, **kwargs)

        return locked

    return wrap


def digest(value: Any) -> str:
    """sha256 of a JSON value in canonical form (sorted keys, no spaces)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """In hex. Raises OSError."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def write_bytes(path: Path, *data: bytes | memoryview) -> None:
    """Write to a temporary file beside `path`, then move it into place: readers see the old or the new, never half.

    Several pieces are written behind each other.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    discard_leftovers(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PART)
    try:
        with os.fdopen(handle, "wb") as f:
            for piece in data:
                f.write(piece)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def discard_leftovers(path: Path) -> None:
    """Remove the temporary files of writes to `path` that were killed: a variant's folder is pushed as it is."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*{PART}"):
        left.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """As `write_bytes`, in UTF-8."""
    write_bytes(path, text.encode())


def write_model(path: Path, model: BaseModel) -> None:
    """As `write_bytes`, in the form of `model_text`."""
    write_text(path, model_text(model))


def model_text(model: BaseModel) -> str:
    """JSON with sorted keys: equal models give equal bytes."""
    return json.dumps(model.model_dump(mode="json"), indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def read_model(path: Path, kind: type[Model]) -> Model | None:
    """The file as a model, or None if it is not there. Raises InputError (one line) if it does not parse."""
    try:
        return kind.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        return None
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(str(p) for p in first["loc"])
        told = f"{path.name} ({path.parent.name}): {where}"
        if first["loc"] == ("schema_version",) and isinstance(found := first["input"], int):
            wanted = kind.model_fields["schema_version"].default
            raise InputError(
                f"{told}: found {found}, expected {wanted}; another version of this tool wrote it"
            ) from None
        raise InputError(f"{told}: {first['msg']}{REDO}") from None


def read_result(path: Path, kind: type[Model]) -> Model | None:
    """Like read_model, but a result that no longer parses counts as missing: it is measured again, never guessed at."""
    try:
        return read_model(path, kind)
    except InputError:
        return None
