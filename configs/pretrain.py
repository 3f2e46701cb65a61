"""The pretrain stage alone.

python -m uae_jax.main --config=configs/pretrain.py --workdir=runs/pretrain
"""

from configs import presets


def get_config(preset: str | None = None):
    """The configuration of a preset (`tiny` when none is named)."""
    return presets.preset(preset, ("pretrain",))
