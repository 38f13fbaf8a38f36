"""What the fast ways of this engine differ by from the plain ones, on the device of this machine.

    python -m benchmarks.engine_agreement [--shape 9b] [--layers 8] [--bits 16,4] [--json OUT]

Delta rule, float32, heads as the shape has them: by chunks against token by token, at the lengths where chunks begin and
end, with keys that repeat, and split at random points. Model, random weights: the compiled step of one token, with the
kernels that this process decodes by, against whole forward passes: largest difference of a logit, and whether both choose
the same token, in the type that the device computes in and in float32. Then the last logits of a batch whose shorter prompts
are padded, against those of each prompt by itself; where there are experts, also how many choices, of a token in a layer,
fell otherwise: two experts with nearly the same score change places for the last bits of a sum, and another expert is
another function. PUBLISH_KERNELS=custom ends with what is wrong with a kernel; plain keeps to MLX's own operations.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import random_variant
from inference import gated_delta, norm_kernel
from inference.backend import compute_dtype, device_info, mx
from inference.load import Model, load
from inference.qwen3_5 import token_kernel
from inference.qwen3_5.model import MoE

LENGTHS = (1, 2, 63, 64, 65, 127, 129, 1000)
PROMPT, STEPS = 200, 16  # tokens
SHORTER = (65, 20, 7)  # few rows are multiplied by other ways than many, and so are rows of experts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="9b", choices=sorted(random_variant.make_checkpoint.PRESETS))
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--bits", type=lambda text: [int(n) for n in text.split(",")], default=[16, 4])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    config = random_variant.config_of(args.shape, args.layers)
    out: dict[str, Any] = {
        "device": asdict(device_info()), "shape": args.shape, "layers": args.layers,
        "kernels": {"token": token_kernel.usable(), "norm": norm_kernel.usable()},
        "delta_rule": delta_rule(config["text_config"]), "models": [],
    }  # fmt: skip
    print(out["device"], out["kernels"], out["delta_rule"], flush=True)
    # the device's own type first: kernels compiled for it must not be taken for float32's
    types = dict.fromkeys((compute_dtype(mx.bfloat16), mx.float32))
    for bits in args.bits:
        with tempfile.TemporaryDirectory() as temp:
            folder = random_variant.write(config, Path(temp) / "model", bits)
            for dtype in types:
                model = load(folder, dtype)
                row = {"bits": bits, "type": str(dtype).rsplit(".", 1)[-1], **steps(model), **padded(model)}
                out["models"].append(row)
                print(row, flush=True)
                del model
                mx.clear_cache()
    if args.json:
        args.json.write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")


def delta_rule(cfg: dict[str, Any]) -> dict[str, float]:
    """Largest difference of an output or a state; values of outputs are about 1."""
    found = {str(n): _differs(_inputs(cfg, n)) for n in LENGTHS}
    found["129, one key"] = _differs(_inputs(cfg, 129, repeat=True))
    x = _inputs(cfg, 1000)
    expected = gated_delta.reference(*x)
    rng, worst = random.Random(0), 0.0
    for _ in range(4):
        ends = sorted(rng.sample(range(1, 1000), 5))
        state, parts = x[-1], []
        for start, end in zip([0, *ends], [*ends, 1000], strict=True):
            y, state = gated_delta.chunked(*(v[:, start:end] for v in x[:-1]), state)
            parts.append(y)
        worst = max(worst, _apart((mx.concatenate(parts, axis=1), state), expected))
    return {**found, "1000, split": worst}


def _inputs(cfg: dict[str, Any], t: int, repeat: bool = False) -> list[mx.array]:
    hk, hv = cfg["linear_num_key_heads"], cfg["linear_num_value_heads"]
    dk, dv = cfg["linear_key_head_dim"], cfg["linear_value_head_dim"]
    mx.random.seed(t)
    k = mx.random.normal((1, 1 if repeat else t, hk, dk))
    k = mx.broadcast_to(k / mx.sqrt((k * k).sum(-1, keepdims=True)), (1, t, hk, dk))
    q, v = mx.random.normal((1, t, hk, dk)) * dk**-0.5, mx.random.normal((1, t, hv, dv))
    g, beta = -3 * mx.random.uniform(shape=(1, t, hv)) ** 4, mx.random.uniform(shape=(1, t, hv))
    return [q, k, v, g, beta, 0.3 * mx.random.normal((1, hv, dv, dk))]


def _differs(x: list[mx.array]) -> float:
    return _apart(gated_delta.chunked(*x), gated_delta.reference(*x))


def _apart(a: tuple[mx.array, ...], b: tuple[mx.array, ...]) -> float:
    return max(float(mx.abs(x - y).max().item()) for x, y in zip(a, b, strict=True))


def steps(model: Model) -> dict[str, Any]:
    ids = mx.random.randint(0, model.config.vocab_size, (1, PROMPT + STEPS), key=mx.random.key(1))
    whole = model.forward(ids)[:, PROMPT:].astype(mx.float32)
    cache = model.make_cache()
    mx.eval(model.hidden(ids[:, :PROMPT], cache))
    stepped = [model.step(ids[:, i : i + 1], cache)[:, -1:] for i in range(PROMPT, PROMPT + STEPS)]
    got = mx.concatenate(stepped, axis=1).astype(mx.float32)
    same = (got.argmax(-1) == whole.argmax(-1)).sum()
    return {
        "step": float(mx.abs(got - whole).max().item()),
        "logits_std": float(mx.std(whole).item()),
        "same_first_choice": f"{int(same.item())} of {STEPS}",
    }


def padded(model: Model) -> dict[str, Any]:
    """Prompts of four lengths in one batch, filled up behind, against each by itself, by length."""
    lengths = (PROMPT, *SHORTER)
    ids = mx.random.randint(0, model.config.vocab_size, (len(lengths), PROMPT), key=mx.random.key(2))
    with routes() as chosen:
        together, moved = model.forward(ids), 0
    found = {}
    for i, n in enumerate(lengths):
        with routes() as own:
            alone = model.forward(ids[i : i + 1, :n])[:, -1]
        found[str(n)] = float(mx.abs(together[i : i + 1, n - 1] - alone).max().item())
        for a, b in zip(chosen, own, strict=True):
            moved += int((a.reshape(len(lengths), PROMPT, -1)[i, :n] != b).any(axis=-1).sum().item())
    return {"padded": found} | ({"routed_otherwise": f"{moved} of {sum(lengths) * len(chosen)}"} if chosen else {})


@contextmanager
def routes() -> Iterator[list[mx.array]]:
    """Experts [N, k] of every layer that runs within, in ascending order."""
    found: list[mx.array] = []
    route = MoE.route

    def recorded(self: MoE, x: mx.array) -> tuple[mx.array, mx.array]:
        experts, scores = route(self, x)
        found.append(mx.sort(experts, axis=-1))
        return experts, scores

    MoE.route = recorded
    try:
        yield found
    finally:
        MoE.route = route


if __name__ == "__main__":
    main()
