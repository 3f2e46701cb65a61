"""Phase 2 of the bootstrap: the reward encoder, a CLIP of scenes, and the held-out one, a DINOv2 that knows each cell.

The reward encoder learns from captions (arXiv 2103.00020, figure 3), with scenes that differ in one fact as hard negatives:
a reward that does not see a fact cannot teach it. The held-out encoder learns another way, from the contents of each cell,
so that what pleases one by accident need not please the other.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from uae_jax.data import scenes
from uae_jax.data.tokenizer import encode_caption
from uae_jax.models.encoders import clip, dino
from uae_jax.models.encoders.config import CLIPConfig, Dinov2Config
from uae_jax.models.encoders.preprocess import Preprocess, apply
from uae_jax.nn.linear import Dense
from uae_jax.stages.bootstrap import scene_stream
from uae_jax.training.step import Algorithm, supervised


def clip_stream(tokenizer, *, seed: int, batch_size: int, side: int, length: int, pad: int):
    """Batches of `pixels` `[B, 2, S, S, 3]` and `ids` `[B, 2, T]`: a scene and the same scene with one fact changed."""

    def example(index: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng([seed, 11, index])
        scene = scenes.scene_at("train", index, seed)
        pair = (scene, scene_stream.edited(scene, rng))
        ids = [scene_stream.pad_ids(encode_caption(tokenizer, scene_stream.full_caption(one, rng)), length, pad)[0] for one in pair]
        return {"pixels": np.stack([scene_stream.pixels_of(one, side) for one in pair]), "ids": np.stack(ids)}

    return scene_stream.stream(example, batch_size)


def clip_algorithm(config: CLIPConfig, preprocess: Preprocess) -> Algorithm:
    """The symmetric contrastive loss over the 2 B pairs of a batch."""

    def loss(params: dict, frozen: dict, rollout: dict, key: Array) -> tuple[Array, Array, dict]:
        del frozen, key
        pixels, ids = (rollout["samples"][name].reshape(-1, *rollout["samples"][name].shape[2:]) for name in ("pixels", "ids"))
        images = _unit(clip.image_features(config, params, apply(preprocess, (pixels + 1) / 2)))
        texts = _unit(clip.text_features(config, params, ids))
        logits = images @ texts.T * jnp.exp(jnp.minimum(params["logit_scale"], jnp.log(100.0)))
        labels = jnp.arange(len(logits))
        cross = optax.softmax_cross_entropy_with_integer_labels
        total = jnp.sum(cross(logits, labels) + cross(logits.T, labels)) / 2
        count = jnp.float32(len(logits))
        return total, count, {"accuracy": (jnp.sum(jnp.argmax(logits, -1) == labels), count)}

    return supervised(loss)


def dino_stream(*, seed: int, batch_size: int, side: int):
    """Batches of `pixels` `[B, S, S, 3]` and `classes` int32 `[B, 5]` (cells, background)."""

    def example(index: int) -> dict[str, np.ndarray]:
        scene = scenes.scene_at("train", index, seed + 1)
        return {"pixels": scene_stream.pixels_of(scene, side), "classes": scene_stream.cell_classes(scene)}

    return scene_stream.stream(example, batch_size)


def init_dino(config: Dinov2Config, key: Array) -> dict:
    """`{"encoder", "heads"}`: the encoder, and linear readouts of its feature that are dropped after training."""
    width = scene_stream.CELLS * scene_stream.OBJECT_CLASSES + len(scenes.BACKGROUNDS)
    head_key, encoder_key = jax.random.split(key)
    heads = Dense(width).init(head_key, jnp.zeros((1, config.hidden_size)))["params"]
    return {"encoder": dino.init_params(config, encoder_key), "heads": heads}


def dino_algorithm(config: Dinov2Config, preprocess: Preprocess) -> Algorithm:
    """Cross-entropy of every cell's contents and of the background, read linearly from the class token."""
    cells, classes = scene_stream.CELLS, scene_stream.OBJECT_CLASSES

    def loss(params: dict, frozen: dict, rollout: dict, key: Array) -> tuple[Array, Array, dict]:
        del frozen, key
        pixels, wanted = rollout["samples"]["pixels"], rollout["samples"]["classes"]
        features = dino.cls_features(config, params["encoder"], apply(preprocess, (pixels + 1) / 2))
        logits = Dense(cells * classes + len(scenes.BACKGROUNDS)).apply({"params": params["heads"]}, features)
        of_cells = logits[:, : cells * classes].reshape(-1, cells, classes)
        cross = optax.softmax_cross_entropy_with_integer_labels
        total = jnp.sum(cross(of_cells, wanted[:, :cells])) + jnp.sum(cross(logits[:, cells * classes :], wanted[:, cells]))
        right = jnp.sum(jnp.argmax(of_cells, -1) == wanted[:, :cells])
        count = jnp.float32(len(pixels))
        return total, count, {"accuracy": (right, count * cells)}

    return supervised(loss)


def _unit(x: Array) -> Array:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
