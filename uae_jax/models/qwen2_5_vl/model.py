"""Pure functions of Qwen2.5-VL over `params = {"vision", "language"}` and an optional adapter of the language model."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from uae_jax import trees
from uae_jax.models.qwen2_5_vl.config import Qwen2_5VLConfig
from uae_jax.models.qwen2_5_vl.frozen_head import frozen_head_scores
from uae_jax.models.qwen2_5_vl.text import KV, LanguageModel, Memory
from uae_jax.models.qwen2_5_vl.vision import VisionTower
from uae_jax.nn import int8
from uae_jax.nn.attention import preferred_length
from uae_jax.nn.constrain import constrain
from uae_jax.nn.linear import Dense
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


def init_params(config: Qwen2_5VLConfig, key: Key[Array, ""]) -> dict[str, Any]:
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
def abstract_params(config: Qwen2_5VLConfig) -> dict[str, Any]:
    """Shapes of `init_params`, without computing anything."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def _apply(
    config: Qwen2_5VLConfig,
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


def encode_images(
    config: Qwen2_5VLConfig,
    params: Params,
    patches: Float[Array, "b p pixels"],
    positions: Int[Array, "b p 2"],
    windows: Int[Array, "b p"],
    images: Int[Array, "b p"],
) -> Float[Array, "b merged d"]:
    """Image embeddings of the patches of each row; see `vision.VisionTower` for the arguments."""
    tower = VisionTower(config.vision)
    return cast(Array, tower.apply({"params": params["vision"]}, patches, positions, windows, images))


def embed_tokens(config: Qwen2_5VLConfig, params: Params, ids: Int[Array, "*rows"]) -> Float[Array, "*rows d"]:
    """Token embeddings."""
    return _apply(config, params, None, ids, method="embed")


def embed_prompt(
    config: Qwen2_5VLConfig,
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


def logits(config: Qwen2_5VLConfig, params: Params, hidden: Float[Array, "*rows d"]) -> Float[Array, "*rows v"]:
    """Float32 logits of final hidden states."""
    return _apply(config, params, None, hidden, method="logits")


def hidden_states(
    config: Qwen2_5VLConfig,
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
    config: Qwen2_5VLConfig,
    params: Params,
    adapter: Params | None,
    embeds: Float[Array, "n t d"],
    positions: Int[Array, "#n t 3"],
    mask: Bool[Array, "n t"],
    memories: tuple[Memory, ...] = (),
) -> tuple[Float[Array, "n t d"], KV]:
    """As `hidden_states`, and the keys and values `[L, N, T, J, K]` of these tokens."""
    return _apply(config, params, adapter, embeds, positions, mask, memories, return_kv=True)


def prompt_prefix(
    config: Qwen2_5VLConfig,
    params: Params,
    adapter: Params | None,
    batch: Mapping[str, Array],
    image_embeds: Float[Array, "b merged d"] | None = None,
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


def text_positions(start: Int[Array, " n"], length: int) -> Int[Array, "n {length} 3"]:
    """M-RoPE positions of text that begins at `start`: the three axes are equal."""
    return jnp.broadcast_to((start[:, None] + jnp.arange(length))[..., None], (*start.shape, length, 3))


def completion_hidden_states(
    config: Qwen2_5VLConfig,
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
    hidden = own_hidden_states(config, params, adapter, prefix, tokens, mask)
    first = jnp.repeat(prefix.last_hidden, len(tokens) // len(prefix.last_hidden), axis=0)
    return jnp.concatenate([first[:, None], hidden[:, :-1]], axis=1)


def own_hidden_states(
    config: Qwen2_5VLConfig,
    params: Params,
    adapter: Params | None,
    prefix: Prefix,
    tokens: Int[Array, "n t"],
    mask: Bool[Array, "n t"],
) -> Float[Array, "n t d"]:
    """The hidden states of the completion tokens themselves; see `completion_hidden_states` for the arguments."""
    rows, length = tokens.shape
    positions = text_positions(jnp.repeat(prefix.next_position, rows // len(prefix.next_position)), length)
    embeds = embed_tokens(config, params, tokens)
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
    config: Qwen2_5VLConfig,
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
    config: Qwen2_5VLConfig,
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


class Projector(nn.Module):
    """Language width to the width of the decoder's context: linear, GELU, linear (arXiv 2509.09666, section 3).

    Attributes:
      hidden: inner width.
      features: output width.
    """

    hidden: int
    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "*rows d"]) -> Float[Array, "*rows d_context"]:
        """Each token by itself."""
        inner = constrain(
            nn.gelu(Dense(self.hidden, name="first")(x), approximate=False), "batch", *[None] * (x.ndim - 2), "hidden"
        )
        return Dense(self.features, name="second")(inner)


def init_projector(key: Key[Array, ""], width: int, hidden: int, features: int) -> dict[str, Any]:
    """Random parameters of a projector from `width` to `features`."""
    return dict(Projector(hidden, features).init(key, jnp.zeros((1, width)))["params"])


def project(projector_params: Params, hidden: Float[Array, "*rows d"]) -> Float[Array, "*rows d_context"]:
    """Applies the projector, whose sizes are those of its parameters."""
    sizes = (projector_params[name]["kernel"].shape[-1] for name in ("first", "second"))
    return constrain(cast(Array, Projector(*sizes).apply({"params": projector_params}, hidden)), "batch")
