"""The image tower of CLIP models published with OpenAI's tensor names, such as Long-CLIP (arXiv 2403.15378)."""

from collections.abc import Mapping

import numpy as np

from uae_jax.hf.rules import load_params
from uae_jax.hf.safetensors import TensorDict
from uae_jax.models.encoders import clip
from uae_jax.models.encoders.config import CLIPVisionConfig
from uae_jax.models.encoders.weights import clip_vision_rules

HEAD_WIDTH = 64  # of all published models with these names, which do not store it
RENAMED = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight", "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight", "visual.ln_post.bias": "vision_model.post_layernorm.bias"}
RENAMED_IN_BLOCK = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2"}
BLOCK = "visual.transformer.resblocks."


def vision_from_openai(
    state: Mapping[str, np.ndarray], *, head_width: int = HEAD_WIDTH, dtype: np.dtype = np.float32) -> tuple[CLIPVisionConfig, dict]:
    """The image tower of an OpenAI-style state dictionary; the text tower is left out.

    Args:
      state: published name to array; only names that start with `visual.` are read.
      head_width: width of an attention head.
      dtype: precision of the parameters.

    Returns:
      The config, read off the shapes, and parameters as of `clip.init_params`.

    Raises:
      ValueError: a tensor is missing, unknown, or of a wrong shape.
    """
    visual = {name: np.asarray(tensor) for name, tensor in state.items() if name.startswith("visual.")}
    missing = [name for name in (*RENAMED, "visual.proj") if name not in visual]
    if missing:
        raise ValueError(f"not the state of a CLIP vision transformer: {missing[0]} is missing")
    tensors = {}
    for name, tensor in visual.items():
        tensors.update(_renamed(name, tensor))
    config = _config(visual, head_width)
    return config, load_params(TensorDict("the OpenAI-style state", tensors), clip_vision_rules(config), clip.abstract_params(config), dtype=dtype)


def _renamed(name: str, tensor: np.ndarray) -> dict[str, np.ndarray]:
    """The tensors under transformers' names; the fused query, key and value map gives three."""
    if name == "visual.proj":
        return {"visual_projection.weight": tensor.T}
    if not name.startswith(BLOCK):
        return {RENAMED.get(name, name): tensor}
    layer, _, rest = name.removeprefix(BLOCK).partition(".")
    prefix = f"vision_model.encoder.layers.{layer}."
    if rest.startswith("attn.in_proj_"):
        kind = rest.removeprefix("attn.in_proj_")
        return {f"{prefix}self_attn.{part}_proj.{kind}": piece for part, piece in zip("qkv", np.split(tensor, 3))}
    module, _, kind = rest.rpartition(".")
    return {f"{prefix}{RENAMED_IN_BLOCK.get(module, module)}.{kind}": tensor}


def _config(visual: Mapping[str, np.ndarray], head_width: int) -> CLIPVisionConfig:
    width, channels, patch, _ = visual["visual.conv1.weight"].shape
    grid = round((len(visual["visual.positional_embedding"]) - 1) ** 0.5)
    inner = visual.get(f"{BLOCK}0.mlp.c_fc.bias", np.zeros(4 * width)).shape[0]
    layers = {name.removeprefix(BLOCK).partition(".")[0] for name in visual if name.startswith(BLOCK)}
    return CLIPVisionConfig(
        hidden_size=width, intermediate_size=inner, projection_dim=visual["visual.proj"].shape[1],
        num_hidden_layers=len(layers), num_attention_heads=width // head_width, num_channels=channels,
        image_size=grid * patch, patch_size=patch)
