"""The image encoder of Qwen2.5-VL (arXiv 2502.13923, section 2.1.1): window attention, 2-D rotary positions, merger.

Windows are given as ids, which are the mask: attention does not depend on the order of its keys, so nothing is
reordered.
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array

from uae_jax.models.qwen2_5_vl.config import VisionConfig
from uae_jax.models.qwen2_5_vl.text import GatedMLP
from uae_jax.nn.attention import Mask, attention
from uae_jax.nn.constrain import constrain
from uae_jax.nn.linear import Dense
from uae_jax.nn.norms import RMSNorm
from uae_jax.nn.remat import remat
from uae_jax.nn.rope import apply_rope

ROPE_THETA = 10000.0


def patch_angles(config: VisionConfig, positions: Array) -> Array:
    """Rotation angles `[B, P, K/2]` from positions `[B, P, 2]`: rows turn the first half, columns the second."""
    half = config.width // config.heads // 2
    exponents = np.arange(0, half, 2, dtype=np.float32) / np.float32(half)
    frequencies = (1.0 / np.float32(ROPE_THETA) ** exponents).astype(np.float32)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return angles.reshape(*positions.shape[:-1], half)


class Block(nn.Module):
    """One pre-norm block, in the form that a scan over blocks needs."""

    config: VisionConfig

    @nn.compact
    def __call__(self, x: Array, full: Array, angles: Array, windows: Array, images: Array) -> tuple[Array, None]:
        """Maps `[B, P, D]`; `full` (bool scalar) chooses whether patches see their image or their window (ids `[B,
        P]`).
        """
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
    def __call__(self, x: Array) -> Array:
        """`[B, P, D]` to `[B, P / merge_size^2, D_out]`; patches of a merge group are contiguous."""
        c = self.config
        joined = RMSNorm(name="norm")(x).reshape(x.shape[0], -1, c.merge_size**2 * c.width)
        hidden = nn.gelu(Dense(joined.shape[-1], name="first")(joined), approximate=False)
        return Dense(c.out_width, name="second")(hidden)


class VisionTower(nn.Module):
    """Patches to image embeddings."""

    config: VisionConfig

    @nn.compact
    def __call__(self, patches: Array, positions: Array, windows: Array, images: Array) -> Array:
        """Encodes the images of each row.

        Args:
          patches: `[B, P, C * frames * size^2]`, normalised pixels, merge groups contiguous.
          positions: int `[B, P, 2]`, row and column of each patch in its image.
          windows: int `[B, P]`, attention-window ids, unique within a row; -1 is padding.
          images: int `[B, P]`, image ids; -1 is padding.

        Returns:
          `[B, P / merge_size^2, D_out]` in the config's precision; entries of padding are meaningless.
        """
        c = self.config
        x = Dense(c.width, use_bias=False, name="patch_embed")(patches.astype(c.dtype))
        full = np.isin(np.arange(c.depth), c.full_attention_blocks)
        scanned = nn.scan(
            remat(Block, c.remat),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=c.depth,
        )
        x, _ = scanned(c, name="blocks")(x, jnp.asarray(full), patch_angles(c, positions), windows, images)
        return Merger(c, name="merger")(x)
