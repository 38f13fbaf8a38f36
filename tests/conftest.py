"""The bundled tiny model, a ladder built from it once a session, and `publish` as a user runs it."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import gc
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import httpcore2
import pushes
import pytest
from click.testing import CliRunner
from huggingface_hub import set_client_factory
from huggingface_hub.utils import _http
from variant_folder import make_project, make_variant

# before a test imports mlx_lm, which loads MLX: this chooses the kernels of the BLAS, and with them the last bits
import inference.backend  # noqa: F401
from publisher.localhub import LocalHub

EXAMPLE = Path(__file__).parents[1] / "examples/tiny"
# the example's protocols take a minute on a busy machine; what they do is the same with fewer tokens
QUICK = """\
bench: {turns: 1, turn_tokens: 6, prefill: [32], runs: 1}
smoke: {prompts: [The quick brown fox], max_tokens: 32, text_tokens: 64}
"""
# A client reads all certificates of the machine when it is made, 50 ms, and each test makes its own. Hubs here speak HTTP.
httpcore2.default_ssl_context = functools.cache(httpcore2.default_ssl_context)
PUBLISH = "from publisher.cli import main; main()"
NO_HUB = "http://127.0.0.1:9"  # the discard port: nothing answers there
# The files that take longest, longest first, in two columns for two processes. They are handed out in this order, so that no
# process ends with a long one while the other has nothing to do; only the left column begins with the ladder (`built`),
# which all others would wait for.
SLOW = [
    "build", "solve",
    "cli", "demo",
    "crash", "evaluate",
    "secrets", "sensitivity",
    "startup", "quant_resume",
    "calibrate", "card",
    "release_ladder", "smoke",
    "merge", "quant_convert",
    "shard", "card_snippets",
]  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {f"test_{name}.py": i for i, name in enumerate(SLOW)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


def pytest_collection_finish() -> None:
    """What was imported stays: no collection need look through it again. `publish` makes one before and after each model."""
    gc.collect()
    gc.freeze()


class Clock:
    """The module `time` with some functions replaced, for one module: the hub in this process needs the real one."""

    def __init__(self, **replaced: Callable) -> None:
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> object:
        return getattr(time, name)


_http.time = Clock(
    sleep=lambda s: None
)  # the client's own pauses between its tries, 23 s in all; ours are set by each test


@dataclass(frozen=True)
class Ran:
    """What a command left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    def ok(self) -> Ran:
        assert self.code == 0, f"exit {self.code}\n{self.out}\n{self.err}"
        return self

    def refused(self, code: int) -> str:
        """The one line that a person is given; anything longer, or a traceback, fails."""
        assert self.code == code, f"exit {self.code}, expected {code}\n{self.out}\n{self.err}"
        lines = [line for line in self.err.splitlines() if line.startswith("Error: ")]
        assert len(lines) == 1, self.err
        assert self.err.rstrip("\n").endswith(lines[0]), f"more than one line:\n{self.err}"
        assert "Traceback" not in self.err
        return lines[0].removeprefix("Error: ")


@pytest.fixture(autouse=True)
def own_client() -> Iterator[None]:
    """The client of huggingface_hub is one for the process: what a test makes of it ends with the test."""
    yield
    if _http._GLOBAL_CLIENT_FACTORY is not _http.default_client_factory:
        set_client_factory(_http.default_client_factory)


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The trained tiny base in the original layout."""
    return EXAMPLE / "model"


@pytest.fixture(scope="session")
def quick_yaml() -> str:
    """variants.yaml of the example with short protocols."""
    text, n = re.subn(r"(?m)^bench:\n(?:  .*\n)+", QUICK, (EXAMPLE / "variants.yaml").read_text())
    assert n == 1
    return text


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory, quick_yaml: str) -> Path:
    """A folder with variants.yaml and the six variants, built by `publish build --all`. Not to be changed."""
    root = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        root = root.parent  # one for all workers
    folder = root / "ladder"
    with open(root / "ladder.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            shutil.rmtree(folder, ignore_errors=True)
            write_ladder(folder, quick_yaml)
            run_process("build", "--all", cwd=folder, timeout=600).ok()  # 12 s of an idle core
            (folder / "done").touch()
    return folder


@pytest.fixture
def ladder(built: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the built ladder that a test may change; its base is a link to the example's."""
    folder = tmp_path / "ladder"
    shutil.copytree(built, folder, symlinks=True)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def publish() -> Callable[..., Ran]:
    """publish(*args, cwd=…, env=…, stdin=…) in this process. Whatever is not an error of ours is raised."""
    return run_here


@pytest.fixture(scope="session")
def publish_process() -> Callable[..., Ran]:
    """The same as a process of its own."""
    return run_process


def write_ladder(folder: Path, text: str) -> Path:
    """variants.yaml beside links to the example's model and imatrix."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("model", "imatrix-tiny.gguf"):
        (folder / name).symlink_to(EXAMPLE / name)
    path = folder / "variants.yaml"
    path.write_text(text)
    return path


def edit(ladder: Path, old: str, new: str) -> None:
    """Replace what stands once in its variants.yaml."""
    path = ladder / "variants.yaml"
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def own_base(folder: Path) -> Path:
    """Replace the link to the example's model by a copy that may be changed."""
    model = folder / "model"
    model.unlink()
    shutil.copytree(EXAMPLE / "model", model)
    return model


def environment(cwd: Path, env: dict[str, str] | None = None) -> dict[str, str]:
    """No hub, no token and no cache but those that a test names."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    off = {k: "1" for k in ("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS")}
    return kept | off | {"HF_ENDPOINT": NO_HUB, "HF_HOME": str(cwd / ".hf")} | (env or {})


def run_here(*args: str, cwd: Path, env: dict[str, str] | None = None, stdin: str = "") -> Ran:
    from huggingface_hub import constants

    from publisher.cli import main

    values = environment(cwd, env)
    home = Path(values["HF_HOME"])
    patches = {
        "ENDPOINT": values["HF_ENDPOINT"],
        "HUGGINGFACE_CO_URL_TEMPLATE": values["HF_ENDPOINT"] + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
        "HF_HUB_OFFLINE": values.get("HF_HUB_OFFLINE") == "1",
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(constants, **patches))
        stack.enter_context(mock.patch.dict(os.environ, values, clear=True))
        stack.enter_context(contextlib.chdir(cwd))
        result = CliRunner(catch_exceptions=False).invoke(main, args, input=stdin)
    return Ran(result.exit_code, result.stdout, result.stderr)


def run_process(*args: str, cwd: Path, env: dict[str, str] | None = None, stdin: str = "", timeout: float = 120) -> Ran:
    done = subprocess.run(
        [sys.executable, "-c", PUBLISH, *args], cwd=cwd, env=environment(cwd, env), input=stdin, text=True,
        capture_output=True, timeout=timeout,
    )  # fmt: skip
    return Ran(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def project(tmp_path):
    """A ladder with one variant, Q4, in a folder as a build leaves it, without building."""
    project = make_project(tmp_path / "project")
    make_variant(project)
    return project


@pytest.fixture
def folder(project):
    return project.store.variant("Q4")


@pytest.fixture
def own_home(tmp_path, monkeypatch):
    """The client's cache and token of this process are the test's own."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)


@contextlib.contextmanager
def sound_hub(folder: Path, accounts: dict[str, str]) -> Iterator[LocalHub]:
    """The built-in hub. It must not crash, nor may a token go to another host."""
    with LocalHub(folder, accounts) as hub:
        yield hub
        assert hub.stats.crashes == 0
        assert hub.stats.leaks == 0


@pytest.fixture
def server(tmp_path):
    """A hub for `project`, with the accounts of `pushes`."""
    with sound_hub(tmp_path / "hub", pushes.TOKENS) as server:
        yield server


@pytest.fixture
def hub(tmp_path):
    """A hub for `ladder`."""
    with sound_hub(tmp_path / "hub", pushes.DEMO) as hub:
        yield hub
