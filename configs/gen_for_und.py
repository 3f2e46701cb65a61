"""The gen_for_und stage alone.

python -m uae_jax.main --config=configs/gen_for_und.py --workdir=runs/gen_for_und
"""

from configs import presets


def get_config(preset: str | None = None):
    """The configuration of a preset (`tiny` when none is named)."""
    return presets.preset(preset, ("gen_for_und",))
