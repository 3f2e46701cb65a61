"""DINOv2 and DINOv3 against transformers, on random weights."""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from uae_jax.models.encoders import dino, weights
from uae_jax.rewards.similarity import load_encoder

TOLERANCE = 1e-4
token_features = jax.jit(dino.token_features, static_argnums=0)
SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)


def shaken(model: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.float().eval()


def check_features(model, config, params, height: int, width: int):
    """Class token, register tokens and patches."""
    pixels = np.random.default_rng(1).standard_normal((2, height, width, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = model(pixel_values=torch.tensor(pixels.transpose(0, 3, 1, 2).copy())).last_hidden_state.numpy()
    ours = np.asarray(token_features(config, params, jnp.asarray(pixels)))
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() / np.abs(theirs).max() < TOLERANCE


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dinov2")
    model = shaken(transformers.Dinov2Model(transformers.Dinov2Config(patch_size=14, image_size=70, **SMALL)))
    model.save_pretrained(folder)
    return model, folder, *weights.load_dino(folder)


@pytest.fixture(scope="module")
def dinov3(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dinov3")
    model = shaken(
        transformers.DINOv3ViTModel(
            transformers.DINOv3ViTConfig(
                patch_size=16, image_size=64, intermediate_size=48, num_register_tokens=4, **SMALL
            )
        )
    )
    model.save_pretrained(folder)
    return model, folder, *weights.load_dino(folder)


@pytest.mark.parametrize("size", [(70, 70), (56, 56), (84, 42)])
def test_dinov2_equals_transformers_at_any_size(dinov2, size):
    model, _, config, params = dinov2
    check_features(model, config, params, *size)


def test_dinov2_of_the_published_image_size_takes_smaller_images(tmp_path):
    model = shaken(transformers.Dinov2Model(transformers.Dinov2Config(patch_size=14, image_size=518, **SMALL)))
    model.save_pretrained(tmp_path)
    config, params = weights.load_dino(tmp_path)
    assert params["position_embedding"].shape == (1, 1370, 32)
    check_features(model, config, params, 224, 224)


def test_class_feature_is_the_first_token(dinov2):
    _, _, config, params = dinov2
    pixels = jnp.ones((1, 28, 28, 3))
    first = jax.jit(dino.cls_features, static_argnums=0)(config, params, pixels)
    np.testing.assert_allclose(first, token_features(config, params, pixels)[:, 0], atol=1e-5)


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
    third = shaken(
        transformers.DINOv3ViTModel(
            transformers.DINOv3ViTConfig(
                intermediate_size=48, use_gated_mlp=True, hidden_act="silu", key_bias=True, **SMALL
            )
        )
    )
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


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["dinov2", "dinov3"])
def test_sharded_half_precision_folders_become_float32(name, stored, request, tmp_path):
    model, _, config, _ = request.getfixturevalue(name)
    half = copy.deepcopy(model).to(stored)
    half.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    again, params = weights.load_dino(tmp_path)
    assert again == config and {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    check_features(half.float(), config, params, 56, 56)


@pytest.mark.parametrize("name", ["dinov2", "dinov3"])
def test_a_torch_file_loads_as_well(name, request, tmp_path):
    model, folder, config, params = request.getfixturevalue(name)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    again, same = weights.load_dino(tmp_path)
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, same, params)


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("config.json", dict(model_type="vit"), "a model .model_type 'vit'."),
        (
            "config.json",
            dict(model_type="qwen2_5_vl", architectures=["Qwen2_5_VLForConditionalGeneration"]),
            "Qwen2_5_VLForConditionalGeneration .model_type 'qwen2_5_vl'.",
        ),
        ("config.json", dict(_class_name="AutoencoderKL"), "holds AutoencoderKL, not"),
        ("model_index.json", dict(_class_name="StableDiffusion3Pipeline"), "holds StableDiffusion3Pipeline, not"),
        ("adapter_config.json", dict(peft_type="LORA"), "holds a peft adapter, not"),
    ],
)
def test_other_models_are_refused_by_name(tmp_path, file, content, message):
    (tmp_path / file).write_text(json.dumps(content))
    for read in (weights.load_dino, load_encoder):
        with pytest.raises(ValueError, match=f"{message}.*give a CLIP, Long-CLIP, DINOv2 or DINOv3 folder"):
            read(tmp_path)


def test_a_text_tower_or_another_encoder_is_refused(dinov2, tmp_path):
    text = transformers.CLIPTextConfig(
        **SMALL, intermediate_size=32, vocab_size=10, bos_token_id=8, eos_token_id=9, projection_dim=8
    )
    transformers.CLIPTextModelWithProjection(text).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="text tower of CLIP alone"):
        load_encoder(tmp_path)
    with pytest.raises(ValueError, match="holds a dinov2 model; needed: clip or longclip"):
        weights.load_clip(dinov2[1])
    with pytest.raises(FileNotFoundError, match="neither config.json nor"):
        load_encoder(tmp_path.parent)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_encoder(tmp_path / "nothing")
