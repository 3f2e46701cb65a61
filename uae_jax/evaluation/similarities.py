"""How alike two pictures are under the image encoders at hand: the scores of Unified-Bench for a single pair."""

import pathlib
from collections.abc import Mapping

import numpy as np
from PIL import Image

from uae_jax.api import Model
from uae_jax.data.qwen_inputs import to_rgb
from uae_jax.evaluation.encoders import BenchEncoder, image_features, open_bench_encoder


class Similarities:
    """Compares pictures under several encoders, each with its own image processing.

    Args:
      model: whose folder's encoders are used.
      paths: folders or files of other encoders by name (`clip`, `longclip`, `dinov2`, `dinov3`), which come before the
        model's.

    Raises:
      FileNotFoundError, ValueError: a path does not hold the encoder of its name.
    """

    def __init__(self, model: Model, paths: Mapping[str, str | pathlib.Path] | None = None):
        paths, system = paths or {}, model.engine.system
        self.encoders: dict[str, tuple[BenchEncoder, dict]] = {}
        for name, path in paths.items():
            encoder = open_bench_encoder(name, path)
            self.encoders[name] = encoder, encoder.source.load()
        for name in system.encoders:
            if name not in paths:
                self.encoders[name] = (
                    open_bench_encoder(name, system.folder / name),
                    model.engine.parts["encoders"][name],
                )

    def __call__(self, original: Image.Image | np.ndarray, drawn: Image.Image | np.ndarray) -> dict[str, float]:
        """Cosine in -1 .. 1 under each encoder, by its name; the pictures may have any sizes."""
        pair = [to_rgb(picture) for picture in (original, drawn)]
        found = {}
        for name, (encoder, params) in self.encoders.items():
            features = image_features(encoder, params, np.stack([encoder.pixels(picture) for picture in pair]))
            found[name] = float(features[0] @ features[1])
        return found
