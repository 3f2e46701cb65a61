"""CLIP against transformers, on random weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from uae_jax.models.encoders import clip, weights
from uae_jax.models.encoders.config import CLIPConfig, CLIPTextConfig, CLIPVisionConfig

TOWER = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
VISION = dict(image_size=28, patch_size=7, **TOWER)
VOCABULARY = dict(vocab_size=60, bos_token_id=58, eos_token_id=59, max_position_embeddings=12)
TEXT = {**TOWER, **VOCABULARY}
TOLERANCE = 1e-4
image_features = jax.jit(clip.image_features, static_argnums=0, static_argnames="remat")
text_features = jax.jit(clip.text_features, static_argnums=0)


def shaken(model: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.float().eval()


def relative_error(ours, theirs) -> float:
    theirs = theirs.detach().numpy()
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def tensor_of(output) -> torch.Tensor:
    return output if torch.is_tensor(output) else output.pooler_output


def random_pixels(batch: int, size: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((batch, size, size, 3)).astype(np.float32)


def channels_first(pixels: np.ndarray) -> torch.Tensor:
    return torch.tensor(pixels.transpose(0, 3, 1, 2).copy())


def build(folder, act: str):
    act = dict(hidden_act=act)
    published = shaken(
        transformers.CLIPModel(
            transformers.CLIPConfig(vision_config={**VISION, **act}, text_config={**TEXT, **act}, projection_dim=20)
        )
    )
    published.save_pretrained(folder)
    return published, folder, *weights.load_clip(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build(tmp_path_factory.mktemp("clip"), "quick_gelu")


@pytest.fixture(scope="module")
def gelu_model(tmp_path_factory):
    return build(tmp_path_factory.mktemp("clip"), "gelu")


@pytest.mark.parametrize("name", ["model", "gelu_model"])
def test_image_features_equal_transformers(name, request):
    published, _, config, params = request.getfixturevalue(name)
    pixels = random_pixels(3, 28)
    ours = image_features(config, params, jnp.asarray(pixels))
    theirs = tensor_of(published.get_image_features(pixel_values=channels_first(pixels)))
    assert ours.shape == (3, 20)
    assert relative_error(ours, theirs) < TOLERANCE


@pytest.mark.parametrize("name, eos", [("model", 59), ("gelu_model", 2)])
def test_text_features_equal_transformers_by_both_pooling_rules(name, eos, request):
    published, _, config, params = request.getfixturevalue(name)
    # the first row ends early and is padded with its end token, the second is full, the third has id 2 inside
    ids = np.array([[58, 4, 5, 59, 59, 59, 59], [58, 6, 7, 8, 9, 10, 59], [58, 2, 7, 2, 59, 0, 0]])
    published.text_model.eos_token_id = eos
    theirs = tensor_of(published.get_text_features(input_ids=torch.tensor(ids)))
    published.text_model.eos_token_id = 59
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, eos_token_id=eos))
    assert relative_error(text_features(config, params, jnp.asarray(ids)), theirs) < TOLERANCE


def test_pooling_rules_differ_where_padding_has_a_larger_id():
    ids = jnp.array([[5, 3, 7, 7]])
    assert clip.pooling_position(CLIPTextConfig(eos_token_id=3), ids) == 1
    assert clip.pooling_position(CLIPTextConfig(eos_token_id=2), ids) == 2


def test_logit_scale_is_read_as_a_scalar(model):
    published, _, _, params = model
    assert params["logit_scale"].shape == ()
    np.testing.assert_allclose(params["logit_scale"], published.logit_scale.item())


def test_single_towers_with_projection(tmp_path):
    vision = shaken(
        transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(projection_dim=10, **VISION))
    )
    vision.save_pretrained(tmp_path / "vision")
    config, params = weights.load_clip(tmp_path / "vision")
    pixels = random_pixels(2, 28)
    theirs = vision(pixel_values=channels_first(pixels)).image_embeds
    assert isinstance(config, CLIPVisionConfig) and set(params) == {"vision"}
    assert relative_error(image_features(config, params, jnp.asarray(pixels)), theirs) < TOLERANCE


def test_pooled_empty_prompt_does_not_depend_on_padding(tmp_path):
    expected, folders = [], []
    for name, width, act in (("text_encoder", 10, "quick_gelu"), ("text_encoder_2", 14, "gelu")):
        # the config of CLIP's real vocabulary, whose published start and end ids are 0 and 2
        text = dict(TEXT, vocab_size=49408, bos_token_id=0, eos_token_id=2, hidden_act=act, projection_dim=width)
        model = shaken(transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**text)))
        model.save_pretrained(tmp_path / name)
        ids = torch.full((1, 12), 49407 if width == 10 else 0)
        ids[0, :2] = torch.tensor([49406, 49407])
        expected.append(model(ids).text_embeds[0])
        folders.append(tmp_path / name)
    ours = weights.pooled_empty_prompt(folders)
    assert ours.shape == (24,)
    assert relative_error(ours, torch.cat(expected)) < TOLERANCE


def test_small_vocabulary_has_the_ids_of_its_config():
    assert weights.empty_prompt_ids(CLIPTextConfig(**TEXT)).tolist() == [[58, 59]]


def test_saved_folder_opens_in_transformers_with_the_same_features(model, tmp_path):
    published, _, config, params = model
    weights.save_clip(tmp_path / "out", config, jax.tree.map(jnp.asarray, params))
    again, information = transformers.CLIPModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not information["missing_keys"] and not information["unexpected_keys"]
    for name, tensor in published.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, rtol=0, atol=0)
    for tower in ("text_config", "vision_config"):
        for name in TEXT | VISION:
            assert getattr(getattr(again.config, tower), name, None) == getattr(
                getattr(published.config, tower), name, None
            )
    assert weights.load_clip(tmp_path / "out")[0] == config


def test_missing_fields_are_filled_as_in_transformers():
    raw = dict(
        model_type="clip",
        projection_dim=96,
        vision_config=dict(hidden_size=96),
        text_config=dict(hidden_size=32),
        text_config_dict=dict(hidden_size=48),
    )
    theirs = transformers.CLIPConfig(**{k: v for k, v in raw.items() if k != "model_type"})
    ours = CLIPConfig.from_dict(raw)
    for tower in ("vision", "text"):
        for name, value in dataclasses.asdict(getattr(ours, tower)).items():
            if name != "projection_dim":
                assert getattr(getattr(theirs, f"{tower}_config"), name) == value, name
    assert ours.vision.projection_dim == ours.text.projection_dim == 96


def test_rematerialised_gradients_are_the_same(model):
    _, _, config, params = model
    pixels = jnp.asarray(random_pixels(1, 28))

    def loss(x, remat):
        return jnp.sum(image_features(config, params, x, remat=remat) ** 2)

    plain, again = (jax.grad(loss)(pixels, remat) for remat in (False, True))
    np.testing.assert_allclose(plain, again, rtol=1e-5, atol=1e-6)


def test_wrong_input_is_named(model, tmp_path):
    _, _, config, params = model
    with pytest.raises(ValueError, match="images of shape"):
        image_features(config, params, jnp.zeros((1, 14, 14, 3)))
    with pytest.raises(ValueError, match="at most 12 tokens"):
        text_features(config, params, jnp.zeros((1, 13), jnp.int32))
    with pytest.raises(FileNotFoundError, match="config.json"):
        weights.load_clip(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="bert"):
        weights.load_clip(tmp_path)
