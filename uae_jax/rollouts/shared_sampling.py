"""Sampling by devices that share the captioner's weights: the layout of a rollout beside that of training.

Training cuts every matrix over all devices of `fsdp`, and gathers it where it is read. A loop over tokens would gather
the model for every token, or keep a whole copy on each device and read all of it for a few rows. Here neighbours along
`fsdp` keep one copy together (`models.language.shared_decoding`), made once before the loop.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Key

from uae_jax import trees
from uae_jax.models.language import shared_decoding as shared
from uae_jax.models.language.config import CaptionerConfig
from uae_jax.models.language.generate import Completion, Decoder, sample_sequences
from uae_jax.models.language.model import Prefix
from uae_jax.models.language.sampling import SamplingConfig
from uae_jax.nn import int8
from uae_jax.nn.device import current_mesh
from uae_jax.sharding import BATCH, parameter_spec
from uae_jax.trees import Tree

AXIS = "fsdp"


def applies(config: CaptionerConfig, rows: int, ways: int) -> bool:
    """Whether so many devices share the weights for the completions of this many prompts.

    Without a mesh, and where the devices' parts of the prompts differ, every device has its own copy.

    Raises:
      ValueError: the devices do not divide `fsdp` or the model, or heads are sharded already.
    """
    mesh = current_mesh()
    if mesh is None or mesh.shape.get(AXIS, 1) == 1 or rows % (mesh.shape["data"] * mesh.shape[AXIS]):
        return False
    if mesh.shape[AXIS] % ways:
        raise ValueError(f"rollout_ways is {ways}; it must divide mesh.fsdp, which is {mesh.shape[AXIS]}")
    if mesh.shape.get("tensor", 1) > 1:
        raise ValueError("rollout_ways cuts the captioner by itself; set config.mesh.tensor to 1, or rollout_ways to 0")
    if found := shared.problem(config.text, ways):
        raise ValueError(f"rollout_ways is {ways}, which does not divide {found}; choose a divisor")
    return True


def sample_shared(
    config: CaptionerConfig,
    params: Mapping[str, Tree],
    adapter: Tree | None,
    prefix: Prefix,
    keys: Key[Array, " n"],
    *,
    ways: int,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    sampling: SamplingConfig,
    group: int,
) -> Completion:
    """`language.generate.generate` by groups of `ways` devices; see there for the arguments.

    Results differ by the rounding of sums over devices.
    """
    mesh = current_mesh()
    assert mesh is not None
    dtype = jnp.dtype(config.text.dtype)
    given = {"language": params["language"], "adapter": adapter or {}, "scales": params.get(int8.SCALES, {})}
    given = jax.tree.map(lambda x: x.astype(dtype) if x.ndim > 1 and x.dtype != jnp.int8 else x, given)
    specs = trees.map_with_name(lambda name, leaf: parameter_spec(name, leaf.shape, mesh), given)
    rows = PartitionSpec(BATCH)
    layered = PartitionSpec(None, BATCH)
    prefix_specs = jax.tree.map(lambda _: rows, prefix)
    prefix_specs = prefix_specs._replace(
        memory=prefix.memory._replace(kv=jax.tree.map(lambda _: layered, prefix.memory.kv), mask=rows)
    )
    neighbours = shared.Group(AXIS, mesh.shape[AXIS], ways)

    def sample(given: Any, prefix: Prefix, key_data: Array) -> Completion:
        decoder, logits, embed = _decoder(config, neighbours, given, specs, prefix, max_new_tokens, group)
        return sample_sequences(
            decoder,
            jax.random.wrap_key_data(key_data, impl=jax.random.key_impl(keys)),
            length=max_new_tokens,
            logits=logits,
            embed=embed,
            sampling=sampling,
            pad=config.pad_token_id,
            stop_ids=stop_ids,
            ended=lambda finished: lax.pmin(jnp.all(finished).astype(jnp.int32), BATCH) > 0,
        )

    return jax.shard_map(sample, in_specs=(specs, prefix_specs, rows), out_specs=rows, check_vma=False)(
        given, prefix, jax.random.key_data(keys)
    )


def _decoder(
    config: CaptionerConfig, group: shared.Group, given: Any, specs: Any, prefix: Prefix, length: int, copies: int
) -> tuple[Decoder, Any, Any]:
    """The decoder of this device's part of the weights, its logits and its embeddings, inside a `shard_map`."""
    text, language = config.text, given["language"]
    whole = functools.partial(jax.tree.map, _gathered)

    def layer(_: None, part: Any) -> tuple[None, Any]:
        own, factors, scales = whole(part, layer_specs)
        return None, shared.cut_layer(text, group, own, factors, scales)

    stacked = (language["layers"], given["adapter"].get("layers", {}), given["scales"].get("layers", {}))
    layer_specs = (
        specs["language"]["layers"],
        specs["adapter"].get("layers", {}),
        specs["scales"].get("layers", {}),
    )
    stacked = jax.tree.map(lambda leaf, spec: _gathered(leaf, spec[:1]), stacked, layer_specs)
    layer_specs = jax.tree.map(lambda spec: PartitionSpec(*spec[1:]), layer_specs, is_leaf=_is_spec)
    _, layers = lax.scan(layer, None, stacked)
    table = group.part(_gathered(language["embedding"]["table"], specs["language"]["embedding"]["table"]), 0)
    head = None
    if not text.tied:
        head = group.part(_gathered(language["head"]["kernel"], specs["language"]["head"]["kernel"]), 1)
    logits, embed = shared.vocabulary_functions(text, group, table, head)
    memory = shared.cut_memory(text, group, prefix.memory)
    start = group.gather(jnp.repeat(prefix.next_position, copies, axis=0))

    def advance(cache: Any, embeds: Array, step: Array) -> tuple[Array, Any]:
        scale = language["final_norm"]["scale"]
        return shared.decode_token(text, group, layers, scale, memory, cache, embeds, start + step, step)

    cache = shared.empty_cache(memory, len(start), length)
    hidden = group.gather(jnp.repeat(prefix.last_hidden, copies, axis=0))
    return Decoder(advance, cache, hidden), logits, embed


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, PartitionSpec)


def _gathered(leaf: Array, spec: Sequence[Any]) -> Array:
    """A complete leaf from the shards of all devices; `spec` has the mesh axis of each of its first axes, or None."""
    for axis, name in enumerate(spec):
        if name is not None:
            leaf = lax.all_gather(leaf, name, axis=axis, tiled=True)
    return leaf
