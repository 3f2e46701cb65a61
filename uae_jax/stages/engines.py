"""The inference engines, and which one a folder needs."""

import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import jax
import numpy as np
from PIL import Image

from uae_jax import trees
from uae_jax.data.qwen_inputs import Fields
from uae_jax.stages.inference import Inference, Row
from uae_jax.stages.inference_config import InferenceConfig
from uae_jax.stages.unified_inference import UnifiedInference
from uae_jax.stages.weights import ModelConfig


class Engine(Protocol):
    """What captions, draws and reconstructs; `stages.inference.Inference` describes the methods."""

    config: InferenceConfig

    @property
    def folder(self) -> pathlib.Path: ...

    @property
    def encoders(self) -> Mapping[str, trees.Tree]: ...

    def image_fields(self, image: np.ndarray | Image.Image) -> Fields: ...

    def question_fields(self, question: str, images: Sequence[np.ndarray | Image.Image]) -> Fields: ...

    def text_fields(self, text: str) -> Fields: ...

    def unknown(self, texts: Iterable[str]) -> str: ...

    def captions(self, rows: Iterable[Row]) -> Iterator[tuple[Row, str]]: ...

    def drawings(self, rows: Iterable[Row]) -> Iterator[tuple[Row, np.ndarray]]: ...

    def reconstructions(self, rows: Iterable[Row]) -> Iterator[tuple[Row, str, np.ndarray]]: ...


# engines of folders that hold one model; every other folder is UAE's
SINGLE = (UnifiedInference,)


def single_engine(folder: str) -> type[UnifiedInference] | None:
    """The engine of a folder that holds one model, or None."""
    return next((engine for engine in SINGLE if engine.knows(folder)), None)


def open_engine(
    model: ModelConfig,
    config: InferenceConfig,
    devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm] (an alias inside of jax)
) -> Engine:
    """The engine of a folder, with its weights on the devices; arguments and errors are those of `Inference`."""
    return (single_engine(model.folder) or Inference)(model, config, devices)
