"""Attention of several token streams on TPUs, with heads side by side as products make them.

Products write `[B, T, H * K]`: the heads of a token lie side by side along the 128 lanes of a register. A kernel that
takes one head at a time needs them apart, and streams in one sequence: transposes, copies, and heads of 64 in 128
lanes. Here a kernel takes the 128 / K heads of 128 lanes at once, and the keys of all streams as they are. A product
with the other heads' lanes at zero is a head's own product. The matrix unit is no slower for it, as it takes 128 lanes
at once. The norms of queries and keys are inside.

All keys of a row fit on the chip, so that a softmax sees its whole line at once. The backward pass is one kernel, which
computes the weights again from queries and keys (arXiv 2205.14135, section 3.1).
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32

from uae_jax.nn.attention.mask import MASKED

LANES = 128
ROWS = 16  # of a tile in bfloat16
WEIGHTS = 2**19  # of one head that are on the chip at once, 2 MB in float32
KEYS = 2**11  # that fit on the chip beside them, with their gradients


class Keys(NamedTuple):
    """Keys and values of one stream.

    Attributes:
      key, value: heads side by side.
      scale: of the keys' norm, repeated for the heads of 128 lanes; None without norm.
    """

    key: Float[Array, "b s d"]
    value: Float[Array, "b s d"]
    scale: Float[Array, "1 128"] | None


class Queries(NamedTuple):
    """Queries of one stream; `scale` as in `Keys`."""

    query: Float[Array, "b t d"]
    scale: Float[Array, "1 128"] | None


@dataclasses.dataclass(frozen=True)
class Form:
    """What a kernel is compiled for.

    Attributes:
      width: K, a divisor of 128.
      epsilon: of the norms.
      always: keys that every row has; those behind it may be padding, see `lengths` of `mixed`.
      interpret: run the kernels step by step on any device, for tests.
    """

    width: int
    epsilon: float
    always: int
    interpret: bool = False

    @property
    def heads(self) -> int:
        """The heads of 128 lanes."""
        return LANES // self.width


def query_block(length: int, size: int) -> int:
    """The queries that a kernel takes at once: whole tiles that divide the length; 0 where there are none.

    Args:
      length: T queries.
      size: S keys of all streams.
    """
    most = max(WEIGHTS // size, ROWS)
    return max((n for n in range(ROWS, min(length, most) + 1, ROWS) if length % n == 0), default=0)


def supported(lengths: Sequence[int], heads: int, width: int) -> bool:
    """Whether the kernels take streams of these lengths, and so many heads of this width on one device."""
    size = sum(lengths)
    tiles = all(query_block(length, size) for length in lengths)
    return tiles and LANES % width == 0 and heads * width % LANES == 0 and size <= KEYS


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def mixed(
    form: Form, queries: Queries, keys: tuple[Keys, ...], lengths: Int32[Array, " b"] | None
) -> Float[Array, "b t d"]:
    """Softmax attention of one stream's queries over the keys of all.

    Args:
      form: sizes.
      queries: T is a multiple of `ROWS`.
      keys: of all streams.
      lengths: valid keys of each row over all streams, which come first; None for all.
    """
    return _forward(form, queries, keys, lengths)


def _grid(form: Form, queries: Queries, keys: tuple[Keys, ...], lengths: Array | None) -> tuple[Any, tuple, int]:
    """The grid (rows, groups of heads, blocks of queries), the blocks of the arguments, and the length of a block."""
    batch, length, width = queries.query.shape
    size = sum(part.key.shape[1] for part in keys)
    block = query_block(length, size)
    scale = pl.BlockSpec((1, LANES), lambda row, group, at: (0, 0))

    def whole(part: Keys) -> Any:
        stream = pl.BlockSpec((1, part.key.shape[1], LANES), lambda row, group, at: (row, 0, group))
        return _like(part, stream, scale)

    some = pl.BlockSpec((1, block, LANES), lambda row, group, at: (row, at, group))
    specs = (
        None if lengths is None else pl.BlockSpec(memory_space=pltpu.SMEM),
        _like(queries, some, scale),
        tuple(whole(part) for part in keys),
    )
    return (batch, width // LANES, length // block), specs, block


def _like(tree: Any, stream: Any, scale: Any) -> Any:
    """Of the form of `Keys` or `Queries`: one entry for every stream, and one for the scale where there is one."""
    return type(tree)(*[stream] * (len(tree) - 1), None if tree.scale is None else scale)


def _cost(products: int, queries: Queries, keys: tuple[Keys, ...], form: Form) -> pl.CostEstimate:
    """Operations of so many products of queries and keys, each with 128 lanes for a head."""
    batch, length, width = queries.query.shape
    size = sum(part.key.shape[1] for part in keys)
    pairs = batch * (width // form.width) * length * size
    moved = batch * width * (2 * length + 2 * size) * queries.query.dtype.itemsize
    return pl.CostEstimate(
        flops=products * 2 * pairs * LANES, transcendentals=pairs, bytes_accessed=moved * (1 if products == 2 else 2)
    )


_ORDER = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))


def _forward(form: Form, queries: Queries, keys: tuple[Keys, ...], lengths: Array | None) -> Array:
    grid, specs, _ = _grid(form, queries, keys, lengths)
    query = queries.query
    return pl.pallas_call(
        functools.partial(_forward_kernel, form),
        grid=grid,
        in_specs=specs,
        out_specs=specs[1].query,
        out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
        scratch_shapes=[pltpu.VMEM(part.key.shape[1:2] + (LANES,), part.key.dtype) for part in keys],
        compiler_params=_ORDER,
        cost_estimate=_cost(2, queries, keys, form),
        interpret=form.interpret,
        name="heads_side_by_side_forward",
    )(lengths, queries, keys)


def _start(
    form: Form, queries: Queries, keys: tuple[Keys, ...], lengths: Array | None
) -> tuple[Array, tuple[Queries, tuple[Keys, ...], Array | None]]:
    return _forward(form, queries, keys, lengths), (queries, keys, lengths)


def _backward(form: Form, saved: tuple[Queries, tuple[Keys, ...], Array | None], outer: Array) -> tuple:
    queries, keys, lengths = saved
    grid, specs, _ = _grid(form, queries, keys, lengths)
    # sums over the tokens of each row and group of heads
    sums = pl.BlockSpec((1, 1, 1, LANES), lambda row, group, at: (row, group, 0, 0))
    summed = jax.ShapeDtypeStruct((*grid[:2], 1, LANES), jnp.float32)

    def array(tree: Any) -> Any:
        return _like(tree, jax.ShapeDtypeStruct(tree[0].shape, tree[0].dtype), summed)

    d_queries, d_keys = pl.pallas_call(
        functools.partial(_backward_kernel, form),
        grid=grid,
        in_specs=(*specs, specs[1].query),
        out_specs=(_like(specs[1], specs[1][0], sums), tuple(_like(part, part[0], sums) for part in specs[2])),
        out_shape=(array(queries), tuple(array(part) for part in keys)),
        scratch_shapes=[
            tuple(pltpu.VMEM((part.key.shape[1], LANES), kind) for kind in (part.key.dtype, jnp.float32, jnp.float32))
            for part in keys
        ],
        compiler_params=_ORDER,
        cost_estimate=_cost(5, queries, keys, form),
        interpret=form.interpret,
        name="heads_side_by_side_backward",
    )(lengths, queries, keys, outer)

    def of_scale(tree: Any) -> Any:
        return tree if tree.scale is None else tree._replace(scale=jnp.sum(tree.scale, (0, 1)))

    return of_scale(d_queries), tuple(of_scale(part) for part in d_keys), None


mixed.defvjp(_start, _backward)


def _own(form: Form, shape: tuple[int, ...], head: int) -> Array:
    """Which lanes are a head's."""
    return lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1) // form.width == head


def _of_each(form: Form, parts: Sequence[Array]) -> Array:
    """An array `[N, 128]` that has each head's lanes from its part, `[N, 128]` or `[N, 1]`."""
    shape = (parts[0].shape[0], LANES)
    found = jnp.broadcast_to(parts[0], shape)
    for head in range(1, form.heads):
        found = jnp.where(_own(form, shape, head), parts[head], found)
    return found


def _mean(form: Form, x: Array) -> Array:
    """The mean of `[N, 128]` over the lanes of each head."""
    return _of_each(
        form,
        [
            jnp.sum(jnp.where(_own(form, x.shape, head), x, 0.0), axis=-1, keepdims=True) / form.width
            for head in range(form.heads)
        ],
    )


def _inverse(form: Form, x: Array) -> Array:
    return lax.rsqrt(_mean(form, jnp.square(x)) + form.epsilon)


def _normed(form: Form, x: Array, scale: Any) -> Array:
    """Root-mean-square norm of each head, as `nn.norms.RMSNorm`."""
    if scale is None:
        return x
    wide = x.astype(jnp.float32)
    return (wide * _inverse(form, wide) * scale[...].astype(jnp.float32)).astype(x.dtype)


def _norm_slopes(form: Form, x: Array, scale: Any, outer: Array) -> tuple[Array, Array]:
    """Gradients of `_normed` for `x`, and for the scale: `[N, 128]` and `[1, 128]`, float32."""
    wide = x.astype(jnp.float32)
    inverse = _inverse(form, wide)
    inner = outer * scale[...].astype(jnp.float32)
    slope = inverse * (inner - wide * jnp.square(inverse) * _mean(form, wide * inner))
    return slope, jnp.sum(outer * wide * inverse, axis=0, keepdims=True)


def _scaled(form: Form, queries: Any) -> Array:
    query = _normed(form, queries.query[0], queries.scale)
    return (query.astype(jnp.float32) * form.width**-0.5).astype(query.dtype)


def _product(left: Array, right: Array, axes: tuple[int, int]) -> Array:
    """Over an axis of each, in float32."""
    return lax.dot_general(left, right, (((axes[0],), (axes[1],)), ((), ())), preferred_element_type=jnp.float32)


def _only(form: Form, x: Array, head: int) -> Array:
    return jnp.where(_own(form, x.shape, head), x, jnp.zeros((), x.dtype)) if form.heads > 1 else x


def _visible(form: Form, logits: Array, lengths: Any, start: int, axis: int) -> Array:
    """Logits without padding: of one stream, whose first key is the `start`-th of all, along an axis."""
    size = logits.shape[axis]
    if lengths is None or start + size <= form.always:
        return logits
    place = lax.broadcasted_iota(jnp.int32, logits.shape, axis)
    return jnp.where(place < lengths[pl.program_id(0)] - start, logits, MASKED)


def _starts(keys: Sequence[Array]) -> list[int]:
    """The place of each stream's first key among all."""
    return [sum(part.shape[0] for part in keys[:index]) for index in range(len(keys))]


def _forward_kernel(form: Form, lengths: Any, queries: Any, keys: Any, out: Any, *normed: Any) -> None:
    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        for part, kept in zip(keys, normed):
            kept[...] = _normed(form, part.key[0], part.scale)

    query, results = _scaled(form, queries), []
    all_keys = [kept[...] for kept in normed]
    for head in range(form.heads):
        own = _only(form, query, head)
        logits = [
            _visible(form, _product(own, key, (1, 1)), lengths, start, 1)
            for key, start in zip(all_keys, _starts(all_keys))
        ]
        most = functools.reduce(jnp.maximum, [jnp.max(part, axis=1, keepdims=True) for part in logits])
        weights = [jnp.exp(part - most) for part in logits]
        total = sum(jnp.sum(part, axis=1, keepdims=True) for part in weights)
        values = [_product(part.astype(query.dtype), stream.value[0], (1, 0)) for part, stream in zip(weights, keys)]
        results.append(sum(values[1:], values[0]) / total)
    out[0] = _of_each(form, results).astype(out.dtype)


def _backward_kernel(
    form: Form, lengths: Any, queries: Any, keys: Any, outer: Any, d_queries: Any, d_keys: Any, *scratch: Any
) -> None:
    """Keys along the first axis, queries along the second: two of three products then need no transposed weights."""
    at, last = pl.program_id(2), pl.num_programs(2) - 1

    @pl.when(at == 0)
    def _() -> None:
        for part, (kept, key_sum, value_sum) in zip(keys, scratch):
            kept[...] = _normed(form, part.key[0], part.scale)
            key_sum[...] = jnp.zeros(key_sum.shape, jnp.float32)
            value_sum[...] = jnp.zeros(value_sum.shape, jnp.float32)
        if d_queries.scale is not None:
            d_queries.scale[...] = jnp.zeros(d_queries.scale.shape, jnp.float32)

    query, slopes, dtype = _scaled(form, queries), [], outer.dtype
    all_keys = [kept[...] for kept, _, _ in scratch]
    for head in range(form.heads):
        own, wanted = _only(form, query, head), _only(form, outer[0], head)
        logits = [
            _visible(form, _product(key, own, (1, 1)), lengths, start, 0)
            for key, start in zip(all_keys, _starts(all_keys))
        ]
        most = functools.reduce(jnp.maximum, [jnp.max(part, axis=0, keepdims=True) for part in logits])
        weights = [jnp.exp(part - most) for part in logits]
        total = sum(jnp.sum(part, axis=0, keepdims=True) for part in weights)
        weights = [part / total for part in weights]
        given = [_product(part.value[0], wanted, (1, 1)) for part in keys]
        mean = sum(jnp.sum(part * slope, axis=0, keepdims=True) for part, slope in zip(weights, given))
        d_logits = [(part * (slope - mean)).astype(dtype) for part, slope in zip(weights, given)]
        for (_, key_sum, value_sum), part, slope in zip(scratch, weights, d_logits):
            value_sum[...] += _product(part.astype(dtype), wanted, (1, 0))
            key_sum[...] += _product(slope, own, (1, 0))
        slopes.append(functools.reduce(jnp.add, [_product(s, key, (0, 0)) for s, key in zip(d_logits, all_keys)]))
    slope = _of_each(form, slopes) * form.width**-0.5
    if d_queries.scale is not None:
        slope, of_scale = _norm_slopes(form, queries.query[0], queries.scale, slope)
        d_queries.scale[0, 0] += of_scale
    d_queries.query[0] = slope.astype(d_queries.query.dtype)

    @pl.when(at == last)
    def _() -> None:
        for part, found, (_, key_sum, value_sum) in zip(keys, d_keys, scratch):
            slope = key_sum[...]
            if found.scale is not None:
                slope, found.scale[0, 0] = _norm_slopes(form, part.key[0], part.scale, slope)
            found.key[0] = slope.astype(found.key.dtype)
            found.value[0] = value_sum[...].astype(found.value.dtype)


def repeated_scale(scale: Float[Array, " k"] | None) -> Float[Array, "1 128"] | None:
    """The scale of a norm for all heads of 128 lanes."""
    return None if scale is None else jnp.tile(scale, LANES // len(scale))[None]


def beside(x: Float[Array, "b t h k"]) -> Float[Array, "b t h*k"]:
    """Heads side by side, as they were made."""
    return x.reshape(*x.shape[:2], math.prod(x.shape[2:]))
