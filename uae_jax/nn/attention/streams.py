"""Joint attention of several token streams with projections of their own (arXiv 2403.03206, section 4)."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from uae_jax.nn.attention import lanes
from uae_jax.nn.attention.entry import attention, chosen, split_of
from uae_jax.nn.attention.mask import Mask
from uae_jax.nn.constrain import constrain
from uae_jax.nn.device import platform
from uae_jax.nn.norms import rms_norm


class Stream(NamedTuple):
    """Tokens with heads of their own.

    Attributes:
      query: None for tokens that are only read.
      key, value: of the tokens.
      query_scale, key_scale: of root-mean-square norms of each head; None without norms.
    """

    query: Float[Array, "b t h k"] | None
    key: Float[Array, "b t h k"]
    value: Float[Array, "b t h k"]
    query_scale: Float[Array, " k"] | None = None
    key_scale: Float[Array, " k"] | None = None


def joint_attention(
    streams: Sequence[Stream], mask: Mask = Mask(), epsilon: float = 1e-6
) -> list[Float[Array, "b t h k"] | None]:
    """Attention of every stream's queries over the keys of all streams, after the norms.

    TPUs take the streams as they are (`lanes`), where their lengths are whole tiles. Elsewhere they are joined.

    Args:
      streams: their keys follow each other.
      mask: of the joined sequence; `always` says how many keys every row has.
      epsilon: of the norms.

    Returns:
      One result a stream; None for a stream without queries.
    """
    if _by_lanes(streams, mask):
        return _beside(streams, mask, epsilon)
    return _joined(streams, mask, epsilon)


def _by_lanes(streams: Sequence[Stream], mask: Mask) -> bool:
    first = streams[0].key
    lengths = [stream.key.shape[1] for stream in streams]
    name = chosen(first, sum(lengths))
    plain = mask.groups is None and not mask.causal and (mask.valid is None or mask.right_padded)
    split = split_of(first.shape[0], first.shape[2], first.shape[2])
    ways = 1 if split is None else split.ways
    return name == "splash" and plain and lanes.supported(lengths, first.shape[2] // ways, first.shape[3])


def _joined(streams: Sequence[Stream], mask: Mask, epsilon: float) -> list[Array | None]:
    """One sequence for the attention of every device."""

    def ready(x: Array, scale: Array | None) -> Array:
        x = x if scale is None else rms_norm(x, scale, epsilon)
        return constrain(x, "batch", None, "heads", None)

    def sequence(parts: list[Array]) -> Array:
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)

    asking = [stream for stream in streams if stream.query is not None]
    found = attention(
        sequence([ready(stream.query, stream.query_scale) for stream in asking if stream.query is not None]),
        sequence([ready(stream.key, stream.key_scale) for stream in streams]),
        sequence([ready(stream.value, None) for stream in streams]),
        mask,
    )
    results: list[Array | None] = []
    start = 0
    for stream in streams:
        length = 0 if stream.query is None else stream.query.shape[1]
        results.append(found[:, start : start + length] if length else None)
        start += length
    return results


def _beside(streams: Sequence[Stream], mask: Mask, epsilon: float) -> list[Array | None]:
    """The kernels of `lanes`, each device's rows and heads by themselves."""
    batch, _, heads, width = streams[0].key.shape
    form = lanes.Form(width, epsilon, mask.always, interpret=platform() == "cpu")
    lengths = None if mask.valid is None else jnp.sum(mask.valid, axis=1, dtype=jnp.int32)
    queries = tuple(
        None
        if stream.query is None
        else lanes.Queries(lanes.beside(stream.query), lanes.repeated_scale(stream.query_scale))
        for stream in streams
    )
    keys = tuple(
        lanes.Keys(lanes.beside(stream.key), lanes.beside(stream.value), lanes.repeated_scale(stream.key_scale))
        for stream in streams
    )

    def mix(queries: tuple, keys: tuple, lengths: Array | None) -> list[Array]:
        return [lanes.mixed(form, part, keys, lengths) for part in queries if part is not None]

    split = split_of(batch, heads, heads)
    if split is not None:
        spread, rows = PartitionSpec(split.rows, None, split.heads), PartitionSpec(split.rows)

        def specs(tree: tuple) -> tuple:
            return jax.tree.map(lambda leaf: spread if leaf.ndim == 3 else PartitionSpec(), tree)

        mix = jax.shard_map(
            mix,
            in_specs=(specs(queries), specs(keys), None if lengths is None else rows),
            out_specs=spread,
            check_vma=False,
        )
    found = iter(mix(queries, keys, lengths))
    return [None if part is None else next(found).reshape(*part.query.shape[:2], heads, width) for part in queries]
