"""Which keys a query may see, as structure instead of a `[T, S]` table, so that every kernel can use it."""

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

MASKED = -1e30  # finite, so that a row without any allowed key gives a mean of values and no NaN


@struct.dataclass
class Mask:
    """The conjunction of what is given; `Mask()` allows all.

    Attributes:
      valid: keys that count; None for all. The kernels of GPUs take it as lengths if `right_padded`.
      groups: for self-attention: a query sees the keys of its own group. -1 is padding: no query sees its keys.
      causal: query t of T sees the keys up to `t + S - T` of S: the queries are the last T of the keys.
      right_padded: promise that the valid keys of each row come first.
      always: promise that so many keys, the first ones, are valid in every row.
    """

    valid: Bool[Array, "b s"] | None = None
    groups: Int[Array, "b t"] | None = None
    causal: bool = struct.field(pytree_node=False, default=False)
    right_padded: bool = struct.field(pytree_node=False, default=False)
    always: int = struct.field(pytree_node=False, default=0)

    def pairs(self, length: int, size: int) -> Bool[Array, "_ _ {size}"] | None:
        """The table, broadcastable to `[B, T, S]`, or None when all is allowed.

        Args:
          length: T, number of queries.
          size: S, number of keys.
        """
        table = None
        if self.causal:
            table = jnp.tril(jnp.ones((length, size), bool), size - length)[None]
        for part in (self.valid[:, None] if self.valid is not None else None, self._same_group()):
            if part is not None:
                table = part if table is None else table & part
        return table

    def table(self, batch: int, length: int, size: int) -> Bool[Array, "{batch} {length} {size}"]:
        """The table for every row; `batch`, `length`, `size`: B, T, S."""
        allowed = self.pairs(length, size)
        return jnp.broadcast_to(True if allowed is None else allowed, (batch, length, size))

    def _same_group(self) -> Array | None:
        if self.groups is None:
            return None
        return (self.groups[:, :, None] == self.groups[:, None, :]) & (self.groups >= 0)[:, None]

    def segments(
        self, length: int, batch: int, size: int
    ) -> tuple[Int[Array, "{batch} {length}"], Int[Array, "{batch} {size}"]] | None:
        """The mask without its causal part as ids: query and key see each other where the ids are equal.

        Args:
          length, batch, size: T, B, S.

        Returns:
          int32 ids of queries and keys, or None when all is allowed. Padding has ids of its own on both sides.
        """
        if self.valid is None and self.groups is None:
            return None
        query = jnp.zeros((batch, length), jnp.int32) if self.groups is None else self.groups
        key = (
            jnp.zeros((batch, size), jnp.int32) if self.groups is None else jnp.where(self.groups < 0, -2, self.groups)
        )
        if self.valid is not None:
            key = jnp.where(self.valid, key, -2)
        return query.astype(jnp.int32), key.astype(jnp.int32)


class SharedKeys(struct.PyTreeNode):
    """Earlier keys and values that all queries may see where valid, shared by groups of consecutive rows.

    Attributes:
      key, value: of M entries; M divides the batch B, rows `i * B / M` to `(i + 1) * B / M - 1` read entry i.
      valid: which of them count.
    """

    key: Float[Array, "m s j k"]
    value: Float[Array, "m s j k"]
    valid: Bool[Array, "m s"]
