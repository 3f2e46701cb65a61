"""DINOv2 and DINOv3 against transformers, on random weights."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from uae_jax import trees
from uae_jax.models.encoders import dino, weights
from uae_jax.models.encoders.config import Dinov2Config, Dinov3Config

TOLERANCE = 1e-4
cls_features = jax.jit(dino.cls_features, static_argnums=0)
SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)


def shaken(model: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.float().eval()


def check_features(model, config, params, height: int, width: int):
    pixels = np.random.default_rng(1).standard_normal((2, height, width, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = model(pixel_values=torch.tensor(pixels.transpose(0, 3, 1, 2).copy())).last_hidden_state[:, 0].numpy()
    ours = cls_features(config, params, jnp.asarray(pixels))
    assert np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max() < TOLERANCE


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dinov2")
    model = shaken(transformers.Dinov2Model(transformers.Dinov2Config(patch_size=14, image_size=70, **SMALL)))
    model.save_pretrained(folder)
    return model, folder, *weights.load_dino(folder)


@pytest.fixture(scope="module")
def dinov3(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dinov3")
    model = shaken(transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(
        patch_size=16, image_size=64, intermediate_size=48, num_register_tokens=4, **SMALL)))
    model.save_pretrained(folder)
    return model, folder, *weights.load_dino(folder)


@pytest.mark.parametrize("size", [(70, 70), (56, 56), (84, 42)])
def test_dinov2_equals_transformers_at_any_size(dinov2, size):
    model, _, config, params = dinov2
    check_features(model, config, params, *size)


def test_position_table_is_resized_as_torch_does():
    table = np.random.default_rng(0).standard_normal((1, 1 + 25, 3)).astype(np.float32)
    square = torch.tensor(table[:, 1:].reshape(1, 5, 5, 3)).permute(0, 3, 1, 2)
    theirs = torch.nn.functional.interpolate(square, size=(4, 7), mode="bicubic").permute(0, 2, 3, 1).reshape(1, 28, 3)
    ours = np.asarray(dino.resize_positions(jnp.asarray(table), 5, 4, 7))
    np.testing.assert_allclose(ours[:, 1:], theirs.numpy(), atol=2e-6)
    np.testing.assert_array_equal(ours[:, :1], table[:, :1])


@pytest.mark.parametrize("size", [(64, 64), (48, 80)])
def test_dinov3_equals_transformers_at_any_size(dinov3, size):
    model, _, config, params = dinov3
    check_features(model, config, params, *size)


def test_gated_feed_forward_layers(tmp_path):
    second = shaken(transformers.Dinov2Model(transformers.Dinov2Config(image_size=28, use_swiglu_ffn=True, **SMALL)))
    third = shaken(transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(
        intermediate_size=48, use_gated_mlp=True, hidden_act="silu", key_bias=True, **SMALL)))
    for name, model, size in (("second", second, 28), ("third", third, 32)):
        model.save_pretrained(tmp_path / name)
        check_features(model, *weights.load_dino(tmp_path / name), size, size)


@pytest.mark.parametrize("name", ["dinov2", "dinov3"])
def test_names_in_memory_load_as_well(name, request, tmp_path):
    model, folder, config, params = request.getfixturevalue(name)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, tmp_path / "model.safetensors")
    again, same = weights.load_dino(tmp_path)
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, same, params)


@pytest.mark.parametrize("config, rules, tensors, millions", [
    (Dinov2Config(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, image_size=518),
     weights.dinov2_rules, 439, 304.4),
    (Dinov3Config(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
                  num_register_tokens=4), weights.dinov3_rules, 415, 303.1)])
def test_full_size_models_have_the_published_tensors(config, rules, tensors, millions):
    abstract = dino.abstract_params(config)
    table = rules(config)
    assert {rule.ours for rule in table} == set(trees.flatten(abstract))
    assert sum(len(rule.sources()) for rule in table) == tensors
    assert round(trees.parameter_count(abstract) / 1e6, 1) == millions


def test_other_models_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(dict(model_type="vit")))
    with pytest.raises(ValueError, match="'vit'"):
        weights.load_dino(tmp_path)
