"""The control reward: similarity of images and sampled captions, without reconstructions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uae_jax.models.encoders import clip
from uae_jax.models.encoders.config import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from uae_jax.models.encoders.preprocess import Preprocess, apply
from uae_jax.models.encoders.weights import save_clip
from uae_jax.rewards import caption_similarity
from uae_jax.rewards import similarity as rewards

SMALL = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, projection_dim=8)
PAD = 7
CONFIG = CLIPConfig(
    CLIPVisionConfig(image_size=16, patch_size=8, **SMALL),
    CLIPTextConfig(
        vocab_size=20, max_position_embeddings=9, bos_token_id=PAD, eos_token_id=PAD, pad_token_id=PAD, **SMALL
    ),
)
SCORER = caption_similarity.CaptionScorer(CONFIG, Preprocess(size=(16,), crop=(16, 16)))
LENGTHS = jnp.array([3, 8, 0, 5, 5, 1])
reward_of = jax.jit(caption_similarity.caption_reward, static_argnums=(0, 5))
image_features, text_features = (
    jax.jit(function, static_argnums=0) for function in (clip.image_features, clip.text_features)
)


@pytest.fixture(scope="module")
def params():
    return jax.jit(clip.init_params, static_argnums=0)(CONFIG, jax.random.key(0))


def tokens(seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(8, 20, (6, 8)), jnp.int32)


def pixels() -> jax.Array:
    return jnp.asarray(np.random.default_rng(3).uniform(-1, 1, (2, 16, 16, 3)), jnp.float32)


def test_it_is_the_cosine_of_both_towers(params):
    found = np.asarray(reward_of(SCORER, params, pixels(), tokens(), LENGTHS, 3))
    images = image_features(CONFIG, params, apply(SCORER.preprocess, (pixels() + 1) / 2))
    for row, (ids, length) in enumerate(zip(tokens(), LENGTHS)):
        text = text_features(CONFIG, params, np.array([[*ids[:length], PAD]]))[0]
        image = images[row // 3]
        cosine = np.dot(text, image) / np.linalg.norm(text) / np.linalg.norm(image)
        assert found[row // 3, row % 3] == pytest.approx(float(cosine), abs=1e-5)


def test_what_follows_a_caption_does_not_count_and_what_is_in_it_does(params):
    first, other = tokens(), tokens(1)
    inside = jnp.arange(8) < LENGTHS[:, None]
    rewards = reward_of(SCORER, params, pixels(), first, LENGTHS, 3)
    np.testing.assert_allclose(
        reward_of(SCORER, params, pixels(), jnp.where(inside, first, other), LENGTHS, 3), rewards, atol=1e-6
    )
    changed = np.asarray(reward_of(SCORER, params, pixels(), jnp.where(inside, other, first), LENGTHS, 3))
    np.testing.assert_array_equal((np.abs(changed - rewards) > 1e-4).reshape(-1), LENGTHS > 0)


def test_the_mix_adds_it_with_its_weight(params):
    said = reward_of(SCORER, params, pixels(), tokens(), LENGTHS, 3)
    config = rewards.RewardConfig((), (), caption_weight=2.0)
    alone, terms = rewards.mixed_reward(config, (), {}, pixels(), jnp.zeros((6, 16, 16, 3)), 3, said)
    assert set(terms) == {"caption"}
    np.testing.assert_allclose(alone, 2 * said)
    config = rewards.RewardConfig((), (), pixel_weight=1.0, caption_weight=0.5)
    both, terms = rewards.mixed_reward(config, (), {}, pixels(), jnp.repeat(pixels(), 3, axis=0), 3, said)
    np.testing.assert_allclose(both, 1 + 0.5 * said, atol=1e-6)
    with pytest.raises(ValueError, match="no caption similarities"):
        rewards.mixed_reward(config, (), {}, pixels(), jnp.zeros((6, 16, 16, 3)), 3)
    (refused,) = config.caption_terms("cold_start")
    assert refused.startswith("reward.caption_weight is 0.5, but cold_start does not train captions")
    assert not list(rewards.RewardConfig().caption_terms("cold_start"))


@pytest.mark.trap(6)
def test_a_caption_without_an_end_earns_the_penalty_less():
    unfinished = jnp.array([[False, True, True], [False, False, False]])
    plain, penalised = (
        rewards.RewardConfig((), (), pixel_weight=1.0, overlong_penalty=penalty) for penalty in (0.0, 0.25)
    )
    rebuilt = jnp.linspace(-1, 1, 6 * 16 * 16 * 3).reshape(6, 16, 16, 3)
    without, terms = rewards.mixed_reward(plain, (), {}, pixels(), rebuilt, 3, None, unfinished)
    with_penalty, same_terms = rewards.mixed_reward(penalised, (), {}, pixels(), rebuilt, 3, None, unfinished)
    np.testing.assert_allclose(with_penalty, without - 0.25 * unfinished, atol=1e-7)
    assert set(terms) == set(same_terms) == {"pixel"}  # the terms are as they were
    with pytest.raises(ValueError, match="which captions have no end"):
        rewards.mixed_reward(penalised, (), {}, pixels(), rebuilt, 3)
    (refused,) = penalised.caption_terms("und_for_gen")
    assert refused.startswith("reward.overlong_penalty is 0.25, but und_for_gen does not train captions")
    with pytest.raises(ValueError, match="overlong_penalty is -0.1; it must be at least 0"):
        rewards.RewardConfig(overlong_penalty=-0.1)


def test_a_folder_that_reads_other_tokens_or_shorter_texts_is_refused(params, tmp_path):
    save_clip(tmp_path / "both", CONFIG, params)
    scorer, read = caption_similarity.load_caption_scorer(tmp_path / "both", 20, 8)
    assert scorer.config == CONFIG and set(read) == {"vision", "text", "logit_scale"}
    with pytest.raises(ValueError, match="knows 20 tokens and the captioner 43"):
        caption_similarity.load_caption_scorer(tmp_path / "both", 43, 8)
    with pytest.raises(ValueError, match="captions of 9 tokens and an end need 10"):
        caption_similarity.load_caption_scorer(tmp_path / "both", 20, 9)
    save_clip(tmp_path / "image", CONFIG.vision, params)
    with pytest.raises(ValueError, match="no CLIP with both towers"):
        caption_similarity.load_caption_scorer(tmp_path / "image", 20, 8)
