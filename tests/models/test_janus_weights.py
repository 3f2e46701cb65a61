"""Janus's weights: both published layouts, export for transformers, adapters of peft, and what is refused."""

import functools
import json
import pathlib

import janus_pieces as pieces
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from janus_pieces import relative
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import JanusForConditionalGeneration

from uae_jax import trees
from uae_jax.hf.safetensors import TensorFolder, write_tensors
from uae_jax.models.janus import config as configs
from uae_jax.models.janus import model, weights
from uae_jax.models.language import model as lm
from uae_jax.nn.lora import init_lora

MODULES = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
IDS = torch.tensor([[0, 40, 41, 97, 12, 155, 8, 3]])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    theirs, folder = pieces.build(), tmp_path_factory.mktemp("janus")
    theirs.save_pretrained(folder)
    return theirs, folder, *weights.load(folder)


@functools.partial(jax.jit, static_argnums=0)
def logits(config, params, adapter=None):
    """Of the last token of `IDS`."""
    ids = jnp.asarray(IDS.numpy())
    batch = {"prompt_ids": ids, "prompt_mask": jnp.ones(ids.shape, bool)}
    return lm.logits(config, params, model.prompt_prefix(config, params, adapter, batch).last_hidden)


def expected(theirs) -> torch.Tensor:
    with torch.no_grad():
        return theirs(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits[:, -1]


def test_every_tensor_has_one_parameter_and_is_written_as_it_was_read(saved):
    theirs, folder, config, params = saved
    stored, written = TensorFolder(folder), dict(weights.tensors(config, params))
    assert len(written) == 282
    assert trees.parameter_count(params) == sum(parameter.numel() for parameter in theirs.parameters()) == 1_189_707
    assert written.keys() == stored.names()
    for name, tensor in written.items():
        np.testing.assert_array_equal(tensor, stored.read(name))


def test_an_export_opens_in_transformers_with_equal_logits(saved, tmp_path):
    theirs, _, config, params = saved
    write_tensors(tmp_path, weights.tensors(config, params))
    (tmp_path / "config.json").write_text(json.dumps(configs.to_json(config)))
    assert configs.from_folder(tmp_path) == config
    again = JanusForConditionalGeneration.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in again.state_dict().items())
    assert relative(logits(config, params), expected(again)) < 1e-4


def official_folder(theirs, folder: pathlib.Path, files: int, dtype=torch.float32) -> pathlib.Path:
    """The official layout: a pickle, or pickles with their index."""
    folder.mkdir()
    state = {name: tensor.to(dtype).clone() for name, tensor in pieces.official_state(theirs.state_dict()).items()}
    if files == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return folder
    names, said = sorted(state), {}
    for number in range(files):
        file = f"pytorch_model-{number + 1:05d}-of-{files:05d}.bin"
        part = names[number::files]
        torch.save({name: state[name] for name in part}, folder / file)
        said |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": said}))
    return folder


@pytest.mark.parametrize("files", [1, 2], ids=["one file", "two files and an index"])
def test_the_official_pickle_holds_the_same_parameters(saved, tmp_path, files):
    theirs, _, config, params = saved
    folder = official_folder(theirs, tmp_path / "official", files)
    _, again = weights.load(folder, config)
    jax.tree.map(np.testing.assert_array_equal, params, again)


def test_the_official_precision_is_read(saved, tmp_path):
    theirs, _, config, params = saved
    _, half = weights.load(official_folder(theirs, tmp_path / "official", 1, torch.bfloat16), config)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half)} == {"bfloat16"}
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    jax.tree.map(np.testing.assert_array_equal, rounded, half)


class Trap:
    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return (pathlib.Path.touch, (self.place,))


def test_code_in_a_pickle_is_refused_and_not_run(saved, tmp_path):
    theirs, _, config, _ = saved
    folder = official_folder(theirs, tmp_path / "official", 1)
    torch.save({"language_model.lm_head.weight": Trap(tmp_path / "run")}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="code .*not run"):
        weights.load(folder, config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("layout", ["transformers", "official"])
def test_missing_and_unknown_tensors_are_named(saved, tmp_path, layout):
    theirs, folder, config, _ = saved
    if layout == "transformers":
        stored = TensorFolder(folder)
        tensors = {name: stored.read(name) for name in stored.names()}
        tensors["model.surprise.weight"] = tensors.pop("model.aligner.fc1.weight")
        write_tensors(tmp_path, tensors)
    else:
        state = pieces.official_state(theirs.state_dict())
        state["surprise.weight"] = state.pop("aligner.layers.0.weight")
        torch.save({name: tensor.clone() for name, tensor in state.items()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"missing: model\.aligner\.fc1\.weight; unknown: .*surprise\.weight"):
        weights.load(tmp_path, config)


def test_a_head_of_its_own_is_refused_where_the_config_ties_it(saved, tmp_path):
    _, folder, config, params = saved
    write_tensors(tmp_path, weights.tensors(config, params))
    stored = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(stored | {"tie_word_embeddings": True}))
    with pytest.raises(ValueError, match="lm_head.weight with other numbers"):
        weights.load(tmp_path)


def test_a_tied_model_is_read_and_written_without_a_head(tmp_path):
    theirs = pieces.build(tied=True)
    theirs.save_pretrained(tmp_path)
    config, params = weights.load(tmp_path)
    assert config.text.tied and "lm_head.weight" not in dict(weights.tensors(config, params))
    assert relative(logits(config, params), expected(theirs)) < 1e-4


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A peft adapter of the language model around the complete model."""
    torch.manual_seed(3)
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=MODULES, init_lora_weights=False)
    wrapped, folder = get_peft_model(pieces.build(), settings).eval(), tmp_path_factory.mktemp("adapter")
    wrapped.save_pretrained(folder)
    return wrapped, folder


def test_an_adapter_of_peft_gives_its_logits_and_its_names(saved, adapted):
    _, _, config, params = saved
    wrapped, folder = adapted
    scaled, adapter = weights.load_adapter(folder, config)
    assert scaled.text.lora_alpha == 8 and len(trees.flatten(adapter)) == 14
    ours = logits(scaled, params, adapter)
    assert relative(ours, expected(wrapped)) < 1e-4
    assert relative(logits(scaled, params), expected(wrapped)) > 1e-2  # the adapter matters
    names = {name for name, _ in weights.adapter_tensors(scaled, adapter)}
    assert names == TensorFolder(folder).names()


def test_an_adapter_around_the_language_model_alone_is_the_same(saved, adapted, tmp_path):
    config = saved[2]
    stored = TensorFolder(adapted[1])
    renamed = {name.replace("model.language_model.", "", 1): stored.read(name) for name in stored.names()}
    write_tensors(tmp_path, renamed, stem="adapter_model")
    (tmp_path / "adapter_config.json").write_bytes((adapted[1] / "adapter_config.json").read_bytes())
    for one, other in zip(weights.load_adapter(adapted[1], config), weights.load_adapter(tmp_path, config)):
        jax.tree.map(np.testing.assert_array_equal, one, other)


def test_our_adapter_opens_in_peft_with_equal_logits(saved, tmp_path):
    _, _, config, params = saved
    adapter = init_lora(jax.random.key(1), params["language"], lm.ADAPTER_PATTERN, 4)
    adapter = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(2), leaf.shape), adapter)
    write_tensors(tmp_path, weights.adapter_tensors(config, adapter), stem="adapter_model")
    (tmp_path / "adapter_config.json").write_text(json.dumps(weights.adapter_config(config, adapter)))
    opened = PeftModel.from_pretrained(pieces.build(), tmp_path).eval()
    names = {name for name, _ in opened.named_parameters() if ".lora_" in name}
    assert len(names) == 28 and all(".language_model." in name for name in names)  # and nothing of the image tower
    assert relative(logits(config, params, adapter), expected(opened)) < 1e-4
    assert relative(logits(config, params), expected(opened)) > 1e-2


def test_an_adapter_of_other_parts_is_refused_for_training(saved, tmp_path):
    torch.manual_seed(3)
    settings = LoraConfig(r=4, target_modules=r".*vision_model.*fc1", init_lora_weights=False)
    get_peft_model(pieces.build(), settings).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="adapts more than the text model"):
        weights.load_adapter(tmp_path, saved[2])
