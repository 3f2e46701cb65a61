"""One token at a time in the form that GPUs read fastest: separate layers, few products, one cache.

A loop over stacked layers copies a layer's weights out of the stack before it multiplies with them. XLA joins products
of one input by joining their weights again for every token. Both together move four times the bytes of the weights
(dev/gpu.md). Here weights are joined once, before the loop over tokens. That takes the memory of one copy of the
language model in its own precision.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from uae_jax.models.language.config import TextConfig
from uae_jax.models.language.text import Memory, mrope_angles
from uae_jax.nn.attention.mask import MASKED
from uae_jax.nn.constrain import constrain, ways
from uae_jax.nn.norms import RMSNorm
from uae_jax.nn.rope import apply_rope

ROWS = 8  # that cuBLAS's tensor cores take at once in half precision

Params = Mapping[str, Any]


class Product(NamedTuple):
    """Affine maps of one input side by side, with their adapters.

    Attributes:
      kernel: of the maps.
      first: the first factors of the adapters; None without adapters.
      second: the scaled second factors of the adapters on a block diagonal.
      bias: of the maps, or None.
      scale: of each output of a kernel of 8 bits (`nn.int8`), or None.
    """

    kernel: Float[Array, "fan_in fan_out"]
    first: Float[Array, "fan_in rank"] | None
    second: Float[Array, "rank fan_out"] | None
    bias: Float[Array, " fan_out"] | None
    scale: Float[Array, " fan_out"] | None = None


class PackedLayer(NamedTuple):
    """The weights of one layer.

    Attributes:
      attention_scale, mlp_scale: of the norms.
      inputs: query, key and value; output, gate_and_up, down: the other products.
    """

    attention_scale: Float[Array, " d"]
    inputs: Product
    output: Product
    mlp_scale: Float[Array, " d"]
    gate_and_up: Product
    down: Product


class Cache(NamedTuple):
    """Rotated keys, and values, of one layer: S entries of the prompt and T of the caption."""

    key: Float[Array, "n j s+t k"]
    value: Float[Array, "n j s+t k"]


def pack(config: TextConfig, language: Params, adapter: Params | None) -> tuple[PackedLayer, ...]:
    """The layers of a language model as the loop over tokens reads them.

    Args:
      config: sizes, precision and adapter scale.
      language: parameters with stacked layers; adapter: of the same layers, or None.
    """

    def layer(index: int) -> PackedLayer:
        own, factors = (
            jax.tree.map(lambda leaf: leaf[index], tree)
            for tree in (language["layers"], (adapter or {}).get("layers", {}))
        )

        def product(part: str, *names: str) -> Product:
            return joined_product(
                config, [own[part][name] for name in names], [factors.get(part, {}).get(name) for name in names]
            )

        return PackedLayer(
            own["attention_norm"]["scale"],
            product("attention", "query", "key", "value"),
            product("attention", "output"),
            own["mlp_norm"]["scale"],
            product("mlp", "gate", "up"),
            product("mlp", "down"),
        )

    return tuple(layer(index) for index in range(config.layers))


def joined_product(config: TextConfig, maps: Sequence[Params], adapters: Sequence[Params | None]) -> Product:
    """Maps of one input side by side.

    Args:
      config: precision and adapter scale.
      maps: with `kernel`, and `bias` and `scale` where there are any.
      adapters: their factors, or None.
    """
    features = [map_["kernel"].shape[-1] for map_ in maps]
    first, second, start = [], [], 0
    for adapter, width in zip(adapters, features):
        if adapter is not None:
            first.append(adapter["a"])
            block = config.lora_alpha / adapter["b"].shape[0] * adapter["b"].astype(jnp.float32)
            second.append(jnp.pad(block, ((0, 0), (start, sum(features) - start - width))))
        start += width
    biases = [map_["bias"] for map_ in maps if "bias" in map_]
    scales = [map_["scale"] for map_ in maps if "scale" in map_]
    kernels = jnp.concatenate([map_["kernel"] for map_ in maps], 1)

    def joined(parts: Sequence[Array], axis: int) -> Array:
        # complete on every device, so that no token gathers what the loop over tokens reads
        return constrain(jnp.concatenate(parts, axis).astype(config.dtype), None)

    return Product(
        constrain(kernels if scales else kernels.astype(config.dtype), None),
        joined(first, 1) if first else None,
        joined(second, 0) if second else None,
        joined(biases, 0) if biases else None,
        jnp.concatenate(scales) if scales else None,
    )


def apply_product(product: Product, x: Float[Array, "n d"]) -> Float[Array, "n f"]:
    """The maps of each row, side by side."""
    y = x @ product.kernel.astype(x.dtype)
    if product.scale is not None:
        y = y * product.scale.astype(x.dtype)
    if product.first is not None and product.second is not None:
        # without the barrier XLA joins both products of x, and their weights with them, for every token
        y = y + (lax.optimization_barrier(x) @ product.first) @ product.second
    return y if product.bias is None else y + product.bias


def whole_tiles(x: Shaped[Array, " n *rest"]) -> Shaped[Array, " padded *rest"]:
    """Zeros behind the rows up to a multiple of 8, to which XLA would pad operands and results of every product.

    Rows that are sharded over devices stay as they are.
    """
    room = -len(x) % ROWS if ways("batch") == 1 else 0
    return jnp.pad(x, ((0, room), *((0, 0),) * (x.ndim - 1)))


def start_caches(config: TextConfig, memory: Memory, group: int, length: int) -> tuple[Cache, ...]:
    """The prompt's keys and values for every row of its group, with room for a caption.

    Args:
      config: sizes.
      memory: of B prompts of S tokens.
      group: G captions of a prompt, N = B * G before `whole_tiles`.
      length: T tokens of a caption.
    """

    def rows(x: Float[Array, "b s j k"]) -> Float[Array, "n j s+{length} k"]:
        x = whole_tiles(jnp.repeat(x.transpose(0, 2, 1, 3), group, axis=0))
        return constrain(jnp.pad(x, ((0, 0), (0, 0), (0, length), (0, 0))), "batch", "heads")

    return tuple(Cache(rows(memory.kv.key[index]), rows(memory.kv.value[index])) for index in range(config.layers))


def decode_token(
    config: TextConfig,
    layers: Sequence[PackedLayer],
    final_scale: Float[Array, " d"],
    caches: Sequence[Cache],
    embeds: Float[Array, "n d"],
    positions: Int[Array, " n"],
    index: Int[Array, ""] | Int[Array, " n"],
    visible: Bool[Array, "n s+t"],
) -> tuple[Float[Array, "n d"], tuple[Cache, ...]]:
    """One token of every row through all layers.

    Args:
      config: sizes.
      layers: of `pack`; final_scale: of the last norm.
      caches: of `start_caches`, filled so far.
      embeds: of the tokens; positions: the same on all three axes.
      index: where the keys of this token are written, S + t, of all rows or of each.
      visible: which entries of the cache count, with that of this token.

    Returns:
      Hidden states after the final norm, and the caches with this token.
    """
    angles = mrope_angles(config, jnp.broadcast_to(positions[:, None, None], (len(positions), 1, 3)))[:, 0]
    x, filled = embeds, []
    for layer, cache in zip(layers, caches):
        x, cache = _layer(config, layer, cache, constrain(x, "batch"), angles, index, visible)
        filled.append(cache)
    return normed(config, final_scale, x), tuple(filled)


def normed(config: TextConfig, scale: Float[Array, " d"], x: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """A norm of the model."""
    return cast(Array, RMSNorm(config.norm_epsilon).apply({"params": {"scale": scale}}, x))


def _layer(
    config: TextConfig, layer: PackedLayer, cache: Cache, x: Array, angles: Array, index: Array, visible: Array
) -> tuple[Array, Cache]:
    rows, width = len(x), config.head_width
    inputs = apply_product(layer.inputs, normed(config, layer.attention_scale, x))
    query, key, value = jnp.split(inputs, [config.heads * width, (config.heads + config.key_heads) * width], axis=1)
    query = apply_rope(query.reshape(rows, config.heads, width), angles)
    key = apply_rope(key.reshape(rows, config.key_heads, width), angles)
    new = Cache(key, value.reshape(rows, config.key_heads, width))
    cache = Cache(*(_write(old, part, index) for old, part in zip(cache, new)))
    mixed = _attend(query.reshape(rows, config.key_heads, -1, width), cache, visible)
    x = x + apply_product(layer.output, mixed.reshape(rows, -1))
    gate, up = jnp.split(apply_product(layer.gate_and_up, normed(config, layer.mlp_scale, x)), 2, axis=1)
    return x + apply_product(layer.down, jax.nn.silu(gate) * up), cache


def _write(cache: Array, new: Array, index: Array) -> Array:
    """Entries `[N, J, K]` at the same place of each row's cache, or at a place of its own."""
    if index.ndim:
        return cache.at[jnp.arange(len(cache)), :, index].set(new)
    return lax.dynamic_update_slice_in_dim(cache, new[:, :, None], index, axis=2)


def _attend(query: Array, cache: Cache, visible: Array) -> Array:
    """Queries `[N, J, H / J, K]` over a cache; logits and softmax are float32."""
    logits = (
        jnp.einsum("nhrk,nhsk->nhrs", query, cache.key, preferred_element_type=jnp.float32) * query.shape[-1] ** -0.5
    )
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], logits, MASKED), axis=-1)
    return jnp.einsum("nhrs,nhsk->nhrk", weights.astype(cache.value.dtype), cache.value)
