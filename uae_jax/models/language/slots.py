"""Sampling of many completions by a few slots: a row that has ended makes room for the next one.

`generate` samples all rows at once, and a row that has ended waits for the longest. Where memory holds only some of the
rows, as in a rollout in parts, every part waits so. Here one loop samples all of them: when the row of a slot ends, the
slot begins the next row of the queue in the same turn. The samples are those of `generate`, by the rows' own keys.

A slot has keys and values of its own: S entries of its prompt, then T of its completion. The prompts of all rows are
computed before the loop, and what a new row needs of them is copied into its slot.

Shape letters: N rows, R slots, B prompts of S tokens, T tokens of a completion.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from uae_jax.models.language import decoding, model
from uae_jax.models.language.config import CaptionerConfig
from uae_jax.models.language.generate import Completion, is_stop, sample_rows
from uae_jax.models.language.sampling import SamplingConfig
from uae_jax.models.language.text import KV, Memory


class SlotDecoder(NamedTuple):
    """A language model that reads one token of every slot.

    Attributes:
      advance: `(cache, embeddings [R, D], step [R], prompt [R]) -> (hidden states [R, D], cache)`.
      refill: `(cache, prompt [R]) -> cache` with these prompts.
      cache: without prompts.
    """

    advance: Callable[[Any, Array, Array, Array], tuple[Array, Any]]
    refill: Callable[[Any, Array], Any]
    cache: Any


class Turn(NamedTuple):
    """What the slots sample.

    Attributes:
      row: of each slot; N for a slot that found the queue empty.
      step: tokens of that row so far.
      begun: rows that have a slot or had one; the queue begins there.
    """

    row: Int[Array, " r"]
    step: Int[Array, " r"]
    begun: Int[Array, ""]

    def next(self, ended: Bool[Array, " r"], rows: int) -> "Turn":
        """The next turn: slots whose row has ended take the first rows of the queue."""
        ended = ended & (self.row < rows)
        waiting = jnp.minimum(self.begun + jnp.cumsum(ended) - 1, rows)
        begun = jnp.minimum(self.begun + jnp.sum(ended), rows)
        return Turn(jnp.where(ended, waiting, self.row), jnp.where(ended, 0, self.step + 1), begun)


class _State(NamedTuple):
    turn: Turn
    completion: Completion
    cache: Any
    hidden: Array


def generate_in_slots(
    config: CaptionerConfig,
    params: model.Params,
    adapter: model.Params | None,
    prefix: model.Prefix,
    keys: Key[Array, " n"],
    *,
    slots: int,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    sampling: SamplingConfig = SamplingConfig(),
    group: int = 1,
    packed: bool = False,
) -> Completion:
    """`generate.generate` with the memory of `slots` rows; see there for the arguments."""
    rows, count = len(keys), min(slots, len(keys))
    start = (_packed if packed else _scanned)(config, params, adapter, prefix, max_new_tokens, count)

    def prompt_of(row: Int[Array, " r"]) -> Int[Array, " r"]:
        return jnp.minimum(row, rows - 1) // group

    def body(state: _State) -> _State:
        row, step, _ = state.turn
        logits = model.logits(config, params, state.hidden)
        token, log_prob = sample_rows(logits, keys[jnp.minimum(row, rows - 1)], step, sampling)
        stopped = is_stop(token, stop_ids)
        completion = written(state.completion, row, step, token, log_prob, stopped)
        ended = stopped | (step == max_new_tokens - 1)
        hidden, cache = start.advance(state.cache, model.embed_tokens(config, params, token), step, prompt_of(row))
        turn = state.turn.next(ended, rows)
        prompt = prompt_of(turn.row)
        cache = lax.cond(jnp.any(ended), start.refill, lambda cache, _: cache, cache, prompt)
        hidden = jnp.where(ended[:, None], prefix.last_hidden[prompt], hidden)
        return _State(turn, completion, cache, hidden)

    first, empty = jnp.arange(count), Completion.empty(rows, max_new_tokens, config.pad_token_id)
    prompt, turn = prompt_of(first), Turn(first, jnp.zeros_like(first), jnp.int32(count))
    begin = _State(turn, empty, start.refill(start.cache, prompt), prefix.last_hidden[prompt])
    return lax.while_loop(lambda state: jnp.any(state.turn.row < rows), body, begin).completion


def written(
    completion: Completion, row: Array, step: Array, token: Array, log_prob: Array, stopped: Array
) -> Completion:
    """The completions with a token of each slot's row; slots without a row write nothing."""
    place = row, step
    return Completion(
        tokens=completion.tokens.at[place].set(token, mode="drop"),
        mask=completion.mask.at[place].set(True, mode="drop"),
        log_probs=completion.log_probs.at[place].set(log_prob, mode="drop"),
        finished=completion.finished.at[row].set(stopped, mode="drop"),
    )


def _scanned(
    config: CaptionerConfig,
    params: model.Params,
    adapter: model.Params | None,
    prefix: model.Prefix,
    length: int,
    slots: int,
) -> SlotDecoder:
    """The model's own forward pass over stacked layers."""
    prompts, size, at = prefix.memory, prefix.memory.mask.shape[1], jnp.arange(slots)

    def advance(cache: KV, embeds: Array, step: Array, prompt: Array) -> tuple[Array, KV]:
        earlier = jnp.arange(length) < step[:, None]
        seen = Memory(cache, jnp.concatenate([prompts.mask[prompt], earlier], axis=1))
        hidden, kv = model.hidden_states_and_kv(
            config,
            params,
            adapter,
            embeds[:, None],
            model.text_positions(prefix.next_position[prompt] + step, 1),
            jnp.ones((slots, 1), bool),
            (seen,),
        )
        new = KV(*(old.at[:, at, size + step].set(own[:, :, 0]) for old, own in zip(cache, kv)))
        return hidden[:, 0], new

    def refill(cache: KV, prompt: Array) -> KV:
        return KV(*(old.at[:, :, :size].set(own[:, prompt]) for old, own in zip(cache, prompts.kv)))

    def empty(prompt: Array) -> Array:
        layers, _, _, heads, width = prompt.shape
        return jnp.zeros((layers, slots, size + length, heads, width), prompt.dtype)

    return SlotDecoder(advance, refill, KV(*(empty(part) for part in prompts.kv)))


def _packed(
    config: CaptionerConfig,
    params: model.Params,
    adapter: model.Params | None,
    prefix: model.Prefix,
    length: int,
    slots: int,
) -> SlotDecoder:
    """The form of `decoding`."""
    layers = decoding.pack(config.text, params["language"], adapter)
    prompts, size = prefix.memory, prefix.memory.mask.shape[1]
    padded = len(decoding.whole_tiles(jnp.zeros(slots)))

    def advance(caches: Any, embeds: Array, step: Array, prompt: Array) -> tuple[Array, Any]:
        step, prompt = decoding.whole_tiles(step), decoding.whole_tiles(prompt)
        written = jnp.arange(length) <= step[:, None]
        hidden, caches = decoding.decode_token(
            config.text,
            layers,
            params["language"]["final_norm"]["scale"],
            caches,
            decoding.whole_tiles(embeds),
            prefix.next_position[prompt] + step,
            size + step,
            jnp.concatenate([prompts.mask[prompt], written], axis=1),
        )
        return hidden[:slots], caches

    def refill(caches: Any, prompt: Array) -> Any:
        def filled(old: Array, own: Array) -> Array:
            return old.at[:slots, :, :size].set(own[prompt].transpose(0, 2, 1, 3))

        return tuple(
            decoding.Cache(*(filled(old, own[index]) for old, own in zip(cache, prompts.kv)))
            for index, cache in enumerate(caches)
        )

    def empty(own: Float[Array, "l b s j k"]) -> Array:
        return jnp.zeros((padded, own.shape[3], size + length, own.shape[4]), own.dtype)

    caches = tuple(decoding.Cache(*(empty(own) for own in prompts.kv)) for _ in range(config.text.layers))
    return SlotDecoder(advance, refill, caches)
