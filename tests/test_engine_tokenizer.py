"""Text ↔ ids, streaming, chat templates, and the files of strangers."""

import json
import random
import shutil

import pytest

from inference.errors import CheckpointError
from inference.tokenizer import Tokenizer

CHAT = [
    {"role": "user", "content": "Grüße, 你好 👋"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "?"},
]


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return Tokenizer.load(tiny)


@pytest.fixture
def folder(tiny, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        shutil.copy(tiny / name, tmp_path / name)
    return tmp_path


def set_template(folder, template: str) -> Tokenizer:
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return Tokenizer.load(folder)


def test_text_survives_the_round_trip(tokenizer):
    text = "def f(x):\n\treturn x  # Grüße, 你好 👋🏽\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_in_text_are_one_id(tokenizer):
    assert tokenizer.encode("<|im_end|>") == [2]
    assert tokenizer.decode([2, 0]) == "<|im_end|><|endoftext|>"
    assert tokenizer.decode([2, 0], skip_special_tokens=True) == ""


def test_stop_ids_are_those_of_generation_config_and_eos_token(tokenizer, folder):
    assert tokenizer.stop_ids == {0, 2}
    (folder / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert 7 in Tokenizer.load(folder).stop_ids
    (folder / "generation_config.json").unlink()
    assert len(Tokenizer.load(folder).stop_ids) == 1


@pytest.mark.parametrize("seed", range(5))
def test_streamed_text_is_the_whole_text_for_any_ids(tokenizer, seed):
    """Random ids hold halves of characters, lone continuation bytes and special tokens."""
    rng = random.Random(seed)
    ids = [rng.randrange(tokenizer.vocab_size) for _ in range(300)]
    ids += tokenizer.encode("Grüße, 你好 👋🏽 — done") + tokenizer.encode("👋")[:-1]
    detokenizer = tokenizer.detokenizer()
    pieces = [detokenizer.add(i) for i in ids]
    assert "".join(pieces) + detokenizer.flush() == tokenizer.decode(ids)


def test_streaming_never_shows_half_a_character(tokenizer):
    detokenizer = tokenizer.detokenizer()
    ids = tokenizer.encode("你好 👋🏽 ok")
    pieces = [detokenizer.add(i) for i in ids]
    assert len(ids) > len("你好 👋🏽 ok")
    assert not any("�" in p for p in pieces)
    assert "".join(pieces) == "你好 👋🏽 ok"


def test_chat_template_renders_as_published(tokenizer):
    text = tokenizer.render_chat(CHAT)
    assert text == (
        "<|im_start|>user\nGrüße, 你好 👋<|im_end|>\n<|im_start|>assistant\nHi.<|im_end|>\n"
        "<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    )
    assert tokenizer.render_chat(CHAT, enable_thinking=False).endswith("<think>\n\n</think>\n\n")
    assert tokenizer.render_chat(CHAT[:1], add_generation_prompt=False).endswith("👋<|im_end|>\n")
    assert tokenizer.encode_chat(CHAT)[0] == 1


def test_templates_have_what_transformers_gives_them(folder):
    tokenizer = set_template(
        folder,
        "{%- for m in messages %}\n"
        "    {%- if loop.index > 1 %}{% break %}{% endif %}\n"
        "    {% generation %}{{ m | tojson }}{% endgeneration %}\n"
        "{%- endfor %}|{{ tools | tojson(indent=1) }}|{{ strftime_now('%Y') | length }}|{{ eos_token }}",
    )
    text = tokenizer.render_chat([{"role": "user", "content": "<é>"}, {"role": "user"}], tools=[{"a": 1}])
    assert (
        text.strip() == '{"role": "user", "content": "<é>"}|[\n {\n  "a": 1\n }\n]|4|' + tokenizer.special["eos_token"]
    )


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ raise_exception('no system\nrole') }}", "no system"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ messages[0].content.x.y }}", "UndefinedError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages | join(3) + 4 }}", "TypeError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{% for i in range(999999999) %}{% endfor %}", "OverflowError"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "TemplateRuntimeError"),
        ("{{ 'a' * 10**10 }}", "TemplateRuntimeError"),
        ("{{ 'a'.center(10**11) }}", "TemplateRuntimeError"),
        ("{{ '%0999999999d' % 1 }}", "TemplateRuntimeError"),
        ("{{ '%0999999999d' | format(1) }}", "TemplateRuntimeError"),
        ("{{ '{:0999999999d}'.format(1) }}", "TemplateRuntimeError"),
        (
            "{% set n = namespace(s='aa') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
            "TemplateRuntimeError",
        ),
        ("{% for i in range(9999) %}{{ 'a' * 9999 }}{% endfor %}", "TemplateRuntimeError"),
        ("{{ 9 ** (9 ** 9) }}", "TemplateRuntimeError"),
    ],
)
def test_failing_templates_are_one_line(folder, template, text):
    with pytest.raises(CheckpointError) as e:
        set_template(folder, template).render_chat(CHAT)
    assert text in str(e.value)
    assert "\n" not in str(e.value)


def test_template_comes_from_tokenizer_config_if_there_is_no_file(folder):
    (folder / "chat_template.jinja").unlink()
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    for template in ("{{ 'old' }}", [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "old"}]):
        path.write_text(json.dumps(config | {"chat_template": template}))
        assert Tokenizer.load(folder).render_chat(CHAT) == "old"
    path.write_text(json.dumps({k: v for k, v in config.items() if k != "chat_template"}))
    with pytest.raises(CheckpointError, match="has no chat template"):
        Tokenizer.load(folder).render_chat(CHAT)


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("tokenizer.json", "{}", "not a tokenizer"),
        ("tokenizer.json", "\x00", "not a tokenizer"),
        ("tokenizer.json", None, "no such file"),
        ("tokenizer_config.json", "[]", "expected an object"),
        ("tokenizer_config.json", '{"eos_token": 3}', "eos_token: found 3"),
        ("tokenizer_config.json", '{"eos_token": "<nope>"}', "'<nope>' is not in tokenizer.json"),
        ("generation_config.json", '{"eos_token_id": "2"}', "eos_token_id: found '2'"),
        ("generation_config.json", '{"eos_token_id": [2, null]}', "eos_token_id: found [2, None]"),
    ],
)
def test_broken_tokenizer_files_are_refused_in_one_line(folder, name, content, text):
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(CheckpointError) as e:
        Tokenizer.load(folder)
    assert text in str(e.value)
    assert "\n" not in str(e.value)
