"""Tensors read at the time of writing, so that a model larger than memory can go from file to file."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from numpy.typing import DTypeLike

from uae_jax import trees
from uae_jax.files.paths import local_to_write
from uae_jax.hf.finite import count_non_finite
from uae_jax.hf.rules import Rule
from uae_jax.hf.safetensors import DTYPES, Tensors, dtype_name, shard_files

# makes the numpy array of a leaf, or of one row of its first axis; None where another process has it
Fetch = Callable[[Any, int | None], np.ndarray | None]
STORED = {np.dtype(kind).name: name for name, kind in DTYPES.items()}
# precisions in the order of safetensors' own writer, by which all tensors of a file are aligned
ORDER = ("I64", "F64", "F32", "I32", "BF16", "F16", "I16", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL")


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


def _row(leaf: Any, row: int | None) -> np.ndarray:
    return np.asarray(leaf if row is None else leaf[row])


def published_items(params: trees.Tree, rules: Sequence[Rule], dtype: DTypeLike, fetch: Fetch = _row) -> list[Item]:
    """The published tensors of a model's parameters as items, fetched one at a time; see `rules.published_tensors`.

    Args:
      params: nested dictionaries of arrays.
      rules: the model's table.
      dtype: precision to cast to.
      fetch: makes the numpy array of a leaf, or of one row of stacked layers.
    """
    leaves = trees.flatten(params)
    return [
        _published(leaves[rule.ours], rule, None if rule.layers is None else row, source, np.dtype(dtype), fetch)
        for rule in rules
        for row, source in enumerate(rule.sources())
    ]


def _published(leaf: Any, rule: Rule, row: int | None, source: str, dtype: np.dtype, fetch: Fetch) -> Item:
    def read() -> np.ndarray:
        tensor = fetch(leaf, row)
        return np.empty(0, dtype) if tensor is None else rule.to_theirs(tensor.astype(dtype, copy=False))

    shape = rule.to_theirs(np.broadcast_to(np.int8(0), leaf.shape if row is None else leaf.shape[1:])).shape
    return Item(source, shape, dtype, read, f"parameter {source}")


def write_items(
    folder: str | pathlib.Path,
    items: Sequence[Item],
    *,
    stem: str = "model",
    max_shard_bytes: float = 5e9,
    shards: int = 0,
    report: Callable[[int], None] = lambda count: None,
    finite: bool = True,
) -> list[pathlib.Path]:
    """Writes items as `hf.safetensors.write_tensors` does arrays, byte for byte, with one of them in memory at a time.

    Args:
      folder: created if absent.
      items: in the order of the files.
      stem: `model`, `diffusion_pytorch_model` or `adapter_model`.
      max_shard_bytes: size limit of one file.
      shards: number of files of about equal size, in place of the size limit; 0 keeps the limit.
      report: called with the bytes of each tensor.
      finite: refuse NaN and infinity.

    Returns:
      The files written.

    Raises:
      ValueError: a tensor holds NaN or infinity; the message has its file and name.
    """

    def checked(item: Item) -> np.ndarray:
        tensor = item.read()
        bad = count_non_finite(tensor)
        if bad:
            raise ValueError(
                f"{item.source} holds NaN or infinity ({bad:,} of {tensor.size:,} numbers); copy the file again "
                "or train from an older checkpoint"
            )
        return tensor

    limit, starts = (math.inf, _starts(items, shards)) if shards else (max_shard_bytes, set())
    with shard_files(folder, stem) as files:
        for group in _groups(items, limit, starts):
            file = files.new([item.name for item in group], sum(item.nbytes for item in group))
            _write_file(file, group, checked if finite else _unchecked, report)
        return files.publish()


def _unchecked(item: Item) -> np.ndarray:
    return item.read()


def _groups(items: Sequence[Item], limit: float, starts: set[str]) -> list[list[Item]]:
    """The items of each file, in order."""
    groups: list[list[Item]] = [[]]
    held = 0
    for item in items:
        if groups[-1] and (item.name in starts or held + item.nbytes > limit):
            groups.append([])
            held = 0
        groups[-1].append(item)
        held += item.nbytes
    return groups


def _write_file(
    file: pathlib.Path, items: Sequence[Item], read: Callable[[Item], np.ndarray], report: Callable[[int], None]
) -> None:
    """One safetensors file, byte for byte that of safetensors' own writer; each tensor goes to its place at once."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts, end = {}, 0
    for item in sorted(items, key=lambda item: (ORDER.index(STORED[item.dtype.name]), item.name)):
        kind, starts[item.name] = STORED[item.dtype.name], end
        end += item.nbytes
        header[item.name] = {"dtype": kind, "shape": item.shape, "data_offsets": [starts[item.name], end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with local_to_write(file) as place, place.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for item in items:
            tensor = read(item)
            if tensor.shape != item.shape or tensor.dtype != item.dtype:
                raise ValueError(
                    f"{item.source} is {tensor.dtype}{list(tensor.shape)} and was announced as "
                    f"{item.dtype}{list(item.shape)}; write again while nothing changes the source"
                )
            stream.seek(8 + len(text) + starts[item.name])
            stream.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
            del tensor
            report(item.nbytes)


def _starts(items: Sequence[Item], shards: int) -> set[str]:
    """Names of the items that begin a file, for files of about equal size."""
    total, starts, done = sum(item.nbytes for item in items), set(), 0
    for position, item in enumerate(items):
        files = len(starts) + 1
        if position and files < shards and (done * shards >= total * files or len(items) - position == shards - files):
            starts.add(item.name)
        done += item.nbytes
    return starts
