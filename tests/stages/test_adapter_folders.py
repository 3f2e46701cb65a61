"""Which weights a model folder gives when adapters, a wrapped captioner or only parts of it are there."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from wrapped_layout import wrapped_tensors

from uae_jax import api, trees
from uae_jax.hf.safetensors import write_tensors
from uae_jax.models.language import weights as lm_weights
from uae_jax.models.language.model import ADAPTER_PATTERN
from uae_jax.models.qwen2_5_vl import weights as qwen_weights
from uae_jax.models.sd3 import weights as sd3_weights
from uae_jax.models.sd3.transformer import ATTENTION_ADAPTER
from uae_jax.nn.lora import init_lora, merge_adapter
from uae_jax.stages.inference import builtin_settings
from uae_jax.stages.weights import BUILTIN, ModelConfig, load_system

RANK = 2


def load(folder, **settings):
    return load_system(ModelConfig(folder=str(folder), **settings), image_size=32)


@pytest.fixture(scope="module")
def builtin():
    return load("")


@pytest.fixture
def folder(tmp_path):
    """The built-in model as links, without its encoders."""
    target = tmp_path / "model"
    shutil.copytree(BUILTIN, target, copy_function=lambda source, copy: pathlib.Path(copy).symlink_to(source))
    for name in ("clip", "dinov2"):
        shutil.rmtree(target / name)
    return target


def random_adapter(params, pattern):
    adapter, rng = init_lora(jax.random.key(0), params, pattern, RANK), np.random.default_rng(0)
    return jax.tree.map(lambda leaf: 0.1 * rng.standard_normal(leaf.shape).astype(np.float32), adapter)


@pytest.fixture(scope="module")
def wrapped(builtin):
    """Tensors of a captioner other than the built-in one, with an adapter, as in the release; its base and adapter."""
    base = jax.tree.map(
        lambda leaf: leaf + np.float32(0.5), {name: builtin.parts[name] for name in ("vision", "language", "projector")}
    )
    adapter = random_adapter(base["language"], ADAPTER_PATTERN)
    return dict(wrapped_tensors(builtin.model.captioner, base, adapter)), base, adapter


def assert_same(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def assert_captioner(system, base, adapter):
    assert_same({name: system.parts[name] for name in base}, base)
    assert_same(system.parts["language_lora"], adapter)
    assert system.model.captioner.text.lora_alpha == 2 * RANK


@pytest.mark.parametrize("beside", ["llm", "config", "llm_config"])
def test_the_wrapped_captioner_wins_over_the_plain_one_and_is_enough(folder, wrapped, beside):
    tensors, base, adapter = wrapped
    write_tensors(folder / "llm_lora", tensors, max_shard_bytes=sum(value.nbytes for value in tensors.values()) // 3)
    if beside == "config":
        shutil.copy(folder / "llm" / "config.json", folder / "llm_lora")
        shutil.rmtree(folder / "llm")
    if beside == "llm_config":
        (folder / "llm" / "model.safetensors").unlink()
    with pytest.warns(UserWarning, match="llm_lora does not state lora_alpha; 4 is used"):
        assert_captioner(load(folder), base, adapter)


def test_the_projector_may_stand_in_the_plain_captioner(builtin, folder, wrapped):
    tensors, base, adapter = wrapped
    write_tensors(
        folder / "llm_lora", {name: value for name, value in tensors.items() if not name.startswith("projector.")}
    )
    with pytest.warns(UserWarning, match="lora_alpha"):
        assert_captioner(load(folder), base | {"projector": builtin.parts["projector"]}, adapter)


@pytest.mark.parametrize(
    "missing",
    [
        "visual.blocks.0.attn.qkv.weight",
        "projector.0.bias",
        "model.base_model.model.layers.0.mlp.up_proj.base_layer.weight",
    ],
)
def test_a_wrapped_captioner_must_be_whole(folder, wrapped, missing):
    write_tensors(folder / "llm_lora", {name: value for name, value in wrapped[0].items() if name != missing})
    published = missing.replace("base_model.model.", "").replace("base_layer.", "")
    with pytest.raises(ValueError, match=f"llm_lora do not fit the model; missing: {published}. "):
        load(folder)


def test_no_configuration_is_one_message(folder, wrapped):
    write_tensors(folder / "llm_lora", wrapped[0])
    shutil.rmtree(folder / "llm")
    with pytest.raises(FileNotFoundError, match=r"llm.config.json does not exist"):
        load(folder)


@pytest.fixture
def adapted(builtin, folder, wrapped):
    """The folder with peft folders of both adapters, which say their alpha."""
    captioner, transformer = builtin.model.captioner.using(lora_alpha=6), builtin.model.transformer
    language, image = wrapped[2], random_adapter(builtin.parts["transformer"], ATTENTION_ADAPTER)
    write_tensors(folder / "llm_lora", lm_weights.adapter_tensors(captioner, language), stem="adapter_model")
    write_tensors(folder / "dit_lora", sd3_weights.adapter_tensors(transformer, image), stem="adapter_model")
    for name, config in (
        ("llm_lora", lm_weights.adapter_config(captioner, language)),
        ("dit_lora", sd3_weights.adapter_config(transformer, image) | dict(lora_alpha=7)),
    ):
        (folder / name / "adapter_config.json").write_text(json.dumps(config))
    return folder, language, image


def test_adapters_are_kept_apart(builtin, adapted):
    folder, language, image = adapted
    system = load(folder)
    assert_same(system.parts["language_lora"], language)
    assert_same(system.parts["transformer_lora"], image)
    assert (system.model.captioner.text.lora_alpha, system.model.transformer.lora_alpha) == (6, 7)
    assert_same(system.parts["language"], builtin.parts["language"])
    assert_same(system.parts["transformer"], builtin.parts["transformer"])


def test_adapters_are_merged(builtin, adapted):
    folder, language, image = adapted
    system = load(folder, merge_adapters=True, lora_alpha=9.0)
    assert not {"language_lora", "transformer_lora"} & set(system.parts)
    # new adapters have the configured alpha, not that of those in the weights
    assert (system.model.captioner.text.lora_alpha, system.model.transformer.lora_alpha) == (9, 9)
    for part, adapter, alpha in (("language", language, 6), ("transformer", image, 7)):
        merged = merge_adapter(builtin.parts[part], adapter, alpha)
        assert_same(system.parts[part], merged)
        before, after = trees.flatten(builtin.parts[part]), trees.flatten(merged)
        changed = {name.removesuffix("/kernel") for name in before if np.any(before[name] != after[name])}
        assert changed == {name.removesuffix("/a") for name in trees.flatten(adapter) if name.endswith("/a")}


def test_adapters_can_be_left_out(builtin, adapted, wrapped):
    folder = adapted[0]
    system = load(folder, adapters=False)
    assert_same(
        {name: part for name, part in system.parts.items() if name != "encoders"},
        {name: part for name, part in builtin.parts.items() if name != "encoders"},
    )
    assert system.model.captioner == builtin.model.captioner and system.model.transformer == builtin.model.transformer
    shutil.rmtree(folder / "llm_lora")
    write_tensors(folder / "llm_lora", wrapped[0])  # holds a captioner of its own, which stays
    system = load(folder, adapters=False)
    assert "language_lora" not in system.parts
    assert_same({name: system.parts[name] for name in wrapped[1]}, wrapped[1])


def test_pictures_are_drawn_through_the_adapters_unless_they_are_left_out(adapted):
    settings = dict(builtin_settings(), steps=1, max_new_tokens=8, batch_size=1)
    with_them, without = (
        api.load(adapted[0], adapters=on, **settings).generate(["red circle"])[0] for on in (True, False)
    )
    assert with_them.tobytes() != without.tobytes()


def test_the_releases_folder_conditions_through_its_adapter(folder, adapted, wrapped):
    assert api.default_settings(adapted[0])["condition"] == "reference"
    shutil.rmtree(folder / "llm_lora")
    write_tensors(folder / "llm_lora", wrapped[0])
    assert api.default_settings(folder)["condition"] == "policy"


def test_a_damaged_plain_captioner_is_seen_beside_a_wrapped_one(builtin, folder, wrapped):
    write_tensors(folder / "llm_lora", wrapped[0])
    tensors = dict(
        qwen_weights.tensors(
            builtin.model.captioner, {name: builtin.parts[name] for name in ("vision", "language", "projector")}
        )
    )
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = np.where(np.arange(tensors[name].shape[1]) == 3, np.nan, tensors[name])
    (folder / "llm" / "model.safetensors").unlink()
    write_tensors(folder / "llm", tensors)
    with pytest.raises(ValueError, match=f"llm/model.safetensors: {name} holds NaN or infinity"):
        load(folder)
