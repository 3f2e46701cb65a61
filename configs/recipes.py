"""Published recipes, each whole, for `PRESET+RECIPE`: what a recipe changes of a full-size preset.

    python -m uae_jax.main --config=gen_for_und:qwen2_5_vl_3b_sd3_5_medium@1xH200+paper_v5 --workdir=...
    python -m uae_jax.main --config=und_for_gen:qwen2_5_vl_3b_sd3_5_medium@8xH200+nft --workdir=...

`docs/recipes.md` has the same values in a table, with the sources. A recipe names the stages that it has.
"""

from typing import Any, NamedTuple


class Recipe(NamedTuple):
    """Stages of a recipe, in order, and its values."""

    stages: tuple[str, ...]
    changes: dict[str, Any]


# arXiv 2509.09666v5: the language model alone learns, on photographs without captions
_PAPER_V5: dict[str, Any] = dict(
    data=dict(
        caption_system="You are an expert vision-language model.",
        caption_prompt=(
            "Your task is: Given an input image, generate a textual description of the image. If there is text in the "
            "image, transcribe it inside double quotes.\n\nNow, carefully analyze the input image and output the full "
            "description."
        ),
    ),
    gen_for_und=dict(
        batch_size=1,
        group_size=4,
        kl_weight=1e-6,
        condition="caption_states",
        train="full",
        rollout_parts=1,
        micro_batches=1,
        vae_chunk=4,
        optimizer=dict(learning_rate=1e-6, schedule="constant"),
    ),
)
# 64 images a step instead of 1: the rate grows with the square root of the batch, as is usual for Adam
# (arXiv 2205.10287); 8 times 1e-6
_PAPER_V5_64: dict[str, Any] = _PAPER_V5 | dict(
    gen_for_und=_PAPER_V5["gen_for_und"]
    | dict(batch_size=64, vae_chunk=64, optimizer=dict(learning_rate=8e-6, schedule="constant"))
)


def _flow_grpo(evaluation: dict[str, Any], **values: Any) -> Recipe:
    """A recipe of flow_grpo, with scores at the guidance that it was published with."""
    return Recipe(("und_for_gen",), dict(evaluation=evaluation, und_for_gen=dict(flow_grpo=values)))


RECIPES = {
    "paper_v5": Recipe(("gen_for_und",), _PAPER_V5),
    "paper_v5_64": Recipe(("gen_for_und",), _PAPER_V5_64),
    # flow_grpo config/grpo.py, *_sd3_fast_nocfg
    "flow_grpo_fast": _flow_grpo(dict(guidance_scale=1.0, also_guidance_scale=0.0), kl_weight=0.0),
    # the same as flow_grpo's README tells it: one deterministic prefix for a group, which branches in the window
    "flow_grpo_prefix": _flow_grpo(
        dict(guidance_scale=1.0, also_guidance_scale=0.0), kl_weight=0.0, shared_noise=True, window_low=1
    ),
    # flow_grpo config/grpo.py, geneval_sd3: nine trained steps of ten, with guidance
    "flow_grpo_geneval": _flow_grpo(
        dict(guidance_scale=4.5, also_guidance_scale=1.0),
        guidance_scale=4.5,
        step_rule="sde",
        noise_level=0.7,
        window=9,
        window_high=9,
        clip_range=1e-4,
        kl_kind="gaussian_nodt",
        kl_weight=0.04,
    ),
    # arXiv 2509.16117, config/nft.py
    "nft": Recipe(
        ("und_for_gen",),
        dict(evaluation=dict(guidance_scale=1.0, also_guidance_scale=5.0), und_for_gen=dict(method="nft")),
    ),
}
