"""Files written tensor by tensor: byte for byte those of safetensors' own writer, with one tensor in memory."""

import weakref

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from uae_jax.hf.items import Item, published_items, write_items
from uae_jax.hf.rules import Rule, published_tensors
from uae_jax.hf.safetensors import DTYPES, write_tensors

TENSORS = {f"ä{number}": np.full((3, 5), number).astype(kind) for number, kind in enumerate(DTYPES.values())} | {
    "scalar": np.float32(2.5).reshape(()),
    "empty": np.zeros((0, 4), ml_dtypes.bfloat16),
    "turned": np.arange(12, dtype=np.float32).reshape(3, 4).T,
}
RULES = [
    Rule("layers/kernel", "layers.{}.weight", "dense", (0, 1, 2)),
    Rule("patch/kernel", "patch.weight", "patch", torch_shape=(16, 6, 2, 2)),
    Rule("scale", "scale"),
]
SHAPES = {"layers": {"kernel": (3, 8, 6)}, "patch": {"kernel": (24, 16)}, "scale": ()}
PARAMS = jax.tree.map(
    lambda shape: np.random.default_rng(0).standard_normal(shape).astype(np.float32),
    SHAPES,
    is_leaf=lambda node: isinstance(node, tuple),
)


def item(name, tensor):
    return Item(name, tensor.shape, tensor.dtype, lambda: tensor, name)


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_file_is_that_of_safetensors_own_writer(tmp_path):
    (file,) = write_items(tmp_path / "ours", [item(*pair) for pair in TENSORS.items()])
    tensors = {name: np.asarray(tensor, order="C") for name, tensor in TENSORS.items()}
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert file.read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize("limit", [10**9, 130])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_are_written_as_all_at_once(tmp_path, limit, dtype):
    write_items(tmp_path / "one", published_items(PARAMS, RULES, dtype), max_shard_bytes=limit)
    write_tensors(tmp_path / "all", published_tensors(PARAMS, RULES, np.dtype(dtype)), max_shard_bytes=limit)
    assert contents(tmp_path / "one") == contents(tmp_path / "all") and len(contents(tmp_path / "one")) > (limit < 999)


def test_one_tensor_at_a_time_is_held_in_memory(tmp_path):
    alive, most = set(), 0

    def make(number):
        nonlocal most
        tensor = np.full(100, number, np.float32)
        alive.add(number)
        weakref.finalize(tensor, alive.discard, number)
        most = max(most, len(alive))
        return tensor

    items = [Item(f"{at}", (100,), np.dtype(np.float32), lambda at=at: make(at), "") for at in range(12)]
    write_items(tmp_path, items)
    assert most == 1


def test_a_source_that_changed_is_refused_and_leaves_what_was_there(tmp_path):
    write_items(tmp_path, [item("a", np.zeros(3, np.float32))])
    before = contents(tmp_path)
    wrong = Item("a", (4,), np.dtype(np.float32), lambda: np.zeros(3, np.float32), "model.safetensors: a")
    with pytest.raises(ValueError, match=r"model.safetensors: a is float32\[3\] and was announced as float32\[4\]"):
        write_items(tmp_path, [wrong])
    assert contents(tmp_path) == before


@pytest.mark.parametrize("finite", [True, False])
def test_nan_is_refused_where_it_is_asked(tmp_path, finite):
    items = [item("a", np.array([np.nan], np.float32))]
    if finite:
        with pytest.raises(ValueError, match="a holds NaN or infinity"):
            write_items(tmp_path, items)
    else:
        assert write_items(tmp_path, items, finite=False)
