"""Qwen3 as the folder `text_encoder` of a pipeline."""

from collections.abc import Callable

from uae_jax.models.decoder import Component
from uae_jax.models.language import encoder
from uae_jax.models.language.config import TextConfig
from uae_jax.models.language.encoder import EncoderSizes
from uae_jax.models.qwen3 import config


def text_encoder(read: Callable[[TextConfig], EncoderSizes]) -> Component:
    """The folder; `read` says what of a model is read."""
    return Component(
        "text_encoder",
        config.from_folder,
        encoder.whole_table,
        lambda sizes: encoder.read_table(read(sizes)),
        stem="model",
    )
