"""The half of a decoder that draws: what transformers and auto-encoders have in common, whatever reads the captions.

A kind of decoder names the files of its folder, which have one form, and adds what differs.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from uae_jax.diffusion.sampler import linear_guidance
from uae_jax.hf.rules import Rule
from uae_jax.models.condition import ConditionTemplate, place_in_template
from uae_jax.models.decoder import Context, Parts
from uae_jax.models.parts import transformer_weights

NUM_TRAIN_TIMESTEPS = 1000


class Network(Protocol):
    """The file of a transformer: its module, its shapes, and the modules that a new adapter changes."""

    @property
    def Transformer(self) -> Callable[..., Any]: ...
    @property
    def ATTENTION_ADAPTER(self) -> str: ...
    def abstract_params(self, config: Any) -> dict[str, Any]: ...


class Coder(Protocol):
    """The file of an auto-encoder."""

    def encode(self, config: Any, params: Any, pixels: Array) -> tuple[Array, Array]: ...
    def to_model_latents(self, config: Any, params: Any, latents: Array) -> Array: ...
    def decode_latents(self, config: Any, params: Any, model_latents: Array, chunk: int | None = None) -> Array: ...
    def abstract_params(self, config: Any) -> dict[str, Any]: ...


class Tables(Protocol):
    """The file that says which published tensor is which parameter."""

    def transformer_rules(self, config: Any) -> list[Rule]: ...


@dataclasses.dataclass(frozen=True)
class LatentDecoder:
    """The half of a `models.decoder.Decoder` that knows latents and images.

    Attributes:
      network, coder, tables: files of the kind of decoder.
      transformer: sizes of the diffusion transformer.
      vae: sizes of the auto-encoder.
      template: ids around a caption.
    """

    network: ClassVar[Network]
    coder: ClassVar[Coder]
    tables: ClassVar[Tables]

    transformer: Any
    vae: Any
    template: ConditionTemplate

    @property
    def lora_targets(self) -> str:
        """Attention of all blocks."""
        return self.network.ATTENTION_ADAPTER

    @property
    def cell(self) -> int:
        """Pixels a side of one token: a patch of the latents."""
        return self.vae.downsampling * self.transformer.patch_size

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(h, w, C) of the auto-encoder."""
        return height // self.vae.downsampling, width // self.vae.downsampling, self.vae.channels

    def prompt(
        self, tokens: Int[Array, "n t"], lengths: Int[Array, " n"]
    ) -> tuple[Int[Array, "n s"], Bool[Array, "n s"]]:
        """See `condition.place_in_template`."""
        return place_in_template(self.template, tokens, lengths)

    def velocity(
        self,
        parts: Parts,
        latents: Float[Array, "b h w c"],
        sigma: Float[Array, " b"],
        context: Context,
        *,
        policy: bool = True,
    ) -> Float32[Array, "b h w c"]:
        """Noise minus data; see `predicted`."""
        variables = transformer_weights(parts, policy=policy)
        model = functools.partial(self.network.Transformer(self.transformer).apply, variables)
        return self.predicted(model, parts, latents, sigma.astype(jnp.float32), context)

    def predicted(
        self, model: Callable[..., Array], parts: Parts, latents: Array, sigma: Array, context: Context
    ) -> Array:
        """The velocity of a transformer that reads `1000 * sigma`, and states with their mask; kinds change it."""
        return model(latents, NUM_TRAIN_TIMESTEPS * sigma, *context)

    def guide(
        self, positive: Float32[Array, "b h w c"], negative: Float32[Array, "b h w c"], scale: float
    ) -> Float32[Array, "b h w c"]:
        """Classifier-free guidance."""
        return linear_guidance(positive, negative, scale)

    def encode_images(
        self, parts: Parts, pixels: Float[Array, "b height width 3"]
    ) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]]:
        """Mean and log-variance of the auto-encoder."""
        return self.coder.encode(self.vae, parts["vae"], pixels)

    def to_model_latents(self, parts: Parts, latents: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """By the statistics of the auto-encoder."""
        return self.coder.to_model_latents(self.vae, parts["vae"], latents)

    def decode(
        self, parts: Parts, latents: Float[Array, "b h w c"], chunk: int | None = None
    ) -> Float[Array, "b height width 3"]:
        """See the auto-encoder's `decode_latents`."""
        return self.coder.decode_latents(self.vae, parts["vae"], latents, chunk)

    def abstract_parts(self) -> dict[str, Any]:
        """Shapes of transformer and auto-encoder."""
        return {
            "transformer": self.network.abstract_params(self.transformer),
            "vae": self.coder.abstract_params(self.vae),
        }

    def transformer_rules(self) -> list[Rule]:
        """Of the published transformer."""
        return self.tables.transformer_rules(self.transformer)


def shapes_of(model: nn.Module, *shapes: tuple[int, ...], mask: bool = False) -> dict[str, Any]:
    """Shapes of a transformer's parameters, without computing anything.

    Args:
      model: the transformer.
      *shapes: of its float32 inputs, of batch 1.
      mask: whether the mask of one token follows them.
    """
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    inputs += [jax.ShapeDtypeStruct((1, 1), jnp.bool_)] if mask else []
    return jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]


def check_fit(file: Any, sizes: Any, widths: Mapping[str, tuple[int, str]]) -> None:
    """Refuses a transformer that fits its own config and not the parts beside it: they are of different models.

    Args:
      file: the transformer's config.
      sizes: of the transformer.
      widths: for fields of the config, the value that another part asks for, and what that is.

    Raises:
      ValueError: two differ; the message has the file and both values.
    """
    for field, (value, what) in widths.items():
        if getattr(sizes, field) != value:
            raise ValueError(
                f"{file} has {field} {getattr(sizes, field)}, not {value}, {what}; take all folders from one model"
            )
