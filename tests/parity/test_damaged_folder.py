"""A folder with a tensor too few, too many, misnamed or not finite, a file cut short, or another model in it: one clear
line.
"""

import json
import pathlib
import shutil

import numpy as np
import pytest
from reference_folder import load

from uae_jax.hf.safetensors import TensorFolder, write_tensors

# a tensor of each part, as the published files name it
TENSORS = {
    "llm": "model.layers.1.mlp.up_proj.weight",
    "dit": "transformer_blocks.2.attn.norm_added_k.weight",
    "SD3/vae": "decoder.mid_block.resnets.0.conv1.weight",
    "SD3/text_encoder_2": "text_model.encoder.layers.1.mlp.fc1.bias",
    "llm_lora": "model.base_model.model.layers.1.mlp.up_proj.lora_B.default.weight",
    "dit_lora": "base_model.model.transformer_blocks.3.attn.add_k_proj.lora_B.weight",
    "dinov3": "layer.1.layer_scale2.lambda1",
}


@pytest.fixture
def folder(reference, tmp_path):
    """The whole model as links to the reference, whose parts can be replaced."""
    target = tmp_path / "model"
    shutil.copytree(reference.folder, target, copy_function=lambda source, copy: pathlib.Path(copy).symlink_to(source))
    return target


def replace(path, source):
    """A part of the folder, with files of its own."""
    shutil.rmtree(path)
    shutil.copytree(source, path)


def rewrite(path, source, change):
    """The part's tensors after `change`, which edits a dictionary of them."""
    replace(path, source)
    stored = TensorFolder(source)
    tensors = {name: stored.read(name) for name in sorted(stored.names())}
    change(tensors)
    for file in path.glob("*.safetensors"):
        file.unlink()
    write_tensors(path, tensors)


def message(folder):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        load(folder)
    text = str(error.value)
    assert "\n" not in text and len(text) < 700
    return text


@pytest.mark.parametrize("part", ["llm", "SD3/text_encoder_2", "llm_lora"])
def test_a_missing_tensor_is_named(reference, folder, part):
    rewrite(folder / part, reference.folder / part, lambda tensors: tensors.pop(TENSORS[part]))
    text = message(folder)
    assert str(folder / part) in text and f"missing: {TENSORS[part]}." in text and "unknown" not in text


@pytest.mark.parametrize("part", ["dit", "dinov3"])
def test_a_renamed_tensor_is_named_both_ways(reference, folder, part):
    def rename(tensors):
        tensors[f"{TENSORS[part]}_old"] = tensors.pop(TENSORS[part])

    rewrite(folder / part, reference.folder / part, rename)
    text = message(folder)
    name = TENSORS[part]
    file = next(file for file in (folder / part).glob("*.safetensors"))
    assert (
        f"missing: {name}; unknown: {name}_old in {file}." in text
        and f"If {name}_old is {name}, give it that name" in text
    )


@pytest.mark.parametrize("part", ["SD3/vae", "dit_lora"])
def test_an_extra_tensor_is_named(reference, folder, part):
    extra = TENSORS[part].replace("1", "9").replace("3", "9")
    rewrite(folder / part, reference.folder / part, lambda tensors: tensors.update({extra: tensors[TENSORS[part]]}))
    text = message(folder)
    assert f"unknown: {extra} in {folder / part}" in text and "missing" not in text


def test_a_tensor_that_is_there_under_two_names_is_named(reference, folder):
    name = TENSORS["llm"]
    again = name.replace("model.", "model.language_model.", 1)
    rewrite(folder / "llm", reference.folder / "llm", lambda tensors: tensors.update({again: tensors[name] + 1}))
    text = message(folder)
    assert str(folder / "llm") in text and name in text and again in text


@pytest.mark.parametrize("part", ["llm", "dit", "llm_lora"])
def test_a_truncated_file_is_named(reference, folder, part):
    replace(folder / part, reference.folder / part)
    file = sorted((folder / part).glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-100])
    assert f"{file} is not a complete safetensors file" in message(folder)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("llm", np.nan),
        ("dit", np.inf),
        ("SD3/vae", np.nan),
        ("SD3/text_encoder_2", -np.inf),
        ("dit_lora", np.nan),
        ("dinov3", np.nan),
    ],
)
def test_a_number_that_is_not_finite_is_named(reference, folder, part, value):
    def spoil(tensors):
        tensors[TENSORS[part]] = tensors[TENSORS[part]].copy()
        tensors[TENSORS[part]].flat[-1] = value

    rewrite(folder / part, reference.folder / part, spoil)
    (file,) = (folder / part).glob("*.safetensors")
    assert f"{file}: {TENSORS[part]} holds NaN or infinity; copy the file again" in message(folder)


@pytest.fixture
def sharded(reference, folder):
    """The folder with a transformer in several files, and the index of these."""

    def again(change=lambda weight_map: None):
        replace(folder / "dit", reference.folder / "dit")
        stored = TensorFolder(reference.folder / "dit")
        tensors = {name: stored.read(name) for name in sorted(stored.names())}
        write_tensors(folder / "dit", tensors, stem="diffusion_pytorch_model", max_shard_bytes=100_000)
        (index,) = (folder / "dit").glob("*.index.json")
        content = json.loads(index.read_text())
        change(content["weight_map"])
        index.write_text(json.dumps(content))
        return index, content["weight_map"]

    return again


def test_an_index_that_names_an_absent_shard_is_named(sharded, folder):
    index, shards = sharded()
    (folder / "dit" / shards[TENSORS["dit"]]).unlink()
    assert f"{index} names {shards[TENSORS['dit']]}, which is not in the folder; copy it there" in message(folder)


def test_an_index_that_disagrees_with_its_shards_is_named(sharded, folder):
    name = TENSORS["dit"]
    other = next(shard for shard in sharded()[1].values() if shard != sharded()[1][name])
    index, _ = sharded(lambda shards: shards.update({name: other}))
    assert f"{index} says that {name} is in {other}, but it is in " in message(folder)
    index, _ = sharded(lambda shards: shards.update({"another.weight": other}))
    assert f"{index} says that another.weight is in {other}, but no shard holds it" in message(folder)
    index, shards = sharded(lambda shards: shards.pop(name))
    assert f"holds {name}, which {index.name} does not list" in message(folder)


@pytest.mark.parametrize("part", ["llm", "dit", "SD3/vae", "SD3/text_encoder", "clip"])
def test_a_folder_without_its_config_is_named(folder, part):
    (folder / part / "config.json").unlink()
    text = message(folder)
    assert str(folder / part / "config.json") in text and ("copy it from" in text or "with its config.json" in text)


@pytest.mark.parametrize(
    ("part", "other", "held", "expected"),
    [
        ("llm", "clip", "clip", "qwen2_5_vl"),
        ("llm", "dit", "SD3Transformer2DModel", "qwen2_5_vl"),
        ("dit", "SD3/vae", "AutoencoderKL", "SD3Transformer2DModel"),
        ("SD3/vae", "dit", "SD3Transformer2DModel", "AutoencoderKL"),
        ("SD3/vae", "llm", "qwen2_5_vl", "AutoencoderKL"),
        ("SD3/text_encoder", "dinov2", "dinov2", "clip"),
        ("clip", "dinov2", "dinov2", "clip"),
        ("clip", "SD3/vae", "AutoencoderKL", "CLIP"),
    ],
)
def test_another_model_in_the_place_of_a_part_is_named(reference, folder, part, other, held, expected):
    replace(folder / part, reference.folder / other)
    text = message(folder)
    assert (
        str(folder / part) in text
        and held in text.replace(str(folder / part), "")
        and expected in text.replace(str(folder), "")
    )


def test_weights_of_another_size_than_their_config_are_named(reference, folder):
    replace(folder / "dit", reference.folder / "dit")
    file = folder / "dit" / "config.json"
    stored = json.loads(file.read_text())
    file.write_text(json.dumps(stored | {"pooled_projection_dim": stored["pooled_projection_dim"] + 1}))
    text = message(folder)
    name, width = "time_text_embed.text_embedder.linear_1.weight", stored["pooled_projection_dim"]
    assert f"{name} in {folder / 'dit'}" in text and f"is [32, {width}], the model needs [32, {width + 1}]" in text


def test_parts_of_different_models_are_named(reference, folder):
    def widen(tensors):
        for name in ("projector.2.weight", "projector.2.bias"):
            tensors[name] = np.concatenate([tensors[name]] * 2)

    shutil.rmtree(folder / "llm_lora")  # its projector would stand for the one of llm
    rewrite(folder / "llm", reference.folder / "llm", widen)
    text = message(folder)
    assert str(folder / "llm") in text and str(folder / "dit" / "config.json") in text and "joint_attention_dim" in text
