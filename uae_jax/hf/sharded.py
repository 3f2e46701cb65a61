"""Writing tensors that are made one at a time, so that a model larger than memory can be written."""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence

import ml_dtypes  # noqa: F401  registers bfloat16 with numpy
import numpy as np
from safetensors.numpy import save_file

from uae_jax.hf.inventory import count_non_finite, dtype_name
from uae_jax.hf.safetensors import TensorFolder


@dataclasses.dataclass(frozen=True)
class Item:
    """A tensor that is read when it is written.

    Attributes:
      name: in the file that is written.
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


def stored_items(folder: TensorFolder, names: Iterable[tuple[str, str]]) -> list[Item]:
    """Items for (name to write, name in the folder) pairs, in their stored precision."""
    return [
        Item(name, folder.shape(stored), np.dtype(dtype_name(folder.dtype(stored))), lambda stored=stored: folder.read(stored),
             f"{folder.files[stored]}: {stored}")
        for name, stored in names]


def cast(items: Iterable[Item], dtype: np.dtype | None) -> list[Item]:
    """The items in another precision (floats only; rounded to nearest even); None keeps what is stored."""
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
        if item.dtype.kind == "f" or item.dtype.name.startswith(("bfloat", "float")) else item for item in items]


def write_items(
    folder: str | pathlib.Path, items: Sequence[Item], *, stem: str = "model", max_shard_bytes: float = 5e9, shards: int = 0,
    report: Callable[[int], None] = lambda count: None) -> list[pathlib.Path]:
    """Writes `stem.safetensors`, or numbered shards with an index; one shard at a time is in memory.

    Args:
      folder: made if absent.
      items: in the order of the files.
      stem: `model`, `diffusion_pytorch_model` or `adapter_model`.
      max_shard_bytes: size limit of one file; a single larger tensor has a file of its own.
      shards: a number of files of about equal size instead of a size limit.
      report: called with the bytes of each tensor that was read.

    Returns:
      The files written.

    Raises:
      ValueError: a tensor has NaN or infinite numbers; the message names its file and name.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    groups = _groups(items, max_shard_bytes, shards)
    total, mask = len(groups), os.umask(0)
    os.umask(mask)
    names = [f"{stem}.safetensors"] if total == 1 else [f"{stem}-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1)]
    for file, group in zip(names, groups):
        tensors = {}
        for item in group:
            tensors[item.name] = np.asarray(item.read(), order="C")
            bad = count_non_finite(tensors[item.name])
            if bad:
                raise ValueError(f"{item.source} has {bad:,} numbers that are NaN or infinite; copy the file again or train from an older checkpoint")
            report(item.nbytes)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o666 & ~mask)  # save_file lets only its user read it
    if total > 1:
        weight_map = {item.name: file for file, group in zip(names, groups) for item in group}
        index = {"metadata": {"total_size": sum(item.nbytes for item in items)}, "weight_map": weight_map}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return [folder / file for file in names]


def _groups(items: Sequence[Item], limit: float, shards: int) -> list[list[Item]]:
    """The items of each file, in order."""
    total, groups, size, done = sum(item.nbytes for item in items), [[]], 0, 0
    for position, item in enumerate(items):
        full = done >= total * len(groups) / shards if shards else size + item.nbytes > limit
        if shards and len(items) - position == shards - len(groups):
            full = True  # as many tensors as files are left
        if groups[-1] and full and (not shards or len(groups) < shards):
            groups.append([])
            size = 0
        groups[-1].append(item)
        size, done = size + item.nbytes, done + item.nbytes
    return groups
