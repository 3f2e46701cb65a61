"""The und_for_gen stage alone.

python -m uae_jax.main --config=configs/und_for_gen.py --workdir=runs/und_for_gen
"""

from configs import presets


def get_config(preset: str | None = None):
    """The configuration of a preset (`tiny` when none is named)."""
    return presets.preset(preset, ("und_for_gen",))
