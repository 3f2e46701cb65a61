"""The small model of `small_model.py`, and runs on one of the faked devices."""

import contextlib

import jax
import pytest
from small_model import config, model_folder, whole  # noqa: F401

from uae_jax import sharding


@contextlib.contextmanager
def first_device():
    """Runs that are started in this process take the first device alone."""
    make_mesh = sharding.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda mesh, devices=None: make_mesh(mesh, devices or jax.devices()[:1]))
        yield


@pytest.fixture
def one_device():
    """The runs of a test are on one device."""
    with first_device():
        yield


@pytest.fixture(scope="module")
def all_on_one_device():
    """All runs of a file are on one device, where programs compile fastest; `test_devices` compares meshes."""
    with first_device():
        yield
