"""Phase 3 of the bootstrap: a captioner whose captions are true, but state few of the facts in an image.

The loss is the cross-entropy of captions given the image, and of full captions given no image in the decoder's
template, because the language model is also the text encoder. Two kinds of linear readouts help, and are dropped at the
end:

- From captions alone the image encoder stays unused for long, since the loss rests where words are guessed from words.
  So readouts of the image embeddings predict each cell.
- The decoder has no positions for text, so the hidden states have to say which words belong together. The states of a
  small language model forget words that do not help to guess the next word. So readouts of every state predict the last
  words.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from uae_jax.data import scenes
from uae_jax.data.qwen_inputs import Fields, ImageProcessor, prompt_fields
from uae_jax.data.scene_captions import CAPTION_PROMPT, mixed_caption, random_detail_caption
from uae_jax.data.tokenizer import IMAGE_PAD, caption_prompt_ids, encode_caption, token_id
from uae_jax.files.json_files import write_json
from uae_jax.methods.method import Supervised
from uae_jax.models.condition import ConditionTemplate, place_in_template
from uae_jax.models.language import model as lm
from uae_jax.models.qwen2_5_vl import model as qwen
from uae_jax.models.qwen2_5_vl.config import Qwen2_5VLConfig, to_json
from uae_jax.rollouts.captioning import IMAGE_FIELDS
from uae_jax.stages.bootstrap import scene_stream
from uae_jax.stages.bootstrap.encoders import cell_losses, init_heads, read_heads
from uae_jax.stages.bootstrap.scene_stream import World

# words that each state predicts: a complete phrase, such as "top left small red circle"
MEMORY = 5


def low_detail_caption(scene: scenes.Scene, rng: np.random.Generator, low: float, high: float) -> str:
    """A true caption in raster order that states each fact with a probability uniform in [low, high]."""
    return random_detail_caption(scene, rng, low, high, shuffle_probability=0.0)


def stream(
    world: World,
    tokenizer,
    processor: ImageProcessor,
    *,
    seed: int,
    batch_size: int,
    side: int,
    length: int,
    pad: int,
    max_prompt: int,
    detail: tuple[float, float],
):
    """Batches of the captioner's inputs with `caption_ids`, `caption_mask` and text-only `text_ids`, `text_mask` `[B,
    T]`.
    """
    image_pad = token_id(tokenizer, IMAGE_PAD)
    grid = processor.grid_of(side, side)
    prompt = caption_prompt_ids(tokenizer, CAPTION_PROMPT, [processor.image_tokens(grid)])

    def example(index: int) -> Fields:
        rng = np.random.default_rng([seed, 12, index])
        scene = world.scene_at("train", index, seed + 2)
        image = processor(world.draw(scene, side))
        fields = prompt_fields(prompt, [image], processor, image_pad, grid[0] * grid[1], max_prompt)
        said = low_detail_caption(scene, rng, *detail)
        read = mixed_caption(scene, rng) if rng.random() < 0.3 else scene_stream.full_caption(scene, rng)
        for name, text in (("caption", said), ("text", read)):
            ids, mask = scene_stream.pad_ids(encode_caption(tokenizer, text), length, pad)
            fields |= {f"{name}_ids": ids, f"{name}_mask": mask}
        return fields | scene_stream.cell_attributes(scene)

    return scene_stream.stream(example, batch_size)


def algorithm(world: World, config: Qwen2_5VLConfig, template: ConditionTemplate, text_weight: float) -> Supervised:
    """Cross-entropy per token of captions, of texts (weighted by `text_weight`), and of the readouts."""

    def loss(params: Mapping, frozen: Mapping, rollout: Mapping, key: Array) -> tuple[Array, Array, dict]:
        del frozen, key
        batch = rollout["samples"]
        images = qwen.encode_images(config, params, *(batch[name] for name in IMAGE_FIELDS))
        prefix = qwen.prompt_prefix(config, params, None, batch, images)
        said = lm.completion_log_probs(
            config, params, None, prefix, batch["caption_ids"], batch["caption_mask"]
        ).log_probs
        count = jnp.sum(batch["caption_mask"], dtype=jnp.float32)
        read, remembered, tokens = _text_losses(config, params, template, batch["text_ids"], batch["text_mask"])
        rows = jnp.float32(len(said))
        named = readout_loss(world, params["readout"], images, batch)
        text = jnp.sum(remembered) - jnp.sum(read)
        total = rows * (text_weight * text / tokens - jnp.sum(said) / count) + jnp.sum(named)
        metrics = {
            "caption_loss": (-jnp.sum(said), count),
            "text_loss": (-jnp.sum(read), tokens),
            "readout_loss": (jnp.sum(named), rows),
            "memory_loss": (jnp.sum(remembered), tokens),
        }
        return total, rows, metrics

    return Supervised(loss)


def _text_losses(
    config: Qwen2_5VLConfig, params: Mapping, template: ConditionTemplate, ids: Array, mask: Array
) -> tuple[Array, Array, Array]:
    """Log-probabilities of text tokens, memory losses of their states (both `[B, S - 1]`, 0 outside of the text), and
    the number of tokens `[]`.
    """
    lengths = jnp.sum(mask, -1, dtype=jnp.int32) - 1
    templated, valid = place_in_template(template, ids, lengths)
    hidden = lm.text_hidden_states(config, params, None, templated, valid)
    scores = lm.score_tokens(config, params, hidden[:, :-1], templated[:, 1:]).log_probs
    position = jnp.arange(1, templated.shape[1])[None]
    before = len(template.prefix)
    inside = (position >= before) & (position < before + lengths[:, None])
    vocabulary = config.text.vocab_size
    logits = read_heads(params["memory"], hidden, MEMORY * vocabulary).reshape(*hidden.shape[:2], MEMORY, vocabulary)
    lagged = [jnp.pad(templated, ((0, 0), (lag, 0)))[:, : templated.shape[1]] for lag in range(MEMORY)]
    wanted = jnp.stack(lagged, axis=-1)
    memory = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, wanted), axis=-1)[:, 1:]
    return jnp.where(inside, scores, 0.0), jnp.where(inside, memory, 0.0), jnp.sum(inside, dtype=jnp.float32)


def init_memory(config: Qwen2_5VLConfig, key: Array) -> Mapping[str, Any]:
    """Linear readouts of a hidden state: the current word and the words before it."""
    return init_heads(config.text.width, MEMORY * config.text.vocab_size, key)


def readout_width(world: World) -> int:
    """Number of outputs of the readouts of an image embedding: a cell's attributes, and the background."""
    return sum(world.attribute_classes) + len(world.backgrounds)


def init_readout(world: World, width: int, key: Array) -> Mapping[str, Any]:
    """Linear readouts of an image embedding."""
    return init_heads(width, readout_width(world), key)


def readout_loss(world: World, params: Mapping, images: Array, batch: Mapping) -> Array:
    """Cross-entropies `[B]` of the cells' attributes, read from the mean of a cell's embeddings (of `[B, P / 4,
    D]`).
    """
    side = round(images.shape[1] ** 0.5)
    grid = (
        images.reshape(len(images), 2, side // 2, 2, side // 2, -1)
        .mean((2, 4))
        .reshape(len(images), scene_stream.CELLS, -1)
    )
    logits = read_heads(params, grid, readout_width(world))
    of_cells, of_background = logits[..., : -len(world.backgrounds)], logits[..., -len(world.backgrounds) :]
    losses, _ = cell_losses(world, of_cells, batch["cell"])
    return jnp.mean(losses, axis=1) + optax.softmax_cross_entropy_with_integer_labels(
        of_background.mean(1), batch["background"]
    )


def write_config(folder: pathlib.Path, config: Qwen2_5VLConfig, stops: tuple[int, ...]) -> None:
    """`config.json` and `generation_config.json` in the published layout."""
    write_json(folder / "config.json", to_json(config), indent=1)
    write_json(folder / "generation_config.json", {"eos_token_id": list(stops)}, indent=1)
