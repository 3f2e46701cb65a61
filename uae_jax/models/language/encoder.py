"""A language model as the text encoder of a decoder: the states of some of its layers, side by side.

Layers behind the last one that is read are neither loaded nor computed. Shape letters: n texts, s tokens, d width.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from uae_jax.hf.inventory import Table
from uae_jax.hf.rules import Rule
from uae_jax.models.language.config import TextConfig
from uae_jax.models.language.text import Embedding, LanguageModel, Layer, mrope_angles
from uae_jax.models.language.weights import HEAD, language_rules, layer_rules
from uae_jax.nn.attention import Mask, preferred_length
from uae_jax.nn.loops import scan_layers
from uae_jax.nn.norms import RMSNorm


@dataclasses.dataclass(frozen=True)
class EncoderSizes:
    """What is read of a language model.

    Attributes:
      text: sizes of the whole model.
      taken: after so many layers each, ascending, the states are taken (`hidden_states[k]` of transformers).
      final_norm: whether the states after the last of them pass the model's final norm.
    """

    text: TextConfig
    taken: tuple[int, ...]
    final_norm: bool = False

    @property
    def width(self) -> int:
        """Numbers of a token's states."""
        return self.text.width * len(self.taken)

    @property
    def sections(self) -> tuple[tuple[int, ...], ...]:
        """Numbers of the layers before each of the states, without those before the one before."""
        return tuple(tuple(range(start, end)) for start, end in zip((0, *self.taken), self.taken))


class TextEncoder(nn.Module):
    """The layers of each section are one stack, `layers_0`, `layers_1`, ..."""

    sizes: EncoderSizes

    @nn.compact
    def __call__(self, ids: Int[Array, "n s"], mask: Bool[Array, "n s"]) -> Float[Array, "n s states"]:
        """States of right-padded texts, those of the padding too: they see the text before them.

        Args:
          ids: of the texts.
          mask: which of them are no padding; no token attends to padding.
        """
        config = self.sizes.text
        x = Embedding(config.vocab_size, config.width, name="embedding")(ids).astype(config.dtype)
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1])[None, :, None], (1, ids.shape[1], 3))
        angles, own = mrope_angles(config, positions), Mask(valid=mask, causal=True, right_padded=True)
        found, in_axes = [], (0, nn.broadcast, nn.broadcast, nn.broadcast)
        for number, layers in enumerate(self.sizes.sections):
            stack = scan_layers(Layer, len(layers), config.remat, in_axes)(config, False, name=f"layers_{number}")
            x, _ = stack(x, (), angles, own, ())
            found.append(x)
        if self.sizes.final_norm:
            found[-1] = RMSNorm(config.norm_epsilon, name="final_norm")(x)
        return jnp.concatenate(found, -1)


def encode(
    sizes: EncoderSizes, variables: Mapping[str, Any], ids: Int[Array, "n s"], mask: Bool[Array, "n s"]
) -> Float[Array, "n s states"]:
    """The states of right-padded texts; see `TextEncoder`, whose Flax variables are given."""
    length = ids.shape[1]
    room = ((0, 0), (0, preferred_length(length) - length))
    # the additional padding is behind all that is returned
    ids, mask = jnp.pad(ids, room), jnp.pad(mask, room)
    with jax.named_scope("text_encoder"):
        return cast(Array, TextEncoder(sizes).apply(variables, ids, mask))[:, :length]


@functools.lru_cache(maxsize=32)  # tracing is most of the time of reading a small model
def abstract_params(sizes: EncoderSizes) -> dict[str, Any]:
    """Shapes of the parameters, without computing anything."""
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, 2), jnp.bool_)
    return jax.eval_shape(TextEncoder(sizes).init, jax.random.key(0), ids, mask)["params"]


def rules(sizes: EncoderSizes, prefix: str = "model.") -> list[Rule]:
    """The table of what is read of the published tensors.

    Args:
      sizes: of the encoder.
      prefix: what stands before `layers.N`.
    """
    table = [Rule("embedding/table", f"{prefix}embed_tokens.weight")]
    for number, layers in enumerate(sizes.sections):
        table += layer_rules(sizes.text, f"layers_{number}", f"{prefix}layers.{{}}", layers)
    return table + ([Rule("final_norm/scale", f"{prefix}norm.weight")] if sizes.final_norm else [])


def unread(sizes: EncoderSizes, prefix: str = "model.") -> str:
    """Pattern of the published tensors that are not read: later layers, norm and head."""
    later = "|".join(str(number) for number in range(sizes.taken[-1], sizes.text.layers))
    names = [rf"{prefix}layers\.({later})\..*"] if later else []
    names += [] if sizes.final_norm else [rf"{prefix}norm\.weight"]
    return "|".join([*names, HEAD.replace(".", r"\.")])


def read_table(sizes: EncoderSizes, prefix: str = "model.", aliases: Sequence[tuple[str, str]] = ()) -> Table:
    """Of what a decoder reads of a language model's folder."""
    return Table(rules(sizes, prefix), abstract_params(sizes), aliases, unread(sizes, prefix))


def whole_table(text: TextConfig) -> Table:
    """Of all published tensors of a language model's folder; a tied head may be stored too."""
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    model = LanguageModel(text)
    params = jax.eval_shape(lambda ids: model.init(jax.random.key(0), ids, method="initialise"), ids)["params"]
    ignore = HEAD.replace(".", r"\.") if text.tied else ""
    return Table(language_rules(text, "model."), {"language": params}, ignore=ignore)
