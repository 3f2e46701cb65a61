"""Rewards: identities of the similarity, groups, clamping, mixes, and folders."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from uae_jax.models.encoders import clip, dino, weights
from uae_jax.models.encoders.config import CLIPConfig, CLIPTextConfig, CLIPVisionConfig, Dinov2Config
from uae_jax.models.encoders.preprocess import Preprocess
from uae_jax.rewards import similarity as rewards

SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
VISION = CLIPVisionConfig(image_size=16, patch_size=8, intermediate_size=64, projection_dim=12, **SMALL)
SQUARE = Preprocess(size=(16,), crop=(16, 16))
ENCODER = rewards.Encoder("clip", "clip", VISION, SQUARE)
features_of = jax.jit(ENCODER.features)
cosine_reward = jax.jit(
    rewards.cosine_reward, static_argnums=(0, 4), static_argnames=("clamp", "contrast", "contrast_temperature")
)


@pytest.fixture(scope="module")
def params():
    return jax.jit(clip.init_params, static_argnums=0)(VISION, jax.random.key(0))


def images(count: int, seed: int = 0, side: int = 24) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, (count, side, side, 3)), jnp.float32)


@pytest.mark.trap(31)
def test_an_image_is_most_similar_to_itself(params):
    x = images(4)
    np.testing.assert_allclose(cosine_reward(ENCODER, params, x, x, 1), 1.0, atol=1e-6)
    other = cosine_reward(ENCODER, params, x, images(4, seed=1), 1)
    assert other.shape == (4, 1) and other.dtype == jnp.float32
    assert np.all(other < 0.9999) and np.all(np.abs(other) <= 1)


@pytest.mark.trap(40)
def test_reconstructions_are_grouped_by_original(params):
    x, group = images(2), 3
    y = jnp.repeat(x, group, axis=0).at[1].set(images(1, seed=5)[0])
    reward = cosine_reward(ENCODER, params, x, y, group)
    expected = np.ones((2, 3), bool)
    expected[0, 1] = False
    np.testing.assert_array_equal(np.asarray(reward) > 1 - 1e-5, expected)


def test_a_contrast_takes_off_the_likeness_to_the_other_originals(params):
    x, y = images(3), images(6, seed=1)
    features = features_of(params, y).reshape(3, 2, -1)
    cosines = np.asarray(jnp.einsum("bgd,cd->bgc", features, features_of(params, x), precision="highest"))
    expected = [[cosines[b, g, b] - 0.5 * np.delete(cosines[b, g], b).mean() for g in range(2)] for b in range(3)]
    np.testing.assert_allclose(cosine_reward(ENCODER, params, x, y, 2, contrast=0.5), expected, atol=1e-6)


def test_a_contrast_at_a_temperature_is_the_log_odds_of_the_original_among_the_batch(params):
    x, y, temperature = images(3), images(6, seed=1), 0.02
    features = features_of(params, y).reshape(3, 2, -1)
    cosines = np.asarray(jnp.einsum("bgd,cd->bgc", features, features_of(params, x), precision="highest"))
    chance = np.exp(cosines / temperature)
    chance /= chance.sum(-1, keepdims=True)
    own = np.stack([chance[b, :, b] for b in range(3)])
    reward = cosine_reward(ENCODER, params, x, y, 2, contrast=1.0, contrast_temperature=temperature)
    np.testing.assert_allclose(reward / temperature, np.log(own / (1 - own)) + np.log(2), rtol=1e-3, atol=1e-3)


def test_a_high_temperature_is_the_plain_mean_and_a_low_one_the_most_similar_image(params):
    x, y = images(4), images(4, seed=1)
    plain = cosine_reward(ENCODER, params, x, y, 1, contrast=0.7)
    np.testing.assert_allclose(
        cosine_reward(ENCODER, params, x, y, 1, contrast=0.7, contrast_temperature=50.0), plain, atol=1e-4
    )
    cosines = np.asarray(features_of(params, y) @ features_of(params, x).T)
    most = np.where(np.eye(4, dtype=bool), -np.inf, cosines).max(1)
    low = cosine_reward(ENCODER, params, x, y, 1, contrast=1.0, contrast_temperature=1e-5)
    np.testing.assert_allclose(low[:, 0], np.diag(cosines) - most, atol=1e-4)


def test_with_full_contrast_one_image_for_every_original_earns_nothing(params):
    x, same = images(4), jnp.repeat(images(1, seed=1), 4, axis=0)
    reward = cosine_reward(ENCODER, params, x, same, 1, contrast=1.0)
    assert np.abs(reward).max() > 1e-4
    np.testing.assert_allclose(np.mean(reward), 0, atol=1e-6)
    with pytest.raises(ValueError, match="needs a batch of two or more"):
        cosine_reward(ENCODER, params, x[:1], same[:1], 1, contrast=1.0)


@pytest.mark.trap(25)
def test_identical_reconstructions_get_identical_rewards(params):
    x = images(2)
    y = jnp.repeat(images(2, seed=1), 4, axis=0)
    reward = np.asarray(cosine_reward(ENCODER, params, x, y, 4))
    np.testing.assert_array_equal(reward, np.repeat(reward[:, :1], 4, axis=1))


@pytest.mark.trap(30)
def test_values_outside_of_the_image_range_do_not_pay(params):
    x, y = images(2), jnp.sign(images(2, seed=1))
    once, more = (cosine_reward(ENCODER, params, x, scale * y, 1, clamp="hard") for scale in (1, 3))
    np.testing.assert_allclose(once, more, atol=1e-6)


@pytest.mark.parametrize(
    "clamp, inside, outside", [("hard", True, False), ("straight_through", True, True), ("none", True, True)]
)
def test_gradient_reaches_the_reconstruction(params, clamp, inside, outside):
    preprocess = dataclasses.replace(SQUARE, clip=False)
    encoder = dataclasses.replace(ENCODER, preprocess=preprocess)
    y = (0.5 * images(1, seed=1)).at[:, 12:].set(1.5)
    gradient = np.asarray(jax.grad(lambda y: cosine_reward(encoder, params, images(1), y, 1, clamp=clamp).sum())(y))
    assert (np.abs(gradient[:, :12]).max() > 0) == inside
    assert (np.abs(gradient[:, 12:]).max() > 0) == outside


def test_straight_through_has_the_hard_value(params):
    y = 2 * images(2, seed=3)
    np.testing.assert_allclose(rewards.clamp_image(y, "straight_through"), rewards.clamp_image(y, "hard"), atol=1e-6)


def test_gradient_ascent_on_pixels_raises_the_reward(params):
    x, y = images(1), images(1, seed=2)
    value = jax.value_and_grad(lambda y: cosine_reward(ENCODER, params, x, y, 1, clamp="straight_through").sum())
    before, gradient = value(y)
    after, _ = value(y + 0.01 * gradient / jnp.abs(gradient).max())
    assert after > before


def test_pixel_reward_ends_are_zero_and_one():
    white, black = jnp.ones((1, 4, 4, 3)), -jnp.ones((1, 4, 4, 3))
    both = jnp.concatenate([white, black, 7 * white])
    np.testing.assert_allclose(rewards.pixel_reward(white, both, 3), [[1.0, 0.0, 1.0]])


def test_mix_is_the_weighted_sum(params):
    second = rewards.Encoder("dinov2", "dinov2", Dinov2Config(image_size=16, patch_size=8, **SMALL), SQUARE)
    both = {"clip": params, "dinov2": jax.jit(dino.init_params, static_argnums=0)(second.config, jax.random.key(1))}
    config = rewards.RewardConfig(("clip", "dinov2"), (0.7, 0.2), pixel_weight=0.1)
    x, y = images(2), images(4, seed=1)
    mixed_reward = jax.jit(rewards.mixed_reward, static_argnums=(0, 1, 5))
    total, terms = mixed_reward(config, (ENCODER, second), both, x, y, 2)
    assert set(terms) == {"clip", "dinov2", "pixel"} and total.shape == (2, 2)
    np.testing.assert_allclose(total, 0.7 * terms["clip"] + 0.2 * terms["dinov2"] + 0.1 * terms["pixel"], atol=1e-6)
    perfect, _ = mixed_reward(config, (ENCODER, second), both, x, x, 1)
    np.testing.assert_allclose(perfect, 1.0, atol=1e-5)


def test_bfloat16_computation_keeps_float32_rewards(params):
    encoder = dataclasses.replace(ENCODER, dtype="bfloat16")
    full, half = (cosine_reward(e, params, images(2), images(2, seed=1), 1) for e in (ENCODER, encoder))
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(full, half, atol=0.02)


def test_recomputed_encoders_have_the_same_gradient(params):
    x, y = images(2), images(2, seed=1)

    def slope(encoder):
        return jax.jit(jax.grad(lambda y: jnp.sum(cosine_reward(encoder, params, x, y, 1))))(y)

    plain, again = (slope(dataclasses.replace(ENCODER, remat=remat)) for remat in (False, True))
    assert np.abs(plain).max() > 1e-5
    np.testing.assert_allclose(again, plain, atol=1e-5 * np.abs(plain).max())


def test_folders_are_read_by_their_model_type(tmp_path):
    config = CLIPConfig(
        VISION,
        CLIPTextConfig(vocab_size=20, projection_dim=12, intermediate_size=32, max_position_embeddings=8, **SMALL),
    )
    params = jax.jit(clip.init_params, static_argnums=0)(config, jax.random.key(0))
    weights.save_clip(tmp_path / "clip", config, params)
    encoder, loaded = rewards.load_encoder(tmp_path / "clip", "reward", variant="uae")
    assert (encoder.name, encoder.kind, encoder.preprocess.size) == ("reward", "clip", (16, 16)) and set(loaded) == {
        "vision"
    }
    both = dataclasses.replace(encoder, config=config)
    features = jax.jit(rewards.Encoder.features, static_argnums=0)
    np.testing.assert_array_equal(features(encoder, loaded, images(1)), features(both, params, images(1)))

    model = transformers.Dinov2Model(transformers.Dinov2Config(image_size=28, **SMALL))
    model.save_pretrained(tmp_path / "dinov2")
    transformers.models.bit.image_processing_pil_bit.BitImageProcessorPil(
        size=dict(shortest_edge=32), crop_size=dict(height=28, width=28)
    ).save_pretrained(tmp_path / "dinov2")
    encoder, loaded = rewards.load_encoder(tmp_path / "dinov2")
    assert (encoder.name, encoder.kind, encoder.preprocess.size) == ("dinov2", "dinov2", (32,))
    np.testing.assert_allclose(np.linalg.norm(features(encoder, loaded, images(2)), axis=-1), 1.0, atol=1e-6)


def test_wrong_settings_are_named(params, tmp_path):
    with pytest.raises(ValueError, match="groups of 2"):
        rewards.cosine_reward(ENCODER, params, images(2), images(3), 2)
    with pytest.raises(ValueError, match="one size"):
        rewards.pixel_reward(images(1), images(1, side=8), 1)
    with pytest.raises(ValueError, match="one weight each"):
        rewards.RewardConfig(("clip", "dinov2"), (1.0,))
    with pytest.raises(ValueError, match="no term"):
        rewards.RewardConfig((), ())
    with pytest.raises(ValueError, match="clamp is 'soft'"):
        rewards.RewardConfig(clamp="soft")
    with pytest.raises(ValueError, match="'dinov2' is not loaded"):
        rewards.mixed_reward(rewards.RewardConfig(("dinov2",)), (ENCODER,), {"clip": params}, images(1), images(1), 1)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ValueError, match="not an image encoder"):
        rewards.load_encoder(tmp_path)
