"""Pure functions of a captioner's language model, `params["language"]`, and an optional adapter of it."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from uae_jax.models.language.config import CaptionerConfig
from uae_jax.models.language.frozen_head import frozen_head_scores
from uae_jax.models.language.text import KV, LanguageModel, Memory
from uae_jax.nn import int8
from uae_jax.nn.attention import preferred_length
from uae_jax.nn.loops import scan

ADAPTER_PATTERN = r"layers/(attention|mlp)/.*"  # all linear layers of the text model, as in the release
SCORE_CHUNK = 64  # positions of each row whose logits exist at once, by default

Params = Mapping[str, Any]


class Prefix(NamedTuple):
    """B prompts that are computed once; all completions of a group read one.

    Attributes:
      memory: keys and values `[L, B, S, J, K]` and their mask `[B, S]`.
      next_position: the M-RoPE position of the first completion token.
      last_hidden: the hidden state that scores the first completion token.
    """

    memory: Memory
    next_position: Int[Array, " b"]
    last_hidden: Float[Array, "b d"]


class TokenScores(NamedTuple):
    """Float32, of the shape of the tokens; zero where masked.

    Attributes:
      log_probs: log-probability of each token.
      entropy: of the distribution that each token was sampled from, in nats, without a gradient; or None.
    """

    log_probs: Float[Array, "*rows t"]
    entropy: Float[Array, "*rows t"] | None


def _apply(
    config: CaptionerConfig,
    params: Params,
    adapter: Params | None,
    *args: Any,
    method: str | None = None,
    return_kv: bool = False,
) -> Any:
    variables = {"params": params["language"]}
    if int8.SCALES in params:
        variables[int8.SCALES] = params[int8.SCALES]
    if adapter is not None:
        variables["lora"] = adapter
    return LanguageModel(config.text, return_kv).apply(variables, *args, method=method)


def embed_tokens(config: CaptionerConfig, params: Params, ids: Int[Array, "*rows"]) -> Float[Array, "*rows d"]:
    """Token embeddings."""
    return _apply(config, params, None, ids, method="embed")


def embed_prompt(
    config: CaptionerConfig,
    params: Params,
    ids: Int[Array, "b t"],
    mask: Bool[Array, "b t"],
    image_embeds: Float[Array, "b merged d"] | None,
) -> Float[Array, "b t d"]:
    """Token embeddings with the image embeddings, in order, in place of the image tokens.

    Args:
      config: sizes.
      params: parameters.
      ids: of the prompt.
      mask: image tokens in the padding are not counted.
      image_embeds: of `encode_images`, or None for text alone.
    """
    embeds = embed_tokens(config, params, ids)
    if image_embeds is None:
        return embeds
    is_image = (ids == config.image_token_id) & mask
    order = jnp.clip(jnp.cumsum(is_image, axis=1) - 1, 0, image_embeds.shape[1] - 1)
    placed = jnp.take_along_axis(image_embeds, order[..., None], axis=1)
    return jnp.where(is_image[..., None], placed.astype(embeds.dtype), embeds)


def logits(config: CaptionerConfig, params: Params, hidden: Float[Array, "*rows d"]) -> Float[Array, "*rows v"]:
    """Float32 logits of final hidden states."""
    return _apply(config, params, None, hidden, method="logits")


def hidden_states(
    config: CaptionerConfig,
    params: Params,
    adapter: Params | None,
    embeds: Float[Array, "n t d"],
    positions: Int[Array, "#n t 3"],
    mask: Bool[Array, "n t"],
    memories: tuple[Memory, ...] = (),
) -> Float[Array, "n t d"]:
    """Hidden states after the final norm; see `text.LanguageModel` for the arguments."""
    return _apply(config, params, adapter, embeds, positions, mask, memories)[0]


def hidden_states_and_kv(
    config: CaptionerConfig,
    params: Params,
    adapter: Params | None,
    embeds: Float[Array, "n t d"],
    positions: Int[Array, "#n t 3"],
    mask: Bool[Array, "n t"],
    memories: tuple[Memory, ...] = (),
) -> tuple[Float[Array, "n t d"], KV]:
    """As `hidden_states`, and the keys and values `[L, N, T, J, K]` of these tokens."""
    return _apply(config, params, adapter, embeds, positions, mask, memories, return_kv=True)


def prefix_of(
    config: CaptionerConfig,
    params: Params,
    adapter: Params | None,
    embeds: Float[Array, "b t d"],
    positions: Int[Array, "#b t 3"],
    mask: Bool[Array, "b t"],
    next_position: Int[Array, " b"],
) -> Prefix:
    """Runs right-padded prompts once, for sampling and scoring any number of completions.

    Args:
      config: sizes.
      params: parameters.
      adapter: adapter, or None for the reference model.
      embeds: of the prompts.
      positions: of their tokens.
      mask: True for tokens, which come first.
      next_position: of the first completion token.

    Returns:
      The prefix of the B prompts; gradients flow through it.
    """
    hidden, kv = hidden_states_and_kv(config, params, adapter, embeds, positions, mask)
    last = jnp.maximum(jnp.sum(mask, axis=1) - 1, 0)
    last_hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    return Prefix(Memory(kv, mask), next_position, last_hidden)


def text_positions(start: Int[Array, " n"], length: int) -> Int[Array, "n {length} 3"]:
    """M-RoPE positions of text that begins at `start`: the three axes are equal."""
    return jnp.broadcast_to((start[:, None] + jnp.arange(length))[..., None], (*start.shape, length, 3))


def completion_hidden_states(
    config: CaptionerConfig,
    params: Params,
    adapter: Params | None,
    prefix: Prefix,
    tokens: Int[Array, "n t"],
    mask: Bool[Array, "n t"],
) -> Float[Array, "n t d"]:
    """The hidden states that score each completion token: entry t has seen the prompt and tokens before t.

    Args:
      config: sizes.
      params: parameters.
      adapter: adapter or None.
      prefix: prompts of B images.
      tokens: N = B * G, rows of a group together.
      mask: a prefix of each row.
    """
    return scoring_states(prefix, own_hidden_states(config, params, adapter, prefix, tokens, mask))


def scoring_states(prefix: Prefix, hidden: Float[Array, "n t d"]) -> Float[Array, "n t d"]:
    """The states before each token, that of the prompt first, from the tokens' own states."""
    first = jnp.repeat(prefix.last_hidden, len(hidden) // len(prefix.last_hidden), axis=0)
    return jnp.concatenate([first[:, None], hidden[:, :-1]], axis=1)


def own_hidden_states(
    config: CaptionerConfig,
    params: Params,
    adapter: Params | None,
    prefix: Prefix,
    tokens: Int[Array, "n t"],
    mask: Bool[Array, "n t"],
) -> Float[Array, "n t d"]:
    """The hidden states of the completion tokens themselves; see `completion_hidden_states` for the arguments."""
    return states_after(config, params, adapter, prefix, embed_tokens(config, params, tokens), mask)


def states_after(
    config: CaptionerConfig,
    params: Params,
    adapter: Params | None,
    prefix: Prefix,
    embeds: Float[Array, "n t d"],
    mask: Bool[Array, "n t"],
) -> Float[Array, "n t d"]:
    """`own_hidden_states` of tokens that are given by their embeddings."""
    rows, length, _ = embeds.shape
    positions = text_positions(jnp.repeat(prefix.next_position, rows // len(prefix.next_position)), length)
    return hidden_states(config, params, adapter, embeds, positions, mask, (prefix.memory,))


def token_log_probs(
    scaled: Float[Array, "*rows v"], tokens: Int[Array, "*rows"]
) -> tuple[Float[Array, "*rows"], Float[Array, "*rows"]]:
    """Log-softmax of float32 logits at tokens, and the log of the normaliser.

    Selecting by comparison instead of gathering keeps the gradient one fused expression, also where V is sharded.
    """
    normaliser = jax.nn.logsumexp(scaled, axis=-1)
    at_token = jax.lax.broadcasted_iota(jnp.int32, scaled.shape, scaled.ndim - 1) == tokens[..., None]
    return jnp.sum(jnp.where(at_token, scaled, 0.0), axis=-1) - normaliser, normaliser


def score_tokens(
    config: CaptionerConfig,
    params: Params,
    hidden: Float[Array, "n t d"],
    tokens: Int[Array, "n t"],
    *,
    temperature: float | Float[Array, ""] = 1.0,
    chunk: int = SCORE_CHUNK,
    with_entropy: bool = False,
    frozen_head: bool = False,
) -> TokenScores:
    """Log-softmax of `logits / temperature` at the tokens, in float32, `chunk` positions at a time.

    `[N, T, V]` never exists. The backward pass recomputes the logits of a chunk. Where the head is frozen, the logits
    of all positions and a part of the vocabulary exist at once, as many as those of a chunk (`frozen_head_scores`).

    Args:
      config: sizes.
      params: parameters.
      hidden: the states that predict the tokens.
      tokens: to score.
      temperature: positive; that of the sampler.
      chunk: positions in one piece.
      with_entropy: whether the entropy is computed too.
      frozen_head: nothing differentiates `params`, as where an adapter is trained.
    """
    if not frozen_head:
        return scores_of(
            lambda states: logits(config, params, states),
            hidden,
            tokens,
            temperature=temperature,
            chunk=chunk,
            with_entropy=with_entropy,
        )
    language, tied = params["language"], config.text.tied
    head = language["embedding"]["table"] if tied else language["head"]["kernel"]
    found = frozen_head_scores(
        head,
        tied,
        hidden.reshape(-1, hidden.shape[-1]),
        tokens.reshape(-1),
        temperature=temperature,
        blocks=-(-tokens.shape[1] // min(chunk, tokens.shape[1])),
        with_entropy=with_entropy,
    )
    return jax.tree.map(lambda x: x.reshape(tokens.shape), TokenScores(*found))


def scores_of(
    head: Callable[[Float[Array, "r c d"]], Float[Array, "n c v"]],
    hidden: Float[Array, "r t d"],
    tokens: Int[Array, "n t"],
    *,
    temperature: float | Float[Array, ""] = 1.0,
    chunk: int = SCORE_CHUNK,
    with_entropy: bool = False,
) -> TokenScores:
    """`score_tokens` for any head; the backward pass recomputes the logits of a chunk.

    Args:
      head: float32 logits of `[R, C, D]` states at C positions, from R rows to N.
      hidden: the states that predict the tokens.
      tokens: to score.
      temperature, chunk, with_entropy: see `score_tokens`.
    """
    length = tokens.shape[1]
    chunk = min(chunk, length)
    pieces = -(-length // chunk)

    def cut(x: Array) -> Array:
        # [R, T, ...] -> [pieces, R, C, ...]
        x = jnp.pad(x, ((0, 0), (0, pieces * chunk - length), *((0, 0),) * (x.ndim - 2)))
        return x.reshape(len(x), pieces, chunk, *x.shape[2:]).swapaxes(0, 1)

    @jax.checkpoint
    def score(states: Array, wanted: Array) -> tuple[Array, Array | None]:
        scaled = head(states) / temperature
        log_probs, normaliser = token_log_probs(scaled, wanted)
        if not with_entropy:
            return log_probs, None
        scaled, normaliser = jax.lax.stop_gradient((scaled, normaliser))
        return log_probs, normaliser - jnp.sum(jnp.exp(scaled - normaliser[..., None]) * scaled, axis=-1)

    _, found = scan(lambda _, piece: (None, score(*piece)), None, (cut(hidden), cut(tokens)))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(len(tokens), -1)[:, :length], TokenScores(*found))


def completion_log_probs(
    config: CaptionerConfig,
    params: Params,
    adapter: Params | None,
    prefix: Prefix,
    tokens: Int[Array, "*rows t"],
    mask: Bool[Array, "*rows t"],
    *,
    temperature: float | Float[Array, ""] = 1.0,
    chunk: int = SCORE_CHUNK,
    with_entropy: bool = False,
    frozen_head: bool = False,
) -> TokenScores:
    """Teacher-forced log-probabilities of completions given their prompts; differentiable, also through the prefix.

    Args:
      config: sizes.
      params: parameters.
      adapter: adapter of the policy, or None for the reference.
      prefix: prompts of B images, from the same adapter.
      tokens: `[N, T]` or `[B, G, T]`; rows of a group together.
      mask: true up to and including the first stop token.
      temperature: positive; that of the sampler.
      chunk: positions whose logits exist at once.
      with_entropy: whether the entropy is returned too.
      frozen_head: see `score_tokens`.

    Returns:
      Scores of the shape of `tokens`, zero where masked.
    """
    shape, flat_mask = tokens.shape, mask.reshape(-1, mask.shape[-1])
    flat = tokens.reshape(-1, shape[-1])
    hidden = completion_hidden_states(config, params, adapter, prefix, flat, flat_mask)
    scores = score_tokens(
        config,
        params,
        hidden,
        flat,
        temperature=temperature,
        chunk=chunk,
        with_entropy=with_entropy,
        frozen_head=frozen_head,
    )
    return jax.tree.map(lambda x: jnp.where(flat_mask, x, 0.0).reshape(shape), scores)


def text_hidden_states(
    config: CaptionerConfig,
    params: Params,
    adapter: Params | None,
    ids: Int[Array, "n t"],
    mask: Bool[Array, "n t"],
) -> Float[Array, "n t d"]:
    """Final hidden states of right-padded text, which the projector maps to the decoder's context."""
    length = ids.shape[1]
    room = ((0, 0), (0, preferred_length(length) - length))
    ids, mask = jnp.pad(ids, room, constant_values=config.pad_token_id), jnp.pad(mask, room)
    positions = text_positions(jnp.zeros(1, jnp.int32), ids.shape[1])  # the same for all rows
    return hidden_states(config, params, adapter, embed_tokens(config, params, ids), positions, mask)[:, :length]
