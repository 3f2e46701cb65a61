"""Makes the built-in tiny model from nothing: auto-encoder, encoders, captioner, decoder.

    python -m uae_jax.main --config=configs/bootstrap.py --workdir=runs/bootstrap

The result is `runs/bootstrap/model`, in the official folder layout. The same workdir continues; another configuration
of a phase that has begun needs a new one. It starts as the paper's model does: a captioner that is right but says
little, and a decoder that draws part of what a caption says. The preset `emoji` makes a model of 64-pixel scenes of
emoji (dev/emoji.md):

    python -m uae_jax.fetch_emoji --folder=data/emoji
    python -m uae_jax.main --config=configs/bootstrap.py:emoji --workdir=runs/emoji_bootstrap

The preset `unified` makes one network that captions and draws 32-pixel scenes, in the layout of Janus (docs/janus.md):

    python -m uae_jax.main --config=configs/bootstrap.py:unified --workdir=runs/unified_bootstrap

The preset `small_decoder` makes a decoder of a smaller size, beside the other parts of the built-in model
(`benchmarks.second_claim`):

    python -m uae_jax.main --config=configs/bootstrap.py:small_decoder --workdir=runs/small_decoder

A part alone, beside those of another model (`start`, `builtin` for the built-in one), here the scorer of captions that
a control reward needs and that is no part of the method:

    python -m uae_jax.main --config=configs/bootstrap.py --workdir=runs/scorer --config.start=builtin \
        --config.phases="('caption_scorer',)"
"""

from typing import Any

import ml_collections

from configs.presets import merged, unknown_preset
from uae_jax.settings import as_dict
from uae_jax.stages.bootstrap.settings import BootstrapConfig


def _emoji() -> dict[str, Any]:
    """The same parts for twice the side and five times the words: a wider transformer, other durations."""
    return dict(
        preset="bootstrap_emoji",
        data=dict(source="emoji", folder="data/emoji"),
        side=64,
        vae=dict(steps=2000, batch_size=16, model=dict(sample_size=64)),
        clip=dict(steps=2000, batch_size=32, vision=dict(image_size=64)),
        dinov2=dict(steps=2000, batch_size=32, model=dict(image_size=64)),
        captioner=dict(steps=3000, vision=dict(patch_size=8, window_size=32)),
        decoder=dict(steps=4000, batch_size=48, model=dict(sample_size=16, num_layers=6, num_attention_heads=5)),
        mistakes=dict(steps=200, batch_size=48),
    )


def _unified() -> dict[str, Any]:
    """One network that captions and draws, beside the image encoders of the built-in model."""
    return dict(preset="bootstrap_unified", start="builtin", phases=("vq", "network"))


def _small_decoder() -> dict[str, Any]:
    """A small decoder of true captions, beside the other parts of the built-in model."""
    return dict(
        preset="bootstrap_small_decoder",
        start="builtin",
        phases=("decoder",),
        decoder=dict(steps=2500, model=dict(num_layers=2, num_attention_heads=2)),
    )


# what differs from the defaults of the settings
PRESETS = {"tiny": dict, "emoji": _emoji, "unified": _unified, "small_decoder": _small_decoder}


def get_config(preset: str | None = None):
    """The configuration of a preset (`tiny` when none is named).

    Raises:
      ValueError: there is no such preset.
    """
    name = preset or "tiny"
    if name not in PRESETS:
        raise ValueError(unknown_preset(name, PRESETS))
    return ml_collections.ConfigDict(merged(as_dict(BootstrapConfig()), PRESETS[name]()))
