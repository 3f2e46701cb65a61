"""What decoders with a text encoder of their own have in common; each adds its conventions in its own folder."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any, ClassVar

from jaxtyping import Array, Bool, Float, Int

from uae_jax.hf.inventory import Table
from uae_jax.models.decoder import Component, Context, Parts
from uae_jax.models.language import encoder
from uae_jax.models.language.encoder import EncoderSizes
from uae_jax.models.latents import LatentDecoder
from uae_jax.models.parts import frozen_weights


@dataclasses.dataclass(frozen=True)
class TextEncoded(LatentDecoder):
    """The half of a `models.decoder.Decoder` that reads captions.

    Attributes:
      encoder: what is read of the text encoder.
    """

    conditions: ClassVar[tuple[str, ...]] = ("reference",)
    parts: ClassVar[tuple[str, ...]] = ("text_encoder", "transformer", "vae")

    encoder: EncoderSizes

    @property
    def most_cells(self) -> int:
        """Any number: positions are rotary."""
        return 0

    def states_shape(self, caption_tokens: int) -> tuple[tuple[int, int], str]:
        """Those of the text encoder."""
        return (self.template.length(caption_tokens), self.encoder.width), self.encoder.text.dtype

    def states(
        self, parts: Parts, ids: Int[Array, "n s"], mask: Bool[Array, "n s"], *, policy: bool = False
    ) -> Float[Array, "n s d"]:
        """Of the text encoder; there is no other that a policy could be."""
        return encoder.encode(self.encoder, frozen_weights(parts, "text_encoder"), ids, mask)

    def context(self, parts: Parts, states: Float[Array, "n s d"], mask: Bool[Array, "n s"]) -> Context:
        """The states themselves."""
        return states, mask

    def abstract_parts(self) -> dict[str, Any]:
        """Shapes of text encoder, transformer and auto-encoder."""
        return {"text_encoder": encoder.abstract_params(self.encoder), **super().abstract_parts()}


def transformer_part(decoder: type[LatentDecoder], config: Callable[[pathlib.Path], Any], module: str) -> Component:
    """The folder `transformer` of a kind of decoder; `module` is its file in `diffusers.models.transformers`."""

    def table(sizes: Any) -> Table:
        return Table(decoder.tables.transformer_rules(sizes), decoder.network.abstract_params(sizes))

    return Component("transformer", config, table, module=f"diffusers.models.transformers.{module}")
