"""A folder with a tensor too few, too many or misnamed, a file cut short, or another model in it ends with one clear line."""

import pathlib
import shutil

import pytest
from reference_folder import load

from uae_jax.hf.safetensors import TensorFolder, write_tensors

# a tensor of each part, as the published files name it
TENSORS = {
    "llm": "model.layers.1.mlp.up_proj.weight", "dit": "transformer_blocks.2.attn.norm_added_k.weight",
    "SD3/vae": "decoder.mid_block.resnets.0.conv1.weight",
    "SD3/text_encoder_2": "text_model.encoder.layers.1.mlp.fc1.bias",
    "llm_lora": "model.base_model.model.layers.1.mlp.up_proj.lora_B.default.weight",
    "dit_lora": "base_model.model.transformer_blocks.3.attn.add_k_proj.lora_B.weight",
    "dinov3": "layer.1.layer_scale2.lambda1"}


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
    assert str(folder / part) in text and f"missing: {TENSORS[part]}; unknown: {TENSORS[part]}_old." in text


@pytest.mark.parametrize("part", ["SD3/vae", "dit_lora"])
def test_an_extra_tensor_is_named(reference, folder, part):
    extra = TENSORS[part].replace("1", "9").replace("3", "9")
    rewrite(folder / part, reference.folder / part, lambda tensors: tensors.update({extra: tensors[TENSORS[part]]}))
    text = message(folder)
    assert str(folder / part) in text and f"unknown: {extra}." in text and "missing" not in text


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


@pytest.mark.parametrize(("part", "other"), [
    ("llm", "clip"), ("dit", "SD3/vae"), ("SD3/vae", "dit"), ("SD3/text_encoder", "dinov2"), ("clip", "dinov2")])
def test_another_model_in_the_place_of_a_part_is_named(reference, folder, part, other):
    replace(folder / part, reference.folder / other)
    assert str(folder / part) in message(folder)
