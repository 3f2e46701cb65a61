"""The diffusion transformer of Z-Image: one stream of image and text tokens, channels last (arXiv 2511.22699).

Source: diffusers' ZImageTransformer2DModel. Conventions that differ from SD3's:

1. The time is 1 - sigma, and the prediction is data - noise; `decoder` turns both.
2. Texts are padded to a multiple of 32 with a learned token that is attended to and has a position. So are images.
3. An image's first position is one more than the length of the padded text of its row.
4. Norms stand before and behind attention and MLP; modulation is a scale and a tanh gate, without a shift.
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from uae_jax.models.latents import shapes_of
from uae_jax.models.two_streams import Maps
from uae_jax.models.z_image.config import CONDITIONING, TransformerConfig
from uae_jax.nn.attention import Mask, attention
from uae_jax.nn.constrain import constrain
from uae_jax.nn.linear import Dense
from uae_jax.nn.loops import scan_layers
from uae_jax.nn.mlp import GatedMLP
from uae_jax.nn.modulation import timestep_embedding
from uae_jax.nn.norms import LayerNorm, RMSNorm
from uae_jax.nn.rope import Rotation, apply_paired_rope, axial_rotation

# attention of all blocks, for `nn.lora.init_lora`: attention.{to_q, to_k, to_v, to_out.0}
ATTENTION_ADAPTER = r"(layers|noise_refiner|context_refiner)/attention/(query|key|value|output)"
MULTIPLE = 32  # of the tokens of texts and images
QK_EPSILON, FINAL_EPSILON = 1e-5, 1e-6
TIME_WIDTH = 1024  # inner width of the embedding of the noise level


def padded(count: int | Int[Array, " b"]) -> Any:
    """The next multiple of 32."""
    return count + -count % MULTIPLE


def patchify(latents: Float[Array, "b rows columns c"]) -> Float[Array, "b p 4*c"]:
    """Patches of 2 x 2 latents row by row, each flattened as (row, column, channel)."""
    batch, rows, columns, channels = latents.shape
    x = latents.reshape(batch, rows // 2, 2, columns // 2, 2, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, -1, 4 * channels)


def unpatchify(x: Float[Array, "b p flat"], rows: int, columns: int) -> Float[Array, "b rows columns c"]:
    """The inverse of `patchify`."""
    batch, _, flat = x.shape
    x = x.reshape(batch, rows // 2, columns // 2, 2, 2, flat // 4).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, rows, columns, flat // 4)


def text_rotation(config: TransformerConfig, tokens: int) -> Rotation:
    """Of text tokens at (1 + i, 0, 0)."""
    positions = np.zeros((tokens, 3))
    positions[:, 0] = 1 + np.arange(tokens)
    return axial_rotation(positions, config.axes_dims, config.rope_theta)


def image_rotation(config: TransformerConfig, rows: int, columns: int, start: Int[Array, " b"]) -> Rotation:
    """Of an image's tokens at (start, row, column), and of those that pad it at (0, 0, 0).

    Args:
      config: sizes.
      rows, columns: of patches.
      start: of each row of the batch, at most the positions of the first axis.
    """
    grid = np.zeros((rows, columns, 3))
    grid[..., 1], grid[..., 2] = np.arange(rows)[:, None], np.arange(columns)
    tokens = rows * columns
    static = axial_rotation(
        np.pad(grid.reshape(-1, 3), ((0, padded(tokens) - tokens), (0, 0))), config.axes_dims, config.rope_theta
    )
    line = np.zeros((config.axes_lens[0], 3))
    line[:, 0] = np.arange(config.axes_lens[0])
    table = axial_rotation(line, config.axes_dims, config.rope_theta)
    of_start = (jnp.arange(padded(tokens)) < tokens)[:, None] & (
        jnp.arange(sum(config.axes_dims)) < config.axes_dims[0]
    )

    def placed(fixed: Array, moving: Array) -> Array:
        return jnp.where(of_start, moving[start][:, None], fixed)

    return Rotation(placed(static.cosine, table.cosine), placed(static.sine, table.sine))


class Attention(nn.Module):
    """Attention over all tokens that count."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"], mask: Mask, rotation: Rotation) -> Float[Array, "b t d"]:
        """The mixed tokens."""
        config = self.config
        maps = Maps(config.n_heads, config.dim // config.n_heads, config.lora_alpha, False, QK_EPSILON)
        query, key, value = maps.split(x)
        query, key = apply_paired_rope(query, rotation), apply_paired_rope(key, rotation)
        return maps.dense("output")(attention(query, key, value, mask).reshape(x.shape))


class Block(nn.Module):
    """A block, in the form that a scan over blocks needs.

    Attributes:
      config: sizes.
    """

    config: TransformerConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t d"], mask: Mask, rotation: Rotation, conditioning: Float[Array, "b k"] | None
    ) -> tuple[Float[Array, "b t d"], None]:
        """Updates all tokens; the noise level scales and gates them, but for texts alone."""
        config = self.config
        x = constrain(x, "batch")
        if conditioning is not None:
            made = Dense(4 * config.dim, lora_alpha=config.lora_alpha, name="modulation")(conditioning)
            scale, gate, mlp_scale, mlp_gate = jnp.split(made[:, None].astype(jnp.float32), 4, axis=-1)
        else:
            scale, gate, mlp_scale, mlp_gate = (None,) * 4

        def scaled(name: str, scale: Array | None) -> Array:
            y = RMSNorm(config.norm_eps, name=name)(x)
            return y if scale is None else (y.astype(jnp.float32) * (1 + scale)).astype(x.dtype)

        def added(name: str, update: Array, gate: Array | None) -> Array:
            y = RMSNorm(config.norm_eps, name=name)(update)
            if gate is None:
                return constrain(x + y, "batch")
            return constrain((x.astype(jnp.float32) + jnp.tanh(gate) * y.astype(jnp.float32)).astype(x.dtype), "batch")

        update = Attention(config, name="attention")(scaled("attention_norm", scale), mask, rotation)
        x = added("attention_output_norm", update, gate)
        mlp = GatedMLP(config.mlp_width, lora_alpha=config.lora_alpha, name="mlp")
        return added("mlp_output_norm", mlp(scaled("mlp_norm", mlp_scale)), mlp_gate), None


class Transformer(nn.Module):
    """What Z-Image predicts, data - noise. Blocks of a kind are one stack."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self,
        latents: Float[Array, "b rows columns c"],
        timestep: Float[Array, " b"],
        context: Float[Array, "b s d_context"],
        mask: Bool[Array, "b s"],
    ) -> Float[Array, "b rows columns c"]:
        """Predicts data - noise, in float32.

        Args:
          latents: in the scale of the diffusion model; both sides are even.
          timestep: 1000 * (1 - sigma).
          context: states of the text encoder.
          mask: which of them are no padding; these come first.

        Raises:
          ValueError: an odd side of the latents, or more positions than the model has.
        """
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        _, rows, columns, _ = latents.shape
        _check_positions(config, rows, columns, context.shape[1])
        conditioning = self._time(timestep).astype(dtype)
        text, text_mask, lengths = self._text(context.astype(dtype), mask)
        patches = patchify(latents).astype(dtype)
        count = patches.shape[1]
        x = Dense(config.dim, lora_alpha=config.lora_alpha, name="patch_embed")(patches)
        x = self._with_pads("image_pad", x, jnp.arange(padded(count)) < count)
        rotation = image_rotation(config, rows // 2, columns // 2, lengths + 1)
        x = self._stack("noise_refiner", config.n_refiner_layers)(x, Mask(), rotation, conditioning)
        positions = text_rotation(config, text.shape[1])
        text = self._stack("context_refiner", config.n_refiner_layers)(
            text, Mask(valid=text_mask, right_padded=True), positions, None
        )
        ones = jnp.ones(x.shape[:2], bool)
        both = Mask(valid=jnp.concatenate([ones, text_mask], axis=1), right_padded=True)
        rotation = Rotation(*(_joined(first, second) for first, second in zip(rotation, positions)))
        x = self._stack("layers", config.n_layers)(jnp.concatenate([x, text], axis=1), both, rotation, conditioning)
        return unpatchify(self._final(x[:, :count], conditioning), rows, columns)

    def _time(self, timestep: Array) -> Array:
        config = self.config
        width = min(config.dim, CONDITIONING)
        y = timestep_embedding(timestep).astype(config.dtype)
        y = nn.silu(Dense(TIME_WIDTH, lora_alpha=config.lora_alpha, name="timestep_embedder_1")(y))
        return Dense(width, lora_alpha=config.lora_alpha, name="timestep_embedder_2")(y)

    def _text(self, context: Array, mask: Array) -> tuple[Array, Array, Array]:
        """Text tokens with learned padding, which of them count, and the padded length of each row."""
        config = self.config
        lengths = jnp.sum(mask, axis=1, dtype=jnp.int32)
        text = RMSNorm(config.norm_eps, name="context_norm")(context)
        text = Dense(config.dim, lora_alpha=config.lora_alpha, name="context_embedder")(text)
        index = jnp.arange(padded(text.shape[1]))
        text = self._with_pads("context_pad", text, index < lengths[:, None])
        return text, index < padded(lengths)[:, None], padded(lengths)

    def _with_pads(self, name: str, x: Array, kept: Array) -> Array:
        """The tokens, padded to a multiple of 32, with a learned token in place of those that are not kept."""
        token = self.param(name, nn.initializers.zeros, (1, self.config.dim), jnp.float32).astype(x.dtype)
        x = jnp.pad(x, ((0, 0), (0, padded(x.shape[1]) - x.shape[1]), (0, 0)))
        return jnp.where(kept[..., None], x, token)

    def _stack(self, name: str, layers: int) -> Any:
        """Blocks that map tokens to tokens."""
        stack = scan_layers(Block, layers, self.config.remat)(self.config, name=name)
        return lambda *inputs: stack(*inputs)[0]

    def _final(self, x: Array, conditioning: Array) -> Array:
        config = self.config
        scale = Dense(config.dim, lora_alpha=config.lora_alpha, name="norm_out")(nn.silu(conditioning))
        y = LayerNorm(FINAL_EPSILON, affine=False)(x.astype(jnp.float32)) * (1 + scale[:, None].astype(jnp.float32))
        y = Dense(config.patch_channels, lora_alpha=config.lora_alpha, name="proj_out")(y.astype(x.dtype))
        return constrain(y.astype(jnp.float32), "batch")


def _joined(image: Array, text: Array) -> Array:
    """Angles `[B, P, K]` of images and `[S, K]` of texts, one behind the other."""
    return jnp.concatenate([image, jnp.broadcast_to(text, (len(image), *text.shape))], axis=1)


def _check_positions(config: TransformerConfig, rows: int, columns: int, tokens: int) -> None:
    if rows % 2 or columns % 2:
        raise ValueError(f"latents of {rows}x{columns} do not divide into patches of 2x2")
    needed = (padded(tokens) + 2, rows // 2, columns // 2)
    if any(size > most for size, most in zip(needed, config.axes_lens)):
        raise ValueError(f"text and image need {needed} positions; axes_lens of the transformer are {config.axes_lens}")


@functools.lru_cache(maxsize=32)  # tracing is most of the time of reading a small model
def abstract_params(config: TransformerConfig) -> dict[str, Any]:
    """The shapes of the parameters, without computing anything."""
    latents, text = (1, 2, 2, config.in_channels), (1, 1, config.cap_feat_dim)
    return shapes_of(Transformer(config), latents, (1,), text, mask=True)
