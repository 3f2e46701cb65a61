"""A random model of a few thousand parameters in the official layout, and runs on it with settings to match.

The fixtures are those of the `conftest.py` of each folder that imports them; a session makes each of them once.
"""

import dataclasses
import functools
import json
import pathlib
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stage_pieces import changed, make_run

from configs import presets
from uae_jax import trees
from uae_jax.data.scene_captions import WORDS
from uae_jax.data.tokenizer import END_OF_TEXT, IMAGE_PAD, load_tokenizer, stop_ids, token_id, write_scene_tokenizer
from uae_jax.hf.rules import published_tensors
from uae_jax.hf.safetensors import write_tensors
from uae_jax.models.encoders import clip, dino
from uae_jax.models.encoders.config import CLIPConfig, CLIPTextConfig, CLIPVisionConfig, Dinov2Config
from uae_jax.models.encoders.preprocess import clip_preprocessor
from uae_jax.models.encoders.tables import dinov2_rules
from uae_jax.models.encoders.weights import save_clip
from uae_jax.models.qwen2_5_vl import model as qwen
from uae_jax.models.qwen2_5_vl import weights as qwen_weights
from uae_jax.models.qwen2_5_vl.config import Qwen2_5VLConfig, TextConfig, VisionConfig, to_json
from uae_jax.models.sd3 import transformer, vae
from uae_jax.models.sd3.config import TransformerConfig, VAEConfig
from uae_jax.models.sd3.weights import transformer_rules, vae_rules
from uae_jax.rewards.similarity import RewardConfig
from uae_jax.settings import as_dict
from uae_jax.training.optimizer import OptimizerConfig

SIDE = 16
STAGES = ("pretrain", "cold_start", "gen_for_und", "und_for_gen")


def random_params(abstract, seed: int):
    """Numbers for a tree of shapes: no bias at zero, no norm at one, no last map at zero, nothing true by its
    initialisation.
    """

    def draw(name, leaf):
        noise = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(leaf.shape)
        if name.endswith("kernel"):
            return (noise / np.sqrt(leaf.shape[-2])).astype(np.float32)
        return (name.endswith("scale") + 0.15 * noise).astype(np.float32)

    return trees.map_with_name(draw, abstract)


def _json(folder, name, content):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(content))


def _write_captioner(root, tokenizer):
    pad, stops = token_id(tokenizer, END_OF_TEXT), stop_ids(tokenizer)
    config = Qwen2_5VLConfig(
        vision=VisionConfig(
            depth=2,
            width=16,
            heads=2,
            mlp_width=24,
            out_width=32,
            patch_size=4,
            window_size=16,
            full_attention_blocks=(1,),
        ),
        text=TextConfig(
            vocab_size=len(tokenizer), width=32, layers=2, heads=4, key_heads=2, mlp_width=48, mrope_section=(2, 1, 1)
        ),
        image_token_id=token_id(tokenizer, IMAGE_PAD),
        video_token_id=token_id(tokenizer, "<|video_pad|>"),
        vision_start_token_id=token_id(tokenizer, "<|vision_start|>"),
        vision_end_token_id=token_id(tokenizer, "<|vision_end|>"),
        pad_token_id=pad,
        stop_token_ids=stops,
    )
    projector = jax.eval_shape(lambda: qwen.init_projector(jax.random.key(0), 32, 24, 16))
    params = random_params(qwen.abstract_params(config) | {"projector": projector}, 1)
    # logits a few units wide, so that captions of one group differ and some of them end
    params["language"]["embedding"]["table"] *= 3
    params["projector"]["second"]["kernel"] *= 4  # drawings depend on their captions
    _json(root / "llm", "config.json", to_json(config))
    _json(root / "llm", "generation_config.json", {"eos_token_id": list(stops)})
    write_tensors(root / "llm", qwen_weights.tensors(config, params, np.float32))


def _write_decoder(root, tokenizer):
    config = TransformerConfig(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    params = random_params(transformer.abstract_params(config), 2)
    params["pos_embed"]["table"] = transformer.position_table(config)
    _json(root / "dit", "config.json", config.published())
    write_tensors(root / "dit", published_tensors(params, transformer_rules(config)), stem="diffusion_pytorch_model")
    config = VAEConfig(
        latent_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, sample_size=SIDE
    )
    params = random_params(vae.abstract_params(config), 3)
    _json(root / "SD3" / "vae", "config.json", config.published())
    write_tensors(root / "SD3" / "vae", published_tensors(params, vae_rules(config)), stem="diffusion_pytorch_model")
    _json(
        root / "SD3" / "scheduler",
        "scheduler_config.json",
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0},
    )
    end = token_id(tokenizer, "<|im_end|>")
    text = CLIPTextConfig(
        hidden_size=8,
        intermediate_size=16,
        projection_dim=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=8,
        bos_token_id=end - 1,
        eos_token_id=end,
        pad_token_id=end,
    )
    for number, name in enumerate(("text_encoder", "text_encoder_2")):
        save_clip(root / "SD3" / name, text, random_params(clip.abstract_params(text), 4 + number))
    return text


def _write_encoders(root, text):
    small = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=SIDE, patch_size=8)
    both = CLIPConfig(CLIPVisionConfig(**small, intermediate_size=32, projection_dim=8), text)
    save_clip(root / "clip", both, random_params(clip.abstract_params(both), 6))
    config = Dinov2Config(**small, mlp_ratio=2)
    params = random_params(dino.abstract_params(config), 7)
    write_tensors(root / "dinov2", published_tensors(params, dinov2_rules(config)))
    _json(root / "dinov2", "config.json", {"model_type": "dinov2", **dataclasses.asdict(config)})
    _json(
        root / "dinov2",
        "preprocessor_config.json",
        clip_preprocessor(SIDE) | {"image_processor_type": "BitImageProcessor"},
    )


def small_config(folder: pathlib.Path) -> dict:
    """The `tiny` preset, smaller still."""
    values = presets.preset("tiny", STAGES).to_dict()
    values["model"]["folder"] = str(folder)
    values["data"] |= dict(image_size=SIDE, max_prompt=0, max_caption=12, negative_prompt="red circle")
    values["evaluation"] |= dict(images=4, images_during=3, batch_size=4, sampler_steps=2, geneval_per_tag=1, samples=2)
    # a random model answers at random
    values["evaluation"] |= dict(questions="")
    values["loop"] |= dict(eval_every=1)
    optimizer = as_dict(OptimizerConfig(learning_rate=1e-2))
    small = dict(steps=2, batch_size=8, optimizer=optimizer)
    rollouts = small | dict(max_new_tokens=6, lora_rank=4)
    return changed(
        values,
        pretrain=small,
        cold_start=small | dict(sampler_steps=2),
        gen_for_und=rollouts | dict(group_size=4, sampler_steps=2),
        # the method of the full-size presets; tests of the other one name it
        und_for_gen=rollouts
        | dict(
            method="flow_grpo",
            train="lora",
            group_size=2,
            data_captions=0.0,
            sampler_steps=3,
            reward=as_dict(RewardConfig()),
            flow_grpo=dict(
                updates_per_rollout=2,
                one_replay=False,
                starts=1,
                window=1,
                window_high=2,
                grpo_guard=False,
                clip_range=0.5,
                kl_kind="gaussian_nodt",
                kl_weight=0.01,
                advantage_scale="batch",
                ema_decay=0.9,
            ),
        ),
    )


@functools.cache
def _model(root: pathlib.Path) -> pathlib.Path:
    write_scene_tokenizer(root / "llm_processor", WORDS, patch_size=4)
    tokenizer = load_tokenizer(root / "llm_processor")
    _write_captioner(root, tokenizer)
    _write_encoders(root, _write_decoder(root, tokenizer))
    return root


@functools.cache
def _run(workdir: pathlib.Path, folder: pathlib.Path):
    run = make_run(small_config(folder), workdir)
    run.parts = jax.tree.map(jnp.asarray, run.parts)
    return run


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """The model's folder; tests that change it copy it first."""
    return _model(tmp_path_factory.getbasetemp() / "small_model")


@pytest.fixture(scope="session")
def config(model_folder):
    """The `tiny` preset, smaller still, as a dictionary; `changed` makes a variant of it."""
    return small_config(model_folder)


@pytest.fixture(scope="session")
def whole(model_folder, tmp_path_factory):
    """One `Run` on one device; its parameters are never donated."""
    return _run(tmp_path_factory.getbasetemp() / "small_run", model_folder)
