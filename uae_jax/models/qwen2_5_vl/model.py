"""Pure functions of Qwen2.5-VL over `params = {"vision", "language"}` and an optional adapter of the language model."""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from uae_jax import trees
from uae_jax.models.qwen2_5_vl.config import Qwen2_5VLConfig
from uae_jax.models.qwen2_5_vl.frozen_head import frozen_head_scores
from uae_jax.models.qwen2_5_vl.text import KV, LanguageModel, Memory
from uae_jax.models.qwen2_5_vl.vision import VisionTower
from uae_jax.nn.attention import preferred_length
from uae_jax.nn.constrain import constrain
from uae_jax.nn.linear import Dense
from uae_jax.nn.loops import scan

ADAPTER_PATTERN = r"layers/(attention|mlp)/.*"  # all linear layers of the text model, as in the release
SCORE_CHUNK = 64  # positions of each row whose logits exist at once, by default


class Prefix(NamedTuple):
    """A prompt that was computed once and is read by all completions of its group.

    Attributes:
      memory: keys and values `[L, B, Tp, H', K]` and their mask `[B, Tp]`.
      next_position: int `[B]`, the M-RoPE position of the first completion token.
      last_hidden: `[B, D]`, the hidden state that scores the first completion token.
    """

    memory: Memory
    next_position: Array
    last_hidden: Array


class TokenScores(NamedTuple):
    """Float32 `[N, T]` each; zero where masked.

    Attributes:
      log_probs: log-probability of each token.
      entropy: entropy of the distribution each token was drawn from in nats, without a gradient; or None.
    """

    log_probs: Array
    entropy: Array | None


def init_params(config: Qwen2_5VLConfig, key: Array) -> dict:
    """Random parameters `{"vision", "language"}`, float32."""
    vision, ids = config.vision, jnp.zeros((1, 2), jnp.int32)
    patches = config.vision.merge_size**2
    groups = jnp.zeros((1, patches), jnp.int32)
    vision_inputs = (jnp.zeros((1, patches, vision.patch_width)), jnp.zeros((1, patches, 2), jnp.int32), groups, groups)
    language = LanguageModel(config.text).init(trees.name_key(key, "language"), ids, method="initialise")
    return {
        "vision": VisionTower(vision).init(trees.name_key(key, "vision"), *vision_inputs)["params"],
        "language": language["params"],
    }


@functools.lru_cache(maxsize=32)  # tracing is most of the time of reading a small model
def abstract_params(config: Qwen2_5VLConfig) -> dict:
    """Shapes of `init_params`, without computing anything."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def _apply(
    config: Qwen2_5VLConfig, params: Mapping, adapter: Mapping | None, *args, method=None, return_kv: bool = False
):
    variables = {"params": params["language"]}
    if adapter is not None:
        variables["lora"] = adapter
    return LanguageModel(config.text, return_kv).apply(variables, *args, method=method)


def encode_images(
    config: Qwen2_5VLConfig, params: Mapping, patches: Array, positions: Array, windows: Array, images: Array
) -> Array:
    """Image embeddings `[B, P / 4, D]` of the patches of each row; see `vision.VisionTower` for the arguments."""
    return VisionTower(config.vision).apply({"params": params["vision"]}, patches, positions, windows, images)


def embed_tokens(config: Qwen2_5VLConfig, params: Mapping, ids: Array) -> Array:
    """Token embeddings `[..., D]`."""
    return _apply(config, params, None, ids, method="embed")


def embed_prompt(
    config: Qwen2_5VLConfig, params: Mapping, ids: Array, mask: Array, image_embeds: Array | None
) -> Array:
    """Token embeddings with the image embeddings, in order, in place of the image tokens.

    Args:
      config: sizes.
      params: parameters.
      ids: int `[B, T]`.
      mask: bool `[B, T]`; image tokens in the padding are not counted.
      image_embeds: `[B, P / 4, D]`, or None for text alone.

    Returns:
      `[B, T, D]`.
    """
    embeds = embed_tokens(config, params, ids)
    if image_embeds is None:
        return embeds
    is_image = (ids == config.image_token_id) & mask
    order = jnp.clip(jnp.cumsum(is_image, axis=1) - 1, 0, image_embeds.shape[1] - 1)
    placed = jnp.take_along_axis(image_embeds, order[..., None], axis=1)
    return jnp.where(is_image[..., None], placed.astype(embeds.dtype), embeds)


def logits(config: Qwen2_5VLConfig, params: Mapping, hidden: Array) -> Array:
    """Float32 logits `[..., V]` of final hidden states `[..., D]`."""
    return _apply(config, params, None, hidden, method="logits")


def hidden_states(
    config: Qwen2_5VLConfig,
    params: Mapping,
    adapter: Mapping | None,
    embeds: Array,
    positions: Array,
    mask: Array,
    memories: tuple[Memory, ...] = (),
) -> Array:
    """Hidden states after the final norm `[N, T, D]`; see `text.LanguageModel` for the arguments."""
    return _apply(config, params, adapter, embeds, positions, mask, memories)[0]


def hidden_states_and_kv(
    config: Qwen2_5VLConfig,
    params: Mapping,
    adapter: Mapping | None,
    embeds: Array,
    positions: Array,
    mask: Array,
    memories: tuple[Memory, ...] = (),
) -> tuple[Array, KV]:
    """As `hidden_states`, and the keys and values `[L, N, T, H', K]` of these tokens."""
    return _apply(config, params, adapter, embeds, positions, mask, memories, return_kv=True)


def prompt_prefix(
    config: Qwen2_5VLConfig,
    params: Mapping,
    adapter: Mapping | None,
    batch: Mapping[str, Array],
    image_embeds: Array | None = None,
) -> Prefix:
    """Runs the caption prompts once, for sampling and scoring any number of completions.

    Args:
      config: sizes.
      params: parameters.
      adapter: adapter of the language model, or None for the reference model.
      batch: `prompt_ids`, `prompt_mask`, `prompt_positions`, `prompt_next`; also `patches`, `patch_positions`,
        `patch_windows`, `patch_images` unless `image_embeds` is given or the prompt is text alone.
      image_embeds: result of `encode_images`, to share it between policy and reference.

    Returns:
      The prefix of the B prompts; gradients flow through it.
    """
    if image_embeds is None and "patches" in batch:
        names = ("patches", "patch_positions", "patch_windows", "patch_images")
        image_embeds = encode_images(config, params, *(batch[name] for name in names))
    mask = batch["prompt_mask"]
    embeds = embed_prompt(config, params, batch["prompt_ids"], mask, image_embeds)
    hidden, kv = hidden_states_and_kv(config, params, adapter, embeds, batch["prompt_positions"], mask)
    last = jnp.maximum(jnp.sum(mask, axis=1) - 1, 0)
    last_hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    return Prefix(Memory(kv, mask), batch["prompt_next"], last_hidden)


def text_positions(start: Array, length: int) -> Array:
    """M-RoPE positions `[N, T, 3]` of text that begins at `start` `[N]`: the three axes are equal."""
    return jnp.broadcast_to((start[:, None] + jnp.arange(length))[..., None], (*start.shape, length, 3))


def completion_hidden_states(
    config: Qwen2_5VLConfig, params: Mapping, adapter: Mapping | None, prefix: Prefix, tokens: Array, mask: Array
) -> Array:
    """The hidden states that score each completion token: entry t has seen the prompt and tokens before t.

    Args:
      config: sizes.
      params: parameters.
      adapter: adapter or None.
      prefix: prompts of B images.
      tokens: int `[N, T]`; N = B * G, rows of a group together.
      mask: bool `[N, T]`, a prefix of each row.

    Returns:
      `[N, T, D]`.
    """
    rows, length = tokens.shape
    group = rows // prefix.next_position.shape[0]
    positions = text_positions(jnp.repeat(prefix.next_position, group), length)
    embeds = embed_tokens(config, params, tokens)
    hidden = hidden_states(config, params, adapter, embeds, positions, mask, (prefix.memory,))
    first = jnp.repeat(prefix.last_hidden, group, axis=0)
    return jnp.concatenate([first[:, None], hidden[:, :-1]], axis=1)


def token_log_probs(scaled: Array, tokens: Array) -> tuple[Array, Array]:
    """Log-softmax of float32 logits `[..., V]` at tokens `[...]`, and the log of the normaliser.

    Selecting by comparison instead of gathering keeps the gradient one fused expression, also where V is sharded.
    """
    normaliser = jax.nn.logsumexp(scaled, axis=-1)
    at_token = jax.lax.broadcasted_iota(jnp.int32, scaled.shape, scaled.ndim - 1) == tokens[..., None]
    return jnp.sum(jnp.where(at_token, scaled, 0.0), axis=-1) - normaliser, normaliser


def score_tokens(
    config: Qwen2_5VLConfig,
    params: Mapping,
    hidden: Array,
    tokens: Array,
    *,
    temperature: float | Array = 1.0,
    chunk: int = SCORE_CHUNK,
    with_entropy: bool = False,
    frozen_head: bool = False,
) -> TokenScores:
    """Log-softmax of `logits / temperature` at the tokens, in float32, `chunk` positions at a time.

    `[N, T, V]` never exists. The logits of a chunk are recomputed in the backward pass. Where the head is frozen,
    logits of all positions and of a part of the vocabulary exist at once, as many as those of a chunk
    (`frozen_head_scores`).

    Args:
      config: sizes.
      params: parameters.
      hidden: `[N, T, D]`, the states that predict the tokens.
      tokens: int `[N, T]`.
      temperature: positive; that of the sampler.
      chunk: positions in one piece.
      with_entropy: whether the entropy is computed too.
      frozen_head: nothing differentiates `params`, as where an adapter is trained.
    """
    rows, length, width = hidden.shape
    chunk = min(chunk, length)
    pieces = -(-length // chunk)
    if frozen_head:
        language, tied = params["language"], config.text.tied
        head = language["embedding"]["table"] if tied else language["head"]["kernel"]
        found = frozen_head_scores(
            head,
            tied,
            hidden.reshape(-1, width),
            tokens.reshape(-1),
            temperature=temperature,
            blocks=pieces,
            with_entropy=with_entropy,
        )
        return jax.tree.map(lambda x: x.reshape(rows, length), TokenScores(*found))
    padding = pieces * chunk - length
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0))).reshape(rows, pieces, chunk, width).swapaxes(0, 1)
    targets = jnp.pad(tokens, ((0, 0), (0, padding))).reshape(rows, pieces, chunk).swapaxes(0, 1)

    @jax.checkpoint
    def score(states: Array, wanted: Array) -> tuple[Array, Array | None]:
        scaled = logits(config, params, states) / temperature
        log_probs, normaliser = token_log_probs(scaled, wanted)
        if not with_entropy:
            return log_probs, None
        scaled, normaliser = jax.lax.stop_gradient((scaled, normaliser))
        return log_probs, normaliser - jnp.sum(jnp.exp(scaled - normaliser[..., None]) * scaled, axis=-1)

    _, found = scan(lambda _, piece: (None, score(*piece)), None, (hidden, targets))
    scores = TokenScores(*found)
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(rows, -1)[:, :length], scores)


def completion_log_probs(
    config: Qwen2_5VLConfig,
    params: Mapping,
    adapter: Mapping | None,
    prefix: Prefix,
    tokens: Array,
    mask: Array,
    *,
    temperature: float | Array = 1.0,
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
      tokens: int `[N, T]` or `[B, G, T]`; rows of a group together.
      mask: bool, as `tokens`; true up to and including the first stop token.
      temperature: positive; that of the sampler.
      chunk: positions whose logits exist at once.
      with_entropy: whether the entropy is returned too.
      frozen_head: see `score_tokens`.

    Returns:
      Scores of the shape of `tokens`, zero where masked.
    """
    shape, flat_mask = tokens.shape, mask.reshape(-1, mask.shape[-1])
    tokens = tokens.reshape(-1, shape[-1])
    hidden = completion_hidden_states(config, params, adapter, prefix, tokens, flat_mask)
    scores = score_tokens(
        config,
        params,
        hidden,
        tokens,
        temperature=temperature,
        chunk=chunk,
        with_entropy=with_entropy,
        frozen_head=frozen_head,
    )
    return jax.tree.map(lambda x: jnp.where(flat_mask, x, 0.0).reshape(shape), scores)


def text_hidden_states(
    config: Qwen2_5VLConfig, params: Mapping, adapter: Mapping | None, ids: Array, mask: Array
) -> Array:
    """Final hidden states `[N, T, D]` of right-padded text `[N, T]`, which the projector maps to the decoder's
    context.
    """
    length = ids.shape[1]
    room = ((0, 0), (0, preferred_length(length) - length))
    ids, mask = jnp.pad(ids, room, constant_values=config.pad_token_id), jnp.pad(mask, room)
    positions = text_positions(jnp.zeros(1, jnp.int32), ids.shape[1])  # the same for all rows
    return hidden_states(config, params, adapter, embed_tokens(config, params, ids), positions, mask)[:, :length]


class Projector(nn.Module):
    """Language width to the width of the diffusion transformer's context: linear, GELU, linear (arXiv 2509.09666,
    section 3).

    Attributes:
      hidden: inner width.
      features: output width.
    """

    hidden: int
    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """`[..., D]` to `[..., features]`."""
        inner = constrain(
            nn.gelu(Dense(self.hidden, name="first")(x), approximate=False), "batch", *[None] * (x.ndim - 2), "hidden"
        )
        return Dense(self.features, name="second")(inner)


def init_projector(key: Array, width: int, hidden: int, features: int) -> dict:
    """Random parameters of a projector from `width` to `features`."""
    return Projector(hidden, features).init(key, jnp.zeros((1, width)))["params"]


def project(projector_params: Mapping, hidden: Array) -> Array:
    """Applies the projector, whose sizes are those of its parameters: `[..., D]` to `[..., features]`."""
    sizes = (projector_params[name]["kernel"].shape[-1] for name in ("first", "second"))
    return constrain(Projector(*sizes).apply({"params": projector_params}, hidden), "batch")
