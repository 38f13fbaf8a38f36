"""Files of strangers: what each is refused with, how much memory that takes, and that nothing outside is touched."""

from __future__ import annotations

import base64
import json
import os
import resource
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inference.checkpoint import read_checkpoint, read_header
from inference.errors import LONGEST, InputError, PublishError
from inference.strict import parse_json, read_file
from inference.tokenizer import Tokenizer
from publisher.store import write_text
from publisher.variants import parse_yaml
from quant.gguf_file import read_gguf

FEW = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def refused(f, *args) -> str:
    with pytest.raises(InputError) as e:
        f(*args)
    text = str(e.value)
    assert text.isprintable(), "more than one line"
    assert len(text) <= LONGEST
    return text


# -- JSON -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', "key 'a' appears twice"),
        ('{"a": [{"b": 1, "b": 1}]}', "key 'b' appears twice"),
        ('{"a": NaN}', "found NaN"),
        ('{"a": -Infinity}', "found -Infinity"),
        ('{"a": 1e999}', "found 1e999, which is no finite number"),
        ('{"a": ' + "9" * 50 + "}", "an integer of 50 digits"),
        ('{"a": "\\ud800"}', "half a character"),
        ('{"\\udc00": 1}', "half a character"),
        ("[" * 100_000, "nested more than 64 deep"),
        ('{"a":' * 65 + "1" + "}" * 65, "nested more than 64 deep"),
        ("[" + "[]," * 2_000_000 + "[]]", "more than 2000000 values"),
        ("\ufeff{}", "BOM"),
        ("{", "Expecting property name"),
    ],
)
def test_json_that_two_readers_could_read_differently_is_refused(text, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[")) as e:
        parse_json(text)
    assert "\n" not in str(e.value)


def test_json_of_published_models_passes():
    assert parse_json('{"a": "\\ud83d\\udc4b", "b": [1.5e3, -0, true, null]}') == {
        "a": "👋",
        "b": [1500.0, 0, True, None],
    }
    assert parse_json("[" * 64 + "]" * 64)


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "no regular file" in refused(read_file, tmp_path / "pipe", 10)
    assert "no regular file" in refused(read_file, Path("/dev/zero"), 10)
    assert "no regular file" in refused(read_file, tmp_path, 10)
    (tmp_path / "long").write_bytes(b"12345678901")
    assert refused(read_file, tmp_path / "long", 10) == "long: larger than 10 bytes"
    assert "no such file" in refused(read_file, tmp_path / "absent", 10)
    assert "no path" in refused(read_file, tmp_path / "a\0b", 10)


# -- messages ---------------------------------------------------------------------------------------------------


def test_messages_never_steer_a_terminal_and_end():
    text = str(InputError("tensor \x1b[2Jx\r\n\u202egnp.exe\x9b " + "y" * 5000))
    assert text.isprintable()
    assert len(text) == LONGEST
    assert "\\x1b[2Jx" in text
    assert str(PublishError("a\nb\x07")) == "a\nb\\x07"  # a difference has lines


# -- safetensors ------------------------------------------------------------------------------------------------


def write_header(path: Path, header: object, nbytes: int) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(nbytes))
    return path


def entry(start: int, end: int, dtype: object = "U8", shape: object = None) -> dict[str, object]:
    return {"dtype": dtype, "shape": [end - start] if shape is None else shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": entry(0, 3), "b": entry(2, 4)}, "tensor b starts at"),
        ({"a": entry(0, 2), "b": entry(3, 4)}, "tensor b starts at"),
        ({"a": entry(0, 9)}, "lie outside the file"),
        ({"a": entry(0, 3)}, "1 bytes belong to no tensor"),
        ({"a": entry(0, 4, shape=[1 << 61, 1 << 61])}, "needs"),
        ({"a": entry(0, 4, shape=[1 << 61] * 100_000)}, "must be a list of sizes, at most 16"),
        ({"a": entry(0, 4, dtype=[])}, "dtype '[]' is unknown"),
        ({"a": entry(0, 4, shape=[-1, -4])}, "must be a list of sizes"),
        ({"a": entry(0, 4, shape=[True, 4])}, "must be a list of sizes"),
        ({"a": entry(4, 0, shape=[4])}, "lie outside"),
        ({"a\x1b[2J\n": entry(0, 4)}, "expected a name of printable characters"),
        ({"a" * 2000: entry(0, 4)}, "expected a name of printable characters"),
        ({"": entry(0, 4)}, "expected a name of printable characters"),
        (b'{"a": {"dtype":"U8","shape":[4],"data_offsets":[0,4]}, "a": 1}', "key 'a' appears twice"),
        (b"[" * 200_000, "nested more than 64 deep"),
        ({"__metadata__": {"a": 1}, "a": entry(0, 4)}, "__metadata__ must map strings"),
    ],
)
def test_headers_that_lie_are_refused(tmp_path, header, message):
    assert message in refused(read_header, write_header(tmp_path / "model.safetensors", header, 4))


def small_checkpoint(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for i in range(2):
        write_header(folder / f"model-{i}.safetensors", {f"t{i}": entry(0, 4)}, 4)
    write_index(folder, {f"t{i}": f"model-{i}.safetensors" for i in range(2)})
    return folder


def write_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    "name",
    [
        "../model-0.safetensors",
        "/etc/passwd",
        "a/model-0.safetensors",
        "..",
        "a\\b.safetensors",
        "\x00.safetensors",
        5,
        [],
        {},
    ],
)
def test_an_index_names_files_beside_it_alone(tmp_path, name):
    folder = small_checkpoint(tmp_path / "base")
    write_index(folder, {"t0": name, "t1": "model-1.safetensors"})
    refused(read_checkpoint, folder)


@pytest.mark.parametrize("name", ["model-0.safetensors", "config.json", "model.safetensors.index.json"])
def test_no_file_of_a_checkpoint_may_be_a_link_out_of_it(tmp_path, name):
    folder = small_checkpoint(tmp_path / "base")
    os.rename(folder / name, tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    assert f"base/{name}: links to" in refused(read_checkpoint, folder)
    (folder / name).unlink()
    (folder / name).symlink_to(folder / name)
    refused(read_checkpoint, folder)


def test_a_shard_that_shrinks_while_it_is_read_is_told(tmp_path):
    path = write_header(tmp_path / "model.safetensors", {"a": entry(0, 4)}, 4)
    (tensor,), _ = read_header(path)
    os.truncate(path, path.stat().st_size - 2)
    assert "file ends inside tensor a" in refused(tensor.read)


# -- GGUF -------------------------------------------------------------------------------------------------------

U64 = "<Q"


def text(value: bytes) -> bytes:
    return struct.pack(U64, len(value)) + value


def gguf(
    fields: bytes = b"", keys: int = 0, infos: bytes = b"", tensors: int = 0, data: bytes = b"", version: int = 3
) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + fields + infos
    return head + bytes(-len(head) % 32) + data


def info(name: bytes, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


BIG = 1 << 60
X = b"x.in_sum2"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"GGUF", "version"),
        (gguf(version=1), "version 1"),
        (gguf(version=0x03000000), "little-endian"),
        (gguf(keys=BIG), f"{BIG} keys"),
        (gguf(tensors=BIG), f"{BIG} tensors"),
        (gguf(struct.pack(U64, BIG), keys=1), "key: 1152921504606846976 bytes"),
        (gguf(text(b"k") + struct.pack("<IQ", 8, BIG), keys=1), "k: 1152921504606846976 bytes"),
        (gguf(text(b"k") + struct.pack("<IIQ", 9, 0, BIG), keys=1), "an array of 1152921504606846976 items"),
        (gguf(text(b"k") + struct.pack("<IIQ", 9, 0, 1 << 19), keys=1), "the head ends at"),
        (gguf(text(b"k") + struct.pack("<IIQIQ", 9, 9, 1, 9, 1), keys=1), "an array of type 9"),
        (gguf(text(b"k") + struct.pack("<II", 99, 0), keys=1), "type 99 is unknown"),
        (gguf(text(b"\xff") + struct.pack("<IB", 0, 0), keys=1), "not UTF-8"),
        (gguf((text(b"k") + struct.pack("<IB", 0, 0)) * 2, keys=2), "key 'k' appears twice"),
        (gguf(text(b"general.alignment") + struct.pack("<II", 4, 0), keys=1), "general.alignment: found 0"),
        (gguf(infos=info(X, (4,)) * 2, tensors=2, data=bytes(16)), "appears twice"),
        (gguf(infos=info(X, (BIG, 16)), tensors=1), "lie outside the data"),
        (gguf(infos=info(X, (1 << 62, 4)), tensors=1, data=bytes(16)), "lie outside the data"),
        (gguf(infos=info(X, (4,), offset=BIG), tensors=1), "lie outside the data"),
        (gguf(infos=info(X, (4,), offset=4), tensors=1, data=bytes(64)), "lie outside the data"),
        (gguf(infos=info(X, (4, 0)), tensors=1), "holds nothing"),
        (gguf(infos=info(X, ()), tensors=1), "0 axes"),
        (gguf(infos=info(X, (1,) * 5), tensors=1), "5 axes"),
        (gguf(infos=text(X) + struct.pack("<I", 1 << 31), tensors=1), "axes"),
        (gguf(infos=info(X, (16,)) + info(b"y.counts", (4,), offset=32), tensors=2, data=bytes(64)), "lies over"),
        (gguf(infos=info(X, (4,), kind=7), tensors=1, data=bytes(16)), "type 7, expected F32"),
    ],
)
def test_a_gguf_that_lies_about_itself_is_refused(tmp_path, data, message):
    path = tmp_path / "i.gguf"
    path.write_bytes(data)
    assert message in refused(read_gguf, path, (".in_sum2", ".counts"))


def test_a_gguf_is_read_as_it_is(tmp_path):
    fields = text(b"a") + struct.pack("<IIQ", 9, 8, 2) + text(b"x") + text("é".encode())
    fields += text(b"n") + struct.pack("<Iq", 11, -5) + text(b"f") + struct.pack("<If", 6, 1.5)
    data = np.arange(8, dtype="<f4").tobytes()
    path = tmp_path / "i.gguf"
    path.write_bytes(gguf(fields, 3, info(b"blob", (3,), 2, 7) + info(X, (4, 2)), 2, data))
    found, tensors = read_gguf(path, (".in_sum2",))
    assert found == {"a": ["x", "é"], "n": -5, "f": 1.5}
    np.testing.assert_array_equal(tensors["x.in_sum2"], np.arange(8).reshape(2, 4))


@FEW
@given(st.data())
def test_a_damaged_imatrix_gives_a_result_or_one_line(tmp_path_factory, data):
    """Structured damage: numbers of the head replaced by interesting ones, pieces cut, doubled or moved."""
    whole = bytearray(
        gguf(text(b"general.type") + struct.pack("<I", 8) + text(b"imatrix"), 1, info(X, (4, 2)), 1, bytes(32))
    )
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(whole) - 1))
        kind = data.draw(st.sampled_from(["u8", "u32", "u64", "cut", "double"]))
        if kind == "cut":
            del whole[at : at + data.draw(st.integers(1, 16))]
            whole = whole or bytearray(b"G")
        elif kind == "double":
            whole[at:at] = whole[at : at + 12]
        else:
            size = {"u8": 1, "u32": 4, "u64": 8}[kind]
            value = data.draw(st.sampled_from([0, 1, 8, 9, (1 << 8 * size) - 1, 1 << (8 * size - 1)]))
            whole[at : at + size] = value.to_bytes(size, "little")
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(bytes(whole))
    try:
        read_gguf(path, (".in_sum2",))
    except InputError as e:
        assert str(e).isprintable()


# -- YAML -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("1:" * 200_000 + "1", "a number of 400001 characters"),  # base 60: minutes, and Python cannot print it
        ("0x" + "f" * 100_000, "a number of 100002 characters"),
        ("1:" * 45 + "1.5", "found 1.0"),
        ("!!int ''", "which is no tag:yaml.org,2002:int"),
        ("!!float ''", "which is no tag:yaml.org,2002:float"),
        ("!!bool perhaps", "which is no tag:yaml.org,2002:bool"),
        ("!!timestamp never", "which is no tag:yaml.org,2002:timestamp"),
        ("!!python/object:os.system x", "could not determine a constructor"),
        ("!!binary x", "failed to decode base64"),
        ("2001-99-99", "month must be in"),
        ("[" + "1," * 60_000 + "]", "more than 50000 keys and values"),
        ("[" * 200_000, "nested more than 32 deep"),
        ("*a", "aliases are not taken"),
        ("{? {b: 1} : 2}", "found unhashable"),
        ("{1: 2}", "put it in quotes"),
        ("{.nan: 2}", "put it in quotes"),
    ],
)
def test_yaml_that_makes_much_of_little_is_refused(value, message):
    found = f"key: {value}\n"
    if message.startswith("found 1.0") or "unhashable" in message:
        try:
            parse_yaml(found, "v.yaml")
        except InputError as e:
            assert str(e).isprintable()
        return
    assert message in refused(parse_yaml, found, "v.yaml")


# -- tokenizers -------------------------------------------------------------------------------------------------

REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
CHARSMAP = base64.b64encode(b"\xff\xff\xff\xff").decode()


def tokenizer(folder: Path, **parts: object) -> Path:
    value = {"model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}, **parts}
    (folder / "tokenizer.json").write_text(json.dumps(value))
    return folder


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"normalizer": {"type": "Sequence", "normalizers": [REPLACE] * 40}}, "1.1e+12 characters of one"),
        ({"decoder": {"type": "Sequence", "decoders": [REPLACE] * 40}}, "1.1e+12 characters of one"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTES] * 30}}, "characters of one"),
        ({"normalizer": {**REPLACE, "pattern": {"Regex": ""}, "content": "x" * 99}}, "characters of one"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": CHARSMAP}}, "shorter than it says"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "shorter than it says"),
        ({"normalizer": {**REPLACE, "pattern": {"Regex": "(" * 9999}}}, "not a tokenizer"),
    ],
)
def test_tokenizers_that_make_much_of_little_are_refused(tmp_path, capfd, parts, message):
    assert message in refused(lambda: Tokenizer.load(tokenizer(tmp_path, **parts)))
    assert capfd.readouterr().err == ""


def test_a_hidden_charsmap_is_found(tmp_path):
    tokenizer(tmp_path, normalizer={"type": "Precompiled", "precompiled_charsmap": CHARSMAP})
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text().replace("precompiled_charsmap", "\\u0070recompiled_charsmap"))
    assert "shorter than it says" in refused(Tokenizer.load, tmp_path)


def test_a_panic_of_the_library_is_one_line_and_silent(tmp_path, capfd):
    """Backtracking without end: the regular expressions give up, and the library panics."""
    split = {"type": "Split", "pattern": {"Regex": "(a|aa)+$"}, "behavior": "Isolated", "invert": False}
    found = Tokenizer.load(tokenizer(tmp_path, pre_tokenizer=split))
    assert "cannot encode the text" in refused(found.encode, "a" * 3000 + "!")
    assert capfd.readouterr().err == ""


def test_truncation_and_padding_of_a_file_are_not_followed(tmp_path):
    cut = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    pad = {"strategy": {"Fixed": 1 << 40}, "direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "a"}
    pieces = {"type": "Whitespace"}
    found = Tokenizer.load(tokenizer(tmp_path, truncation=cut, padding=pad, pre_tokenizer=pieces))
    assert found.encode("a b a b a") == [0, 1, 0, 1, 0]


def test_texts_and_ids_that_no_tokenizer_takes_are_one_line(tmp_path):
    found = Tokenizer.load(tokenizer(tmp_path))
    refused(found.encode, "\ud800")
    refused(found.decode, [-1])
    refused(found.decode, [1 << 32])


# -- memory -----------------------------------------------------------------------------------------------------

BOMBS = """
import json, struct, sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from inference.checkpoint import read_header, read_json
from inference.errors import PublishError
from inference.tokenizer import Tokenizer
from publisher.variants import parse_yaml
from quant.gguf_file import read_gguf
folder = Path(sys.argv[1])

def template(text):
    model = Tokenizer(folder, frozenset(), text, {}, None)
    return lambda: model.render_chat([{"role": "user", "content": "Hi"}], tools=[[1]])

def header(blob):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(blob)) + blob)
    return read_header(folder / "model.safetensors")

def config(blob):
    (folder / "config.json").write_bytes(blob)
    return read_json(folder / "config.json")

def imatrix(blob):
    (folder / "i.gguf").write_bytes(blob)
    return read_gguf(folder / "i.gguf", (".counts",))

array = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 0, 1 << 60)
bombs = [
    lambda: header(b"[" + b"[]," * 8_000_000 + b"[]]"),
    lambda: header(b'{"a":{"dtype":"U8","shape":[' + b"9," * 900_000 + b'9],"data_offsets":[0,0]}}'),
    lambda: config(b'{"a":[' + b"{}," * 10_000_000 + b"{}]}"),
    lambda: config(b"[" * 40_000_000),
    lambda: imatrix(array),
    lambda: parse_yaml("a: [" + "b," * 400_000 + "]", "v.yaml"),
    lambda: parse_yaml("- " * 400_000, "v.yaml"),
    *map(template, [
        "{{ 'a' * 10**9 }}", "{{ [0] * 10**9 }}", "{% for i in range(10**9) %}{% endfor %}", "{{ range(10**8) | list }}",
        "{% set l = [1] * 1000 %}{% for a in l %}{% for b in l %}{% for c in l %}{% endfor %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{{ f(n - 1) }}{{ f(n - 1) }}{% endmacro %}{{ f(40) }}",
        "{% set n = namespace(l=[1]) %}{% for i in range(60) %}{% set n.l = [n.l, n.l] %}{% endfor %}{{ n.l }}",
        "{{ tools | tojson(indent=10**9) }}", "{{ '\\\\t'.expandtabs(10**9) }}", "{{ (5).to_bytes(10**9) }}",
        "{{ strftime_now('%999999999Y') }}", "{{ lipsum(10**6) }}", "{{ 'a'.zfill(10**9) }}", "{{ 1e999 }}",
        "{{ x }}" * 40_000, "{{ [" + "a," * 100_000 + "] }}", "{{ " + "a~" * 60_000 + "a }}", "{{ " + "(" * 100_000,
    ]),
]
for n, bomb in enumerate(bombs):
    try:
        bomb()
    except PublishError as e:
        assert "\\n" not in str(e)
    else:
        sys.exit(f"bomb {n} was not refused")
status = Path("/proc/self/status")  # ru_maxrss would count what the parent held when it forked
peak = status.read_text().split("VmHWM:")[1].split()[0] if status.exists() else 0
print(len(bombs), int(peak) // 1024)
"""
MEMORY_MB = 400  # 170 were seen


def test_bombs_are_refused_within_bounded_memory(tmp_path):
    """In a process that may not have more than 3 GB of addresses; what it came to use is measured."""
    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", BOMBS, str(tmp_path), root], capture_output=True, text=True, timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30)),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr == ""
    count, peak = map(int, done.stdout.split())
    assert count == 25
    assert peak < MEMORY_MB if sys.platform == "linux" else True


# -- writing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["ENOSPC", "EDQUOT", "EROFS", "EIO"])
def test_a_disk_that_takes_no_more_leaves_the_old_file(tmp_path, monkeypatch, code):
    import errno

    path = tmp_path / "a.json"
    write_text(path, "old")
    error = getattr(errno, code)
    monkeypatch.setattr("os.fsync", lambda handle: (_ for _ in ()).throw(OSError(error, os.strerror(error))))
    with pytest.raises(OSError, match=os.strerror(error)):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_file_size_limit_leaves_the_old_file(tmp_path):
    """RLIMIT_FSIZE stands in for a full disk: the write itself fails, half-way."""
    write_text(tmp_path / "a.json", "old")
    script = (
        "import resource, sys; from pathlib import Path; from publisher.store import write_text\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: write_text(Path(sys.argv[1]), 'x' * 100_000)\n"
        "except OSError: sys.exit(7)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "a.json"], cwd=Path(__file__).parents[1], check=False
    )
    assert done.returncode == 7
    assert (tmp_path / "a.json").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_of_images_that_is_a_link_is_not_sent(tmp_path):
    from variant_folder import make_project, make_variant

    from publisher.push_plan import local_files
    from publisher.verify import stray_files

    project = make_project(tmp_path / "project")
    folder = make_variant(project)
    (tmp_path / "private").mkdir()
    (tmp_path / "private/x.png").write_bytes(b"secret")
    (folder / "images").symlink_to(tmp_path / "private")
    manifest, files = local_files(project, "Q4")
    assert not any(f.path.startswith("images") for f in files)
    assert stray_files(folder, manifest) == ["images"]  # so the gate refuses
