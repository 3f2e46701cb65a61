"""Similarity of two images under image encoders: the scores of Unified-Bench for a single pair."""

import pathlib
from collections.abc import Mapping

import numpy as np
from PIL import Image

from uae_jax import trees
from uae_jax.api import Model
from uae_jax.data.images import to_rgb
from uae_jax.evaluation.encoders import BenchEncoder, image_features, open_bench_encoder


class Similarities:
    """Compares images under several encoders, each with its own image processing.

    Args:
      model: its folder's encoders are used.
      paths: folders or files of further encoders by name (`clip`, `longclip`, `dinov2`, `dinov3`); a path replaces the
        model's encoder of that name.

    Raises:
      FileNotFoundError, ValueError: a path does not hold the named encoder.
    """

    def __init__(self, model: Model, paths: Mapping[str, str | pathlib.Path] | None = None):
        paths, engine = paths or {}, model.engine
        self.encoders: dict[str, tuple[BenchEncoder, trees.Tree]] = {}
        for name, path in paths.items():
            encoder = open_bench_encoder(name, path)
            self.encoders[name] = encoder, encoder.source.load()
        for name, params in engine.encoders.items():
            if name not in paths:
                self.encoders[name] = open_bench_encoder(name, engine.folder / name), params

    def __call__(self, original: Image.Image | np.ndarray, other: Image.Image | np.ndarray) -> dict[str, float]:
        """{encoder: cosine in [-1, 1]}; the images may have any sizes."""
        pair = [to_rgb(image) for image in (original, other)]
        found = {}
        for name, (encoder, params) in self.encoders.items():
            features = image_features(encoder, params, np.stack([encoder.pixels(image) for image in pair]))
            found[name] = float(features[0] @ features[1])
        return found
