"""Images as tokens of the language model: prompts with and without the caption, guided sampling, and scores.

Classifier-free guidance (arXiv 2207.12598) runs two rows for a caption in one batch: its prompt, and the same prompt
with every token between the first and the last replaced by padding that is attended to, as in the official code. Both
rows read the sampled tokens. Their order is caption, half, image: a row of a sharded batch stays on its device.

Shape letters: b captions, n images, k of a caption, h halves (2, or 1 without guidance), t tokens of a prompt, c cells.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from uae_jax.models.janus import model
from uae_jax.models.janus.config import JanusConfig
from uae_jax.models.language.generate import sample_sequences, start_decoder
from uae_jax.models.language.model import (
    SCORE_CHUNK,
    Params,
    Prefix,
    TokenScores,
    embed_tokens,
    scores_of,
    scoring_states,
    states_after,
)
from uae_jax.models.language.sampling import SamplingConfig


class Drawing(NamedTuple):
    """Sampled image tokens; every image has all of them, and none ends early.

    Attributes:
      tokens: int32, in reading order.
      log_probs: float32 log-probability of each token under the distribution it was sampled from, with guidance. With
        temperature 0 or truncation: under the full distribution at temperature 1 or the given one.
    """

    tokens: Int[Array, "n c"]
    log_probs: Float[Array, "n c"]


def unconditional(config: JanusConfig, ids: Int[Array, "b t"], mask: Bool[Array, "b t"]) -> Int[Array, "b t"]:
    """The prompts with padding for every token between the first and the last of each row.

    The padding counts as much as the tokens did, so that a row has the length of its own prompt.
    """
    place = jnp.arange(ids.shape[1])
    inside = (place > 0) & (place < jnp.sum(mask, axis=1, keepdims=True) - 1)
    return jnp.where(inside, config.pad_token_id, ids)


def drawing_prefix(
    config: JanusConfig,
    params: Params,
    adapter: Params | None,
    ids: Int[Array, "b t"],
    mask: Bool[Array, "b t"],
    *,
    guided: bool = True,
) -> Prefix:
    """Runs the prompts of B captions once, for any number of images of each.

    Args:
      config: sizes.
      params: parameters.
      adapter: adapter of the language model, or None for the reference model.
      ids: right-padded prompts, which end with the token that begins an image.
      mask: True for tokens, which come first.
      guided: whether the unconditional half is run too.

    Returns:
      The prefix of B * H rows, the halves of a caption together.
    """
    if guided:
        ids = jnp.stack([ids, unconditional(config, ids, mask)], axis=1).reshape(-1, ids.shape[1])
        mask = jnp.repeat(mask, 2, axis=0)
    return model.text_prefix(config, params, adapter, embed_tokens(config, params, ids), mask)


def guided_logits(
    config: JanusConfig,
    params: Params,
    hidden: Float[Array, "rows *t d"],
    group: int,
    halves: int,
    guidance_scale: float | Float[Array, ""],
) -> Float[Array, "n *t v"]:
    """Float32 logits `u + scale * (c - u)` of image tokens, from the states of both halves."""
    scores = model.image_logits(config, params, hidden)
    if halves == 1:
        return scores
    pairs = scores.reshape(-1, 2, group, *scores.shape[1:])
    guided = pairs[:, 1] + guidance_scale * (pairs[:, 0] - pairs[:, 1])
    return guided.reshape(-1, *scores.shape[1:])


def for_both_halves(embeds: Float[Array, "n *t d"], group: int, halves: int) -> Float[Array, "rows *t d"]:
    """What every row reads of the tokens of its image."""
    rows = embeds.reshape(-1, 1, group, *embeds.shape[1:])
    return jnp.repeat(rows, halves, axis=1).reshape(-1, *embeds.shape[1:])


def draw(
    config: JanusConfig,
    params: Params,
    adapter: Params | None,
    prefix: Prefix,
    keys: Key[Array, " n"],
    *,
    guidance_scale: float | Float[Array, ""] = 5.0,
    sampling: SamplingConfig = SamplingConfig(),
    group: int = 1,
    packed: bool = False,
) -> Drawing:
    """Samples the image tokens of `group` images of each caption, in one loop.

    Args:
      config: sizes.
      params: parameters.
      adapter: adapter of the language model, or None.
      prefix: of `drawing_prefix`, from the same adapter.
      keys: typed random keys, N = B * group, rows of a group together; step t folds in t.
      guidance_scale: 1 takes the caption's half alone.
      sampling: temperature and truncation.
      group: images of each caption.
      packed: see `language.generate.generate`.

    Raises:
      ValueError: the number of keys is not B * group.
    """
    halves = _halves(prefix, len(keys), group)
    decoder = start_decoder(config, params, adapter, prefix, config.vq.tokens, group=group, packed=packed)
    drawn = sample_sequences(
        decoder,
        keys,
        length=config.vq.tokens,
        logits=lambda hidden: guided_logits(config, params, hidden, group, halves, guidance_scale),
        embed=lambda tokens: for_both_halves(model.embed_image_tokens(config, params, tokens), group, halves),
        sampling=sampling,
    )
    return Drawing(drawn.tokens, drawn.log_probs)


def drawing_log_probs(
    config: JanusConfig,
    params: Params,
    adapter: Params | None,
    prefix: Prefix,
    tokens: Int[Array, "n c"],
    *,
    guidance_scale: float | Float[Array, ""] = 5.0,
    temperature: float | Float[Array, ""] = 1.0,
    group: int = 1,
    chunk: int = SCORE_CHUNK,
    with_entropy: bool = False,
) -> TokenScores:
    """Teacher-forced log-probabilities of image tokens; differentiable, also through the prefix.

    Args:
      config: sizes.
      params: parameters.
      adapter: adapter of the policy, or None for the reference.
      prefix: of `drawing_prefix`, from the same adapter.
      tokens: of the images, rows of a caption together.
      guidance_scale: that of the sampler; for scores without guidance take a prefix that is not guided.
      temperature: positive; that of the sampler.
      group: images of each caption.
      chunk: positions of each row whose logits exist at once.
      with_entropy: whether the entropy is returned too.

    Raises:
      ValueError: the number of images is not B * group.
    """
    halves = _halves(prefix, len(tokens), group)
    embeds = for_both_halves(model.embed_image_tokens(config, params, tokens), group, halves)
    hidden = states_after(config, params, adapter, prefix, embeds, jnp.ones(embeds.shape[:2], bool))
    return scores_of(
        lambda states: guided_logits(config, params, states, group, halves, guidance_scale),
        scoring_states(prefix, hidden),
        tokens,
        temperature=temperature,
        chunk=chunk,
        with_entropy=with_entropy,
    )


def _halves(prefix: Prefix, images: int, group: int) -> int:
    """2 for a prefix with the unconditional half, 1 for one without."""
    rows = len(prefix.next_position)
    halves = rows * group // images if images else 0
    if halves not in (1, 2) or halves * images != rows * group:
        raise ValueError(f"{images} images do not belong to {rows} rows of prompts with {group} images of each caption")
    return halves
