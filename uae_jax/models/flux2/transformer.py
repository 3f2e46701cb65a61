"""The diffusion transformer of FLUX.2-klein: blocks with two streams, then blocks with one, channels last.

Source: diffusers' Flux2Transformer2DModel. Conventions that differ from SD3's:

1. All blocks of a kind share one modulation.
2. Attention and MLP of a block with one stream are parallel, and their maps are fused. No map has a bias.
3. Positions are rotary. Images use the second and third of four axes, texts the last.
4. The padding of texts is attended to.
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from uae_jax.models.flux2.config import TransformerConfig
from uae_jax.models.latents import shapes_of
from uae_jax.models.two_streams import JointAttention, Maps, Parts, updated
from uae_jax.nn.attention import attention
from uae_jax.nn.constrain import constrain
from uae_jax.nn.linear import Dense
from uae_jax.nn.loops import scan_layers
from uae_jax.nn.modulation import Modulation, gated_sum, modulated_norm, timestep_embedding
from uae_jax.nn.rope import Rotation, apply_paired_rope, axial_rotation

# attention of both kinds of blocks, for `nn.lora.init_lora`: attn.{to_q, to_k, to_v, to_out.0, add_q_proj, add_k_proj,
# add_v_proj, to_add_out}, and the fused attn.{to_qkv_mlp_proj, to_out} of blocks with one stream
ATTENTION_ADAPTER = r"blocks/attention/(context_)?(query|key|value|output)|single_blocks/(fused_in|fused_out)"


def joint_rotation(config: TransformerConfig, tokens: int, rows: int, columns: int) -> Rotation:
    """Of S text tokens at (0, 0, 0, i), then of an image's tokens at (0, row, column, 0)."""
    text = np.zeros((tokens, 4))
    text[:, 3] = np.arange(tokens)
    image = np.zeros((rows, columns, 4))
    image[..., 1], image[..., 2] = np.arange(rows)[:, None], np.arange(columns)
    positions = np.concatenate([text, image.reshape(-1, 4)])
    return axial_rotation(positions, config.axes_dims_rope, config.rope_theta)


def _dense(config: TransformerConfig, features: int, name: str) -> Dense:
    return Dense(features, use_bias=False, lora_alpha=config.lora_alpha, name=name)


class Embedder(nn.Module):
    """Linear map, SiLU, linear map: features of the noise level to the model's width."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b features"]) -> Float[Array, "b d"]:
        """One vector of the model's width for each row."""
        width = self.config.width
        return _dense(self.config, width, "linear_2")(nn.silu(_dense(self.config, width, "linear_1")(x)))


class FeedForward(nn.Module):
    """SwiGLU with a fused first map, gate first."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Each token by itself."""
        gate, up = jnp.split(_dense(self.config, 2 * self.config.mlp_width, "gate_up")(x), 2, axis=-1)
        return _dense(self.config, self.config.width, "down")(constrain(nn.silu(gate) * up, "batch", None, "hidden"))


def _maps(config: TransformerConfig) -> Maps:
    return Maps(config.num_attention_heads, config.attention_head_dim, config.lora_alpha, False, config.eps)


def _modulation(config: TransformerConfig, parts: int, name: str) -> Modulation:
    return Modulation(config.width, parts, config.lora_alpha, use_bias=False, name=name)


class Block(nn.Module):
    """A block with two streams, in the form that a scan over blocks needs."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self,
        streams: tuple[Float[Array, "b s d"], Float[Array, "b p d"]],
        context_parts: Parts,
        parts: Parts,
        rotation: Rotation,
    ) -> tuple[tuple[Float[Array, "b s d"], Float[Array, "b p d"]], None]:
        """Updates text and image tokens; `context_parts` and `parts` modulate them."""
        config = self.config
        context, x = (constrain(stream, "batch") for stream in streams)
        mix = JointAttention(_maps(config), name="attention")
        context, x = updated(
            (("context_", context), ("", x)),
            (context_parts, parts),
            lambda streams: mix(streams, rotation),
            lambda name: FeedForward(config, name=name),
            config.eps,
        )
        return (context, x), None


class SingleBlock(nn.Module):
    """A block with one stream: attention and gated MLP side by side, in the form that a scan over blocks needs."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t d"], parts: Parts, rotation: Rotation
    ) -> tuple[Float[Array, "b t d"], None]:
        """Updates all tokens; `parts` modulate them."""
        config = self.config
        width, inner = config.width, config.mlp_width
        shift, scale, gate = parts
        x = constrain(x, "batch")
        fused = _dense(config, 3 * width + 2 * inner, "fused_in")(modulated_norm(x, scale, shift, config.eps))
        *heads, mlp_gate, up = jnp.split(fused, (width, 2 * width, 3 * width, 3 * width + inner), axis=-1)
        shape = (*x.shape[:2], config.num_attention_heads, config.attention_head_dim)
        query, key, value = (part.reshape(shape) for part in heads)
        query, key, value = _maps(config).normed(query, key, value)
        query, key = apply_paired_rope(query, rotation), apply_paired_rope(key, rotation)
        mixed = attention(query, key, value).reshape(x.shape)
        update = jnp.concatenate([mixed, constrain(nn.silu(mlp_gate) * up, "batch", None, "hidden")], axis=-1)
        return gated_sum(x, gate, _dense(config, width, "fused_out")(update)), None


class Transformer(nn.Module):
    """Velocity of noisy latents given text. Blocks of a kind are one stack, `blocks` and `single_blocks`."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self,
        latents: Float[Array, "b rows columns c"],
        timestep: Float[Array, " b"],
        context: Float[Array, "b s d_context"],
    ) -> Float[Array, "b rows columns c"]:
        """Predicts the velocity noise - data, in float32.

        Args:
          latents: in the scale of the diffusion model.
          timestep: 1000 * sigma with sigma in [0, 1].
          context: states of the text encoder, padding included: all of it is attended to.
        """
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        batch, rows, columns, channels = latents.shape
        conditioning = Embedder(config, name="timestep_embedder")(timestep_embedding(timestep).astype(dtype))
        conditioning = nn.silu(conditioning)
        parts = _modulation(config, 6, name="modulation")(conditioning)
        context_parts = _modulation(config, 6, name="context_modulation")(conditioning)
        single_parts = _modulation(config, 3, name="single_modulation")(conditioning)
        x = _dense(config, config.width, "patch_embed")(latents.reshape(batch, rows * columns, channels).astype(dtype))
        text = _dense(config, config.width, "context_embedder")(context.astype(dtype))
        rotation, tokens = joint_rotation(config, text.shape[1], rows, columns), text.shape[1]
        if config.num_layers:
            stack = scan_layers(Block, config.num_layers, config.remat)(config, name="blocks")
            (text, x), _ = stack((text, x), context_parts, parts, rotation)
        x = jnp.concatenate([text, x], axis=1)
        if config.num_single_layers:
            stack = scan_layers(SingleBlock, config.num_single_layers, config.remat)(config, name="single_blocks")
            x, _ = stack(x, single_parts, rotation)
        scale, shift = _modulation(config, 2, name="norm_out")(conditioning)
        y = _dense(config, channels, "proj_out")(modulated_norm(x[:, tokens:], scale, shift, config.eps))
        return constrain(y.astype(jnp.float32).reshape(latents.shape), "batch")


@functools.lru_cache(maxsize=32)  # tracing is most of the time of reading a small model
def abstract_params(config: TransformerConfig) -> dict[str, Any]:
    """The shapes of the parameters, without computing anything."""
    return shapes_of(Transformer(config), (1, 1, 1, config.in_channels), (1,), (1, 1, config.joint_attention_dim))
