"""Sizes of the auto-encoders that diffusers calls AutoencoderKL, which two kinds of decoders have."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from uae_jax.files.known_fields import require
from uae_jax.models.autoencoder.blocks import Sizes


@dataclasses.dataclass(frozen=True)
class KLFields:
    """Fields of its configuration.

    Attributes:
      in_channels: channels of the image that the encoder reads.
      out_channels: channels of the image that the decoder makes.
      latent_channels: that encoder and decoder know.
      block_out_channels: width of each resolution; each step between two halves height and width.
      layers_per_block: residual blocks a resolution in the encoder; the decoder has one more.
      norm_num_groups: groups of every group norm.
      mid_block_add_attention: whether the lowest resolution has self-attention.

    Raises:
      ValueError: a value that the modules do not support; the message names the field.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 16
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    mid_block_add_attention: bool = True

    def __post_init__(self):
        divisible = all(width % self.norm_num_groups == 0 for width in self.block_out_channels)
        require(
            bool(self.block_out_channels) and divisible,
            "VAE",
            "block_out_channels",
            self.block_out_channels,
            f"at least one width, each a multiple of norm_num_groups={self.norm_num_groups}",
        )
        require(self.layers_per_block >= 1, "VAE", "layers_per_block", self.layers_per_block, "at least 1")

    @property
    def sizes(self) -> Sizes:
        """Of encoder and decoder; the encoder makes mean and log-variance of each latent channel."""
        return Sizes(
            self.block_out_channels,
            self.layers_per_block,
            self.norm_num_groups,
            2 * self.latent_channels,
            self.latent_channels,
            channels=self.out_channels,
            middle_attention=self.mid_block_add_attention,
        )


def check_fixed(stored: Mapping[str, Any], fixed: Mapping[str, tuple[Any, Any]]) -> None:
    """Checks the fields of a file that have one supported value.

    Args:
      stored: the contents of the file.
      fixed: by name, the value where the file has none, and the supported one; lists as tuples.

    Raises:
      ValueError: another value; the message names the field.
    """
    for field, (default, supported) in fixed.items():
        value = stored.get(field, default)
        value = tuple(value) if isinstance(value, list) else value
        require(value == supported, "VAE", field, value, repr(supported))


def block_types(stored: Mapping[str, Any], absent: tuple[int, ...]) -> dict[str, tuple[Any, Any]]:
    """The kinds of blocks for `check_fixed`, as many as there are widths, or `absent` where the file has none."""
    widths = stored.get("block_out_channels", absent)
    blocks = len(widths) if isinstance(widths, list | tuple) else 0  # another kind is refused by its field
    return {
        "down_block_types": (("DownEncoderBlock2D",), ("DownEncoderBlock2D",) * blocks),
        "up_block_types": (("UpDecoderBlock2D",), ("UpDecoderBlock2D",) * blocks),
    }
