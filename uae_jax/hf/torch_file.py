"""PyTorch's weight files (`.pt`, `.pth`, `.bin`), read without running code from the pickle."""

import pathlib
import pickle
import re
import zipfile
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

from uae_jax.files.paths import is_url, local_to_read, to_path
from uae_jax.hf.file_sets import check_index, shards
from uae_jax.hf.safetensors import TensorFolder

SUFFIXES = (".pt", ".pth", ".bin")
DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32"}
REMEDY = "save the model's state_dict() alone, or as safetensors"


INDEX = "pytorch_model.bin.index.json"


class TorchFile:
    """The tensors of one state dictionary in PyTorch files, memory-mapped; a `hf.safetensors.Tensors`.

    Attributes:
      path: the file, or the folder of an index and its shards.
      files: tensor name to file.
    """

    def __init__(self, path: str | pathlib.Path):
        """Opens a file, or the shards of a folder's `INDEX`.

        Raises:
          FileNotFoundError: no such file, or a shard of the index is missing.
          ValueError: PyTorch is not installed, a file is not complete or holds anything but tensors by name, or index
            and shards disagree.
        """
        self.path = to_path(path)
        index = self.path / INDEX if self.path.is_dir() else None
        if not (index or self.path).is_file():
            raise FileNotFoundError(f"weights not found: {index or self.path} does not exist")
        self._tensors: dict[str, Any] = {}
        self.files: dict[str, pathlib.Path] = {}
        for file in [self.path] if index is None else shards(index, self.path):
            tensors = _load(file)
            if again := sorted(set(tensors) & set(self.files)):
                raise ValueError(f"{self.files[again[0]]} and {file} both hold {again[0]}; keep the right file")
            self._tensors |= tensors
            self.files |= dict.fromkeys(tensors, file)
        if index is not None:
            check_index(index, self.files, self.path)

    def names(self) -> set[str]:
        """All tensor names."""
        return set(self.files)

    def file(self, name: str) -> pathlib.Path:
        """The file that holds a tensor."""
        return self.files[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> str:
        """safetensors' name of a tensor's precision (`F32`, `BF16`, ...), without reading the tensor."""
        stored = str(self._tensors[name].dtype).removeprefix("torch.")
        return DTYPES.get(stored, stored)

    def read(self, name: str) -> np.ndarray:
        """One tensor in its stored precision."""
        tensor = self._tensors[name]
        if self.dtype(name) == "BF16":  # numpy has bfloat16 only through ml_dtypes
            return tensor.contiguous().view(_torch().int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()

    def expect(self, names: Sequence[str]) -> None:
        """The file is open as a whole."""


def open_tensors(path: str | pathlib.Path) -> TensorFolder | TorchFile:
    """The tensors of a file, or of a folder: its safetensors or, without safetensors, its PyTorch file or files.

    Raises:
      FileNotFoundError: no such file or folder, or no weights in the folder.
      ValueError: several PyTorch files without `INDEX` (and none named `pytorch_model.bin`), or an unreadable file.
    """
    path = to_path(path)
    if path.is_dir() and not any(not file.name.startswith(".") for file in path.glob("*.safetensors*")):
        if (path / INDEX).is_file():
            return TorchFile(path)
        visible = (file for file in path.iterdir() if not file.name.startswith("."))
        files = sorted(file for file in visible if file.suffix in SUFFIXES)
        files = [file for file in files if file.name == "pytorch_model.bin"] or files
        if len(files) > 1:
            raise ValueError(
                f"{path} holds {' and '.join(file.name for file in files)}; give the path of the one to read"
            )
        if not files:
            raise FileNotFoundError(f"no weights in {path}: neither safetensors nor a {', '.join(SUFFIXES)} file")
        path = files[0]
    return TorchFile(path) if path.suffix in SUFFIXES else TensorFolder(path)


def _torch():
    try:
        import torch
    except ImportError:
        raise ValueError(
            "PyTorch is needed to read .pt, .pth and .bin files: pip install torch, or give the weights as safetensors"
        ) from None
    return torch


def _load(path: pathlib.Path) -> dict[str, Any]:
    if is_url(path):  # the file is read once; what is mapped of its copy stays after the copy's name is gone
        with local_to_read(path) as copy:
            try:
                return _load(copy)
            except ValueError as error:
                raise ValueError(str(error).replace(str(copy), str(path))) from None
    torch = _torch()
    zipped = zipfile.is_zipfile(path)
    with path.open("rb") as file:
        if not zipped and file.read(2) == b"PK":  # begins as a zip archive, without its end
            raise ValueError(f"{path} is not a complete PyTorch file; copy it again")
    if zipped and any(name.partition("/")[2].startswith("code/") for name in zipfile.ZipFile(path).namelist()):
        raise ValueError(f"{path} is a TorchScript program, which is not run; {REMEDY}")
    try:
        # older files, which are not zip archives, cannot be mapped
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"code ({found[1].rstrip('.')})" if found else "objects other than tensors"
        raise ValueError(f"{path} holds {what}, which is not run; {REMEDY}") from None
    except (RuntimeError, EOFError, OSError, KeyError) as error:
        raise ValueError(
            f"{path} is not a complete PyTorch file ({str(error).splitlines()[0]}); copy it again"
        ) from None
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, not tensors by name; {REMEDY}")
    others = [name for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise ValueError(f"{path} holds {others[0]!r}, which is not a tensor; {REMEDY}")
    return {name: tensor.detach() for name, tensor in state.items()}
