"""A painter in place of the model, for the benchmarks that draw."""

import pytest
from stand_ins import Painter, load_painter

from uae_jax.evaluation import drawing


@pytest.fixture
def painter(monkeypatch):
    monkeypatch.setattr(drawing, "load_model", load_painter)
    monkeypatch.setattr(Painter, "limit", None)
