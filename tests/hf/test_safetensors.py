"""Folders of safetensors: one file, shards, and what is wrong with them."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest

from uae_jax.hf.rules import Rule, load_params, published_tensors
from uae_jax.hf.safetensors import TensorFolder, write_tensors

TENSORS = {f"layers.{number}.weight": np.full((4, 8), number, np.float32) for number in range(5)} | {
    "half": np.arange(4, dtype=ml_dtypes.bfloat16), "scalar": np.float32(2.5).reshape(())}


@pytest.mark.parametrize("limit", [10**9, 300], ids=["one", "shards"])
def test_what_is_written_is_read(tmp_path, limit):
    files = write_tensors(tmp_path, TENSORS, max_shard_bytes=limit)
    assert len(files) == (1 if limit > 1000 else 3) and (tmp_path / "model.safetensors.index.json").exists() == (limit < 1000)
    folder = TensorFolder(tmp_path)
    assert folder.names() == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert folder.shape(name) == tensor.shape and folder.read(name).dtype == tensor.dtype
        np.testing.assert_array_equal(folder.read(name), tensor)


def test_shards_without_an_index_are_all_read(tmp_path):
    write_tensors(tmp_path, TENSORS, max_shard_bytes=300)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert TensorFolder(tmp_path).names() == set(TENSORS)


def test_a_shard_that_the_index_names_and_is_not_there(tmp_path):
    files = write_tensors(tmp_path, TENSORS, max_shard_bytes=300)
    files[1].unlink()
    with pytest.raises(FileNotFoundError, match=f"names {files[1].name}, which is not in the folder"):
        TensorFolder(tmp_path)


@pytest.mark.parametrize("cut", [5, -7])
def test_truncated_files_are_named(tmp_path, cut):
    (file,) = write_tensors(tmp_path, TENSORS)
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(ValueError, match="model.safetensors is not a complete safetensors file"):
        TensorFolder(tmp_path)


def test_missing_folders_and_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        TensorFolder(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="no safetensors file in"):
        TensorFolder(tmp_path)


RULES = [Rule("layers/kernel", "layers.{}.weight", "dense", (0, 1, 2)), Rule("conv/kernel", "conv.weight", "conv"),
         Rule("patch/kernel", "patch.weight", "patch", torch_shape=(6, 3, 2, 2))]
ABSTRACT = {
    "layers": {"kernel": jax.ShapeDtypeStruct((3, 8, 4), np.float32)}, "conv": {"kernel": jax.ShapeDtypeStruct((3, 3, 2, 5), np.float32)},
    "patch": {"kernel": jax.ShapeDtypeStruct((12, 6), np.float32)}}


def params():
    return jax.tree.map(lambda leaf: np.random.default_rng(0).standard_normal(leaf.shape).astype(np.float32), ABSTRACT)


def test_layouts_go_there_and_back(tmp_path):
    tensors = dict(published_tensors(params(), RULES))
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        **{f"layers.{number}.weight": (4, 8) for number in range(3)}, "conv.weight": (5, 2, 3, 3), "patch.weight": (6, 3, 2, 2)}
    np.testing.assert_array_equal(tensors["layers.1.weight"], params()["layers"]["kernel"][1].T)
    write_tensors(tmp_path, tensors)
    jax.tree.map(np.testing.assert_array_equal, load_params(TensorFolder(tmp_path), RULES, ABSTRACT), params())


@pytest.mark.parametrize("change, message", [
    (lambda t: t.pop("conv.weight"), "missing: conv.weight"), (lambda t: t.update(extra=np.zeros(2)), "unknown: extra"),
    (lambda t: t.update({"layers.2.weight": np.zeros((4, 9), np.float32)}), r"layers.2.weight in .*model.safetensors is \[4, 9\], the model needs \[4, 8\]")])
def test_tensors_that_do_not_fit_are_named(tmp_path, change, message):
    tensors = dict(published_tensors(params(), RULES))
    change(tensors)
    write_tensors(tmp_path, tensors)
    with pytest.raises(ValueError, match=message):
        load_params(TensorFolder(tmp_path), RULES, ABSTRACT)


def test_a_table_that_does_not_fit_the_model_is_refused(tmp_path):
    write_tensors(tmp_path, dict(published_tensors(params(), RULES)))
    with pytest.raises(ValueError, match="disagree on the parameters .*'patch/kernel'"):
        load_params(TensorFolder(tmp_path), RULES[:2], ABSTRACT)
