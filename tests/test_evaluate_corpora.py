"""What is scored and where, what evaluation may not share with calibration, and texts that cannot be used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from inference.errors import CheckpointError, InputError
from inference.tokenizer import Tokenizer
from publisher.evaluate_corpora import (
    chat_corpus,
    check_overlap,
    contents_of,
    read_conversations,
    text_corpus,
)
from publisher.source import Source, read_source

TALK = [
    [
        {"role": "user", "content": "How many legs has a spider?"},
        {"role": "assistant", "content": "Eight. An insect has six."},
        {"role": "user", "content": "And a crab?"},
        {"role": "assistant", "content": "Ten, if you count the claws."},
    ],
    [{"role": "user", "content": "Say yes."}, {"role": "assistant", "content": "Yes."}],
]


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Tokenizer:
    return Tokenizer.load(tiny)


def source(text: str, where: str = "evaluation.text") -> Source:
    return Source(where, text, "0" * 64)


def packaged(name: str) -> Source:
    return read_source(None, name, name)


def with_config(tiny: Path, folder: Path, **change: object) -> Tokenizer:
    """The tiny tokenizer with other settings in tokenizer_config.json."""
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        shutil.copy(tiny / name, folder / name)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    return Tokenizer.load(folder)


def test_windows_are_scored_as_llama_perplexity_scores_them(tokenizer):
    text = packaged("evaluation.txt")
    corpus = text_corpus(text, tokenizer, 3, 512)
    ids = tokenizer.encode(text.text)
    assert [list(w.tokens) for w in corpus.windows] == [ids[:512], ids[512:1024], ids[1024:1536]]
    for w in corpus.windows:
        assert w.scored == tuple(range(256, 511))
        assert w.targets == list(w.tokens[257:512])
    assert corpus.sizes == [255] * 3


def test_a_bos_takes_the_place_of_each_windows_first_token_where_the_tokenizer_adds_one(tiny, tmp_path):
    tokenizer = with_config(tiny, tmp_path, add_bos_token=True, bos_token="<|endoftext|>")
    text = packaged("evaluation.txt")
    ids, bos = tokenizer.encode(text.text), tokenizer.encode("<|endoftext|>")
    corpus = text_corpus(text, tokenizer, 2, 64)
    assert list(corpus.windows[0].tokens) == [*bos, *ids[:63]]
    assert list(corpus.windows[1].tokens) == [*bos, *ids[64:127]]
    off = with_config(tiny, tmp_path, add_bos_token=False, bos_token="<|endoftext|>")
    assert list(text_corpus(text, off, 2, 64).windows[0].tokens) == ids[:64]


def test_without_the_setting_tokenizer_json_says_whether_a_bos_is_added(tiny, tmp_path):
    tokenizer = with_config(tiny, tmp_path, bos_token="<|endoftext|>")
    assert tokenizer.bos() is None
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    bos = tokenizer.encode("<|endoftext|>")[0]
    data["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [bos], "tokens": ["<|endoftext|>"]}},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    assert Tokenizer.load(tmp_path).bos() == bos


def test_a_bos_that_is_wanted_and_missing_is_refused(tiny, tmp_path):
    tokenizer = with_config(tiny, tmp_path, add_bos_token=True, bos_token=None)
    with pytest.raises(CheckpointError, match="add_bos_token is true"):
        tokenizer.bos()


def test_in_a_conversation_the_assistants_words_are_scored_and_the_end_of_each_turn(tokenizer):
    corpus = chat_corpus(source("", "evaluation.chat"), TALK, tokenizer, 2048)
    assert len(corpus.windows) == 2
    said = [tokenizer.decode(w.targets) for w in corpus.windows]
    assert said[0] == "Eight. An insect has six.<|im_end|>Ten, if you count the claws.<|im_end|>"
    assert said[1] == "Yes.<|im_end|>"
    rendered = tokenizer.encode_chat(TALK[0], add_generation_prompt=False)
    assert list(corpus.windows[0].tokens) == rendered


def test_a_conversation_is_cut_at_the_context(tokenizer):
    whole = chat_corpus(source(""), TALK * 2, tokenizer, 2048)
    length = len(whole.windows[0].tokens) - 8
    cut = chat_corpus(source(""), TALK * 2, tokenizer, length)
    assert len(cut.windows[0].tokens) == length
    assert len(cut.windows[0].scored) < len(whole.windows[0].scored)
    with pytest.raises(InputError, match="fewer than 2 conversations have a token to score within 3 tokens"):
        chat_corpus(source("", "evaluation.chat"), TALK, tokenizer, 3)


def test_a_template_that_hides_what_the_assistant_said_is_refused(tiny, tmp_path):
    tokenizer = with_config(tiny, tmp_path)
    tokenizer.template = "{% for m in messages %}{{ m.role }}: {{ m.content | upper }}\n{% endfor %}"
    with pytest.raises(InputError, match=r"evaluation\.chat\[0\]: the base's chat template does not show .*Eight"):
        chat_corpus(source("", "evaluation.chat"), TALK, tokenizer, 2048)


# ------------------------------------------------------------------------------------------------ overlap


def test_a_passage_shared_with_the_calibration_is_named(tokenizer):
    text = packaged("evaluation.txt")
    ids = tokenizer.encode(text.text)
    windows = [ids[:300], ids[300:600]]
    other = tokenizer.encode("The ferry was late, and nobody on the quay was surprised. " * 20)
    check_overlap(windows, "evaluation.text", [other, other + ids[400:431]], tokenizer)  # 31 tokens: by chance
    with pytest.raises(InputError) as e:
        check_overlap(windows, "evaluation.text", [other, other + ids[400:432] + other], tokenizer)
    passage = " ".join(tokenizer.decode(ids[400:432]).split())[:30]
    assert str(e.value).startswith("evaluation.text: shares 1 runs of 32 tokens")
    assert passage in str(e.value)
    assert "\n" not in str(e.value)


def test_a_run_across_two_windows_or_two_messages_is_none(tokenizer):
    ids = tokenizer.encode(packaged("evaluation.txt").text)[:600]
    check_overlap([ids[:300], ids[300:]], "x", [ids[280:300], ids[300:320]], tokenizer)


def test_the_packages_texts_share_nothing(tokenizer):
    calibration = [tokenizer.encode(packaged("calibration.txt").text)]
    calibration += contents_of(read_conversations(packaged("calibration_chat.json")), tokenizer)
    check_overlap([tokenizer.encode(packaged("evaluation.txt").text)], "evaluation.txt", calibration, tokenizer)
    talks = read_conversations(packaged("evaluation_chat.json"))
    check_overlap(contents_of(talks, tokenizer), "evaluation_chat.json", calibration, tokenizer)
    assert len(talks) >= 10
    assert len(packaged("evaluation.txt").text) > 12288 * 4.5  # 24 windows of 512 for the widest vocabularies


# ------------------------------------------------------------------------------------------------ what cannot be used


def test_a_text_that_is_not_utf8_is_named_with_its_line(tmp_path):
    (tmp_path / "held.txt").write_bytes(b"eins\nzwei\n" + b"dr\xfci")
    with pytest.raises(InputError, match=r"^evaluation\.text: held\.txt:3: found byte 0xfc, expected UTF-8$"):
        read_source(tmp_path / "held.txt", "evaluation.text", "evaluation.txt")


def test_a_text_that_is_too_short_is_refused(tokenizer):
    with pytest.raises(InputError, match=r"^evaluation\.text: \d+ tokens, expected at least 2 windows of 512$"):
        text_corpus(source("too short"), tokenizer, 24, 512)


def test_a_text_with_fewer_windows_than_asked_for_gives_what_it_has(tokenizer):
    text = source(packaged("evaluation.txt").text[:4000])
    corpus = text_corpus(text, tokenizer, 4000, 64)
    assert len(corpus.windows) == len(tokenizer.encode(text.text)) // 64


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("{}", "expected an array of 2 to 1000 conversations, found dict"),
        ("[]", "found 0 entries"),
        ('[{"messages": []}, []]', r"chat\[0\]: expected a list of messages, found 0 entries"),
        ('[3, 4]', r"chat\[0\]: expected a list of messages, found int"),
        ('[[{"role": "user"}], []]', r"chat\[0\]\[0\]: expected role"),
        ('[[{"role": "tool", "content": "x"}], []]', r"chat\[0\]\[0\]: expected role \(system, user, assistant\)"),
        ('[[{"role": "user", "content": " "}], []]', r"chat\[0\]\[0\]: expected role"),
        ('[[{"role": "user", "content": [1]}], []]', r"chat\[0\]\[0\]: expected role"),
        ('[[{"role": "user", "content": "x"}], []]', r"chat\[0\]: the assistant says nothing in it"),
    ],
)  # fmt: skip
def test_malformed_conversations_are_one_clear_line(text, message):
    with pytest.raises(InputError, match=message) as e:
        read_conversations(source(text, "evaluation.chat"))
    assert "\n" not in str(e.value)
    assert len(str(e.value)) < 250
