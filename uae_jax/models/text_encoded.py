"""What decoders with a text encoder of their own have in common; each adds its conventions in its own folder."""

import dataclasses
import pathlib
from typing import Any, ClassVar

from jaxtyping import Array, Bool, Float, Float32, Int

from uae_jax.diffusion.sampler import linear_guidance
from uae_jax.models.condition import ConditionTemplate, place_in_template
from uae_jax.models.decoder import Context, Parts
from uae_jax.models.language import encoder
from uae_jax.models.language.encoder import EncoderSizes


@dataclasses.dataclass(frozen=True)
class TextEncoded:
    """The half of a `models.decoder.Decoder` that reads captions.

    Attributes:
      transformer: sizes of the diffusion transformer.
      vae: sizes of the auto-encoder.
      encoder: what is read of the text encoder.
      template: ids around a caption.
    """

    conditions: ClassVar[tuple[str, ...]] = ("reference",)
    parts: ClassVar[tuple[str, ...]] = ("text_encoder", "transformer", "vae")

    transformer: Any
    vae: Any
    encoder: EncoderSizes
    template: ConditionTemplate

    @property
    def most_cells(self) -> int:
        """Any number: positions are rotary."""
        return 0

    def prompt(
        self, tokens: Int[Array, "n t"], lengths: Int[Array, " n"]
    ) -> tuple[Int[Array, "n s"], Bool[Array, "n s"]]:
        """See `condition.place_in_template`."""
        return place_in_template(self.template, tokens, lengths)

    def states_shape(self, caption_tokens: int) -> tuple[tuple[int, int], str]:
        """Those of the text encoder."""
        return (self.template.length(caption_tokens), self.encoder.width), self.encoder.text.dtype

    def states(
        self, parts: Parts, ids: Int[Array, "n s"], mask: Bool[Array, "n s"], *, policy: bool = False
    ) -> Float[Array, "n s d"]:
        """Of the text encoder; there is no other that a policy could be."""
        return encoder.encode(self.encoder, parts["text_encoder"], ids, mask)

    def context(self, parts: Parts, states: Float[Array, "n s d"], mask: Bool[Array, "n s"]) -> Context:
        """The states themselves."""
        return states, mask

    def guide(
        self, positive: Float32[Array, "b h w c"], negative: Float32[Array, "b h w c"], scale: float
    ) -> Float32[Array, "b h w c"]:
        """Classifier-free guidance."""
        return linear_guidance(positive, negative, scale)


def check_fit(folder: pathlib.Path, sizes: Any, *widths: tuple[str, int, str]) -> None:
    """Refuses a transformer that fits its own config and not the parts beside it: they are of different models.

    Args:
      folder: of the pipeline.
      sizes: of its transformer.
      *widths: a field of the transformer's config, the value that the other part asks for, and what that is.

    Raises:
      ValueError: two differ; the message has the file and both values.
    """
    for field, value, what in widths:
        if getattr(sizes, field) != value:
            raise ValueError(
                f"{folder / 'transformer' / 'config.json'} has {field} {getattr(sizes, field)}, not {value}, {what}; "
                "take all folders from one model"
            )
