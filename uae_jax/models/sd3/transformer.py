"""The diffusion transformer of SD3 and SD3.5 (arXiv 2403.03206, section 4), channels last."""

import functools
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from uae_jax import trees
from uae_jax.models.latents import shapes_of
from uae_jax.models.sd3.blocks import Block
from uae_jax.models.sd3.config import TransformerConfig
from uae_jax.nn.attention import Mask, preferred_length
from uae_jax.nn.constrain import constrain
from uae_jax.nn.linear import Dense
from uae_jax.nn.loops import scan_layers
from uae_jax.nn.modulation import Modulation, modulated_norm, timestep_embedding
from uae_jax.nn.remat import remat

# The modules that the release adapts, for `nn.lora.init_lora`: attn.{to_q, to_k, to_v, to_out.0, add_q_proj,
# add_k_proj, add_v_proj, to_add_out}, without the second attention of dual blocks.
ATTENTION_ADAPTER = r"(blocks_\d+|last_block)/attention/(context_)?(query|key|value|output)"
# Stored and loaded with the parameters, but a constant: optimizers and weight decay must leave it out.
BUFFERS = r"pos_embed/table"


def position_table(config: TransformerConfig) -> Float[Array, "1 p d"]:
    """The two-dimensional sine-cosine table (arXiv 2010.11929 form; diffusers' `get_2d_sincos_pos_embed`).

    Returns:
      float32 `[1, M * M, D]`, row-major over a square of M = `pos_embed_max_size` patches. The first half of D encodes
      the column, the second the row, in units in which the training grid has `sample_size / patch_size` steps.
    """
    side, width = config.pos_embed_max_size, config.width
    positions = np.arange(side, dtype=np.float32) / np.float32(side / (config.sample_size // config.patch_size))
    frequencies = 1.0 / 10000 ** (np.arange(width // 4, dtype=np.float64) / (width / 4))
    angles = np.outer(positions.astype(np.float64), frequencies)
    line = jnp.asarray(np.concatenate([np.sin(angles), np.cos(angles)], axis=1), jnp.float32)
    columns = jnp.broadcast_to(line[None], (side, side, width // 2))
    rows = jnp.broadcast_to(line[:, None], (side, side, width // 2))
    return jnp.concatenate([columns, rows], axis=-1).reshape(1, side * side, width)


class PositionTable(nn.Module):
    """The stored position table; a buffer, so no gradient reaches it."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, rows: int, columns: int) -> Float[Array, "1 {rows}*{columns} d"]:
        """The centre `rows` x `columns` of the table."""
        side, width = self.config.pos_embed_max_size, self.config.width
        if max(rows, columns) > side:
            raise ValueError(f"{rows}x{columns} patches do not fit the position table; pos_embed_max_size is {side}")
        table = self.param("table", lambda key: position_table(self.config))
        top, left = (side - rows) // 2, (side - columns) // 2
        crop = table.reshape(side, side, width)[top : top + rows, left : left + columns]
        return jax.lax.stop_gradient(crop.reshape(1, rows * columns, width))


class Embedder(nn.Module):
    """Linear map, SiLU, linear map: timestep features or pooled text to the model's width."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b fan_in"]) -> Float[Array, "b d"]:
        """One vector of the model's width for each row."""
        width, alpha = self.config.width, self.config.lora_alpha
        return Dense(width, lora_alpha=alpha, name="linear_2")(
            nn.silu(Dense(width, lora_alpha=alpha, name="linear_1")(x))
        )


class Transformer(nn.Module):
    """Velocity of noisy latents given text (SD3Transformer2DModel).

    Parameters of equal neighbouring blocks are stacked, `blocks_0`, `blocks_1`, ... in the order of
    `TransformerConfig.runs`; the block that ends the context is `last_block`. The leaf `pos_embed/table` is a buffer.
    """

    config: TransformerConfig

    @nn.compact
    def __call__(
        self,
        latents: Float[Array, "b rows columns c"],
        timestep: Float[Array, " b"],
        context: Float[Array, "b s d_context"],
        pooled: Float[Array, "b d_pooled"],
        context_mask: Bool[Array, "b s"] | None = None,
    ) -> Float[Array, "b rows columns c_out"]:
        """Predicts the velocity.

        Args:
          latents: in the scale of the diffusion model; both sides are multiples of the patch size.
          timestep: 1000 * sigma with sigma in [0, 1].
          context: text tokens.
          pooled: pooled text.
          context_mask: False for padding on the right, which no token attends to. None attends to all tokens, as the
            official code does.

        Returns:
          The velocity noise - data, in float32.

        Raises:
          ValueError: the latents do not divide into patches, or have more patches a side than the position table.
        """
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        alpha = config.lora_alpha
        patches = patchify(latents, config.patch_size).astype(dtype)
        rows, columns = (side // config.patch_size for side in latents.shape[1:3])
        x = Dense(config.width, lora_alpha=alpha, name="patch_embed")(patches)
        x = (x + PositionTable(config, name="pos_embed")(rows, columns)).astype(dtype)
        conditioning = Embedder(config, name="timestep_embedder")(timestep_embedding(timestep).astype(dtype))
        conditioning += Embedder(config, name="pooled_embedder")(pooled.astype(dtype))
        conditioning = nn.silu(conditioning)
        context = Dense(config.width, lora_alpha=alpha, name="context_embedder")(context.astype(dtype))
        context, mask = padded_context(context, context_mask, x.shape[1])
        x = self._blocks(x, context, conditioning, mask)
        scale, shift = Modulation(config.width, 2, alpha, name="norm_out")(conditioning)
        y = Dense(config.patch_size**2 * config.out_channels, lora_alpha=alpha, name="proj_out")(
            modulated_norm(x, scale, shift)
        )
        return constrain(unpatchify(y.astype(jnp.float32), rows, columns, config.patch_size), "batch")

    def _blocks(self, x: Array, context: Array, conditioning: Array, mask: Mask) -> Array:
        config = self.config
        streams: Any = (x, context)
        for name, layers, dual in config.runs:
            stack = scan_layers(Block, len(layers), config.remat)(config, dual=dual, name=name)
            streams, _ = stack(streams, conditioning, mask)
        last_dual = config.num_layers - 1 in config.dual_attention_layers
        last = remat(Block, config.remat, in_scan=False)(config, dual=last_dual, last=True, name="last_block")
        (x, _), _ = last(streams, conditioning, mask)
        return x


def padded_context(
    context: Float[Array, "b s d"], context_mask: Bool[Array, "b s"] | None, patches: int
) -> tuple[Float[Array, "b padded d"], Mask]:
    """The context with padding that no block needs to add again, and the mask of the joint sequence.

    Args:
      context: text tokens.
      context_mask: valid tokens first; None for all.
      patches: P image tokens, which come first.

    Returns:
      S' context tokens, where P + S' suits the attention of the devices, and the mask of P + S' keys.
    """
    batch, tokens, _ = context.shape
    room = preferred_length(patches + tokens) - patches - tokens
    if context_mask is None and not room:
        return context, Mask()
    valid = jnp.ones((batch, tokens), bool) if context_mask is None else context_mask
    valid = jnp.pad(jnp.pad(valid, ((0, 0), (patches, 0)), constant_values=True), ((0, 0), (0, room)))
    return jnp.pad(context, ((0, 0), (0, room), (0, 0))), Mask(valid=valid, right_padded=True, always=patches)


def patchify(latents: Float[Array, "b rows columns c"], patch_size: int) -> Float[Array, "b p c*{patch_size}**2"]:
    """Patches row by row, each flattened as (channel, row, column).

    Raises:
      ValueError: a side is not a multiple of the patch size.
    """
    batch, height, width, channels = latents.shape
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"latents of {height}x{width} do not divide into patches; both must be multiples of {patch_size}"
        )
    rows, columns = height // patch_size, width // patch_size
    x = latents.reshape(batch, rows, patch_size, columns, patch_size, channels).transpose(0, 1, 3, 5, 2, 4)
    return x.reshape(batch, rows * columns, channels * patch_size**2)


def unpatchify(
    x: Float[Array, "b p flat"], rows: int, columns: int, patch_size: int
) -> Float[Array, "b {rows}*{patch_size} {columns}*{patch_size} c"]:
    """Latents from `rows` x `columns` patches, each flattened as (row, column, channel)."""
    x = x.reshape(x.shape[0], rows, columns, patch_size, patch_size, -1).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(x.shape[0], rows * patch_size, columns * patch_size, -1)


@functools.lru_cache(maxsize=32)  # tracing is most of the time of reading a small model
def abstract_params(config: TransformerConfig) -> dict[str, Any]:
    """The shapes of the parameters, without computing anything."""
    side, channels = config.patch_size, config.in_channels
    text = (1, 1, config.joint_attention_dim), (1, config.pooled_projection_dim)
    return shapes_of(Transformer(config), (1, side, side, channels), (1,), *text)


def init_params(config: TransformerConfig, key: Key[Array, ""]) -> dict[str, Any]:
    """New parameters to train from nothing (arXiv 2212.09748, section 3.2, adaLN-Zero).

    Modulations and the last linear map start at zero, so that every block is the identity and the velocity is zero;
    the timestep and pooled embedders are normal with standard deviation 0.02; other kernels are Xavier-uniform; biases
    are zero and norm scales one. Each leaf depends only on `key` and its own name.

    Returns:
      The structure of `abstract_params`, float32.
    """

    def start(name: str, leaf: jax.ShapeDtypeStruct) -> Array:
        if name == BUFFERS:
            return position_table(config)
        if name.endswith("/scale"):
            return jnp.ones(leaf.shape, jnp.float32)
        if name.endswith("/bias") or re.search(r"(modulation|norm_out)/linear/|^proj_out/", name):
            return jnp.zeros(leaf.shape, jnp.float32)
        leaf_key = trees.name_key(key, name)
        if re.match(r"(timestep|pooled)_embedder/", name):
            return 0.02 * jax.random.normal(leaf_key, leaf.shape, jnp.float32)
        limit = (6.0 / (leaf.shape[-2] + leaf.shape[-1])) ** 0.5
        return jax.random.uniform(leaf_key, leaf.shape, jnp.float32, -limit, limit)

    return trees.map_with_name(start, abstract_params(config))
