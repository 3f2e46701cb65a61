"""Folders of safetensors: one file, shards, and what is wrong with them."""

import json
import weakref

import jax
import ml_dtypes
import numpy as np
import pytest

from uae_jax.hf.rules import Rule, load_params, published_tensors
from uae_jax.hf.safetensors import TensorFolder, write_tensors

TENSORS = {f"layers.{number}.weight": np.full((4, 8), number, np.float32) for number in range(5)} | {
    "half": np.arange(4, dtype=ml_dtypes.bfloat16),
    "scalar": np.float32(2.5).reshape(()),
}


@pytest.mark.parametrize("limit", [10**9, 300], ids=["one", "shards"])
def test_what_is_written_is_read(tmp_path, limit):
    files = write_tensors(tmp_path, TENSORS, max_shard_bytes=limit)
    (tmp_path / "other").touch()
    assert {file.stat().st_mode for file in files} == {(tmp_path / "other").stat().st_mode}
    assert len(files) == (1 if limit > 1000 else 3) and (tmp_path / "model.safetensors.index.json").exists() == (
        limit < 1000
    )
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


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "not an index of weights"),
        ("[]", "not an index of weights"),
        ('{"weight_map": 3}', "not an index of weights"),
    ],
)
def test_an_index_that_cannot_be_read_is_named(tmp_path, content, message):
    write_tensors(tmp_path, TENSORS, max_shard_bytes=300)
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=f"model.safetensors.index.json is {message}.*copy it again"):
        TensorFolder(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda shards: shards.update({"scalar": shards["layers.0.weight"]}),
            "says that scalar is in model-00001-of-00003.*but it is in model-00003",
        ),
        (
            lambda shards: shards.update({"absent": shards["scalar"]}),
            "says that absent is in model-00003.*but no shard holds it",
        ),
        (
            lambda shards: shards.pop("half"),
            "model-00003-of-00003.safetensors holds half, which model.safetensors.index.json does not list",
        ),
    ],
)
def test_an_index_that_disagrees_with_its_shards_is_named(tmp_path, change, message):
    write_tensors(tmp_path, TENSORS, max_shard_bytes=300)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    change(content["weight_map"])
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        TensorFolder(tmp_path)


def test_a_pointer_in_place_of_the_weights_is_named(tmp_path):
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(ValueError, match="model.safetensors is a Git LFS pointer.*git lfs pull"):
        TensorFolder(tmp_path)


def test_a_tensor_in_two_files_is_named_and_a_variant_is_left_alone(tmp_path):
    write_tensors(tmp_path, TENSORS)
    write_tensors(tmp_path, {"half": np.zeros(4, np.float16)}, stem="model.fp16")
    assert TensorFolder(tmp_path).dtype("half") == "BF16"
    write_tensors(tmp_path, {"half": np.zeros(4, np.float16)}, stem="other")
    with pytest.raises(ValueError, match="model.safetensors and .*other.safetensors both hold half"):
        TensorFolder(tmp_path)


def test_one_shard_at_a_time_is_held_in_memory(tmp_path):
    alive, most = set(), 0

    def stream():
        nonlocal most
        for number in range(12):
            tensor = np.full(100, number, np.float32)
            alive.add(number)
            weakref.finalize(tensor, alive.discard, number)
            most = max(most, len(alive))
            yield f"tensor.{number}", tensor

    files = write_tensors(tmp_path, stream(), max_shard_bytes=3 * 400)
    assert [file.name for file in files] == [f"model-{number:05d}-of-00004.safetensors" for number in range(1, 5)]
    assert most <= 3 + 2  # a shard, the tensor after it, and the one that is being made


def test_an_error_leaves_what_was_there(tmp_path):
    files = write_tensors(tmp_path, TENSORS, max_shard_bytes=300)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def stream():
        yield from TENSORS.items()
        raise OSError("no more")

    for folder in (tmp_path, tmp_path / "new"):
        with pytest.raises(OSError, match="no more"):
            write_tensors(folder, stream(), max_shard_bytes=300)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before and files[0].exists()


def test_older_files_of_the_same_stem_are_replaced(tmp_path):
    write_tensors(tmp_path, {"kept": np.zeros(2, np.float32)}, stem="adapter_model")
    write_tensors(tmp_path, TENSORS, max_shard_bytes=300)
    write_tensors(tmp_path, {"only": np.zeros(2, np.float32)})
    assert {file.name for file in tmp_path.iterdir()} == {"model.safetensors", "adapter_model.safetensors"}


RULES = [
    Rule("layers/kernel", "layers.{}.weight", "dense", (0, 1, 2)),
    Rule("conv/kernel", "conv.weight", "conv"),
    Rule("patch/kernel", "patch.weight", "patch", torch_shape=(6, 3, 2, 2)),
]
ABSTRACT = {
    "layers": {"kernel": jax.ShapeDtypeStruct((3, 8, 4), np.float32)},
    "conv": {"kernel": jax.ShapeDtypeStruct((3, 3, 2, 5), np.float32)},
    "patch": {"kernel": jax.ShapeDtypeStruct((12, 6), np.float32)},
}


def params():
    return jax.tree.map(lambda leaf: np.random.default_rng(0).standard_normal(leaf.shape).astype(np.float32), ABSTRACT)


def test_layouts_go_there_and_back(tmp_path):
    tensors = dict(published_tensors(params(), RULES))
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        **{f"layers.{number}.weight": (4, 8) for number in range(3)},
        "conv.weight": (5, 2, 3, 3),
        "patch.weight": (6, 3, 2, 2),
    }
    np.testing.assert_array_equal(tensors["layers.1.weight"], params()["layers"]["kernel"][1].T)
    write_tensors(tmp_path, tensors)
    jax.tree.map(np.testing.assert_array_equal, load_params(TensorFolder(tmp_path), RULES, ABSTRACT), params())


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("conv.weight"), "missing: conv.weight"),
        (lambda t: t.update(extra=np.zeros(2)), "unknown: extra"),
        (
            lambda t: t.update({"layers.2.weight": np.zeros((4, 9), np.float32)}),
            r"layers.2.weight in .*model.safetensors is \[4, 9\], the model needs \[4, 8\]",
        ),
    ],
)
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


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64, ml_dtypes.float8_e4m3fn])
@pytest.mark.parametrize("wanted", [None, np.float32, ml_dtypes.bfloat16])
def test_every_precision_is_read(tmp_path, stored, wanted):
    write_tensors(tmp_path, dict(published_tensors(params(), RULES, stored)))
    read = load_params(TensorFolder(tmp_path), RULES, ABSTRACT, dtype=wanted)
    expected = jax.tree.map(lambda leaf: leaf.astype(stored).astype(wanted or stored), params())
    jax.tree.map(np.testing.assert_array_equal, read, expected)
    assert {leaf.dtype for leaf in jax.tree.leaves(read)} == {np.dtype(wanted or stored)}


def test_layers_of_several_precisions_are_stacked_in_the_widest(tmp_path):
    tensors = dict(published_tensors(params(), RULES))
    tensors["layers.1.weight"] = tensors["layers.1.weight"].astype(ml_dtypes.bfloat16)
    tensors["layers.2.weight"] = tensors["layers.2.weight"].astype(np.float16)
    write_tensors(tmp_path, tensors)
    kernel = load_params(TensorFolder(tmp_path), RULES, ABSTRACT)["layers"]["kernel"]
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel[0], params()["layers"]["kernel"][0])
    np.testing.assert_array_equal(kernel[1], params()["layers"]["kernel"][1].astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["layers.2.weight", "conv.weight", "patch.weight"])
def test_a_number_that_is_not_finite_is_named_with_its_file(tmp_path, stored, value, name):
    tensors = dict(published_tensors(params(), RULES, stored))
    tensors[name] = tensors[name].copy()
    tensors[name].flat[-1] = value
    write_tensors(tmp_path, tensors, max_shard_bytes=300)
    folder = TensorFolder(tmp_path)
    with pytest.raises(ValueError, match=f"{folder.file(name)}: {name} holds NaN or infinity; copy the file again"):
        load_params(folder, RULES, ABSTRACT, dtype=np.float32)


def test_a_number_past_the_wanted_precision_is_named(tmp_path):
    tensors = dict(published_tensors(params(), RULES))
    tensors["conv.weight"] = tensors["conv.weight"] + 1e6
    write_tensors(tmp_path, tensors)
    with np.errstate(over="ignore"), pytest.raises(ValueError, match="conv.weight passes the range of float16"):
        load_params(TensorFolder(tmp_path), RULES, ABSTRACT, dtype=np.float16)


def test_a_quantised_tensor_is_named(tmp_path):
    tensors = dict(published_tensors(params(), RULES))
    tensors["layers.1.weight"] = np.zeros((4, 8), np.int8)
    write_tensors(tmp_path, tensors)
    with pytest.raises(ValueError, match="model.safetensors stores layers.1.weight as int8, so the model is quantised"):
        load_params(TensorFolder(tmp_path), RULES, ABSTRACT)


def test_a_renamed_tensor_is_recognised(tmp_path):
    tensors = dict(published_tensors(params(), RULES))
    tensors["layer.1.weight"] = tensors.pop("layers.1.weight")
    write_tensors(tmp_path, tensors)
    with pytest.raises(
        ValueError,
        match="missing: layers.1.weight; unknown: layer.1.weight in .*model.safetensors. If layer.1.weight is "
        "layers.1.weight",
    ):
        load_params(TensorFolder(tmp_path), RULES, ABSTRACT)
