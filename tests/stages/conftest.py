"""The small model of `small_model.py`, and runs on one of the faked devices."""

import jax
import pytest
from small_model import config, model_folder, whole  # noqa: F401

from uae_jax import sharding


@pytest.fixture
def one_device(monkeypatch):
    """A run that is started in this process takes the first device alone."""
    make_mesh = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda mesh, devices=None: make_mesh(mesh, devices or jax.devices()[:1]))
