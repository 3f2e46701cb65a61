"""What the decoder is given: the caption, encoded again by the language model without the image, and projected.

The paper's text bottleneck (arXiv 2509.09666, section 3). The caption stands inside the chat template of the role
`generate`; every token's projected hidden state is context, as in the official inference code. Shape letters: N
captions, T caption tokens, S tokens of caption and template, C context width.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax import Array

from uae_jax.models.qwen2_5_vl import model as qwen
from uae_jax.models.qwen2_5_vl.config import Qwen2_5VLConfig


@dataclasses.dataclass(frozen=True)
class ConditionTemplate:
    """Token ids around a caption in the role `generate`.

    Attributes:
      prefix: before the caption.
      suffix: after the caption.
      negative: ids of the negative prompt itself, without template.
      pad: id that fills rows up to one length; masked, so that its choice does not matter.
      attend_padding: the official code's behaviour: rows are padded to one length and the decoder attends to the
        padding.
    """

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    negative: tuple[int, ...]
    pad: int
    attend_padding: bool = False

    def length(self, caption_tokens: int) -> int:
        """S: room for the template and for the longer of `caption_tokens` and the negative prompt."""
        return len(self.prefix) + max(caption_tokens, len(self.negative)) + len(self.suffix)


def place_in_template(template: ConditionTemplate, tokens: Array, lengths: Array) -> tuple[Array, Array]:
    """Puts captions between prefix and suffix, without a gap, inside one compiled shape.

    Args:
      template: the ids around them.
      tokens: int32 `[N, T]`, right-padded.
      lengths: int32 `[N]`, caption tokens without the stop token.

    Returns:
      ids int32 `[N, S]` and mask bool `[N, S]`.
    """
    count, width = tokens.shape
    total = template.length(width)
    before, after = len(template.prefix), len(template.suffix)
    position = jnp.arange(total)[None]
    end = (before + lengths)[:, None]
    ids = jnp.full((count, total), template.pad, jnp.int32)
    ids = ids.at[:, :before].set(jnp.asarray(template.prefix, jnp.int32))
    inside = jnp.take_along_axis(tokens, jnp.clip(position - before, 0, width - 1), axis=1)
    ids = jnp.where((position >= before) & (position < end), inside, ids)
    suffix = jnp.asarray(template.suffix, jnp.int32)[jnp.clip(position - end, 0, after - 1)]
    ids = jnp.where((position >= end) & (position < end + after), suffix, ids)
    return ids, position < end + after


def encode_ids(
    config: Qwen2_5VLConfig, params: dict, adapter: dict | None, template: ConditionTemplate, ids: Array, mask: Array
) -> tuple[Array, Array]:
    """Hidden states of templated captions under the language model, projected to the decoder's context.

    Args:
      config: the captioner's configuration.
      params: with `language` and `projector`.
      adapter: None for the reference model (the default condition), the policy's adapter for parity with the release.
      template: decides whether padding is attended to.
      ids, mask: `[N, S]`.

    Returns:
      context `[N, S, C]` and its mask bool `[N, S]`.
    """
    hidden = qwen.text_hidden_states(config, params, adapter, ids, mask)
    context = qwen.project(params["projector"], hidden)
    return context, jnp.ones_like(mask) if template.attend_padding else mask


def encode_captions(
    config: Qwen2_5VLConfig,
    params: dict,
    adapter: dict | None,
    template: ConditionTemplate,
    tokens: Array,
    lengths: Array,
) -> tuple[Array, Array]:
    """`place_in_template` and `encode_ids`: `[N, T]` captions to context `[N, S, C]` and mask `[N, S]`."""
    ids, mask = place_in_template(template, tokens, lengths)
    return encode_ids(config, params, adapter, template, ids, mask)


def encode_negative(
    config: Qwen2_5VLConfig, params: dict, adapter: dict | None, template: ConditionTemplate, caption_tokens: int
) -> tuple[Array, Array]:
    """Context `[1, S, C]` and mask `[1, S]` of the negative prompt, of the length that captions of T tokens have."""
    width = max(caption_tokens, len(template.negative))
    tokens = np.full((1, width), template.pad, np.int32)
    tokens[0, : len(template.negative)] = template.negative
    return encode_captions(
        config, params, adapter, template, jnp.asarray(tokens), jnp.array([len(template.negative)], jnp.int32)
    )


def caption_lengths(mask: Array, finished: Array) -> Array:
    """int32 `[N]`: tokens of sampled captions without their stop token, from mask `[N, T]` and finished `[N]`."""
    return jnp.sum(mask, -1, dtype=jnp.int32) - finished.astype(jnp.int32)
