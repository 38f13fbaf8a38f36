"""The built-in recipes, as data. A recipe of the user's own extends or overrides them in variants.yaml.

`unsloth` is the map of the published "UD" MLX cards (mlx-node `convert --q-recipe unsloth`): its order of sensitivity
was measured by Unsloth on another model, and every reason below says so. `mixed_*` and `uniform` give what
`mlx_lm.convert` gives, tensor by tensor.
"""

from __future__ import annotations

from .recipe import Recipe, Rule

STUDY = "Unsloth's study of Qwen3.5-35B-A3B, not measured on this model"
ROUTER = Rule(
    "*.mlp.{gate,shared_expert_gate}", 8, 64, why="routing decides which experts run; rounding it moves the choice",
    optional=True,
)  # fmt: skip


def _unsloth(name: str, out: int | str, group_size: int | None) -> Recipe:
    """out, group_size: the format of the projections that have no norm before them, and of the tiny a/b."""
    unscaled = "no norm before it to take a scale; KLD about {} when lowered"
    return Recipe(
        name,
        (
            Rule("*.embed_tokens", "N+2", why=f"KLD about 0.15 when lowered: little sensitive ({STUDY})"),
            Rule("*.lm_head", "N+3", why=f"KLD about 0.05 when lowered: least sensitive ({STUDY})", optional=True),
            ROUTER,
            Rule("*.self_attn.{q,k,v}_proj", "N+2", awq=True, why=f"KLD about 1.5 to 2.9 when lowered ({STUDY})"),
            Rule(
                "*.linear_attn.in_proj_{qkv,z}", "N+2", awq=True, optional=True,
                why=f"KLD about 2.9 when lowered ({STUDY})",
            ),
            Rule("*.self_attn.o_proj", out, group_size, why=f"{unscaled.format(1.5)} ({STUDY})"),
            Rule("*.linear_attn.out_proj", out, group_size, optional=True, why=f"{unscaled.format('6.0')} ({STUDY})"),
            Rule(
                "*.linear_attn.in_proj_{a,b}", out, group_size, optional=True,
                why="tiny, and it drives the recurrence's gates",
            ),
            Rule(
                "*.{switch_mlp,shared_expert}.down_proj", "N+1", optional=True,
                why=f"slightly more sensitive than gate and up ({STUDY})",
            ),
            Rule(
                "*.{switch_mlp,shared_expert}.{gate,up}_proj", "N", optional=True,
                why=f"the bulk of the weights, tolerant of low bits ({STUDY})",
            ),
            Rule(
                "*.mlp.down_proj", "N+1", awq=True, optional=True,
                why=f"slightly more sensitive than gate and up ({STUDY})",
            ),
            Rule(
                "*.mlp.{gate,up}_proj", "N", awq=True, optional=True,
                why=f"the bulk of the weights, tolerant of low bits ({STUDY})",
            ),
        ),
        origin="the Unsloth Dynamic 2.0 strategy as mlx-node published it",
    )  # fmt: skip


def _mixed(low: int, high: int) -> Recipe:
    more = "llama.cpp's use_more_bits layers, as in mlx-lm's recipe of this name"
    return Recipe(
        f"mixed_{low}_{high}",
        (
            Rule("*.v_proj", high, layers="use_more_bits", why=more),
            Rule("*.down_proj", high, layers="use_more_bits", why=more),
            Rule("*.lm_head", high, why="high bits for the output, as in mlx-lm's recipe of this name", optional=True),
            Rule("*", low, why="low bits for all else, as in mlx-lm's recipe of this name"),
        ),
        origin=f"mlx-lm's quantization recipe mixed_{low}_{high}",
    )


def _float(mode: str, bits: int, group_size: int) -> Recipe:
    return Recipe(
        mode,
        (ROUTER, Rule("*", bits, group_size, mode, why=f"every matrix in {mode}")),
        origin=f"every matrix in MLX's {mode} format, routers in 8 bits",
    )


BUILTIN: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        _unsloth("unsloth", "bf16", None),
        _unsloth("unsloth_8bit_out", 8, 64),
        Recipe(
            "uniform",
            (ROUTER, Rule("*", "N", why="the same bits for every matrix")),
            origin="one width for every matrix, as `mlx_lm.convert --quantize` gives it",
        ),
        _mixed(2, 6),
        _mixed(3, 4),
        _mixed(3, 6),
        _mixed(4, 6),
        _float("mxfp4", 4, 32),
        _float("mxfp8", 8, 32),
        _float("nvfp4", 4, 16),
    )
}  # fmt: skip
