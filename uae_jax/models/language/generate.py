"""Token sampling as one loop inside the compiled step: key-value cache as loop state, early end, per-row keys."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from uae_jax.models.language import decoding, model
from uae_jax.models.language.config import CaptionerConfig
from uae_jax.models.language.sampling import SamplingConfig, sample_tokens, truncate
from uae_jax.models.language.text import KV, Memory
from uae_jax.nn.constrain import constrain


class Completion(NamedTuple):
    """Sampled tokens of N rows.

    Attributes:
      tokens: int32, `pad_token_id` after the end.
      mask: true up to and including the first stop token.
      log_probs: float32 log-probability of each token under the distribution it was sampled from; 0 where masked. With
        temperature 0 or truncation: under the full distribution at temperature 1 or the given one.
      finished: whether a stop token was sampled.
    """

    tokens: Int[Array, "n t"]
    mask: Bool[Array, "n t"]
    log_probs: Float[Array, "n t"]
    finished: Bool[Array, " n"]

    @classmethod
    def empty(cls, rows: int, length: int, pad: int) -> "Completion":
        """Before the first token: N rows with room for T tokens."""
        shape = rows, length
        return cls(
            tokens=jnp.full(shape, pad, jnp.int32),
            mask=jnp.zeros(shape, bool),
            log_probs=jnp.zeros(shape, jnp.float32),
            finished=jnp.zeros(rows, bool),
        )


class _State(NamedTuple):
    step: Array
    completion: Completion
    cache: Any
    hidden: Array


class Decoder(NamedTuple):
    """A language model that reads one token of R rows after the other.

    Attributes:
      advance: `(cache, embeddings [R, D], step) -> (hidden states [R, D], cache)`.
      cache: before the first token.
      hidden: the states that score the first token.
    """

    advance: Callable[[Any, Array, Array], tuple[Array, Any]]
    cache: Any
    hidden: Float[Array, "r d"]


def generate(
    config: CaptionerConfig,
    params: model.Params,
    adapter: model.Params | None,
    prefix: model.Prefix,
    keys: Key[Array, " n"],
    *,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    sampling: SamplingConfig = SamplingConfig(),
    group: int = 1,
    packed: bool = False,
) -> Completion:
    """Samples `group` completions of each prompt; ends as soon as all rows have ended.

    Args:
      config: sizes.
      params: parameters.
      adapter: adapter of the language model, or None.
      prefix: prompts of B images, from the same adapter.
      keys: typed random keys, N = B * group, rows of a group together; step t folds in t.
      max_new_tokens: T.
      stop_ids: tokens that end a row; empty samples T tokens for every row.
      sampling: temperature and truncation.
      group: completions of each prompt.
      packed: copy the layers into the form of `decoding` first.

    Raises:
      ValueError: the number of keys is not B * group.
    """
    rows = prefix.next_position.shape[0] * group
    if keys.shape != (rows,):
        raise ValueError(f"{rows} completions need as many random keys, not {keys.shape}")
    return sample_sequences(
        start_decoder(config, params, adapter, prefix, max_new_tokens, group=group, packed=packed),
        keys,
        length=max_new_tokens,
        logits=lambda hidden: model.logits(config, params, hidden),
        embed=lambda tokens: model.embed_tokens(config, params, tokens),
        sampling=sampling,
        pad=config.pad_token_id,
        stop_ids=stop_ids,
    )


def sample_sequences(
    decoder: Decoder,
    keys: Key[Array, " n"],
    *,
    length: int,
    logits: Callable[[Float[Array, "r d"]], Float[Array, "n v"]],
    embed: Callable[[Int[Array, " n"]], Float[Array, "r d"]],
    sampling: SamplingConfig,
    pad: int = 0,
    stop_ids: tuple[int, ...] = (),
    ended: Callable[[Bool[Array, " n"]], Bool[Array, ""]] = jnp.all,
) -> Completion:
    """Samples N sequences of any vocabulary from the R rows of a decoder, in one loop.

    Args:
      decoder: of `start_decoder`, with room for `length` tokens.
      keys: typed random keys; step t folds in t.
      length: T.
      logits: float32, from states of the rows to sequences.
      embed: what the rows read after a token of each sequence.
      sampling: temperature and truncation.
      pad: written after the end of a sequence.
      stop_ids: tokens that end a sequence; empty samples T tokens for each.
      ended: whether the loop ends, from which rows have; inside a `shard_map` it asks all devices.
    """
    rows = len(keys)

    def body(state: _State) -> _State:
        step, done = state.step, state.completion.finished
        token, log_prob = sample_rows(logits(state.hidden), keys, step, sampling)
        token = jnp.where(done, pad, token)
        completion = Completion(
            tokens=state.completion.tokens.at[:, step].set(token),
            mask=state.completion.mask.at[:, step].set(~done),
            log_probs=state.completion.log_probs.at[:, step].set(jnp.where(done, 0.0, log_prob)),
            finished=done | is_stop(token, stop_ids),
        )
        hidden, cache = decoder.advance(state.cache, embed(token), step)
        return _State(step + 1, completion, cache, hidden)

    def unfinished(state: _State) -> Array:
        return (state.step < length) & ~ended(state.completion.finished)

    empty = Completion.empty(rows, length, pad)
    start = _State(jnp.zeros((), jnp.int32), empty, decoder.cache, decoder.hidden)
    return lax.while_loop(unfinished, body, start).completion


def start_decoder(
    config: CaptionerConfig,
    params: model.Params,
    adapter: model.Params | None,
    prefix: model.Prefix,
    length: int,
    *,
    group: int = 1,
    packed: bool = False,
) -> Decoder:
    """The decoder of `group` sequences of each prompt, before their first token.

    Args:
      config, params, adapter, prefix: see `generate`.
      length: tokens that the cache has room for.
      group: sequences of each prompt, R = B * group.
      packed: copy the layers into the form of `decoding` first.
    """
    advance, cache = (_packed if packed else _scanned)(config, params, adapter, prefix, length, group)
    return Decoder(advance, cache, constrain(jnp.repeat(prefix.last_hidden, group, axis=0), "batch"))


def _scanned(
    config: CaptionerConfig,
    params: model.Params,
    adapter: model.Params | None,
    prefix: model.Prefix,
    length: int,
    group: int,
) -> tuple[Callable[[Any, Array, Array], tuple[Array, Any]], Any]:
    """The model's own forward pass over stacked layers; a group shares the keys and values of its prompt."""
    rows = prefix.next_position.shape[0] * group
    start = jnp.repeat(prefix.next_position, group)

    def advance(cache: KV, embeds: Array, step: Array) -> tuple[Array, KV]:
        earlier = jnp.broadcast_to(jnp.arange(length) < step, (rows, length))
        hidden, kv = model.hidden_states_and_kv(
            config,
            params,
            adapter,
            embeds[:, None],
            model.text_positions(start + step, 1),
            jnp.ones((rows, 1), bool),
            (prefix.memory, Memory(cache, earlier)),
        )
        return hidden[:, 0], jax.tree.map(
            lambda old, new: lax.dynamic_update_slice_in_dim(old, new, step, axis=2), cache, kv
        )

    def empty(prompt: Array) -> Array:
        layers, _, _, heads, width = prompt.shape
        return constrain(
            jnp.zeros((layers, rows, length, heads, width), prompt.dtype), None, "batch", None, "heads", None
        )

    return advance, jax.tree.map(empty, prefix.memory.kv)


def _packed(
    config: CaptionerConfig,
    params: model.Params,
    adapter: model.Params | None,
    prefix: model.Prefix,
    length: int,
    group: int,
) -> tuple[Callable[[Any, Array, Array], tuple[Array, Any]], Any]:
    """The form of `decoding`."""
    layers = decoding.pack(config.text, params["language"], adapter)
    start, prompt = (
        decoding.whole_tiles(jnp.repeat(x, group, axis=0)) for x in (prefix.next_position, prefix.memory.mask)
    )
    size = prompt.shape[1]

    def advance(caches: Any, embeds: Array, step: Array) -> tuple[Array, Any]:
        written = jnp.broadcast_to(jnp.arange(length) <= step, (len(start), length))
        hidden, caches = decoding.decode_token(
            config.text,
            layers,
            params["language"]["final_norm"]["scale"],
            caches,
            decoding.whole_tiles(embeds),
            start + step,
            size + step,
            jnp.concatenate([prompt, written], axis=1),
        )
        return hidden[: len(embeds)], caches

    return advance, decoding.start_caches(config.text, prefix.memory, group, length)


def sample_rows(
    logits: Float[Array, "n v"],
    keys: Key[Array, " n"],
    step: Int[Array, "#n"] | Int[Array, ""],
    sampling: SamplingConfig,
) -> tuple[Int[Array, " n"], Float[Array, " n"]]:
    """A token of each row and its log-probability, by the row's key at its step."""
    steps = jnp.broadcast_to(step, keys.shape)
    uniforms = jax.vmap(lambda key, at: jax.random.uniform(jax.random.fold_in(key, at)))(keys, steps)
    token = sample_tokens(truncate(logits, sampling), uniforms, sampling.temperature)
    return token, model.token_log_probs(logits / (sampling.temperature or 1.0), token)[0]


def is_stop(token: Int[Array, " n"], stop_ids: tuple[int, ...]) -> Bool[Array, " n"]:
    """Which tokens end a row."""
    if not stop_ids:
        return jnp.zeros(token.shape, bool)
    return jnp.any(token[:, None] == jnp.asarray(stop_ids), axis=-1)
