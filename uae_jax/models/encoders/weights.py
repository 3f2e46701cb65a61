"""Which published tensor is which parameter of the encoders, and loaders of their folders."""

import json
import pathlib
from collections.abc import Sequence

import jax
import numpy as np
from safetensors.numpy import save_file

from uae_jax import trees
from uae_jax.hf.rules import Placement, Rule, load_params, published_tensors
from uae_jax.hf.safetensors import TensorFolder
from uae_jax.models.encoders import clip, dino
from uae_jax.models.encoders.config import (
    CLIPConfig, CLIPTextConfig, CLIPVisionConfig, Dinov2Config, Dinov3Config, read_json)
from uae_jax.models.encoders.preprocess import clip_preprocessor

POSITION_BUFFERS = r".*\.position_ids"
TEXT_TOWER = r"text_model\..*|text_projection\.weight|logit_scale"


def _norm(ours: str, theirs: str, layers: tuple[int, ...] | None = None) -> list[Rule]:
    return [Rule(f"{ours}/scale", f"{theirs}.weight", layers=layers), Rule(f"{ours}/bias", f"{theirs}.bias", layers=layers)]


def _dense(ours: str, theirs: str, layers: tuple[int, ...] | None = None, bias: bool = True) -> list[Rule]:
    rules = [Rule(f"{ours}/kernel", f"{theirs}.weight", "dense", layers)]
    return rules + ([Rule(f"{ours}/bias", f"{theirs}.bias", layers=layers)] if bias else [])


def _clip_blocks(tower: str, prefix: str, count: int) -> list[Rule]:
    layers = tuple(range(count))
    names = (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("out", "out_proj"))
    rules = []
    for ours, theirs in names:
        rules += _dense(f"{tower}/layers/attention/{ours}", f"{prefix}.encoder.layers.{{}}.self_attn.{theirs}", layers)
    for name in ("fc1", "fc2"):
        rules += _dense(f"{tower}/layers/{name}", f"{prefix}.encoder.layers.{{}}.mlp.{name}", layers)
    for number in (1, 2):
        rules += _norm(f"{tower}/layers/norm{number}", f"{prefix}.encoder.layers.{{}}.layer_norm{number}", layers)
    return rules


def clip_vision_rules(config: CLIPVisionConfig) -> list[Rule]:
    """The table of CLIPVisionModelWithProjection and of the image tower of CLIPModel."""
    prefix = "vision_model"
    shape = (config.hidden_size, config.num_channels, config.patch_size, config.patch_size)
    return [
        Rule("vision/class_embedding", f"{prefix}.embeddings.class_embedding"),
        Rule("vision/patch_embedding/kernel", f"{prefix}.embeddings.patch_embedding.weight", "patch", torch_shape=shape),
        Rule("vision/position_embedding", f"{prefix}.embeddings.position_embedding.weight"),
        *_norm("vision/pre_norm", f"{prefix}.pre_layrnorm"),
        *_clip_blocks("vision", prefix, config.num_hidden_layers),
        *_norm("vision/post_norm", f"{prefix}.post_layernorm"),
        *_dense("vision/projection", "visual_projection", bias=False)]


def clip_text_rules(config: CLIPTextConfig) -> list[Rule]:
    """The table of CLIPTextModelWithProjection and of the text tower of CLIPModel."""
    prefix = "text_model"
    return [
        Rule("text/token_embedding", f"{prefix}.embeddings.token_embedding.weight"),
        Rule("text/position_embedding", f"{prefix}.embeddings.position_embedding.weight"),
        *_clip_blocks("text", prefix, config.num_hidden_layers),
        *_norm("text/final_norm", f"{prefix}.final_layer_norm"),
        *_dense("text/projection", "text_projection", bias=False)]


def clip_rules(config: clip.AnyCLIPConfig) -> list[Rule]:
    """The table of the published model that the config belongs to."""
    if isinstance(config, CLIPVisionConfig):
        return clip_vision_rules(config)
    if isinstance(config, CLIPTextConfig):
        return clip_text_rules(config)
    return [*clip_vision_rules(config.vision), *clip_text_rules(config.text), Rule("logit_scale", "logit_scale")]


def dinov2_rules(config: Dinov2Config) -> list[Rule]:
    """The table of Dinov2Model, with the names of published files."""
    layers, block = tuple(range(config.num_hidden_layers)), "encoder.layer.{}"
    shape = (config.hidden_size, config.num_channels, config.patch_size, config.patch_size)
    rules = [
        Rule("cls_token", "embeddings.cls_token"),
        Rule("position_embedding", "embeddings.position_embeddings"),
        Rule("patch_embedding/kernel", "embeddings.patch_embeddings.projection.weight", "patch", torch_shape=shape),
        Rule("patch_embedding/bias", "embeddings.patch_embeddings.projection.bias"),
        *_norm("norm", "layernorm")]
    if config.use_mask_token:
        rules.append(Rule("mask_token", "embeddings.mask_token"))
    for name in ("query", "key", "value"):
        rules += _dense(f"layers/attention/{name}", f"{block}.attention.attention.{name}", layers, config.qkv_bias)
    rules += _dense("layers/attention/out", f"{block}.attention.output.dense", layers)
    for name in ("weights_in", "weights_out") if config.use_swiglu_ffn else ("fc1", "fc2"):
        rules += _dense(f"layers/{name}", f"{block}.mlp.{name}", layers)
    return rules + _residual_rules(block, layers)


# names that transformers 5 has in memory, to those of the published files
DINOV2_ALIASES = (
    (r"^dinov2\.", ""), (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."), (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."))
DINOV3_ALIASES = ((r"^model\.layer\.", "layer."),)


def dinov3_rules(config: Dinov3Config) -> list[Rule]:
    """The table of DINOv3ViTModel, with the names of published files."""
    layers, block = tuple(range(config.num_hidden_layers)), "layer.{}"
    shape = (config.hidden_size, config.num_channels, config.patch_size, config.patch_size)
    rules = [
        Rule("cls_token", "embeddings.cls_token"), Rule("mask_token", "embeddings.mask_token"),
        Rule("register_tokens", "embeddings.register_tokens"),
        Rule("patch_embedding/kernel", "embeddings.patch_embeddings.weight", "patch", torch_shape=shape),
        Rule("patch_embedding/bias", "embeddings.patch_embeddings.bias"), *_norm("norm", "norm")]
    biases = (config.query_bias, config.key_bias, config.value_bias, config.proj_bias)
    names = (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("out", "o_proj"))
    for (ours, theirs), bias in zip(names, biases):
        rules += _dense(f"layers/attention/{ours}", f"{block}.attention.{theirs}", layers, bias)
    for name in ("up", "gate", "down") if config.use_gated_mlp else ("up", "down"):
        rules += _dense(f"layers/{name}", f"{block}.mlp.{name}_proj", layers, config.mlp_bias)
    return rules + _residual_rules(block, layers)


def _residual_rules(block: str, layers: tuple[int, ...]) -> list[Rule]:
    rules = []
    for number in (1, 2):
        rules += _norm(f"layers/norm{number}", f"{block}.norm{number}", layers)
        rules.append(Rule(f"layers/scale{number}", f"{block}.layer_scale{number}.lambda1", layers=layers))
    return rules


def load_dino(
    folder: str | pathlib.Path, *, dtype: np.dtype = np.float32, placement: Placement | None = None) -> tuple[dino.AnyDinoConfig, dict]:
    """Config and parameters of a Dinov2Model or DINOv3ViTModel folder, in the file or the in-memory names.

    Args:
      folder: with `config.json` and safetensors.
      dtype: precision of the parameters.
      placement: where they go, see `hf.rules.load_params`.

    Returns:
      The config, and parameters as of `dino.init_params`.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: the folder holds another model, or its tensors do not fit.
    """
    if read_json(folder).get("model_type") == "dinov3_vit":
        config = Dinov3Config.from_folder(folder)
        rules, aliases = dinov3_rules(config), DINOV3_ALIASES
    else:
        config = Dinov2Config.from_folder(folder)
        rules, aliases = dinov2_rules(config), DINOV2_ALIASES
    return config, load_params(
        TensorFolder(folder), rules, dino.abstract_params(config), aliases=aliases, dtype=dtype, placement=placement)


def load_clip(
    folder: str | pathlib.Path, *, dtype: np.dtype = np.float32, placement: Placement | None = None,
    image_only: bool = False) -> tuple[clip.AnyCLIPConfig, dict]:
    """Config and parameters of a CLIPModel, CLIPVisionModelWithProjection or CLIPTextModelWithProjection folder.

    Args:
      folder: with `config.json` and safetensors.
      dtype: precision of the parameters.
      placement: where they go, see `hf.rules.load_params`.
      image_only: of both towers read the one for images.

    Returns:
      The config of the class that the folder holds, or of its image tower, and parameters as of `clip.init_params`.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: the folder holds another model, or its tensors do not fit.
    """
    classes = {"clip": CLIPConfig, "clip_vision_model": CLIPVisionConfig, "clip_text_model": CLIPTextConfig}
    raw = read_json(folder)
    kind = raw.get("model_type", raw.get("_class_name"))
    if kind not in classes:
        raise ValueError(f"{folder} holds a {kind!r} model, expected one of {', '.join(map(repr, classes))}; give the folder of a CLIP model")
    config, ignore = classes[kind].from_folder(folder), POSITION_BUFFERS
    if image_only and isinstance(config, CLIPConfig):
        config, ignore = config.vision, f"{POSITION_BUFFERS}|{TEXT_TOWER}"
    return config, load_params(
        TensorFolder(folder), clip_rules(config), clip.abstract_params(config), ignore=ignore, dtype=dtype, placement=placement)


def save_clip(folder: str | pathlib.Path, config: clip.AnyCLIPConfig, params: trees.Tree) -> None:
    """Writes a folder that `load_clip` and transformers read, with CLIP's image processing where there is an image tower.

    Args:
      folder: made if absent.
      config: of both towers or of one.
      params: as of `clip.init_params`.
    """
    names = {CLIPConfig: "CLIPModel", CLIPVisionConfig: "CLIPVisionModelWithProjection",
             CLIPTextConfig: "CLIPTextModelWithProjection"}
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # order="C" keeps the scalar logit scale a scalar, which np.ascontiguousarray does not
    tensors = {name: np.asarray(tensor, order="C") for name, tensor in published_tensors(params, clip_rules(config))}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    raw = {"architectures": [names[type(config)]], "dtype": "float32", **config.to_dict()}
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    if not isinstance(config, CLIPTextConfig):
        size = (config.vision if isinstance(config, CLIPConfig) else config).image_size
        (folder / "preprocessor_config.json").write_text(json.dumps(clip_preprocessor(size), indent=2) + "\n")


CLIP_START, CLIP_END = 49406, 49407  # of CLIP's tokenizer; the ids in the published text configs are wrong


def empty_prompt_ids(config: CLIPTextConfig) -> np.ndarray:
    """The empty prompt `[1, 2]`: start and end token.

    The padding that follows in the published pipelines (end token or 0) cannot change the pooled feature, because
    attention is causal and pooling is at the first end token, so there is none. Vocabularies smaller than CLIP's have
    the ids of their config.
    """
    is_clip = config.vocab_size > CLIP_END
    start, end = (CLIP_START, CLIP_END) if is_clip else (config.bos_token_id, config.eos_token_id)
    return np.array([[start, end]], np.int32)


_text_features = jax.jit(clip.text_features, static_argnums=0)


def pooled_empty_prompt(folders: Sequence[str | pathlib.Path]) -> np.ndarray:
    """The transformer's pooled condition: features of the empty prompt, concatenated (arXiv 2403.03206, section 4).

    Args:
      folders: `text_encoder` and `text_encoder_2` of a diffusers folder, in this order.

    Returns:
      float32 `[P_1 + P_2]`.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a folder does not hold a CLIP text tower, or its tensors do not fit.
    """
    parts = []
    for folder in folders:
        config, params = load_clip(folder)
        if isinstance(config, CLIPVisionConfig):
            raise ValueError(f"{folder} holds an image tower; the pooled condition needs CLIP text towers")
        text = config.text if isinstance(config, CLIPConfig) else config
        with jax.default_matmul_precision("highest"):
            parts.append(_text_features(config, params, empty_prompt_ids(text))[0])
    return np.concatenate([np.asarray(part, np.float32) for part in parts])
