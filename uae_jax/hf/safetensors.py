"""Folders of safetensors files, single or sharded with an index, read tensor by tensor and written back."""

import contextlib
import json
import pathlib
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from uae_jax.files.paths import is_url, local_to_write, read_range, to_path
from uae_jax.hf.file_sets import check_index, check_single, index_of, shards, weight_files
from uae_jax.hf.remote import Reads, check_filled, read_header

# safetensors' names of the precisions of parameters and buffers
DTYPES: dict[str, type] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
LFS_POINTER = b"version https://git-lfs"


def dtype_name(stored: str) -> str:
    """numpy's name of a precision (`bfloat16`) from safetensors' name (`BF16`)."""
    return np.dtype(DTYPES[stored]).name if stored in DTYPES else stored.lower()


class Tensors(Protocol):
    """Named tensors in files: what `TensorFolder` and its like offer.

    Attributes:
      path: the folder or file.
      files: tensor name to file.
    """

    path: pathlib.Path
    files: dict[str, pathlib.Path]

    def names(self) -> set[str]: ...

    def file(self, name: str) -> pathlib.Path: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> str: ...

    def read(self, name: str) -> np.ndarray: ...

    def expect(self, names: Sequence[str]) -> None: ...


class TensorFolder:
    """The tensors of one folder, read lazily from the memory-mapped files, or by ranges from those of a bucket.

    Attributes:
      path: the folder, or a single `.safetensors` file.
      files: tensor name to file.
    """

    def __init__(self, path: str | pathlib.Path):
        """Opens the folder's index, or its only file, or all shards when there is no index.

        A variant in another precision (`model.fp16.safetensors`) is ignored beside `model.safetensors`.

        Raises:
          FileNotFoundError: the folder, its safetensors files, or a shard of the index is missing.
          ValueError: a file is truncated or not safetensors, index and shards disagree, or weights stand beside an
            index that does not name them.
        """
        self.path = to_path(path)
        if not self.path.exists():
            raise FileNotFoundError(f"weights not found: {self.path} does not exist")
        self.files: dict[str, pathlib.Path] = {}
        self._entries: dict[str, dict[str, Any]] = {}
        index = index_of(self.path)
        check_single(self.path, index)
        for file in weight_files(self.path) if index is None else shards(index, self.path):
            entries = _header(file)
            again = sorted(set(entries) & set(self.files))
            if again:
                raise ValueError(f"{self.files[again[0]]} and {file} both hold {again[0]}; keep the right file")
            self.files |= dict.fromkeys(entries, file)
            self._entries |= entries
        if index is not None:
            check_index(index, self.files, self.path)
        self._reads = Reads({name: self._place(name) for name in self.files}) if is_url(self.path) else None

    def _place(self, name: str) -> tuple[pathlib.Path, int, int]:
        """File, first byte and size in bytes of a tensor."""
        entry = self._entries[name]
        return self.files[name], entry["start"], entry["size"]

    def names(self) -> set[str]:
        """All tensor names."""
        return set(self.files)

    def file(self, name: str) -> pathlib.Path:
        """The file that holds a tensor."""
        return self.files[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return tuple(self._entries[name]["shape"])

    def dtype(self, name: str) -> str:
        """safetensors' name of a tensor's precision (`F32`, `BF16`, ...), without reading the tensor."""
        return self._entries[name]["dtype"]

    def read(self, name: str) -> np.ndarray:
        """One tensor in its stored precision: a read-only view of the file. The view's pages stay in memory only while
        the view lives. Of a bucket the tensor is read whole.

        Raises:
          ValueError: an unknown precision.
        """
        shape, dtype = self.shape(name), DTYPES.get(self.dtype(name))
        if dtype is None:
            raise ValueError(
                f"{self.file(name)} stores {name} as {self.dtype(name)}; save it again in one of {', '.join(DTYPES)}"
            )
        if 0 in shape:
            return np.empty(shape, dtype)
        if self._reads is not None:
            return np.frombuffer(self._reads.read(name), dtype).reshape(shape)
        # one mapping for each tensor: all pages of a mapping of the whole file would stay in memory
        return np.asarray(np.memmap(self.file(name), dtype, "r", self._entries[name]["start"], shape))

    def expect(self, names: Sequence[str]) -> None:
        """Says in which order tensors will be read: from a bucket they are asked for ahead."""
        if self._reads is not None:
            self._reads.expect(names)


def _header(file: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Shape, dtype, first byte and size of each tensor of a file, after a check of the file's layout."""
    if read_range(file, 0, len(LFS_POINTER)) == LFS_POINTER:
        raise ValueError(f"{file} is a Git LFS pointer, not the weights; run `git lfs pull` in its repository")
    try:
        length, header = _remote_header(file) if is_url(file) else _local_header(file)
    except (SafetensorError, OSError, _Unfit) as error:
        reason = " ".join(str(error).split())  # the header's own words may be in it
        raise ValueError(f"{file} is not a complete safetensors file ({reason}); copy it again") from None
    return {
        name: {
            "shape": entry["shape"],
            "dtype": entry["dtype"],
            "start": 8 + length + entry["data_offsets"][0],
            "size": entry["data_offsets"][1] - entry["data_offsets"][0],
        }
        for name, entry in header.items()
        if name != "__metadata__"
    }


class _Unfit(Exception):
    """What is wrong with a header."""


def metadata(file: pathlib.Path) -> dict[str, str]:
    """What the writer of a file has noted in its header."""
    if is_url(file):
        return read_header(file)[1].get("__metadata__") or {}
    with safe_open(file, framework="numpy") as handle:
        return handle.metadata() or {}


def _local_header(file: pathlib.Path) -> tuple[int, dict[str, Any]]:
    with file.open("rb") as stream:
        with safe_open(file, framework="numpy"):
            pass  # checks that the tensors fill the file
        length = int.from_bytes(stream.read(8), "little")
        return length, json.loads(stream.read(length))


def _remote_header(file: pathlib.Path) -> tuple[int, dict[str, Any]]:
    try:
        length, header, size = read_header(file)
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        check_filled(
            tensors, size - 8 - length, lambda stored: np.dtype(DTYPES[stored]).itemsize if stored in DTYPES else None
        )
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise _Unfit(str(error)) from None
    return length, header


def write_tensors(
    folder: str | pathlib.Path,
    tensors: Iterator[tuple[str, np.ndarray]] | Mapping[str, np.ndarray],
    *,
    stem: str = "model",
    max_shard_bytes: float = 5e9,
    starts: Container[str] = (),
) -> list[pathlib.Path]:
    """Writes tensors as `stem.safetensors`, or as numbered shards with an index when they pass the size limit.

    Memory holds at most one shard and the next tensor. Files get their final names once all are written; older files of
    the same stem are then deleted. An error deletes the new files and leaves the older ones unchanged.

    Args:
      folder: created if absent.
      tensors: names and arrays, in the order of the files.
      stem: `model`, `diffusion_pytorch_model` or `adapter_model`.
      max_shard_bytes: size limit of one file; a larger tensor gets its own file.
      starts: names of tensors that begin a new file regardless of size.

    Returns:
      The files written.
    """
    with shard_files(folder, stem) as files:
        writer = _ShardWriter(files)
        for name, tensor in tensors.items() if isinstance(tensors, Mapping) else tensors:
            if writer.shard and (name in starts or writer.shard_bytes + tensor.nbytes > max_shard_bytes):
                writer.flush()
            writer.add(name, tensor)
        writer.flush()
        return files.publish()


class _ShardWriter:
    """Collects the tensors of one shard."""

    def __init__(self, files: "ShardFiles"):
        self.files = files
        self.shard: dict[str, np.ndarray] = {}
        self.shard_bytes = 0

    def add(self, name: str, tensor: np.ndarray) -> None:
        self.shard[name] = np.asarray(tensor, order="C")  # keeps scalars scalar
        self.shard_bytes += tensor.nbytes

    def flush(self) -> None:
        with local_to_write(self.files.new(list(self.shard), self.shard_bytes)) as file:
            file.touch()
            mode = file.stat().st_mode  # the default of new files; safetensors would write files for the owner alone
            save_file(self.shard, file, metadata={"format": "pt"})
            file.chmod(mode)
        self.shard, self.shard_bytes = {}, 0


@contextlib.contextmanager
def shard_files(folder: str | pathlib.Path, stem: str) -> Iterator["ShardFiles"]:
    """Files to write in a folder, which is made if absent; an error deletes them and leaves the older ones."""
    folder = to_path(folder)
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    files = ShardFiles(folder, stem)
    try:
        yield files
    except BaseException:
        files.discard()
        if made:
            folder.rmdir()
        raise


class ShardFiles:
    """Shards under temporary names; a final name contains the number of shards, known only after the last one."""

    def __init__(self, folder: pathlib.Path, stem: str):
        self.folder, self.stem = folder, stem
        self.total_bytes = 0
        self.written: list[tuple[pathlib.Path, list[str]]] = []

    def new(self, names: list[str], nbytes: int) -> pathlib.Path:
        """The temporary path of the next shard, which holds these tensors of so many bytes."""
        file = self.folder / f".{self.stem}-{len(self.written):05d}.tmp"
        self.written.append((file, names))
        self.total_bytes += nbytes
        return file

    def publish(self) -> list[pathlib.Path]:
        """Gives the shards their names, writes their index, and deletes older files of the same stem."""
        total = len(self.written)
        names = (
            [f"{self.stem}.safetensors"]
            if total == 1
            else [f"{self.stem}-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1)]
        )
        index = self.folder / f"{self.stem}.safetensors.index.json"
        fresh = set(names)
        if total > 1:
            weight_map = {name: file for file, (_, held) in zip(names, self.written) for name in held}
            content = json.dumps({"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}, indent=2)
            draft = self.folder / f".{self.stem}.index.tmp"
            self.written.append((draft, []))
            draft.write_text(content)
            fresh.add(index.name)
        for name, (file, _) in zip([*names, index.name], self.written):
            file.rename(self.folder / name)
        pattern = rf"{re.escape(self.stem)}(-\d{{5}}-of-\d{{5}})?\.safetensors(\.index\.json)?"
        for file in self.folder.iterdir():
            if re.fullmatch(pattern, file.name) and file.name not in fresh:
                file.unlink()
        return [self.folder / name for name in names]

    def discard(self) -> None:
        """Deletes what has no final name yet."""
        for file, _ in self.written:
            file.unlink(missing_ok=True)
