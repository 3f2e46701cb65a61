"""DINOv2 (arXiv 2304.07193) and DINOv3 (arXiv 2508.10104) vision transformers, as in transformers."""

import functools
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from uae_jax import trees
from uae_jax.models.encoders.blocks import SelfAttention, activation, image_patches
from uae_jax.models.encoders.config import Dinov2Config, Dinov3Config
from uae_jax.models.encoders.preprocess import TORCH_CUBIC, resize_matrix
from uae_jax.nn.linear import Dense
from uae_jax.nn.loops import scan_layers
from uae_jax.nn.norms import LayerNorm

AnyDinoConfig = Dinov2Config | Dinov3Config


class Block(nn.Module):
    """Pre-norm attention and feed-forward; each branch has a learned scale per channel (arXiv 2103.17239, eq. 4)."""

    config: AnyDinoConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t d"], angles: Float[Array, "t half"] | None
    ) -> tuple[Float[Array, "b t d"], None]:
        """The tokens, and None (what a scan collects); `angles` are rotary positions, K / 2 a head, or None."""
        config = self.config
        if isinstance(config, Dinov3Config):
            biases = (config.query_bias, config.key_bias, config.value_bias, config.proj_bias)
        else:
            biases = (config.qkv_bias, config.qkv_bias, config.qkv_bias, True)
        y = LayerNorm(config.layer_norm_eps, name="norm1")(x)
        y = SelfAttention(config.num_attention_heads, biases, name="attention")(y, angles=angles)
        x = x + y * self._scale("scale1").astype(x.dtype)
        y = LayerNorm(config.layer_norm_eps, name="norm2")(x)
        y = self._dinov3_mlp(config, y) if isinstance(config, Dinov3Config) else self._dinov2_mlp(config, y)
        return x + y * self._scale("scale2").astype(x.dtype), None

    def _scale(self, name: str) -> Array:
        value = nn.initializers.constant(self.config.layerscale_value)
        return self.param(name, value, (self.config.hidden_size,), jnp.float32)

    def _dinov2_mlp(self, config: Dinov2Config, x: Array) -> Array:
        if not config.use_swiglu_ffn:
            x = activation(config.hidden_act)(Dense(config.mlp_width, name="fc1")(x))
            return Dense(config.hidden_size, name="fc2")(x)
        gate, up = jnp.split(Dense(2 * config.mlp_width, name="weights_in")(x), 2, axis=-1)
        return Dense(config.hidden_size, name="weights_out")(jax.nn.silu(gate) * up)

    def _dinov3_mlp(self, config: Dinov3Config, x: Array) -> Array:
        act = activation(config.hidden_act)
        up = Dense(config.intermediate_size, config.mlp_bias, name="up")(x)
        if config.use_gated_mlp:
            inner = act(Dense(config.intermediate_size, config.mlp_bias, name="gate")(x)) * up
        else:
            inner = act(up)
        return Dense(config.hidden_size, config.mlp_bias, name="down")(inner)


class Dinov2(nn.Module):
    """DINOv2 with its learned position table, resized to the image."""

    config: Dinov2Config
    remat: bool = False

    @nn.compact
    def __call__(self, pixels: Float[Array, "b height width c"]) -> Float[Array, "b t d"]:
        """All tokens of normalised images, after the final norm."""
        config, width, normal = self.config, self.config.hidden_size, nn.initializers.normal(0.02)
        rows, columns = pixels.shape[1] // config.patch_size, pixels.shape[2] // config.patch_size
        patches = Dense(width, name="patch_embedding")(image_patches(pixels, config.patch_size))
        first = self.param("cls_token", normal, (1, 1, width), jnp.float32)
        if config.use_mask_token:  # only for pre-training, but part of the published folder
            self.param("mask_token", nn.initializers.zeros, (1, width), jnp.float32)
        table = self.param("position_embedding", normal, (1, config.grid**2 + 1, width), jnp.float32)
        first = jnp.broadcast_to(first.astype(patches.dtype), (len(patches), 1, width))
        x = jnp.concatenate([first, patches], axis=1)
        x = x + resize_positions(table, config.grid, rows, columns).astype(x.dtype)
        x, _ = scan_layers(Block, config.num_hidden_layers, "full" if self.remat else "none")(config, name="layers")(
            x, None
        )
        return LayerNorm(config.layer_norm_eps, name="norm")(x)


def resize_positions(
    table: Float[Array, "1 1+{grid}**2 d"], grid: int, rows: int, columns: int
) -> Float[Array, "1 1+{rows}*{columns} d"]:
    """A position table for another number of patches: torch's bicubic without antialiasing.

    Args:
      table: the position of the class token first.
      grid: side of the table's square.
      rows: patches down.
      columns: patches across.
    """
    if (rows, columns) == (grid, grid):
        return table
    down, across = (resize_matrix(grid, n, "bicubic", antialias=False, a=TORCH_CUBIC) for n in (rows, columns))
    square = table[:, 1:].reshape(1, grid, grid, -1)
    square = jnp.einsum("bhwd,uh,vw->buvd", square, down, across, precision="highest")
    return jnp.concatenate([table[:, :1], square.reshape(1, rows * columns, -1)], axis=1)


class Dinov3(nn.Module):
    """DINOv3 with register tokens and rotary positions on the patches (arXiv 2508.10104, section 3.2)."""

    config: Dinov3Config
    remat: bool = False

    @nn.compact
    def __call__(self, pixels: Float[Array, "b height width c"]) -> Float[Array, "b t d"]:
        """All tokens of normalised images, after the final norm."""
        config, width, normal = self.config, self.config.hidden_size, nn.initializers.normal(0.02)
        rows, columns = pixels.shape[1] // config.patch_size, pixels.shape[2] // config.patch_size
        patches = Dense(width, name="patch_embedding")(image_patches(pixels, config.patch_size))
        first = self.param("cls_token", normal, (1, 1, width), jnp.float32)
        registers = self.param("register_tokens", normal, (1, config.num_register_tokens, width), jnp.float32)
        self.param("mask_token", nn.initializers.zeros, (1, 1, width), jnp.float32)  # part of the published folder
        prefix = jnp.concatenate([first, registers], axis=1).astype(patches.dtype)
        x = jnp.concatenate([jnp.broadcast_to(prefix, (len(patches), *prefix.shape[1:])), patches], axis=1)
        angles = rotary_angles(config, rows, columns)
        x, _ = scan_layers(Block, config.num_hidden_layers, "full" if self.remat else "none")(config, name="layers")(
            x, angles
        )
        return LayerNorm(config.layer_norm_eps, name="norm")(x)


def rotary_angles(config: Dinov3Config, rows: int, columns: int) -> Float[Array, "t half"]:
    """Rotary angles of patch centres in [-1, 1]; zero for the class and register tokens.

    Args:
      config: gives head width, period base and number of registers.
      rows: patches down.
      columns: patches across.

    Returns:
      float32 angles in radians of 1 + registers + rows * columns tokens: K / 4 for the row, then K / 4 for the column.
    """
    head_width = config.hidden_size // config.num_attention_heads
    frequencies = config.rope_theta ** -np.arange(0, 1, 4 / head_width, dtype=np.float32)
    down, across = (2 * (np.arange(n, dtype=np.float32) + 0.5) / n - 1 for n in (rows, columns))
    centres = np.stack(np.meshgrid(down, across, indexing="ij"), axis=-1).reshape(-1, 2)
    angles = (2 * np.pi * centres[:, :, None] * frequencies).reshape(len(centres), -1)
    prefix = np.zeros((1 + config.num_register_tokens, angles.shape[1]))
    return jnp.asarray(np.concatenate([prefix, angles]), jnp.float32)


def _module(config: AnyDinoConfig, remat: bool = False) -> nn.Module:
    return Dinov3(config, remat) if isinstance(config, Dinov3Config) else Dinov2(config, remat)


def token_features(
    config: AnyDinoConfig, params: trees.Tree, pixels: Float[Array, "b height width c"], *, remat: bool = False
) -> Float[Array, "b t d"]:
    """The last hidden state, not normalised, in the precision of `pixels`.

    Args:
      config, params, pixels, remat: see `cls_features`.

    Returns:
      The class token, DINOv3's register tokens, the patches in reading order.
    """
    return cast(Array, _module(config, remat).apply({"params": params}, pixels))


def cls_features(
    config: AnyDinoConfig, params: trees.Tree, pixels: Float[Array, "b height width c"], *, remat: bool = False
) -> Float[Array, "b d"]:
    """The class token of the last hidden state, not normalised, in the precision of `pixels`.

    Args:
      config: of DINOv2 or DINOv3.
      params: the model's parameters.
      pixels: already preprocessed; what is left over behind the last complete patch is dropped.
      remat: recompute layers in the backward pass.
    """
    return token_features(config, params, pixels, remat=remat)[:, 0]


def init_params(config: AnyDinoConfig, key: Key[Array, ""]) -> dict[str, Any]:
    """New random parameters, float32."""
    blank = jnp.zeros((1, config.patch_size, config.patch_size, config.num_channels))
    return dict(_module(config).init(key, blank)["params"])


@functools.lru_cache(maxsize=32)  # tracing is most of the time of reading a small model
def abstract_params(config: AnyDinoConfig) -> dict[str, Any]:
    """The shapes of `init_params`, without allocating anything."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
