"""The cold_start stage alone.

python -m uae_jax.main --config=configs/cold_start.py --workdir=runs/cold_start
"""

from configs import presets


def get_config(preset: str | None = None):
    """The configuration of a preset (`tiny` when none is named)."""
    return presets.preset(preset, ("cold_start",))
