"""Phase 2 of the bootstrap: the reward encoder, a CLIP of scenes, and the held-out encoder, a DINOv2 of cells.

The reward encoder learns from captions (arXiv 2103.00020, figure 3). Hard negatives are scenes that differ in one fact,
because a reward that misses a fact cannot teach the fact. A linear readout of the cells helps the image tower at first,
as in the captioner's phase, and is dropped at the end.

The held-out encoder has another architecture, other scenes and another task, the joint class of each cell. So an image
that exploits one encoder need not exploit the other.
"""

from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from uae_jax.data.qwen_inputs import Fields
from uae_jax.data.tokenizer import encode_caption
from uae_jax.methods.method import Supervised
from uae_jax.models.encoders import clip, dino
from uae_jax.models.encoders.config import CLIPConfig, Dinov2Config
from uae_jax.models.encoders.preprocess import Preprocess, apply
from uae_jax.nn.linear import Dense
from uae_jax.stages.bootstrap import scene_stream
from uae_jax.stages.bootstrap.scene_stream import World


def attribute_width(world: World) -> int:
    """Outputs of `attribute_readout`."""
    return scene_stream.CELLS * sum(world.attribute_classes) + len(world.backgrounds)


def readout_width(world: World) -> int:
    """Outputs of `readout`."""
    return scene_stream.CELLS * world.object_classes + len(world.backgrounds)


def clip_stream(world: World, tokenizer, *, seed: int, batch_size: int, side: int, length: int, pad: int):
    """Batches of `pixels` `[B, 2, S, S, 3]`, `ids` `[B, 2, T]` and cell attributes, of a scene and the same scene with
    one fact changed.
    """

    def example(index: int) -> Fields:
        rng = np.random.default_rng([seed, 11, index])
        scene = world.scene_at("train", index, seed)
        pair = (scene, scene_stream.edited(scene, rng))
        ids = [
            scene_stream.pad_ids(encode_caption(tokenizer, scene_stream.full_caption(one, rng)), length, pad)[0]
            for one in pair
        ]
        return {
            "pixels": np.stack([scene_stream.pixels_of(world, one, side) for one in pair]),
            "ids": np.stack(ids),
            **jax.tree.map(lambda *leaves: np.stack(leaves), *(scene_stream.cell_attributes(one) for one in pair)),
        }

    return scene_stream.stream(example, batch_size)


def clip_algorithm(world: World, config: CLIPConfig, preprocess: Preprocess) -> Supervised:
    """The symmetric contrastive loss over the 2 B pairs of a batch, and the loss of the readout."""

    def loss(params: dict, frozen: dict, rollout: dict, key: Array) -> tuple[Array, Array, dict]:
        del frozen, key
        samples = {name: leaf.reshape(-1, *leaf.shape[2:]) for name, leaf in rollout["samples"].items()}
        images = clip.image_features(config, params, apply(preprocess, (samples["pixels"] + 1) / 2))
        named, right = attribute_readout(world, params["heads"], images, samples)
        images, texts = _unit(images), _unit(clip.text_features(config, params, samples["ids"]))
        total, matched = contrastive(images, texts, params["logit_scale"])
        count = jnp.float32(len(images))
        metrics = {
            "contrastive_loss": (total, count),
            "accuracy": (matched, count),
            "readout_accuracy": (right, count * scene_stream.CELLS),
        }
        return total + jnp.sum(named) / scene_stream.CELLS, count, metrics

    return Supervised(loss)


def contrastive(images: Array, texts: Array, logit_scale: Array) -> tuple[Array, Array]:
    """CLIP's symmetric contrastive loss (arXiv 2103.00020, figure 3), summed over pairs.

    Args:
      images, texts: features `[N, D]` of unit length; pair i has row i of both.
      logit_scale: logarithm of the inverse temperature, `[]`, bounded at log 100.

    Returns:
      The loss `[]`, and the number of images whose nearest text is their own `[]`.
    """
    logits = images @ texts.T * jnp.exp(jnp.minimum(logit_scale, jnp.log(100.0)))
    labels = jnp.arange(len(logits))
    cross = optax.softmax_cross_entropy_with_integer_labels
    loss = jnp.sum(cross(logits, labels) + cross(logits.T, labels)) / 2
    return loss, jnp.sum(jnp.argmax(logits, -1) == labels)


def dino_stream(world: World, *, seed: int, batch_size: int, side: int):
    """Batches of `pixels` `[B, S, S, 3]` and `classes` int32 `[B, 5]` (cells, background)."""

    def example(index: int) -> Fields:
        scene = world.scene_at("train", index, seed + 1)
        return {"pixels": scene_stream.pixels_of(world, scene, side), "classes": scene_stream.cell_classes(scene)}

    return scene_stream.stream(example, batch_size)


def init_heads(width: int, outputs: int, key: Array) -> Mapping[str, Any]:
    """Parameters of linear readouts of features `[..., width]`."""
    return Dense(outputs).init(key, jnp.zeros((1, width)))["params"]


def read_heads(heads: Mapping[str, Any], features: Array, outputs: int) -> Array:
    """Linear readouts `[..., outputs]` of features `[..., D]`."""
    return cast(Array, Dense(outputs).apply({"params": heads}, features))


def attribute_readout(
    world: World, heads: Mapping[str, Any], features: Array, samples: Mapping[str, Array]
) -> tuple[Array, Array]:
    """Cross-entropies `[B]` of all cells' attributes and the background, and the number of cells with the right noun
    `[]`.
    """
    logits = read_heads(heads, features, attribute_width(world))
    of_cells, of_background = logits[:, : -len(world.backgrounds)], logits[:, -len(world.backgrounds) :]
    losses, right = cell_losses(world, of_cells.reshape(len(logits), scene_stream.CELLS, -1), samples["cell"])
    background = optax.softmax_cross_entropy_with_integer_labels(of_background, samples["background"])
    return jnp.sum(losses, axis=1) + background, right


def cell_losses(world: World, logits: Array, cells: Array) -> tuple[Array, Array]:
    """Cross-entropies `[B, 4]` of cells' attributes `[B, 4, A]`, and the number of cells with the right noun `[]`.

    An empty cell has no further attributes.
    """
    splits = tuple(int(position) for position in np.cumsum(world.attribute_classes[:-1]))
    named, *others = jnp.split(logits, splits, axis=-1)
    cross = optax.softmax_cross_entropy_with_integer_labels
    details = sum(cross(other, cells[..., 1 + number]) for number, other in enumerate(others))
    losses = cross(named, cells[..., 0]) + jnp.where(cells[..., 0] > 0, details, 0.0)
    return losses, jnp.sum(jnp.argmax(named, -1) == cells[..., 0])


def readout(world: World, heads: Mapping[str, Any], features: Array, classes: Array) -> tuple[Array, Array]:
    """Cross-entropies `[B]` of cells and background from features `[B, D]`, and the number of right cells `[]`."""
    logits = read_heads(heads, features, readout_width(world))
    cells, of_cell = scene_stream.CELLS, world.object_classes
    of_cells, of_background = logits[:, : cells * of_cell].reshape(-1, cells, of_cell), logits[:, cells * of_cell :]
    cross = optax.softmax_cross_entropy_with_integer_labels
    losses = jnp.sum(cross(of_cells, classes[:, :cells]), axis=1) + cross(of_background, classes[:, cells])
    return losses, jnp.sum(jnp.argmax(of_cells, -1) == classes[:, :cells])


def dino_algorithm(world: World, config: Dinov2Config, preprocess: Preprocess) -> Supervised:
    """Cross-entropy of every cell's class and of the background, read linearly from the class token."""

    def loss(params: dict, frozen: dict, rollout: dict, key: Array) -> tuple[Array, Array, dict]:
        del frozen, key
        pixels = rollout["samples"]["pixels"]
        features = dino.cls_features(config, params["encoder"], apply(preprocess, (pixels + 1) / 2))
        losses, right = readout(world, params["heads"], features, rollout["samples"]["classes"])
        count = jnp.float32(len(pixels))
        return jnp.sum(losses), count, {"accuracy": (right, count * scene_stream.CELLS)}

    return Supervised(loss)


def _unit(x: Array) -> Array:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
