"""Weights in a bucket: the same numbers as from disk, each byte read once, and what is wrong named by its URL."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from buckets import served
from jax.sharding import NamedSharding, PartitionSpec

from uae_jax import trees
from uae_jax.hf import remote
from uae_jax.hf.inventory import cut_short
from uae_jax.hf.rules import Rule, check_params, load_params, published_tensors
from uae_jax.hf.safetensors import TensorFolder, metadata, write_tensors
from uae_jax.hf.split_tensors import SplitTensors
from uae_jax.hf.torch_file import open_tensors
from uae_jax.sharding import MeshConfig, make_mesh

SHAPES = {"layers/kernel": (6, 64, 32), "conv/kernel": (3, 3, 8, 16), "embedding": (64, 8), "scale": ()}
RULES = [
    Rule("layers/kernel", "layers.{}.weight", "dense", (2, 0, 1, 3, 5, 4)),
    Rule("conv/kernel", "conv.weight", "conv"),
    Rule("embedding", "embedding.weight"),
    Rule("scale", "scale"),
]
ABSTRACT = trees.unflatten({name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in SHAPES.items()})
PARAMS = jax.tree.map(lambda leaf: np.random.default_rng(0).standard_normal(leaf.shape).astype(np.float32), ABSTRACT)


@pytest.fixture
def store():
    with served("weights") as found:
        yield found


@pytest.fixture
def folder(tmp_path, store):
    write_tensors(tmp_path / "local", dict(published_tensors(PARAMS, RULES)), max_shard_bytes=20_000)
    store.upload_folder(tmp_path / "local", "weights", "model")
    return tmp_path / "local"


def placement(tree):
    specs = {"layers/kernel": ("fsdp", None, "tensor"), "conv/kernel": (None, None, None, "fsdp")}
    mesh = make_mesh(MeshConfig(2, 2, 2), jax.devices()[:8])
    return trees.map_with_name(lambda name, _: NamedSharding(mesh, PartitionSpec(*specs.get(name, ()))), tree)


@pytest.mark.parametrize("place", [None, placement])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_parameters_are_those_of_the_local_folder_and_each_byte_is_read_once(store, folder, place, dtype):
    theirs = load_params(TensorFolder(folder), RULES, ABSTRACT, dtype=dtype, placement=place)
    store.forget()
    opened = TensorFolder("gs://weights/model")
    headers = dict(store.read)
    ours = load_params(opened, RULES, ABSTRACT, dtype=dtype, placement=place)
    for name, leaf in trees.flatten(ours).items():
        assert leaf.dtype == trees.flatten(theirs)[name].dtype
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(trees.flatten(theirs)[name]))
    read = {name: store.read[name] - headers.get(name, 0) for name in store.read if name.endswith(".safetensors")}
    assert len(read) > 2 and sum(read.values()) == sum(leaf.nbytes for leaf in jax.tree.leaves(PARAMS))


def test_a_header_is_read_without_the_tensors(store, tmp_path):
    write_tensors(tmp_path / "large", {"a": np.zeros(2**20, np.float32), "b": np.ones(3, np.float16)})
    store.upload_folder(tmp_path / "large", "weights", "large")
    opened = TensorFolder("gs://weights/large")
    assert opened.shape("a") == (2**20,) and opened.dtype("b") == "F16"
    assert store.read["large/model.safetensors"] <= remote.FIRST + len(b"version https://git-lfs")
    assert metadata(opened.file("a")) == {"format": "pt"}
    np.testing.assert_array_equal(opened.read("b"), np.ones(3, np.float16))


def test_a_header_longer_than_the_first_request_is_read_on(store, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "FIRST", 100)
    many = {f"tensor {number}": np.full(2, number, np.int64) for number in range(40)}
    write_tensors(tmp_path, many)
    store.upload_folder(tmp_path, "weights", "many")
    opened = TensorFolder("gs://weights/many/model.safetensors")
    assert opened.names() == set(many)
    assert all(np.array_equal(opened.read(name), value) for name, value in many.items())


def test_pieces_of_a_tensor_are_read_with_it(store, tmp_path):
    write_tensors(tmp_path, {"in_proj": np.arange(36, dtype=np.float32).reshape(9, 4), "b": np.zeros(2, np.float32)})
    store.upload_folder(tmp_path, "weights", "fused")
    opened = SplitTensors(TensorFolder("gs://weights/fused"), "in_proj")
    store.forget()
    names = sorted(opened.names() - {"b"})
    opened.expect(names)
    pieces = {name: opened.read(name) for name in names}
    assert len(pieces) == 3 and store.read["fused/model.safetensors"] == 36 * 4
    for name, piece in pieces.items():
        np.testing.assert_array_equal(piece, SplitTensors(TensorFolder(tmp_path), "in_proj").read(name))


def test_reads_ahead_keep_to_their_room(store, tmp_path, monkeypatch):
    tensors = {f"t{number}": np.full(256, number, np.float32) for number in range(12)}
    write_tensors(tmp_path, tensors)
    store.upload_folder(tmp_path, "weights", "many")
    monkeypatch.setattr(remote, "AHEAD", 3 * 1024)
    monkeypatch.setattr(remote, "KEPT", 1024)
    opened = TensorFolder("gs://weights/many")
    store.forget()
    opened.expect([f"t{number}" for number in range(12)])
    reads = opened._reads
    for number in range(12):
        np.testing.assert_array_equal(opened.read(f"t{number}"), tensors[f"t{number}"])
        assert len(reads._coming) <= 3 and len(reads._used) <= 1
    assert sum(store.read.values()) == 12 * 1024
    np.testing.assert_array_equal(opened.read("t0"), tensors["t0"])  # again, in no order that was said


def damaged(content, how):
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    if how == "cut":
        return content[:-5]
    if how == "longer":
        return content + b"1234"
    if how == "no header":
        return (2**40).to_bytes(8, "little") + content[8:]
    if how == "not json":
        return content[:8] + b"[" + content[9:]
    if how == "empty":
        return b""
    header["conv.weight"]["data_offsets"][1] += 4
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


@pytest.mark.parametrize("how", ["cut", "longer", "no header", "not json", "empty", "offsets"])
def test_a_damaged_file_is_named_by_its_url(store, tmp_path, how):
    write_tensors(tmp_path, dict(published_tensors(PARAMS, RULES)))
    content = damaged((tmp_path / "model.safetensors").read_bytes(), how)
    store.put("weights", "model/model.safetensors", content)
    (tmp_path / "model.safetensors").write_bytes(content)
    for place in (tmp_path, "gs://weights/model"):
        with pytest.raises(ValueError, match=r"model.safetensors is not a complete safetensors file \(.+\); copy it"):
            TensorFolder(place)
    if how == "cut":
        told = cut_short("gs://weights/model")
        assert told == cut_short(tmp_path).replace(str(tmp_path), "gs://weights/model")


def test_other_mistakes_are_those_of_a_local_folder(store, folder):
    with pytest.raises(FileNotFoundError, match="weights not found: gs://weights/none does not exist"):
        TensorFolder("gs://weights/none")
    store.put("weights", "pointer/model.safetensors", b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match="gs://weights/pointer/model.safetensors is a Git LFS pointer"):
        TensorFolder("gs://weights/pointer")
    shard = sorted(name for name in store.names("weights", "model/") if name.endswith(".safetensors"))[0]
    del store.objects["weights", shard]
    with pytest.raises(FileNotFoundError, match="which is not in the folder; copy it there"):
        TensorFolder("gs://weights/model")


def test_non_finite_numbers_are_found_in_a_bucket(store, tmp_path):
    tensors = dict(published_tensors(PARAMS, RULES))
    tensors["embedding.weight"] = np.full_like(tensors["embedding.weight"], np.nan)
    write_tensors(tmp_path, tensors)
    store.upload_folder(tmp_path, "weights", "nan")
    for check in (load_params, check_params):
        with pytest.raises(ValueError, match="gs://weights/nan/model.safetensors: embedding.weight holds NaN"):
            check(TensorFolder("gs://weights/nan"), RULES, ABSTRACT)


def test_a_pytorch_file_is_read_once(store, tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}, tmp_path / "x.pt")
    store.upload_folder(tmp_path, "weights", "torch")
    opened = open_tensors("gs://weights/torch")
    np.testing.assert_array_equal(opened.read("a"), np.arange(6.0).reshape(2, 3))
    assert opened.dtype("b") == "BF16"
    assert store.read["torch/x.pt"] == (tmp_path / "x.pt").stat().st_size


def test_tensors_are_written_to_a_bucket_byte_for_byte(store, folder, tmp_path):
    tensors = dict(published_tensors(PARAMS, RULES))
    write_tensors("gs://weights/out", {"older": np.zeros(3, np.float32)})
    write_tensors("gs://weights/out", tensors, max_shard_bytes=20_000)
    local = {file.name: file.read_bytes() for file in pathlib.Path(folder).iterdir()}
    assert store.contents("weights", "out/") == local
    shutil.rmtree(folder)
