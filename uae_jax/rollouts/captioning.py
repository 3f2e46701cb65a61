"""Captions of images by the trained captioner: for rollouts of both RL stages, for scores and for inference.

Shape letters: b images, n captions, t caption tokens, p image patches, e image embeddings, d their width.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Key

from uae_jax import trees
from uae_jax.models import condition, uae
from uae_jax.models.language.config import CaptionerConfig
from uae_jax.models.language.generate import Completion, generate
from uae_jax.models.language.model import Prefix
from uae_jax.models.language.sampling import SamplingConfig
from uae_jax.models.language.slots import generate_in_slots
from uae_jax.models.qwen2_5_vl import model as qwen
from uae_jax.nn import int8
from uae_jax.nn.constrain import ways as spread
from uae_jax.nn.device import platform
from uae_jax.rl.losses import Metrics
from uae_jax.rollouts import shared_sampling
from uae_jax.rollouts.reconstruction import sample_keys
from uae_jax.sharding import gather_over_fsdp
from uae_jax.trees import Tree

REPEATED = 4  # tokens of the sequences whose repetition is counted
# fields of a batch (`data.loader`): of images for the captioner, of its prompt, and of the data set's captions
IMAGE_FIELDS = ("patches", "patch_positions", "patch_windows", "patch_images")
PROMPT_FIELDS = ("prompt_ids", "prompt_mask", "prompt_positions", "prompt_next")
CAPTION_FIELDS = ("caption_ids", "caption_mask")


def encode_batch_images(model: uae.UAE, parts: Mapping[str, Tree], batch: Mapping[str, Array]) -> Float[Array, "b e d"]:
    """Image embeddings of a batch (`data.loader`); four patches are merged into one embedding."""
    return qwen.encode_images(model.captioner, parts, *(batch[name] for name in IMAGE_FIELDS))


def sample_captions(
    model: uae.UAE,
    parts: Mapping[str, Tree],
    batch: Mapping[str, Array],
    key: Key[Array, ""],
    image_embeds: Float[Array, "b e d"] | None = None,
    *,
    max_new_tokens: int,
    stops: tuple[int, ...],
    sampling: SamplingConfig,
    group: int = 1,
    gather_weights: bool = False,
    weights: str = "model",
    ways: int = 0,
    slots: int = 0,
    parts_of_prompts: int = 1,
) -> Completion:
    """Captions by the policy, n = b * group rows, those of a group together.

    The random keys are those of the global sample ids and do not depend on the batch.

    Args:
      model, parts: the model.
      batch: b images with prompts and `sample_id` (`data.loader`).
      key: of the step.
      image_embeds: of `encode_batch_images`, to share them; None computes them.
      max_new_tokens: t.
      stops: ids that end a caption.
      sampling: temperature and truncation.
      group: captions per image.
      gather_weights, weights: see `for_decoding`.
      ways, slots: see `complete_prompts`.
      parts_of_prompts: the prompts are read in so many parts; a divisor of b.
    """
    params, adapter = uae.captioner_weights(parts, policy=True)
    if model.banned:
        sampling = dataclasses.replace(sampling, banned=model.banned)
    read = functools.partial(_prompts, model, parts, batch, image_embeds, parts_of_prompts)
    return complete_prompts(
        model.captioner,
        params,
        adapter,
        read,
        sample_keys(trees.name_key(key, "caption"), batch["sample_id"], group),
        max_new_tokens=max_new_tokens,
        stops=stops,
        sampling=sampling,
        group=group,
        gather_weights=gather_weights,
        weights=weights,
        ways=ways,
        slots=slots,
    )


def _prompts(
    model: uae.UAE,
    parts: Mapping[str, Tree],
    batch: Mapping[str, Array],
    image_embeds: Float[Array, "b e d"] | None,
    count: int,
    params: Tree,
    adapter: Tree | None,
) -> Prefix:
    """The prompts of a batch, read in `count` parts."""

    def read(rows: Mapping[str, Array]) -> Prefix:
        images = encode_batch_images(model, parts, rows) if image_embeds is None else rows["image_embeds"]
        return qwen.prompt_prefix(model.captioner, params, adapter, rows, images)

    def rows_first(prefix: Prefix) -> Prefix:
        kv = jax.tree.map(lambda x: x.swapaxes(0, 1), prefix.memory.kv)
        return prefix._replace(memory=prefix.memory._replace(kv=kv))

    seen = {name: batch[name] for name in (*IMAGE_FIELDS, *PROMPT_FIELDS) if name in batch}
    seen |= {} if image_embeds is None else {"image_embeds": image_embeds}
    if count == 1:
        return read(seen)
    return rows_first(trees.map_parts(lambda rows: rows_first(read(rows)), trees.cut(seen, count)))


def complete_prompts(
    config: CaptionerConfig,
    params: dict[str, Tree],
    adapter: Tree | None,
    prefix_of: Callable[[Tree, Tree | None], Prefix],
    keys: Key[Array, " n"],
    *,
    max_new_tokens: int,
    stops: tuple[int, ...],
    sampling: SamplingConfig,
    group: int,
    gather_weights: bool,
    weights: str = "model",
    ways: int = 0,
    slots: int = 0,
) -> Completion:
    """Completions of the prompts of any captioner.

    Args:
      config: of the captioner.
      params: with `language`.
      adapter: of the language model, or None.
      prefix_of: `(params, adapter) -> Prefix`, called with the weights of `for_decoding`.
      keys: one for each completion.
      max_new_tokens, stops, sampling, group, gather_weights, weights: see `sample_captions`.
      ways: devices that share one gathered copy of the language model (`shared_sampling`); 0 for one copy a device, in
        the form that suits it.
      slots: completions that one device samples at once (`language.slots`); 0 for all.

    Raises:
      ValueError: slots, and a batch that lies on several devices.
    """
    if slots and spread("batch") > 1:
        raise ValueError(
            f"rollout_slots is {slots}; it is for one device, and the batch lies on {spread('batch')}: set it to 0"
        )
    if gather_weights and ways and shared_sampling.applies(config, len(keys) // group, ways):
        params = rounded(params) if weights == "int8" else params
        prefix = prefix_of(params, adapter)
        return shared_sampling.sample_shared(
            config,
            params,
            adapter,
            prefix,
            keys,
            ways=ways,
            max_new_tokens=max_new_tokens,
            stop_ids=stops,
            sampling=sampling,
            group=group,
        )
    params, adapter, packed = for_decoding(config, params, adapter, gather_weights, weights)
    sample = functools.partial(generate_in_slots, slots=slots) if slots else generate
    return sample(
        config,
        params,
        adapter,
        prefix_of(params, adapter),
        keys,
        max_new_tokens=max_new_tokens,
        stop_ids=stops,
        sampling=sampling,
        group=group,
        packed=packed,
    )


def for_decoding(
    config: CaptionerConfig,
    params: dict[str, Tree],
    adapter: Tree | None,
    gather_weights: bool,
    weights: str = "model",
) -> tuple[dict[str, Tree], Tree | None, bool]:
    """The weights that a loop over tokens reads, and whether it takes the form of `language.decoding`.

    Args:
      config: of the captioner.
      params: with `language`.
      adapter: of the language model, or None.
      gather_weights: gather the language model once, before the loop (`sharding.gather_over_fsdp`). GPUs take the form
        of `language.decoding`, unless heads are sharded over devices.
      weights: "int8" rounds the kernels of the layers to 8 bits before they are gathered; see `nn.int8`. They are not
        packed for GPUs then.
    """
    packed = gather_weights and platform() == "gpu" and spread("heads") == 1 and weights == "model"
    params = rounded(params) if weights == "int8" else params
    if gather_weights:
        language, dtype = params["language"], config.text.dtype
        # packing gathers the layers one by one; gathered here, all of them would be in memory twice
        read = {name: part for name, part in language.items() if not (packed and name == "layers")}
        params = params | {"language": language | gather_over_fsdp(read, dtype)}
        adapter = adapter if packed or adapter is None else gather_over_fsdp(adapter, dtype)
    return params, adapter, packed


def rounded(params: dict[str, Tree]) -> dict[str, Tree]:
    """A captioner whose layers have kernels of 8 bits (`nn.int8`)."""
    layers, scales = int8.quantised(params["language"]["layers"])
    return params | {"language": params["language"] | {"layers": layers}, int8.SCALES: {"layers": scales}}


def drawn_captions(
    share: float, completion: Completion, batch: Mapping[str, Array], key: Key[Array, ""]
) -> tuple[Int[Array, "b t"], Int[Array, " b"]]:
    """The captions whose images are generated, with their lengths.

    They are the captioner's or, for a share of the images, the data set's own.

    Args:
      share: of the images, in [0, 1].
      completion: one caption per image.
      batch: with `sample_id`, `caption_ids`, `caption_mask` (`data.loader`).
      key: of the step.
    """
    tokens, lengths = completion.tokens, condition.caption_lengths(completion.mask, completion.finished)
    if not share:
        return tokens, lengths
    keys = sample_keys(trees.name_key(key, "data_captions"), batch["sample_id"])
    own = jax.vmap(lambda k: jax.random.bernoulli(k, share))(keys)
    width = max(tokens.shape[1], batch["caption_ids"].shape[1])
    written, given = (jnp.pad(ids, ((0, 0), (0, width - ids.shape[1]))) for ids in (tokens, batch["caption_ids"]))
    given_lengths = jnp.sum(batch["caption_mask"], -1, dtype=jnp.int32) - 1
    return jnp.where(own[:, None], given, written), jnp.where(own, given_lengths, lengths)


def repeated_sequences(
    tokens: Int[Array, "n t"], mask: Bool[Array, "n t"]
) -> tuple[Float32[Array, " n"], Float32[Array, " n"]]:
    """Counts the sequences of `REPEATED` tokens that a caption has had before (seq-rep-4, arXiv 1908.04319, eq. 3).

    Args:
      tokens: not negative.
      mask: true up to the end of each caption.

    Returns:
      The repeated sequences of each caption, and all its sequences.
    """
    width = tokens.shape[1] - REPEATED + 1
    if width < 2:
        return jnp.zeros(len(tokens)), jnp.sum(mask[:, REPEATED - 1 :], -1, dtype=jnp.float32)
    complete = mask[:, REPEATED - 1 :]
    # beyond the end every sequence is unlike all others
    first = jnp.where(complete, tokens[:, :width], -1 - jnp.arange(width))
    columns = jax.lax.sort(
        [first, *(tokens[:, at : at + width] for at in range(1, REPEATED))], dimension=1, num_keys=REPEATED
    )
    same = jnp.all(jnp.stack([column[:, 1:] == column[:, :-1] for column in columns]), axis=0)
    return jnp.sum(same, -1, dtype=jnp.float32), jnp.sum(complete, -1, dtype=jnp.float32)


def caption_metrics(completion: Completion, group: int) -> Metrics:
    """Length, truncation, variety and repetition of sampled captions.

    `repetition` is the share of all sequences of four tokens that their caption has had before.
    """
    tokens, rows = jnp.where(completion.mask, completion.tokens, -1), jnp.float32(len(completion.tokens))
    grouped = tokens.reshape(-1, group, tokens.shape[-1])
    same = jnp.all(grouped[:, :, None] == grouped[:, None], axis=-1)
    repeats, sequences = repeated_sequences(completion.tokens, completion.mask)
    lengths = condition.caption_lengths(completion.mask, completion.finished)
    return {
        "caption_tokens": (jnp.sum(lengths, dtype=jnp.float32), rows),
        "truncated_fraction": (jnp.sum(~completion.finished, dtype=jnp.float32), rows),
        "unique_fraction": (jnp.sum(1.0 / jnp.sum(same, -1)), rows),
        "repetition": (jnp.sum(repeats), jnp.sum(sequences)),
    }
