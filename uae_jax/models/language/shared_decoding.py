"""One token at a time on a few devices that share the weights, in the form that TPUs read fastest.

Reading the weights is what a token costs, whether for one row or for a hundred. So a few neighbouring devices put their
rows together. Each reads its part of every matrix for the rows of all, and two sums a layer join the parts (Megatron's
division, arXiv 1909.08053). Of `ways` devices, each holds 1 / ways of the query heads, of the inner width of the MLP
and of the vocabulary. With one device nothing is exchanged.

Products of one input stand side by side in one matrix, as in `decoding`, and layers are stacked: XLA reads a layer out
of the stack inside its products, and has no reason to lay a matrix out anew. Everything here runs inside a `shard_map`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from uae_jax.models.language.config import TextConfig
from uae_jax.models.language.decoding import PackedLayer, Product, apply_product, joined_product, normed
from uae_jax.models.language.text import KV, Memory, mrope_angles
from uae_jax.nn.attention import Mask, SharedKeys, attention
from uae_jax.nn.rope import apply_rope

Params = Mapping[str, Any]


class Group(NamedTuple):
    """The devices that share the weights: so many neighbours along an axis of the mesh.

    Attributes:
      axis: name of the axis; size: of the axis; ways: devices of a group, a divisor of the size.
    """

    axis: str
    size: int
    ways: int

    @property
    def groups(self) -> list[list[int]] | None:
        """The places along the axis of each group's devices; None where a group is the axis."""
        if self.ways == self.size:
            return None
        return [list(range(start, start + self.ways)) for start in range(0, self.size, self.ways)]

    @property
    def member(self) -> Array | int:
        """The place of this device in its group."""
        return lax.axis_index(self.axis) % self.ways if self.ways > 1 else 0

    def sum(self, x: Array) -> Array:
        """Over the group."""
        return x if self.ways == 1 else lax.psum(x, self.axis, axis_index_groups=self.groups)

    def gather(self, x: Array, axis: int = 0) -> Array:
        """The group's arrays behind each other."""
        if self.ways == 1:
            return x
        return lax.all_gather(x, self.axis, axis=axis, tiled=True, axis_index_groups=self.groups)

    def rows_for_columns(self, x: Float[Array, "n v"]) -> Float[Array, "own all"]:
        """Of the rows of all with some columns, this device's rows with all columns."""
        if self.ways == 1:
            return x
        return lax.all_to_all(x, self.axis, 0, 1, tiled=True, axis_index_groups=self.groups)

    def part(self, x: Array, axis: int, parts: int | None = None) -> Array:
        """This device's part of an array; with fewer parts than devices, neighbours have the same one."""
        parts = parts or self.ways
        size = x.shape[axis] // parts
        if self.ways == 1 or parts == 1:
            return x
        return lax.dynamic_slice_in_dim(x, self.member * parts // self.ways * size, size, axis)


def problem(text: TextConfig, ways: int) -> str:
    """Why so many devices cannot share a model; empty if they can."""
    if text.heads % ways or (text.key_heads % ways and ways % text.key_heads):
        return f"{text.heads} query heads and {text.key_heads} key heads"
    if text.mlp_width % ways or text.vocab_size % ways:
        return f"an MLP of {text.mlp_width} and a vocabulary of {text.vocab_size}"
    return ""


def key_parts(text: TextConfig, ways: int) -> int:
    """The parts that key heads are cut into."""
    return min(ways, text.key_heads)


def cut_layer(text: TextConfig, group: Group, own: Params, factors: Params, scales: Params) -> PackedLayer:
    """This device's part of a complete layer.

    Args:
      text: sizes.
      group: the devices.
      own: parameters of the layer.
      factors: its adapter, or empty.
      scales: of kernels of 8 bits (`nn.int8`), or empty.
    """
    keys = key_parts(text, group.ways)

    def by_outputs(part: str, *names: str) -> Product:
        maps, adapters = [], []
        for name in names:
            parts = keys if name in ("key", "value") else group.ways
            found = {word: group.part(leaf, leaf.ndim - 1, parts) for word, leaf in own[part][name].items()}
            if (scale := scales.get(part, {}).get(name)) is not None:
                found["scale"] = group.part(scale["kernel"], 0, parts)
            maps.append(found)
            factor = factors.get(part, {}).get(name)
            adapters.append(None if factor is None else {"a": factor["a"], "b": group.part(factor["b"], 1, parts)})
        return joined_product(text, maps, adapters)

    def by_inputs(part: str, name: str) -> Product:
        found = {"kernel": group.part(own[part][name]["kernel"], 0)}
        if (scale := scales.get(part, {}).get(name)) is not None:
            found["scale"] = scale["kernel"]
        factor = factors.get(part, {}).get(name)
        adapter = None if factor is None else {"a": group.part(factor["a"], 0), "b": factor["b"]}
        return joined_product(text, [found], [adapter])

    return PackedLayer(
        own["attention_norm"]["scale"],
        by_outputs("attention", "query", "key", "value"),
        by_inputs("attention", "output"),
        own["mlp_norm"]["scale"],
        by_outputs("mlp", "gate", "up"),
        by_inputs("mlp", "down"),
    )


def cut_memory(text: TextConfig, group: Group, memory: Memory) -> Memory:
    """The prompts of the whole group, with this device's key heads."""
    keys = key_parts(text, group.ways)
    kv = KV(*(group.part(group.gather(x, 1), 3, keys) for x in memory.kv))
    return Memory(kv, group.gather(memory.mask))


def empty_cache(memory: Memory, rows: int, length: int) -> KV:
    """Room for the keys and values `[L, N, T, J, K]` of N rows."""

    def empty(prompt: Array) -> Array:
        layers, _, _, heads, width = prompt.shape
        return jnp.zeros((layers, rows, length, heads, width), prompt.dtype)

    return KV(*(empty(part) for part in memory.kv))


def decode_token(
    text: TextConfig,
    group: Group,
    layers: PackedLayer,
    final_scale: Float[Array, " d"],
    memory: Memory,
    cache: KV,
    embeds: Float[Array, "n d"],
    positions: Int[Array, " n"],
    step: Int[Array, ""],
) -> tuple[Float[Array, "n d"], KV]:
    """One token of every row of the group through all layers.

    Args:
      text: sizes.
      group: the devices.
      layers: of `cut_layer`, stacked.
      final_scale: of the last norm.
      memory: of `cut_memory`.
      cache: of `empty_cache`, filled up to `step`.
      embeds: of the tokens; positions: the same on all three axes.
      step: t.

    Returns:
      Hidden states after the final norm, and the cache with this token.
    """
    rows, length = cache.key.shape[1:3]
    angles = mrope_angles(text, jnp.broadcast_to(positions[:, None, None], (rows, 1, 3)))[:, 0]
    earlier = jnp.broadcast_to(jnp.arange(length) < step, (rows, length))

    def layer(x: Array, given: tuple[PackedLayer, KV, KV]) -> tuple[Array, KV]:
        packed, prompt, written = given
        shared = SharedKeys(*prompt, memory.mask), SharedKeys(*written, earlier)
        return _layer(text, group, packed, x, angles, shared)

    hidden, new = lax.scan(layer, embeds, (layers, memory.kv, cache))
    cache = KV(*(lax.dynamic_update_slice_in_dim(old, part, step, axis=2) for old, part in zip(cache, new)))
    return normed(text, final_scale, hidden), cache


def _layer(
    text: TextConfig, group: Group, packed: PackedLayer, x: Array, angles: Array, shared: Sequence[SharedKeys]
) -> tuple[Array, KV]:
    rows, width, keys = len(x), text.head_width, shared[0].key.shape[2]
    inputs = apply_product(packed.inputs, normed(text, packed.attention_scale, x))
    heads = inputs.shape[1] // width - 2 * keys
    query, key, value = jnp.split(inputs, [heads * width, (heads + keys) * width], axis=1)
    query = apply_rope(query.reshape(rows, heads, width), angles)[:, None]
    key = apply_rope(key.reshape(rows, keys, width), angles)[:, None]
    value = value.reshape(rows, 1, keys, width)
    own = Mask(valid=jnp.ones((rows, 1), bool), causal=True)
    mixed = attention(query, key, value, own, tuple(shared)).reshape(rows, -1)
    x = x + group.sum(apply_product(packed.output, mixed))
    gate, up = jnp.split(apply_product(packed.gate_and_up, normed(text, packed.mlp_scale, x)), 2, axis=1)
    return x + group.sum(apply_product(packed.down, jax.nn.silu(gate) * up)), KV(key, value)


def vocabulary_functions(
    text: TextConfig, group: Group, table: Float[Array, "v d"], head: Float[Array, "d v"] | None
) -> tuple[Callable[[Float[Array, "n d"]], Float[Array, "own vocab"]], Callable[[Int[Array, " own"]], Array]]:
    """Logits of this device's rows from the states of all, and the embeddings of all from this device's tokens.

    Args:
      text: sizes.
      group: the devices.
      table: this device's rows of the embedding table.
      head: this device's columns of an output matrix; None where the table is the head.
    """

    def logits(hidden: Float[Array, "n d"]) -> Float[Array, "own vocab"]:
        if head is None:
            found = jnp.einsum("nd,vd->nv", hidden, table.astype(hidden.dtype), preferred_element_type=jnp.float32)
        else:
            found = jnp.einsum("nd,dv->nv", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)
        return group.rows_for_columns(found)

    def embed(tokens: Int[Array, " own"]) -> Float[Array, "n d"]:
        place = group.gather(tokens) - group.member * len(table)
        mine: Bool[Array, " n"] = (place >= 0) & (place < len(table))
        rows = jnp.take(table, jnp.where(mine, place, 0), axis=0).astype(text.dtype)
        return group.sum(jnp.where(mine[:, None], rows, jnp.zeros((), rows.dtype)))

    return logits, embed
