"""Tensors in another form than parameters have, shown in that form, so that each parameter has one source."""

import pathlib
import re
from collections.abc import Sequence

import numpy as np

from uae_jax.hf.safetensors import Tensors

PARTS = ("query", "key", "value")


class SplitTensors:
    """A state whose fused tensor `NAME` appears as `NAME[query]`, `NAME[key]` and `NAME[value]`: thirds of its rows.

    Attributes:
      path: of the state.
      files: tensor name to file.
    """

    def __init__(self, source: Tensors, fused: str, batched: str = ""):
        """Shows the tensors of `source`.

        Args:
          source: the state.
          fused: regular expression of the names of fused tensors.
          batched: of those with a first axis of length 1, which is not shown.
        """
        self.path = source.path
        self._source = source
        self._batched = batched
        self._stored: dict[str, tuple[str, int | None]] = {}
        for name in source.names():
            pieces = {f"{name}[{part}]": (name, index) for index, part in enumerate(PARTS)}
            self._stored |= pieces if re.fullmatch(fused, name) else {name: (name, None)}
        self.files = {name: source.file(stored) for name, (stored, _) in self._stored.items()}

    def names(self) -> set[str]:
        """All tensor names, those of the pieces in place of the fused ones."""
        return set(self._stored)

    def file(self, name: str) -> pathlib.Path:
        """The file that holds a tensor."""
        return self.files[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor as it is shown; that of the file where it does not allow that."""
        stored, index = self._stored[name]
        shape = self._source.shape(stored)
        if index is not None and shape and shape[0] % 3 == 0:
            return (shape[0] // 3, *shape[1:])
        return shape[1:] if self._is_batched(stored) else shape

    def _is_batched(self, stored: str) -> bool:
        return bool(re.fullmatch(self._batched, stored)) and self._source.shape(stored)[:1] == (1,)

    def dtype(self, name: str) -> str:
        """The stored precision in safetensors' words."""
        return self._source.dtype(self._stored[name][0])

    def expect(self, names: Sequence[str]) -> None:
        """Says in which order tensors will be read."""
        self._source.expect([self._stored[name][0] for name in names])

    def read(self, name: str) -> np.ndarray:
        """One tensor in its stored precision."""
        stored, index = self._stored[name]
        tensor = self._source.read(stored)
        if index is not None:
            return np.split(tensor, 3)[index]
        return tensor[0] if self._is_batched(stored) else tensor
