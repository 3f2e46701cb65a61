"""Tensors read at the time of writing, so that a model larger than memory can go from file to file."""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax.numpy as jnp
import numpy as np
from numpy.typing import DTypeLike

from uae_jax.hf.finite import count_non_finite
from uae_jax.hf.safetensors import Tensors, dtype_name, write_tensors


@dataclasses.dataclass(frozen=True)
class Item:
    """A tensor read at the time of writing.

    Attributes:
      name: in the written file.
      shape, dtype: of the result of `read`.
      read: makes the array.
      source: file and name for messages.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    source: str

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def stored_items(folder: Tensors, names: Iterable[tuple[str, str]]) -> list[Item]:
    """Items for pairs (name to write, name in the folder), in the stored precision."""
    return [
        Item(
            name,
            folder.shape(stored),
            np.dtype(dtype_name(folder.dtype(stored))),
            lambda stored=stored: folder.read(stored),
            f"{folder.files[stored]}: {stored}",
        )
        for name, stored in names
    ]


def cast(items: Iterable[Item], dtype: DTypeLike | None) -> list[Item]:
    """The items with floats rounded to nearest even in another precision; None keeps the stored precision."""
    if dtype is None:
        return list(items)
    dtype = np.dtype(dtype)

    def converted(item: Item) -> np.ndarray:
        tensor = item.read()
        with np.errstate(over="ignore"):
            result = tensor.astype(dtype)
        if count_non_finite(result) and not count_non_finite(tensor):
            raise ValueError(f"{item.source} has numbers that {dtype.name} cannot hold; choose bfloat16 or float32")
        return result

    return [
        dataclasses.replace(item, dtype=dtype, read=lambda item=item: converted(item))
        if jnp.issubdtype(item.dtype, np.floating)
        else item
        for item in items
    ]


def write_items(
    folder: str | pathlib.Path,
    items: Sequence[Item],
    *,
    stem: str = "model",
    max_shard_bytes: float = 5e9,
    shards: int = 0,
    report: Callable[[int], None] = lambda count: None,
) -> list[pathlib.Path]:
    """Writes items by `hf.safetensors.write_tensors`, and reads each item just before.

    Args:
      folder: created if absent.
      items: in the order of the files.
      stem: `model`, `diffusion_pytorch_model` or `adapter_model`.
      max_shard_bytes: size limit of one file.
      shards: number of files of about equal size, in place of the size limit; 0 keeps the limit.
      report: called with the bytes of each tensor.

    Returns:
      The files written.

    Raises:
      ValueError: a tensor holds NaN or infinity; the message has its file and name.
    """

    def read() -> Iterator[tuple[str, np.ndarray]]:
        for item in items:
            tensor = item.read()
            bad = count_non_finite(tensor)
            if bad:
                raise ValueError(
                    f"{item.source} holds NaN or infinity ({bad:,} of {tensor.size:,} numbers); copy the file again "
                    "or train from an older checkpoint"
                )
            yield item.name, tensor
            report(item.nbytes)

    limit, starts = (math.inf, _starts(items, shards)) if shards else (max_shard_bytes, ())
    return write_tensors(folder, read(), stem=stem, max_shard_bytes=limit, starts=starts)


def _starts(items: Sequence[Item], shards: int) -> set[str]:
    """Names of the items that begin a file, for files of about equal size."""
    total, starts, done = sum(item.nbytes for item in items), set(), 0
    for position, item in enumerate(items):
        files = len(starts) + 1
        if position and files < shards and (done * shards >= total * files or len(items) - position == shards - files):
            starts.add(item.name)
        done += item.nbytes
    return starts
