"""The one attention function of all models, and how it picks a kernel."""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float

from uae_jax.nn.attention import plain as xla
from uae_jax.nn.attention.by_head import by_head
from uae_jax.nn.attention.cudnn import cudnn, supported
from uae_jax.nn.attention.mask import Mask, SharedKeys
from uae_jax.nn.attention.splash import splash
from uae_jax.nn.device import compute_capability, current_mesh, platform

IMPLEMENTATIONS: dict[str, Callable[[Array, Array, Array, Mask], Array]] = {
    "plain": xla.plain,
    "by_query_blocks": xla.by_query_blocks,
    "by_head": by_head,
    "splash": splash,
    "cudnn": cudnn,
}
SMALL = 128 * 128  # pairs of query and key; up to here the plain formula is as fast as any other form, on every device
# lengths that need no padding inside a kernel (dev/gpu.md); CPUs take any
MULTIPLES = {"gpu": 16, "tpu": 16, "cpu": 1}
BATCH_AXES, HEAD_AXIS = ("data", "fsdp"), "tensor"

_chosen: contextvars.ContextVar[str] = contextvars.ContextVar("attention", default="auto")


@contextlib.contextmanager
def use_attention(name: str) -> Iterator[None]:
    """Everything traced inside uses this implementation (`IMPLEMENTATIONS`), or picks by device and size (`auto`).

    Raises:
      ValueError: there is no such implementation.
    """
    if name != "auto" and name not in IMPLEMENTATIONS:
        raise ValueError(f"attention is {name!r}; use one of auto, {', '.join(IMPLEMENTATIONS)}")
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def attention(
    query: Float[Array, "b t h k"],
    key: Float[Array, "b s j k"],
    value: Float[Array, "b s j k"],
    mask: Mask = Mask(),
    shared: tuple[SharedKeys, ...] = (),
) -> Float[Array, "b t h k"]:
    """Softmax attention with grouped queries; logits and softmax in float32 (arXiv 1706.03762, eq. 1; 2305.13245).

    The kernel follows the devices of the mesh that `jax.set_mesh` made current (those of the process without one), also
    where a program is compiled for devices that are not there: splash attention on TPUs, cuDNN on GPUs, a form chosen
    by measurement on CPUs. `use_attention` overrides it.

    Args:
      query: H heads; the result has the precision of `query`.
      key, value: J heads, where J divides H; query head h reads key head h // (H / J).
      mask: which of these keys a query may see.
      shared: keys that precede these, for causal self-attention (S = T); see `mask.SharedKeys`.

    Raises:
      ValueError: the number of key heads does not divide the number of query heads.
    """
    heads, key_heads = query.shape[2], key.shape[2]
    if heads % key_heads:
        raise ValueError(f"{heads} query heads cannot share {key_heads} key heads")
    size = key.shape[1] + sum(earlier.key.shape[1] for earlier in shared)
    name = chosen(query, size)
    if name == "plain" and shared:
        return xla.plain_with_shared(query, key, value, mask, shared)
    if shared:
        key, value, mask = _joined(key, value, mask, shared)
    implementation = IMPLEMENTATIONS[name]
    if name in ("splash", "cudnn", "by_head"):
        return on_each_device(implementation, query, key, value, mask)
    return implementation(query, key, value, mask)


def chosen(query: Array, size: int) -> str:
    """The implementation of queries `[B, T, H, K]` and S keys: of `use_attention`, else of the current devices."""
    name = _chosen.get()
    return choose(platform(), query, size) if name == "auto" else name


def choose(device: str, query: Array | jax.ShapeDtypeStruct, size: int) -> str:
    """The implementation for a platform (`cpu`, `gpu`, `tpu`), queries `[B, T, H, K]` and S keys.

    On several devices without a current mesh, only what the compiler can shard by itself is chosen.
    """
    if query.shape[1] == 1 or query.shape[1] * size <= SMALL:
        return "plain"
    if device == "gpu" and supported(query, compute_capability()):
        return "cudnn"
    if device in ("cpu", "tpu") and (current_mesh() is not None or jax.device_count() == 1):
        return {"cpu": "by_head", "tpu": "splash"}[device]
    return "by_query_blocks"


def preferred_length(length: int) -> int:
    """The next length that the kernels of the current devices take without a copy.

    Callers pad to it once, and mask the rest.
    """
    multiple = MULTIPLES.get(platform(), 1)
    return -(-length // multiple) * multiple


def _joined(key: Array, value: Array, mask: Mask, shared: tuple[SharedKeys, ...]) -> tuple[Array, Array, Mask]:
    """Shared keys, repeated for the rows that read them, and own keys, as one sequence under a causal mask."""
    rows, length = key.shape[:2]

    def every_row(x: Array) -> Array:
        return jnp.repeat(x, rows // len(x), axis=0)

    keys = [every_row(earlier.key).astype(key.dtype) for earlier in shared]
    values = [every_row(earlier.value).astype(value.dtype) for earlier in shared]
    own = jnp.ones((rows, length), bool) if mask.valid is None else mask.valid
    valid = jnp.concatenate([*(every_row(earlier.valid) for earlier in shared), own], axis=1)
    joined = Mask(valid=valid, causal=True)
    return jnp.concatenate([*keys, key], axis=1), jnp.concatenate([*values, value], axis=1), joined


class Split(NamedTuple):
    """How the devices of the current mesh share the rows and heads of a kernel.

    Attributes:
      rows: mesh axes over which rows are sharded, or None.
      heads: the mesh axis over which heads are sharded, or None.
      ways: shards of the heads.
    """

    rows: tuple[str, ...] | None
    heads: str | None
    ways: int


def split_of(batch: int, heads: int, key_heads: int) -> Split | None:
    """The split of B rows, H heads and J key heads; None for one device, and inside a `shard_map`."""
    mesh = current_mesh()
    if mesh is None or mesh.size == 1 or AxisType.Manual in mesh.axis_types:
        return None
    axes: tuple[str, ...] = ()
    for axis in BATCH_AXES:
        if axis in mesh.shape and batch % math.prod(mesh.shape[name] for name in (*axes, axis)) == 0:
            axes += (axis,)
    ways = mesh.shape.get(HEAD_AXIS, 1)
    if ways == 1 or heads % ways or (key_heads % ways and ways % key_heads):
        return Split(axes or None, None, 1)
    return Split(axes or None, HEAD_AXIS, ways)


def on_each_device(
    implementation: Callable[[Array, Array, Array, Mask], Array], query: Array, key: Array, value: Array, mask: Mask
) -> Array:
    """Runs an implementation on each device's rows and heads: the compiler cannot shard a kernel.

    Rows are sharded over those of the current mesh's axes `data` and `fsdp` that divide them. Heads are sharded over
    `tensor` where it divides the query heads and fits the key heads, which are repeated if they are fewer. Without a
    mesh, or inside a `shard_map`, the implementation is called as it is.
    """
    split = split_of(query.shape[0], query.shape[2], key.shape[2])
    if split is None:
        return implementation(query, key, value, mask)
    key, value = (jnp.repeat(x, max(split.ways // x.shape[2], 1), axis=2) for x in (key, value))
    spread, flat = PartitionSpec(split.rows, None, split.heads, None), PartitionSpec(split.rows, None)
    sharded = jax.shard_map(implementation, in_specs=(spread, spread, spread, flat), out_specs=spread, check_vma=False)
    return sharded(query, key, value, mask)
