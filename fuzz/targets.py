"""The parsers of untrusted input as functions of bytes: one a parser, for `fuzz/run.py` and for the replay in the tests.

A target returns, whatever it is given. What the parser refuses it must refuse as a user is told: one of the project's
errors, with one line of bounded length. Any other exception is a finding, and so is a result that breaks the target's
own invariants. Targets need neither atheris nor MLX nor a network, and write only below a folder of their own.
"""

from __future__ import annotations

import functools
import io
import json
import shutil
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from inference.errors import LONGEST, InputError, PublishError

MODEL = Path(__file__).parents[1] / "examples/tiny/model"
TARGETS: dict[str, Callable[[bytes], None]] = {}


def target(f: Callable[[bytes], None]) -> Callable[[bytes], None]:
    TARGETS[f.__name__] = f
    return f


@contextmanager
def refusals() -> Iterator[None]:
    """A refusal is one line."""
    try:
        yield
    except PublishError as e:
        text = str(e)
        assert text, "an error without a message"
        assert len(text) <= 2 * LONGEST, f"a message of {len(text)} characters"
        assert not isinstance(e, InputError) or text.isprintable(), f"not one line: {text[:200]!r}"


@functools.cache
def scratch() -> Path:
    """A folder of this process, with a copy of the tiny model's small files."""
    root = Path(tempfile.mkdtemp(prefix="publish-fuzz-"))
    import atexit

    atexit.register(shutil.rmtree, root, ignore_errors=True)
    for name in ("model", "index", "tokenizer", "ladder", "cards"):
        (root / name).mkdir()
    (root / "index/config.json").write_text("{}")
    for i, names in enumerate((["a", "b"], ["c"])):
        (root / f"index/model-{i}.safetensors").write_bytes(safetensors({n: ("U8", [1]) for n in names}))
    (root / "ladder/model").mkdir()
    (root / "ladder/imatrix.gguf").write_bytes(b"GGUF")
    return root


def safetensors(tensors: dict[str, tuple[str, list[int]]]) -> bytes:
    header: dict[str, Any] = {}
    at = 0
    for name, (dtype, shape) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + 1]}
        at += 1
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"\0" * at


@functools.cache
def tiny_config() -> dict[str, Any]:
    return json.loads((MODEL / "config.json").read_bytes())


# a model whose imatrix has a few hundred bytes
SMALL = {
    "model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 9, "num_attention_heads": 2,
    "num_key_value_heads": 1, "intermediate_size": 4, "torch_dtype": "bfloat16",
}  # fmt: skip


# -------------------------------------------------------------------------------------------- checkpoints


@target
def header(data: bytes) -> None:
    """A safetensors file. The first byte: 0 for a whole file, n for a JSON header (the rest) before n bytes of data."""
    from inference.checkpoint import read_header

    size, body = data[:1], data[1:]
    raw = body if size in (b"", b"\0") else struct.pack("<Q", len(body)) + body + bytes(size[0])
    path = scratch() / "model/model.safetensors"
    path.write_bytes(raw)
    with refusals():
        tensors, _ = read_header(path)
        for t in tensors:
            assert 8 <= t.start <= t.end <= len(raw)
            assert len(t.read()) == t.nbytes


@target
def index(data: bytes) -> None:
    """model.safetensors.index.json beside two shards."""
    from inference.checkpoint import read_checkpoint

    (scratch() / "index/model.safetensors.index.json").write_bytes(data)
    with refusals():
        found = read_checkpoint(scratch() / "index")
        assert all(t.file.parent == scratch() / "index" for t in found.tensors.values())


@target
def config(data: bytes) -> None:
    """config.json, of an original and of a packed model."""
    from inference.checkpoint import read_json, read_quantization
    from inference.families import names_of

    path = scratch() / "model/config.json"
    path.write_bytes(data)
    with refusals():
        value = read_json(path)
        json.dumps(value, indent=2, ensure_ascii=False).encode()  # as a build writes it
        read_quantization(value)
        names = names_of(value)
        hyper = names.read_config(value)
        if hyper.num_hidden_layers < 100:
            names.text_shapes(hyper)
            names.cache_nbytes(hyper, 1000)


@target
def tokenizer(data: bytes) -> None:
    """tokenizer.json, with a text through it and back."""
    from inference.tokenizer import Tokenizer

    folder = scratch() / "tokenizer"
    (folder / "tokenizer_config.json").unlink(missing_ok=True)
    (folder / "tokenizer.json").write_bytes(data)
    with refusals():
        found = Tokenizer.load(folder)
        ids = found.encode("Grüße, 你好 👋 a ab the end\n")
        assert len(ids) < 10_000
        found.encode_offsets("a b")
        found.bos()
        found.decode(ids)
        found.decode([0, 1, 1 << 30])


@target
def tokenizer_config(data: bytes) -> None:
    """tokenizer_config.json, with a chat template in it."""
    from inference.tokenizer import Tokenizer

    folder = scratch() / "tokenizer"
    (folder / "tokenizer.json").write_text(
        json.dumps({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}})
    )
    (folder / "tokenizer_config.json").write_bytes(data)
    with refusals():
        found = Tokenizer.load(folder)
        found.bos()
        found.render_chat([{"role": "user", "content": "Hi"}])


@target
def chat_template(data: bytes) -> None:
    from inference import tokenizer

    text = data.decode("utf-8", "replace")
    whole = tokenizer.WORK
    tokenizer.WORK = 200_000  # the same bounds, sooner
    try:
        with refusals():
            model = tokenizer.Tokenizer(Path("model"), frozenset(), text, {"eos_token": "</s>"}, None)  # type: ignore[arg-type]
            model.render_chat(
                [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Oh"}], tools=[{"a": 1}]
            )
    finally:
        tokenizer.WORK = whole


@target
def imatrix(data: bytes) -> None:
    """An imatrix GGUF for the model SMALL."""
    from quant.imatrix import read_imatrix

    path = scratch() / "model/i.gguf"
    path.write_bytes(data)
    with refusals():
        found = read_imatrix(path, SMALL)
        assert found.tokens >= 0


# -------------------------------------------------------------------------------------------- the ladder and its cards


@target
def variants(data: bytes) -> None:
    """variants.yaml with its recipes, and what every command asks of it."""
    from publisher.variants import load_project
    from quant.recipe import matches

    path = scratch() / "ladder/variants.yaml"
    path.write_bytes(data)
    with refusals():
        project = load_project(path)
        for id in project.select([]):
            project.repo(id), project.size(id), project.floors(), project.pins(id)
            for rule in project.recipe(id).rules:
                matches(rule.match, "language_model.model.layers.0.mlp.down_proj")
        assert project.store.root
        project.at("variants", "Q4", 3)


@target
def allocation(data: bytes) -> None:
    """A frozen allocation."""
    from publisher.allocation import read_frozen
    from publisher.schema import Ladder
    from publisher.variants import Project

    folder = scratch() / "ladder"
    (folder / "variants.allocations").mkdir(exist_ok=True)
    (folder / "variants.allocations/Q4.yaml").write_bytes(data)
    ladder = Ladder.model_validate({"base": "./model", "variants": {"Q4": {"size": "5 GB"}}})
    with refusals():
        read_frozen(Project(ladder, folder / "variants.yaml"), "Q4")


@target
def records(data: bytes) -> None:
    """The JSON that this tool wrote itself: the first byte says which."""
    from publisher import schema
    from publisher.store import read_model

    kinds = (schema.Manifest, schema.Receipt, schema.Smoke, schema.Lock, schema.Quality, schema.Costs)
    path = scratch() / "ladder/record.json"
    path.write_bytes(data[1:])
    with refusals():
        read_model(path, kinds[data[0] % len(kinds)] if data else schema.Lock)


@target
def conversations(data: bytes) -> None:
    """A file of conversations for `publish eval` and `publish calibrate`."""
    from publisher.evaluate_corpora import read_conversations
    from publisher.source import read_source

    path = scratch() / "ladder/chat.json"
    path.write_bytes(data)
    with refusals():
        read_conversations(read_source(path, "evaluation.chat", ""))


@target
def card_template(data: bytes) -> None:
    from jinja2 import FunctionLoader

    from inference.sandbox import TEMPLATE_ERRORS
    from publisher import card_sandbox
    from publisher.card_format import FILTERS

    text = data.decode("utf-8", "replace")
    whole = card_sandbox.WORK
    card_sandbox.WORK = 200_000
    try:
        env = card_sandbox.Sandbox(FunctionLoader(lambda name: text if name == "card.md.j2" else None), FILTERS)
        values = {"id": "Q4", "nbytes": 5_000_000_000, "rows": ("a", "b"), "kld": 0.5, "lost": None, "tags": ["x"]}
        out = env.text("card.md.j2", card=values, facts={"variants": [values]})
        assert len(out.encode()) <= card_sandbox.OUTPUT
    except TEMPLATE_ERRORS as e:
        assert not isinstance(e, AssertionError) or not str(e).startswith("finding")
    finally:
        card_sandbox.WORK = whole


@target
def front_matter(data: bytes) -> None:
    """A README: as the gate, the base's facts and the built-in hub read it."""
    from publisher.card import check_card
    from publisher.card_facts import front_matter
    from publisher.localhub import frontmatter

    text = data.decode("utf-8", "replace")
    path = scratch() / "cards/README.md"
    path.write_bytes(data)
    with refusals():
        front_matter(path)
        assert all(isinstance(fault, str) for fault in check_card(text))
        values, errors, _ = frontmatter.read(text)
        json.dumps([values, errors], allow_nan=False, ensure_ascii=False).encode()


# -------------------------------------------------------------------------------------------- the built-in hub


@target
def commit(data: bytes) -> None:
    """The body of a commit, applied to a small tree."""
    from publisher.localhub import commits
    from publisher.localhub.store import File, git_blob_id
    from publisher.localhub.web import HubError

    kept = scratch() / "cards"

    class Blobs:
        def add_blob(self, data: bytes) -> File:
            oid = git_blob_id(data)
            (kept / "blob").write_bytes(data)
            return File(oid, len(data), None)

        def lfs_file(self, sha256: str) -> File | None:
            return None if sha256.startswith("0") else File(sha256[:40], 5, sha256)

        def path_of(self, file: File) -> Path:
            return kept / "blob"

    old = {p: File("1" * 40, 3, None) for p in ("README.md", ".gitattributes", "a/b.txt")}
    (kept / "blob").write_bytes(b"")
    try:
        _, operations = commits._parse(data)
        tree = commits.apply(Blobs(), old, operations)  # type: ignore[arg-type]
        for path in tree:
            assert not path.startswith("/") and ".." not in path.split("/")
    except HubError as e:
        assert 400 <= e.status < 500
        e.response()


@target
def xorb(data: bytes) -> None:
    from publisher.localhub.xet_format import XetFormatError, index_xorb

    with suppress(XetFormatError):
        index_xorb(io.BytesIO(data), len(data))


@target
def shard(data: bytes) -> None:
    """A Xet shard. A first byte of 1 stands for the tag and version that every shard begins with."""
    from publisher.localhub.xet_format import Chunk, XetFormatError, read_shard, write_shard

    start = write_shard("0" * 64, [Chunk("0" * 64, 1, 1)], 0, 0)[:48]
    with suppress(XetFormatError):
        read_shard(start + data[1:] if data[:1] == b"\1" else data)


# -------------------------------------------------------------------------------------------- a hub's answers

CALLS: tuple[Callable[[Any], Any], ...] = (
    lambda hub: hub.head("acme/x"),
    lambda hub: hub.tree("acme/x", "a" * 40),
    lambda hub: hub.tags("acme/x"),
    lambda hub: hub.account(),
    lambda hub: hub.check_card("---\nlicense: mit\n---\n"),
    lambda hub: hub.resolve_commit("acme/x", "main"),
    lambda hub: hub.pull_status("acme/x", 3),
    lambda hub: hub.create_repo("acme/x", False),
    lambda hub: hub.check_write("acme/x"),
    lambda hub: hub.read_range("acme/x", "a" * 40, "config.json", 0, 100),
)


@target
def answers(data: bytes) -> None:
    """What a hub answers: the first byte picks the call, the second the status, the rest is the body of every answer."""
    from answering import answering_hub
    from huggingface_hub.utils import _http

    status = (200, 201, 302, 400, 401, 403, 404, 409, 412, 429, 500)[data[1] % 11] if len(data) > 1 else 200
    # the client's own retries take half a minute
    with refusals(), mock.patch.object(_http, "time", SimpleNamespace(sleep=lambda s: None, time=time.time)):
        hub = answering_hub(status, data[2:])
        CALLS[data[0] % len(CALLS) if data else 0](hub)
