"""The diffusion transformer of Qwen-Image: two token streams with joint attention, channels last (arXiv 2508.02324).

Source: diffusers' QwenImageTransformer2DModel. Conventions that differ from SD3's:

1. Positions are rotary with three axes. Those of an image are centred on 0. Those of a text follow the image's largest
   one on all axes.
2. There is no pooled vector, and the text passes an RMS norm first.
3. The last block updates the text too, which nothing reads: some of its leaves get no gradient.
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from uae_jax.models.latents import shapes_of
from uae_jax.models.qwen_image.config import TransformerConfig
from uae_jax.models.two_streams import JointAttention, Maps, updated
from uae_jax.nn.attention import Mask
from uae_jax.nn.constrain import constrain
from uae_jax.nn.linear import Dense
from uae_jax.nn.loops import scan_layers
from uae_jax.nn.mlp import TanhMLP
from uae_jax.nn.modulation import Modulation, modulated_norm, timestep_embedding
from uae_jax.nn.norms import RMSNorm
from uae_jax.nn.rope import Rotation, axial_rotation

# attention of all blocks, for `nn.lora.init_lora`: attn.{to_q, to_k, to_v, to_out.0, add_q_proj, add_k_proj,
# add_v_proj, to_add_out}
ATTENTION_ADAPTER = r"blocks/attention/(context_)?(query|key|value|output)"
THETA, EPSILON = 10_000.0, 1e-6


def patchify(latents: Float[Array, "b rows columns c"]) -> Float[Array, "b p 4*c"]:
    """Patches of 2 x 2 latents row by row, each flattened as (channel, row, column)."""
    batch, rows, columns, channels = latents.shape
    x = latents.reshape(batch, rows // 2, 2, columns // 2, 2, channels).transpose(0, 1, 3, 5, 2, 4)
    return x.reshape(batch, -1, 4 * channels)


def unpatchify(x: Float[Array, "b p flat"], rows: int, columns: int) -> Float[Array, "b rows columns c"]:
    """The inverse of `patchify`."""
    batch, _, flat = x.shape
    x = x.reshape(batch, rows // 2, columns // 2, flat // 4, 2, 2).transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(batch, rows, columns, flat // 4)


def joint_rotation(config: TransformerConfig, rows: int, columns: int, tokens: int) -> Rotation:
    """Of an image's tokens at (0, y, x) around 0, then of S text tokens at max(rows, columns) // 2 + i on all axes."""
    image = np.zeros((rows, columns, 3))
    image[..., 1] = np.arange(rows)[:, None] - (rows - rows // 2)
    image[..., 2] = np.arange(columns) - (columns - columns // 2)
    text = np.repeat(max(rows, columns) // 2 + np.arange(tokens)[:, None], 3, axis=1)
    return axial_rotation(np.concatenate([image.reshape(-1, 3), text]), config.axes_dims_rope, THETA)


class Block(nn.Module):
    """A block with two streams, in the form that a scan over blocks needs."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self,
        streams: tuple[Float[Array, "b p d"], Float[Array, "b s d"]],
        conditioning: Float[Array, "b d"],
        mask: Mask,
        rotation: Rotation,
    ) -> tuple[tuple[Float[Array, "b p d"], Float[Array, "b s d"]], None]:
        """Updates image and text tokens; `conditioning` is already through SiLU."""
        config = self.config
        x, context = (constrain(stream, "batch") for stream in streams)
        modulations = [
            Modulation(config.width, 6, config.lora_alpha, name=name)(conditioning)
            for name in ("modulation", "context_modulation")
        ]
        maps = Maps(config.num_attention_heads, config.attention_head_dim, config.lora_alpha, True, EPSILON)
        mix = JointAttention(maps, name="attention")
        x, context = updated(
            (("", x), ("context_", context)),
            modulations,
            lambda streams: mix(streams, rotation, mask),
            lambda name: TanhMLP(4 * config.width, config.lora_alpha, name=name),
        )
        return (x, context), None


class Transformer(nn.Module):
    """Velocity of noisy latents given text. All blocks are one stack."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self,
        latents: Float[Array, "b rows columns c"],
        timestep: Float[Array, " b"],
        context: Float[Array, "b s d_context"],
        mask: Bool[Array, "b s"],
    ) -> Float[Array, "b rows columns c"]:
        """Predicts the velocity noise - data, in float32.

        Args:
          latents: in the scale of the diffusion model; both sides are even.
          timestep: 1000 * sigma with sigma in [0, 1].
          context: states of the text encoder.
          mask: which of them are no padding; these come first.
        """
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        alpha, (_, rows, columns, _) = config.lora_alpha, latents.shape
        x = Dense(config.width, lora_alpha=alpha, name="patch_embed")(patchify(latents).astype(dtype))
        text = RMSNorm(EPSILON, name="context_norm")(context.astype(dtype))
        text = Dense(config.width, lora_alpha=alpha, name="context_embedder")(text)
        y = Dense(config.width, lora_alpha=alpha, name="timestep_embedder_1")(
            timestep_embedding(timestep).astype(dtype)
        )
        conditioning = nn.silu(Dense(config.width, lora_alpha=alpha, name="timestep_embedder_2")(nn.silu(y)))
        valid = jnp.concatenate([jnp.ones(x.shape[:2], bool), mask], axis=1)
        rotation = joint_rotation(config, rows // 2, columns // 2, text.shape[1])
        stack = scan_layers(Block, config.num_layers, config.remat)(config, name="blocks")
        (x, _), _ = stack((x, text), conditioning, Mask(valid=valid, right_padded=True), rotation)
        scale, shift = Modulation(config.width, 2, alpha, name="norm_out")(conditioning)
        y = Dense(config.in_channels, lora_alpha=alpha, name="proj_out")(modulated_norm(x, scale, shift))
        return constrain(unpatchify(y.astype(jnp.float32), rows, columns), "batch")


@functools.lru_cache(maxsize=32)  # tracing is most of the time of reading a small model
def abstract_params(config: TransformerConfig) -> dict[str, Any]:
    """The shapes of the parameters, without computing anything."""
    latents, text = (1, 2, 2, config.out_channels), (1, 1, config.joint_attention_dim)
    return shapes_of(Transformer(config), latents, (1,), text, mask=True)
