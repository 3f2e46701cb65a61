"""A painter replaces the model in the benchmarks that generate images."""

import pytest
from stand_ins import Painter, load_painter

from uae_jax.evaluation import drawing


@pytest.fixture
def painter(monkeypatch):
    monkeypatch.setattr(drawing, "load_model", load_painter)
    monkeypatch.setattr(Painter, "limit", None)
