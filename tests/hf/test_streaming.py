"""Parameters go from their file to the devices one at a time: what each device holds, what is read, and how much memory
it takes.
"""

import json
import pathlib
import shutil
import subprocess
import sys
import weakref

import jax
import large_folder
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from uae_jax import trees
from uae_jax.hf import rules
from uae_jax.hf.rules import Rule, load_params, published_tensors
from uae_jax.hf.safetensors import TensorFolder, write_tensors
from uae_jax.sharding import MeshConfig, make_mesh

SHAPES = {
    "layers/kernel": (4, 256, 128),
    "conv/kernel": (3, 3, 8, 16),
    "patch/kernel": (24, 16),
    "embedding": (64, 8),
    "scale": (),
}
RULES = [
    Rule("layers/kernel", "layers.{}.weight", "dense", (2, 0, 1, 3)),
    Rule("conv/kernel", "conv.weight", "conv"),
    Rule("patch/kernel", "patch.weight", "patch", torch_shape=(16, 6, 2, 2)),
    Rule("embedding", "embedding.weight"),
    Rule("scale", "scale"),
]
ABSTRACT = trees.unflatten({name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in SHAPES.items()})
SPECS = [
    {
        "layers/kernel": ("fsdp", None, "tensor"),
        "conv/kernel": (None, None, None, "fsdp"),
        "patch/kernel": ("tensor", "fsdp"),
        "embedding": ("fsdp",),
    },
    {
        "layers/kernel": (None, ("fsdp", "tensor")),
        "conv/kernel": (None, None, "tensor"),
        "patch/kernel": (None, "data"),
        "embedding": (None, "tensor"),
    },
    {},
]
PARAMS = jax.tree.map(lambda leaf: np.random.default_rng(0).standard_normal(leaf.shape).astype(np.float32), ABSTRACT)


@pytest.fixture
def folder(tmp_path):
    write_tensors(tmp_path, dict(published_tensors(PARAMS, RULES)), max_shard_bytes=200_000)
    return TensorFolder(tmp_path)


def placement(specs):
    mesh = make_mesh(MeshConfig(2, 2, 2), jax.devices()[:8])
    return lambda tree: trees.map_with_name(
        lambda name, _: NamedSharding(mesh, PartitionSpec(*specs.get(name, ()))), tree
    )


@pytest.mark.parametrize("specs", SPECS)
def test_every_device_holds_its_share_of_every_layout(folder, specs):
    placed = load_params(folder, RULES, ABSTRACT, placement=placement(specs))
    for name, leaf in trees.flatten(placed).items():
        assert leaf.sharding.spec == PartitionSpec(*specs.get(name, ()))
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(shard.data, trees.flatten(PARAMS)[name][shard.index])


@pytest.mark.parametrize("specs", SPECS)
def test_what_several_devices_hold_is_read_once(folder, specs, monkeypatch):
    copied, copy = [], rules._copy
    monkeypatch.setattr(rules, "_copy", lambda source, target: (copied.append(target.size), copy(source, target)))
    load_params(folder, RULES, ABSTRACT, placement=placement(specs))
    assert sum(copied) == trees.parameter_count(ABSTRACT)


def test_a_device_that_is_not_this_process_s_own_is_not_read_for(folder, monkeypatch):
    """One device's shards of a mesh of eight: what a process of a larger run reads."""
    copied, copy = [], rules._copy
    monkeypatch.setattr(rules, "_copy", lambda source, target: (copied.append(target.size), copy(source, target)))

    shards = rules.local_shards
    monkeypatch.setattr(rules, "local_shards", lambda sharding, shape: shards(sharding, shape)[:1])
    monkeypatch.setattr(jax, "make_array_from_single_device_arrays", lambda shape, sharding, placed: placed[0])
    block = load_params(folder, RULES, ABSTRACT, placement=placement(SPECS[0]))["layers"]["kernel"]
    np.testing.assert_array_equal(block, PARAMS["layers"]["kernel"][:2, :, :64])
    assert copied[:2] == [256 * 64, 256 * 64]


def test_the_host_holds_one_shard_at_a_time(folder, monkeypatch):
    alive, most, block, put = set(), 0, rules._Stored._block, jax.device_put

    def counted(self, index, dtype):
        nonlocal most
        made = block(self, index, dtype)
        alive.add(id(made))
        weakref.finalize(made, alive.discard, id(made))
        most = max(most, len(alive))
        return made

    monkeypatch.setattr(rules._Stored, "_block", counted)
    # as another device does, and the CPU does not always
    monkeypatch.setattr(jax, "device_put", lambda value, device: put(value.copy(), device))
    load_params(folder, RULES, ABSTRACT, placement=placement(SPECS[0]))
    assert most <= 2 and not alive  # the one that is made, and the name of the one before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_placed_parameters_have_the_wanted_precision(folder, dtype):
    placed = load_params(folder, RULES, ABSTRACT, dtype=dtype, placement=placement(SPECS[0]))
    for ours, theirs in zip(jax.tree.leaves(placed), jax.tree.leaves(PARAMS)):
        np.testing.assert_array_equal(np.asarray(ours), theirs.astype(dtype))


@pytest.fixture
def large(tmp_path):
    yield large_folder.write(tmp_path / "model")
    shutil.rmtree(tmp_path)


@pytest.mark.slow
def test_a_gigabyte_is_read_with_two_tensors_to_spare(large):
    assert sum(file.stat().st_size for file in large) > 10**9 and len(large) > 2
    program = pathlib.Path(large_folder.__file__)
    done = subprocess.run(
        [sys.executable, str(program), str(large[0].parent)],
        cwd=program.parents[2],
        env=large_folder.environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert not found["wrong"]
    assert found["bytes"] > 10**9 and found["growth"] < found["bytes"] + 2 * found["largest"] + 64 * 2**20
    # a second copy of the model, or pages that stay in memory, would pass the limit
    assert 2 * found["largest"] + 64 * 2**20 < 0.6 * found["bytes"]
