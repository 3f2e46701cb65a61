"""What the decoder is given: the caption, encoded again by the language model without the image, and projected.

The paper's text bottleneck (arXiv 2509.09666, section 3). The caption stands inside the chat template of the role
`generate`. The projected hidden state of every token is context, as in the official inference code. N captions of T
tokens have S tokens with their template.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from uae_jax.models.language import model as lm
from uae_jax.models.qwen2_5_vl import model as qwen
from uae_jax.models.qwen2_5_vl.config import Qwen2_5VLConfig


@dataclasses.dataclass(frozen=True)
class ConditionTemplate:
    """Token ids around a caption in the role `generate`.

    Attributes:
      prefix: before the caption.
      suffix: after the caption.
      negative: ids of the negative prompt itself, without template.
      pad: id that fills rows up to one length.
      total: length of all rows, where the decoder reads padding too; a caption is then cut in front of the suffix. 0
        for as long as the captions need; padding is then masked, so that its id does not matter.
      most: tokens of a row at most, 0 for any number; a caption is then cut as well.
    """

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    negative: tuple[int, ...]
    pad: int
    total: int = 0
    most: int = 0

    def length(self, caption_tokens: int) -> int:
        """S: room for the template and for the longer of `caption_tokens` and the negative prompt."""
        needed = len(self.prefix) + max(caption_tokens, len(self.negative)) + len(self.suffix)
        return self.total or (min(needed, self.most) if self.most else needed)


def place_in_template(
    template: ConditionTemplate, tokens: Int[Array, "n t"], lengths: Int[Array, " n"]
) -> tuple[Int[Array, "n s"], Bool[Array, "n s"]]:
    """Puts captions between prefix and suffix, without a gap, inside one compiled shape.

    Args:
      template: the ids around them.
      tokens: right-padded captions.
      lengths: caption tokens without the stop token.

    Returns:
      int32 ids and their mask.
    """
    count, width = tokens.shape
    total = template.length(width)
    before, after = len(template.prefix), len(template.suffix)
    if template.total or template.most:
        lengths = jnp.minimum(lengths, total - before - after)
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
    config: Qwen2_5VLConfig,
    params: lm.Params,
    adapter: lm.Params | None,
    ids: Int[Array, "n s"],
    mask: Bool[Array, "n s"],
) -> Float[Array, "n s d_context"]:
    """Hidden states of templated captions under the language model, projected to the decoder's context.

    Args:
      config: the captioner's configuration.
      params: with `language` and `projector`.
      adapter: None for the reference model (the default condition), the policy's adapter for parity with the release.
      ids, mask: of `place_in_template`.
    """
    return qwen.project(params["projector"], lm.text_hidden_states(config, params, adapter, ids, mask))


def encode_captions(
    config: Qwen2_5VLConfig,
    params: lm.Params,
    adapter: lm.Params | None,
    template: ConditionTemplate,
    tokens: Int[Array, "n t"],
    lengths: Int[Array, " n"],
) -> tuple[Float[Array, "n s d_context"], Bool[Array, "n s"]]:
    """`place_in_template` and `encode_ids`: captions to context and its mask."""
    ids, mask = place_in_template(template, tokens, lengths)
    return encode_ids(config, params, adapter, ids, mask), mask


def encode_negative(
    config: Qwen2_5VLConfig,
    params: lm.Params,
    adapter: lm.Params | None,
    template: ConditionTemplate,
    caption_tokens: int,
) -> tuple[Float[Array, "1 s d_context"], Bool[Array, "1 s"]]:
    """Context and mask of the negative prompt, of the length that captions of so many tokens have."""
    return encode_captions(config, params, adapter, template, *negative_tokens(template, caption_tokens))


def negative_tokens(template: ConditionTemplate, caption_tokens: int) -> tuple[Int[Array, "1 t"], Int[Array, " 1"]]:
    """The negative prompt as one caption, of the length that captions of so many tokens have, and its own length."""
    width = max(caption_tokens, len(template.negative))
    tokens = np.full((1, width), template.pad, np.int32)
    tokens[0, : len(template.negative)] = template.negative
    return jnp.asarray(tokens), jnp.array([len(template.negative)], jnp.int32)


def caption_lengths(mask: Bool[Array, "n t"], finished: Bool[Array, " n"]) -> Int[Array, " n"]:
    """Tokens of sampled captions without their stop token, int32."""
    return jnp.sum(mask, -1, dtype=jnp.int32) - finished.astype(jnp.int32)
