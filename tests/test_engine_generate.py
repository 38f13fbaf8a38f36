"""Generation: what is sampled, when it stops, what the cache saves, and that text streams."""

from pathlib import Path

import mlx_lm.utils
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p

from inference.backend import mx
from inference.errors import InputError
from inference.generate import Sampling, chat, filter_logits, generate, penalise
from inference.load import load

TEXT = (Path(__file__).parent / "fixtures/evaluation.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def model(tiny):
    return load(tiny)


@pytest.fixture(scope="module")
def prompt(model):
    return model.tokenizer.encode(TEXT)[:100]


def ids_of(tokens):
    return [t.id for t in tokens]


def greedy_by_hand(model, prompt, count):
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(mx.argmax(model.forward(mx.array([ids]), last_only=True)[0, -1]).item()))
    return ids[len(prompt) :]


def test_greedy_is_the_argmax_of_a_whole_forward_pass(model, prompt):
    assert ids_of(generate(model, prompt, max_tokens=12, stop=())) == greedy_by_hand(model, prompt, 12)


def test_greedy_generates_what_mlx_lm_generates(tiny, model, prompt):
    lm, _ = mlx_lm.utils.load_model(tiny)
    # mlx-lm rounds 1 + w to bfloat16 when it reads the original layout: a tie could fall otherwise, this text has none
    lm.set_dtype(mx.float32)
    expected = [int(t) for t, _ in generate_step(mx.array(prompt), lm, max_tokens=8)]
    assert ids_of(generate(model, prompt, max_tokens=8, stop=())) == expected


@pytest.mark.parametrize("step", [1, 7, 64, 99, 100, 1000])
def test_prefill_step_changes_nothing(model, prompt, step):
    assert ids_of(generate(model, prompt, max_tokens=4, stop=(), prefill_step=step)) == greedy_by_hand(model, prompt, 4)


def test_same_seed_same_text_other_seed_other_text(model, prompt):
    def sample(seed):
        return ids_of(generate(model, prompt, max_tokens=16, stop=(), sampling=Sampling(temperature=1, seed=seed)))

    assert sample(1) == sample(1) != sample(2)


def test_stop_token_ends_the_text_and_shows_no_text(model, prompt):
    greedy = ids_of(generate(model, prompt, max_tokens=12, stop=()))
    stop = greedy[5]
    tokens = list(generate(model, prompt, max_tokens=12, stop=[stop]))
    assert ids_of(tokens) == greedy[: greedy.index(stop) + 1]
    assert [t.finish for t in tokens] == [None] * (len(tokens) - 1) + ["stop"]
    shown = model.tokenizer.decode(ids_of(tokens)[:-1])
    assert "".join(t.text for t in tokens) == shown


def test_length_ends_the_text_and_timing_adds_up(model, prompt):
    tokens = list(generate(model, prompt, max_tokens=6, stop=()))
    assert tokens[-1].finish == "length"
    timing = tokens[-1].timing
    assert (timing.prompt_tokens, timing.cached_tokens, timing.generated) == (100, 0, 6)
    assert 0 < timing.prefill_s <= timing.ttft_s
    assert timing.decode_s > 0
    assert timing.decode_tps == pytest.approx(5 / timing.decode_s)
    assert tokens[0].timing.decode_tps is None
    assert "".join(t.text for t in tokens) == model.tokenizer.decode(ids_of(tokens))


def test_cache_of_a_longer_prompt_saves_the_shared_part(model, prompt):
    cache = model.make_cache()
    first = ids_of(generate(model, prompt, max_tokens=5, stop=(), cache=cache))
    grown = prompt + first + prompt[:10]
    *_, last = tokens = list(generate(model, grown, max_tokens=5, stop=(), cache=cache))
    assert last.timing.cached_tokens == len(prompt) + 4  # the fifth token was never fed
    assert ids_of(tokens) == greedy_by_hand(model, grown, 5)


def test_cache_of_another_prompt_is_not_used(model, prompt):
    cache = model.make_cache()
    list(generate(model, prompt, max_tokens=5, stop=(), cache=cache))
    for other in (prompt[:50], prompt[10:], prompt):  # a delta net cannot go back
        tokens = list(generate(model, other, max_tokens=3, stop=(), cache=cache))
        assert tokens[-1].timing.cached_tokens == 0
        assert ids_of(tokens) == greedy_by_hand(model, other, 3)


def test_checkpoint_lets_a_prompt_change_its_end(model, prompt):
    cache = model.make_cache()
    list(generate(model, prompt, max_tokens=5, stop=(), cache=cache, checkpoint_at=70, prefill_step=32))
    other = prompt[:80] + prompt[:20]
    tokens = list(generate(model, other, max_tokens=4, stop=(), cache=cache))
    assert tokens[-1].timing.cached_tokens == 70
    assert ids_of(tokens) == greedy_by_hand(model, other, 4)


def test_generation_that_is_broken_off_leaves_a_usable_cache(model, prompt):
    cache = model.make_cache()
    stream = generate(model, prompt, max_tokens=20, stop=(), cache=cache)
    first = [next(stream).id, next(stream).id]
    stream.close()
    assert cache.tokens == prompt + first
    assert ids_of(generate(model, prompt + first + [5], max_tokens=3, stop=(), cache=cache)) == greedy_by_hand(
        model, prompt + first + [5], 3
    )


def test_chat_prefills_only_what_is_new(model):
    cache = model.make_cache()
    messages = [{"role": "user", "content": TEXT[:300]}]
    answers = []
    for question in ("And then?", "Why?"):
        tokens = list(chat(model, messages, cache=cache, max_tokens=8))
        answers.append((tokens, model.tokenizer.encode_chat(messages)))
        text = "".join(t.text for t in tokens)
        messages = [*messages, {"role": "assistant", "content": text}, {"role": "user", "content": question}]
    (_, first_prompt), (second, second_prompt) = answers
    timing = second[-1].timing
    history = len(first_prompt) - len(model.tokenizer.encode("<|im_start|>assistant\n<think>\n"))
    assert timing.cached_tokens == history  # the template drops <think>, so the answer is prefilled as history
    assert ids_of(second) == ids_of(generate(model, second_prompt, max_tokens=8))


@pytest.mark.parametrize(
    ("prompt", "options", "text"),
    [
        ([], {}, "no tokens"),
        ([4096], {}, "token id 4096 is outside the vocabulary of 4096"),
        ([3, -1], {}, "token id -1"),
        ([1], {"max_tokens": 0}, "at least 1"),
        ([1] * 10, {"max_tokens": 5000}, "exceed the context of 4096"),
    ],
)
def test_senseless_prompts_are_refused(model, prompt, options, text):
    with pytest.raises(InputError, match=text):
        generate(model, prompt, **options)


@pytest.mark.parametrize(
    "option",
    [{"temperature": -1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.1}, {"min_p": 2},
     {"repetition_penalty": 0}, {"seed": -1}],
)  # fmt: skip
def test_senseless_sampling_is_refused(option):
    with pytest.raises(InputError, match=next(iter(option))):
        Sampling(**option)


LOGITS = mx.log(mx.array([[0.1, 0.4, 0.05, 0.25, 0.2]]))


def kept(**options):
    out = filter_logits(LOGITS, Sampling(**({"temperature": 1.0} | options)))[0]
    return [i for i, x in enumerate(out.tolist()) if x > -float("inf")]


def test_filters_keep_what_they_promise():
    assert kept() == [0, 1, 2, 3, 4]
    assert kept(top_k=1) == [1]
    assert kept(top_k=3) == [1, 3, 4]
    assert kept(top_k=9) == [0, 1, 2, 3, 4]
    assert kept(top_p=0.39) == [1]
    assert kept(top_p=0.6) == [1, 3]
    assert kept(top_p=0.66) == [1, 3, 4]
    assert kept(top_p=1e-9) == [1]
    assert kept(min_p=0.49) == [1, 3, 4]
    assert kept(min_p=0.51) == [1, 3]
    assert kept(min_p=1.0) == [1]


def test_filters_follow_the_order_of_transformers():
    assert kept(top_k=2, top_p=0.6) == [1]  # of the two that top-k leaves, the first has 0.615
    assert kept(temperature=0.5, top_p=0.5) == [1]  # squared: 0.16 of 0.275
    assert kept(temperature=2.0, min_p=0.7) == [1, 3, 4]  # square roots: 0.707 of the first


@pytest.mark.parametrize(
    "apply", [(apply_top_k, "top_k", 20), (apply_top_p, "top_p", 0.8), (apply_min_p, "min_p", 0.1)]
)
def test_one_filter_alone_keeps_what_mlx_lm_keeps(apply):
    function, name, value = apply
    mx.random.seed(0)
    logits = mx.random.normal((1, 500)) * 3
    mx.disable_compile()  # on the CPU it would run a C++ compiler
    expected = function(logits - mx.logsumexp(logits, axis=-1, keepdims=True), value)
    mx.enable_compile()
    got = filter_logits(logits, Sampling(temperature=1.0, **{name: value}))
    assert mx.array_equal(mx.isinf(got), mx.isinf(expected))
    assert 0 < mx.isinf(got).sum().item() < 500


def test_sampling_follows_the_distribution():
    n = 20000
    tokens = mx.random.categorical(mx.broadcast_to(filter_logits(LOGITS, Sampling(2.0)), (n, 5)), key=mx.random.key(0))
    p = np.array([0.1, 0.4, 0.05, 0.25, 0.2]) ** 0.5
    assert np.abs(np.bincount(np.array(tokens), minlength=5) / n - p / p.sum()).max() < 0.015


def test_repetition_penalty_lowers_seen_tokens_whatever_their_sign():
    got = penalise(mx.array([[2.0, -2.0, 3.0]]), mx.array([[True, True, False]]), 2.0)
    assert got.tolist() == [[1.0, -4.0, 3.0]]


def test_repetition_penalty_covers_prompt_and_generated_tokens(model, prompt):
    tokens = ids_of(generate(model, prompt, max_tokens=20, stop=(), sampling=Sampling(repetition_penalty=1e6)))
    assert len(set(tokens)) == 20
    assert not set(tokens) & set(prompt)
