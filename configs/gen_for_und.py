"""The gen_for_und stage alone.

    python -m uae_jax.main --config=configs/gen_for_und.py --workdir=runs/gen_for_und
    python -m uae_jax.main --config=gen_for_und:qwen2_5_vl_3b_sd3_5_medium@1xH200+paper_v5 --workdir=runs/v5 \
        --config.model.folder=/weights/UAE --config.data.folder=/data/photographs

The second one is the recipe of the paper's version 5 (docs/recipes.md).
"""

from configs import presets


def get_config(preset: str | None = None):
    """The configuration of a preset (`tiny` when none is named)."""
    return presets.preset(preset, ("gen_for_und",))
