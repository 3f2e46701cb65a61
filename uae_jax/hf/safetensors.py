"""Folders of safetensors files, single or sharded with an index, read tensor by tensor and written back."""

import json
import pathlib
from collections.abc import Iterator, Mapping

import ml_dtypes  # noqa: F401  registers bfloat16 with numpy, which safetensors needs
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file


class TensorFolder:
    """The tensors of one folder, read lazily from the memory-mapped files.

    Attributes:
      path: the folder, or a single `.safetensors` file.
      files: tensor name to file.
    """

    def __init__(self, path: str | pathlib.Path):
        """Opens the folder's index, or its only file, or all shards when there is no index.

        Raises:
          FileNotFoundError: there is no such folder, no safetensors file in it, or a shard of the index is missing.
          ValueError: a file is not readable as safetensors (cut short, or of another format).
        """
        self.path = pathlib.Path(path)
        if not self.path.exists():
            raise FileNotFoundError(f"weights not found: {self.path} does not exist")
        self._open: dict[pathlib.Path, safe_open] = {}
        self.files: dict[str, pathlib.Path] = {}
        for file in _weight_files(self.path):
            for name in self._handle(file).keys():
                self.files[name] = file

    def _handle(self, file: pathlib.Path):
        if file not in self._open:
            try:
                self._open[file] = safe_open(file, framework="numpy")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file} is not a complete safetensors file ({error}); copy it again") from None
        return self._open[file]

    def names(self) -> set[str]:
        """All tensor names."""
        return set(self.files)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return tuple(self._handle(self.files[name]).get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """The stored precision of a tensor in safetensors' words (`F32`, `BF16`, ...), without reading it."""
        return self._handle(self.files[name]).get_slice(name).get_dtype()

    def read(self, name: str) -> np.ndarray:
        """One tensor in its stored precision."""
        return self._handle(self.files[name]).get_tensor(name)


def _weight_files(path: pathlib.Path) -> list[pathlib.Path]:
    if path.is_file():
        return [path]
    indexes = sorted(path.glob("*.safetensors.index.json"))
    if indexes:
        shards = sorted(set(json.loads(indexes[0].read_text())["weight_map"].values()))
        missing = [shard for shard in shards if not (path / shard).exists()]
        if missing:
            raise FileNotFoundError(f"{indexes[0]} names {missing[0]}, which is not in the folder; copy it there")
        return [path / shard for shard in shards]
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no safetensors file in {path}")
    return files


def write_tensors(
    folder: str | pathlib.Path, tensors: Iterator[tuple[str, np.ndarray]] | Mapping[str, np.ndarray], *,
    stem: str = "model", max_shard_bytes: int = 5 * 10**9) -> list[pathlib.Path]:
    """Writes tensors as `stem.safetensors`, or as numbered shards with an index when they pass the size limit.

    Args:
      folder: made if absent.
      tensors: names and arrays, in the order of the files.
      stem: `model`, `diffusion_pytorch_model` or `adapter_model`.
      max_shard_bytes: size limit of one file.

    Returns:
      The files written.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    items = tensors.items() if isinstance(tensors, Mapping) else tensors
    shards: list[dict[str, np.ndarray]] = [{}]
    sizes = [0]
    for name, tensor in items:
        if shards[-1] and sizes[-1] + tensor.nbytes > max_shard_bytes:
            shards.append({})
            sizes.append(0)
        shards[-1][name] = np.asarray(tensor, order="C")  # keeps scalars scalar
        sizes[-1] += tensor.nbytes
    total = len(shards)
    names = [f"{stem}.safetensors"] if total == 1 else [
        f"{stem}-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1)]
    for file, shard in zip(names, shards):
        save_file(shard, folder / file, metadata={"format": "pt"})
    if total > 1:
        weight_map = {name: file for file, shard in zip(names, shards) for name in shard}
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return [folder / file for file in names]
