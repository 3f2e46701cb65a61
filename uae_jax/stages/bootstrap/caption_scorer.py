"""A text tower for the frozen reward encoder, which scores captions without image generation (`rewards`).

The text tower is trained contrastively (arXiv 2103.00020, figure 3) on true captions of every length. Hard negatives
are scenes that differ in one fact. So a detailed caption is nearer to its image, and a false caption farther. The image
tower is frozen.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from uae_jax.data.qwen_inputs import Fields
from uae_jax.data.scene_captions import random_detail_caption
from uae_jax.data.tokenizer import encode_caption
from uae_jax.methods.method import Supervised
from uae_jax.models.encoders.config import CLIPConfig, CLIPTextConfig
from uae_jax.models.encoders.preprocess import Preprocess
from uae_jax.rewards.caption_similarity import CaptionScorer
from uae_jax.stages.bootstrap import scene_stream
from uae_jax.stages.bootstrap.encoders import contrastive
from uae_jax.stages.bootstrap.scene_stream import World


def text_config(image_tower: CLIPConfig, settings: dict, end: int) -> CLIPConfig:
    """The config of both towers: the given image tower, and a text tower with the padding id as end token.

    Args:
      image_tower: of the reward encoder.
      settings: of the text tower, such as width and positions.
      end: the padding id, which must not be 2. Published configs have 2 by mistake, and CLIP treats 2 in another way
        (`clip.pooling_position`).
    """
    text = CLIPTextConfig(
        **settings,
        vocab_size=image_tower.text.vocab_size,
        projection_dim=image_tower.vision.projection_dim,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    return dataclasses.replace(image_tower, text=text)


def stream(
    world: World, tokenizer, *, seed: int, batch_size: int, side: int, length: int, pad: int, full_fraction: float
):
    """Batches of `pixels` `[B, 2, S, S, 3]`, `tokens` `[B, 2, T]` and `lengths` `[B, 2]`, of a scene and the same scene
    with one fact changed.

    `full_fraction` of the captions state every fact, the others a random part.
    """

    def example(index: int) -> Fields:
        rng = np.random.default_rng([seed, 14, index])
        scene = world.scene_at("train", index, seed + 4)
        full = rng.random() < full_fraction
        rows = []
        for one in (scene, scene_stream.edited(scene, rng)):
            text = scene_stream.full_caption(one, rng) if full else random_detail_caption(one, rng)
            ids = encode_caption(tokenizer, text)[:-1]
            pixels, tokens = scene_stream.pixels_of(world, one, side), scene_stream.pad_ids(ids, length, pad)[0]
            rows.append({"pixels": pixels, "tokens": tokens, "lengths": np.int32(len(ids))})
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    return scene_stream.stream(example, batch_size)


def algorithm(config: CLIPConfig, preprocess: Preprocess) -> Supervised:
    """The contrastive loss over the 2 B pairs of a batch; `text` and `logit_scale` train, `vision` is frozen."""
    scorer = CaptionScorer(config, preprocess)

    def loss(params: dict, frozen: dict, rollout: dict, key: Array) -> tuple[Array, Array, dict]:
        del key
        samples = {name: leaf.reshape(-1, *leaf.shape[2:]) for name, leaf in rollout["samples"].items()}
        images = scorer.image_features(frozen, samples["pixels"])
        texts = scorer.text_features(params, samples["tokens"], samples["lengths"])
        total, right = contrastive(images, texts, params["logit_scale"])
        count, cosines = jnp.float32(len(images)), jnp.sum(jax.lax.stop_gradient(images * texts))
        return total, count, {"accuracy": (right, count), "cosine": (cosines, count)}

    return Supervised(loss)
