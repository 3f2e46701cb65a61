"""The built-in unified model from nothing: its image tokenizer, then one network that captions scenes and draws them.

The network begins where the other built-in model does: its captions are true and state few of the facts, and it draws
what a caption says. Its folder is one of transformers' layout, with the image encoders of the other model beside it.
"""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from uae_jax import trees
from uae_jax.data.janus_inputs import JanusTokenizer, padded_ids
from uae_jax.data.qwen_inputs import Fields
from uae_jax.data.scene_captions import CAPTION_PROMPT, mixed_caption
from uae_jax.data.tokenizer import UNKNOWN, write_word_tokenizer
from uae_jax.files.json_files import write_json
from uae_jax.hf.safetensors import write_tensors
from uae_jax.methods.method import Supervised
from uae_jax.models.condition import ConditionTemplate
from uae_jax.models.janus import drawing, weights
from uae_jax.models.janus import model as janus
from uae_jax.models.janus import vq as tokens
from uae_jax.models.janus.config import TOKENS, JanusConfig, VisionConfig, VQConfig, special_ids, to_json
from uae_jax.models.janus.unified import Unified
from uae_jax.models.language import model as lm
from uae_jax.models.language.config import TextConfig
from uae_jax.settings import frozen
from uae_jax.stages.bootstrap import scene_stream, vae, vq
from uae_jax.stages.bootstrap.captioner import init_readout, low_detail_caption, readout_loss
from uae_jax.stages.bootstrap.scene_stream import World
from uae_jax.stages.bootstrap.settings import NetworkPhase

TURNS = ("<|User|>", "<|Assistant|>", ":")
TOKENIZER = "vq"  # folder of the image tokenizer between the two phases, beside the model


def write_tokenizer(folder: pathlib.Path, world: World) -> None:
    """`tokenizer.json` of the words of a world, with the special tokens of Janus."""
    write_word_tokenizer(folder, (*TOKENS.values(), UNKNOWN, *TURNS[:2]), (TURNS[2], *world.words))


def sizes(run: Any) -> JanusConfig:
    """The network of a bootstrap's settings."""
    phase, ids = run.config.network, special_ids(run.model)
    words = len(run.tokenizer)
    text = TextConfig(vocab_size=words, tied=False, qkv_bias=False, rope_theta=1e4, **phase.text)
    return JanusConfig(
        text=text,
        vision=VisionConfig(image_size=run.config.side, **phase.vision),
        vq=frozen_vq(run.config.vq.model),
        image_token_id=ids["image"],
        bos_token_id=ids["bos"],
        pad_token_id=ids["pad"],
        stop_token_ids=(ids["eos"],),
    )


def frozen_vq(values: Mapping[str, Any]) -> VQConfig:
    """The sizes of the image tokenizer."""
    return frozen(VQConfig, values, "config.vq.model")


def tokenizer_of(folder: pathlib.Path, image_tokens: int) -> JanusTokenizer:
    """The tokenizer that `write_tokenizer` has written."""
    return JanusTokenizer(folder, special_ids(folder), image_tokens)


def vq_phase(run: Any, train: Callable[..., Any], stored: np.dtype) -> None:
    """Writes the image tokenizer alone, `vq/model.safetensors`, under its names in the complete model."""
    phase, model = run.config.vq, frozen_vq(run.config.vq.model)
    data = vae.stream(run.world, seed=run.config.seed, batch_size=phase.batch_size, side=run.config.side)
    params = tokens.init_params(model, jax.random.fold_in(run.key, 80))
    state = train(run, "vq", vq.algorithm(model), params, {}, data, steps=phase.steps)
    rules = weights.vq_rules(model)
    write_tensors(run.workdir / TOKENIZER, weights.published_tensors({"vq": state.params}, rules, stored))


def network_phase(run: Any, train: Callable[..., Any], stored: np.dtype) -> None:
    """Writes the complete model in the layout of transformers."""
    phase, network = run.config.network, sizes(run)
    words = tokenizer_of(run.model, network.vision.tokens)
    before, after = words.drawing_template()
    model = Unified(network, ConditionTemplate(tuple(before), tuple(after), (), network.pad_token_id))
    codes = weights.load_vq(run.workdir / TOKENIZER, network.vq)
    data = stream(run, phase, words)
    params = janus.init_params(network, jax.random.fold_in(run.key, 81))
    del params["vq"]
    params["readout"] = init_readout(run.world, network.text.width, jax.random.fold_in(run.key, 82))
    frozen_parts = {"vq": jax.tree.map(jnp.asarray, codes)}
    state = train(run, "network", algorithm(run.world, model, phase), params, frozen_parts, data, steps=phase.steps)
    parts = {name: part for name, part in state.params.items() if name != "readout"} | frozen_parts
    write_tensors(run.model, weights.tensors(network, parts, stored))
    write_json(run.model / "config.json", to_json(network), indent=1)


def stream(run: Any, phase: NetworkPhase, words: JanusTokenizer):
    """Batches of `pixels`, the caption prompt, `caption_ids` that leave facts out and `text_ids` that are drawn, with
    their masks `[B, T]`, and the facts of cells.
    """
    config, world = run.config, run.world
    prompt = words.question_ids(CAPTION_PROMPT, CAPTION_PROMPT)
    asked = padded_ids(prompt, len(prompt))

    def example(index: int) -> Fields:
        rng = np.random.default_rng([config.seed, 15, index])
        scene = world.scene_at("train", index, config.seed + 4)
        said = low_detail_caption(scene, rng, phase.detail_low, phase.detail_high)
        full = rng.random() < phase.full_fraction
        drawn = scene_stream.full_caption(scene, rng) if full else mixed_caption(scene, rng)
        fields = {"pixels": scene_stream.pixels_of(world, scene, config.side), **asked}
        for name, text in (("caption", said), ("text", drawn)):
            ids, mask = scene_stream.pad_ids(words.encode_caption(text), config.caption_tokens, words.ids["pad"])
            fields |= {f"{name}_ids": ids, f"{name}_mask": mask}
        return fields | scene_stream.cell_attributes(scene)

    return scene_stream.stream(example, phase.batch_size)


def algorithm(world: World, model: Unified, phase: NetworkPhase) -> Supervised:
    """Cross-entropies per token of captions given the image and of image tokens given a caption, and the loss of a
    readout of the image embeddings, which helps the tower at first and is dropped at the end.
    """
    network = model.network

    def loss(params: dict, frozen: dict, rollout: dict, key: Array) -> tuple[Array, Array, dict]:
        batch = rollout["samples"]
        images = janus.encode_images(network, params, batch["pixels"])
        prefix = janus.prompt_prefix(network, params, None, batch, images)
        said = lm.completion_log_probs(network, params, None, prefix, batch["caption_ids"], batch["caption_mask"])
        ids, mask = model.drawing_prompts(batch["text_ids"], jnp.sum(batch["text_mask"], -1, dtype=jnp.int32) - 1)
        dropped = jax.random.bernoulli(trees.name_key(key, "drop"), phase.caption_dropout, (len(ids), 1))
        ids = jnp.where(dropped, drawing.unconditional(network, ids, mask), ids)
        prompts = drawing.drawing_prefix(network, params, None, ids, mask, guided=False)
        wanted = tokens.encode(network.vq, frozen["vq"], batch["pixels"])
        drawn = drawing.drawing_log_probs(network, params, None, prompts, wanted).log_probs
        count, rows = jnp.sum(batch["caption_mask"], dtype=jnp.float32), jnp.float32(len(ids))
        named = readout_loss(world, params["readout"], images, batch)
        captions, pictures = -jnp.sum(said.log_probs), -jnp.sum(drawn)
        total = rows * (captions / count + phase.image_weight * pictures / drawn.size) + jnp.sum(named)
        metrics = {
            "caption_loss": (captions, count),
            "image_loss": (pictures, jnp.float32(drawn.size)),
            "readout_loss": (jnp.sum(named), rows),
        }
        return total, rows, metrics

    return Supervised(loss)
