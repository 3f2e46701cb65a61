"""No training: scores the model on held-out pictures and writes summary.json and report.html.

python -m uae_jax.main --config=configs/evaluate.py --workdir=runs/evaluate --config.model.folder=runs/tiny/export
"""

from configs import presets


def get_config(preset: str | None = None):
    """The configuration of a preset (`tiny` when none is named)."""
    return presets.preset(preset, ())
