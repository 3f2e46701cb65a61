"""The image encoder of Qwen2.5-VL (arXiv 2502.13923, section 2.1.1): window attention, 2-D rotary positions, merger.

Ids of windows are the mask. Attention does not depend on the order of its keys, so that nothing is reordered.
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from uae_jax.models.qwen2_5_vl.config import VisionConfig
from uae_jax.nn.attention import Mask, attention
from uae_jax.nn.constrain import constrain
from uae_jax.nn.linear import Dense
from uae_jax.nn.loops import scan_layers
from uae_jax.nn.mlp import GatedMLP
from uae_jax.nn.norms import RMSNorm
from uae_jax.nn.rope import apply_rope

ROPE_THETA = 10000.0


def patch_angles(config: VisionConfig, positions: Int[Array, "b p 2"]) -> Float[Array, "b p half"]:
    """Rotation angles, K / 2 a head: rows turn the first half, columns the second."""
    half = config.width // config.heads // 2
    exponents = np.arange(0, half, 2, dtype=np.float32) / np.float32(half)
    frequencies = (1.0 / np.float32(ROPE_THETA) ** exponents).astype(np.float32)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return angles.reshape(*positions.shape[:-1], half)


class Block(nn.Module):
    """One pre-norm block, in the form that a scan over blocks needs."""

    config: VisionConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b p d"],
        full: Bool[Array, ""],
        angles: Float[Array, "b p half"],
        windows: Int[Array, "b p"],
        images: Int[Array, "b p"],
    ) -> tuple[Float[Array, "b p d"], None]:
        """Maps the patches; they see their image where `full`, else their window."""
        c = self.config
        x = constrain(x, "batch")
        normed = RMSNorm(name="attention_norm")(x)
        qkv = Dense(3 * c.width, name="qkv")(normed).reshape(*x.shape[:2], 3, c.heads, c.width // c.heads)
        query, key, value = apply_rope(qkv[:, :, 0], angles), apply_rope(qkv[:, :, 1], angles), qkv[:, :, 2]
        query, key, value = (constrain(part, "batch", None, "heads", None) for part in (query, key, value))
        mixed = attention(query, key, value, Mask(groups=jnp.where(full, images, windows)))
        x = constrain(x + Dense(c.width, name="output")(mixed.reshape(x.shape)), "batch")
        x = x + GatedMLP(c.mlp_width, use_bias=True, name="mlp")(RMSNorm(name="mlp_norm")(x))
        return x, None


class Merger(nn.Module):
    """Joins neighbouring patches into one embedding of the language model's width."""

    config: VisionConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b p d"]) -> Float[Array, "b merged d_out"]:
        """`[B, P, D]` to `[B, P / merge_size^2, D_out]`; patches of a merge group are contiguous."""
        c = self.config
        joined = RMSNorm(name="norm")(x).reshape(x.shape[0], -1, c.merge_size**2 * c.width)
        hidden = nn.gelu(Dense(joined.shape[-1], name="first")(joined), approximate=False)
        return Dense(c.out_width, name="second")(hidden)


class VisionTower(nn.Module):
    """Patches to image embeddings."""

    config: VisionConfig

    @nn.compact
    def __call__(
        self,
        patches: Float[Array, "b p pixels"],
        positions: Int[Array, "b p 2"],
        windows: Int[Array, "b p"],
        images: Int[Array, "b p"],
    ) -> Float[Array, "b merged d_out"]:
        """Encodes the images of each row.

        Args:
          patches: normalised pixels, `C * frames * size^2` a patch, merge groups contiguous.
          positions: row and column of each patch in its image.
          windows: ids of the attention windows, unique within a row; -1 is padding.
          images: ids of the images; -1 is padding.

        Returns:
          `[B, P / merge_size^2, D_out]` in the config's precision; entries of padding are meaningless.
        """
        c = self.config
        x = Dense(c.width, use_bias=False, name="patch_embed")(patches.astype(c.dtype))
        full = np.isin(np.arange(c.depth), c.full_attention_blocks)
        blocks = scan_layers(Block, c.depth, c.remat, (0, nn.broadcast, nn.broadcast, nn.broadcast))(c, name="blocks")
        x, _ = blocks(x, jnp.asarray(full), patch_angles(c, positions), windows, images)
        return Merger(c, name="merger")(x)
