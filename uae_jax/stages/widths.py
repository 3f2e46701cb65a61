"""Whether the parts of a model folder fit each other."""

import pathlib
from collections.abc import Mapping

from uae_jax.models.sd3.config import TransformerConfig, VAEConfig


def check_widths(
    folders: tuple[pathlib.Path, pathlib.Path, pathlib.Path],
    parts: Mapping,
    transformer: TransformerConfig,
    vae: VAEConfig,
) -> None:
    """Refuses parts that fit their own configs and not each other: they are of different models.

    Args:
      folders: of the captioner, of SD3 and of its transformer.
      parts: the projector and the vector of the empty prompt among them.
      transformer, vae: sizes.

    Raises:
      ValueError: two widths differ; the message names both files.
    """
    captioner, folder, transformer_folder = folders
    pairs = (
        (
            captioner,
            "a projector to width",
            parts["projector"]["second"]["kernel"].shape[-1],
            "joint_attention_dim",
            transformer.joint_attention_dim,
        ),
        (
            folder / "SD3",
            "text encoders with pooled width",
            parts["pooled"].shape[-1],
            "pooled_projection_dim",
            transformer.pooled_projection_dim,
        ),
        (
            folder / "SD3" / "vae",
            "an auto-encoder with latent channels",
            vae.latent_channels,
            "in_channels",
            transformer.in_channels,
        ),
    )
    for path, what, width, field, needed in pairs:
        if width != needed:
            raise ValueError(
                f"{path} holds {what} {width}, but {transformer_folder / 'config.json'} has {field} {needed}; take "
                "both from one model"
            )
