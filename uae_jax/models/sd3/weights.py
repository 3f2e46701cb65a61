"""Which published tensor is which parameter, for the transformer, its adapter and the auto-encoder (diffusers,
peft).
"""

import dataclasses
import pathlib
from collections.abc import Iterator

import numpy as np
from jax.typing import DTypeLike

from uae_jax import trees
from uae_jax.hf.adapters import (
    DIFFUSERS_ALIASES,
    AdapterFiles,
    adapter_rules,
    read_adapter,
    settings_of,
    survey_adapter,
)
from uae_jax.hf.rules import Placement, Rule, load_params, published_tensors
from uae_jax.hf.safetensors import TensorFolder
from uae_jax.models.autoencoder.tables import affine, autoencoder_rules
from uae_jax.models.precision import numpy_dtype
from uae_jax.models.sd3 import vae
from uae_jax.models.sd3.config import TransformerConfig, VAEConfig
from uae_jax.models.sd3.transformer import abstract_params


def vae_rules(config: VAEConfig) -> list[Rule]:
    """The table of the auto-encoder, for `hf.rules.load_params` and `published_tensors`."""
    return autoencoder_rules(config.sizes)


# Names of older files: diffusers before 0.15 wrote the middle attention with these.
VAE_ALIASES = (
    (r"\.mid_block\.attentions\.0\.query\.", ".mid_block.attentions.0.to_q."),
    (r"\.mid_block\.attentions\.0\.key\.", ".mid_block.attentions.0.to_k."),
    (r"\.mid_block\.attentions\.0\.value\.", ".mid_block.attentions.0.to_v."),
    (r"\.mid_block\.attentions\.0\.proj_attn\.", ".mid_block.attentions.0.to_out.0."),
)


_JOINT = {
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "output": "to_out.0",
    "context_query": "add_q_proj",
    "context_key": "add_k_proj",
    "context_value": "add_v_proj",
    "context_output": "to_add_out",
}
_JOINT_NORMS = {
    "query_norm": "norm_q",
    "key_norm": "norm_k",
    "context_query_norm": "norm_added_q",
    "context_key_norm": "norm_added_k",
}


def _groups(config: TransformerConfig) -> list[tuple[str, str, tuple[int, ...] | None, bool, bool]]:
    """Every group of blocks: (our name, published prefix, layers, dual, last)."""
    last = config.num_layers - 1
    return [
        *((name, "transformer_blocks.{}", layers, dual, False) for name, layers, dual in config.runs),
        ("last_block", f"transformer_blocks.{last}", None, last in config.dual_attention_layers, True),
    ]


def _block(
    config: TransformerConfig, ours: str, theirs: str, layers: tuple[int, ...] | None, dual: bool, last: bool
) -> list[Rule]:
    maps = {
        "modulation/linear": "norm1.linear",
        "context_modulation/linear": "norm1_context.linear",
        "feed_forward/up": "ff.net.0.proj",
        "feed_forward/down": "ff.net.2",
    }
    maps |= {
        f"attention/{name}": f"attn.{published}"
        for name, published in _JOINT.items()
        if not (last and name == "context_output")
    }
    norms = {f"attention/{name}": f"attn.{published}" for name, published in _JOINT_NORMS.items()}
    if not last:
        maps |= {"context_feed_forward/up": "ff_context.net.0.proj", "context_feed_forward/down": "ff_context.net.2"}
    if dual:
        maps |= {f"image_attention/{name}": f"attn2.{_JOINT[name]}" for name in ("query", "key", "value", "output")}
        norms |= {f"image_attention/{name}": f"attn2.{_JOINT_NORMS[name]}" for name in ("query_norm", "key_norm")}
    rules = []
    for name, published in maps.items():
        rules += affine(f"{ours}/{name}", f"{theirs}.{published}", "dense", layers)
    if config.qk_norm is not None:
        rules += [
            Rule(f"{ours}/{name}/scale", f"{theirs}.{published}.weight", layers=layers)
            for name, published in norms.items()
        ]
    return rules


def transformer_rules(config: TransformerConfig) -> list[Rule]:
    """The table of the transformer, for `hf.rules.load_params` and `published_tensors`."""
    patch = (config.width, config.in_channels, config.patch_size, config.patch_size)
    rules = [
        Rule("pos_embed/table", "pos_embed.pos_embed"),
        Rule("patch_embed/kernel", "pos_embed.proj.weight", "patch", torch_shape=patch),
        Rule("patch_embed/bias", "pos_embed.proj.bias"),
    ]
    for ours, theirs in (("timestep_embedder", "timestep_embedder"), ("pooled_embedder", "text_embedder")):
        for part in ("linear_1", "linear_2"):
            rules += affine(f"{ours}/{part}", f"time_text_embed.{theirs}.{part}", "dense")
    rules += affine("context_embedder", "context_embedder", "dense")
    for group in _groups(config):
        rules += _block(config, *group)
    return rules + affine("norm_out/linear", "norm_out.linear", "dense") + affine("proj_out", "proj_out", "dense")


def adapter_tensors(
    config: TransformerConfig, adapter: trees.Tree, dtype: DTypeLike | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Names and arrays of an adapter as peft saves it; the inverse of `load_adapter`."""
    return published_tensors(adapter, adapter_rules(transformer_rules(config), adapter), numpy_dtype(dtype))


def adapter_config(config: TransformerConfig, adapter: trees.Tree) -> dict:
    """The contents of peft's `adapter_config.json` for an adapter, whatever its modules."""
    table = transformer_rules(config)
    return settings_of(adapter, adapter_rules(table, adapter), table, config.lora_alpha)


def load_vae(path: str | pathlib.Path, *, placement: Placement | None = None) -> tuple[VAEConfig, dict]:
    """An auto-encoder folder as published: its config and float32 parameters, sharded as by `hf.rules.load_params`.

    Raises:
      FileNotFoundError: config or weights are absent.
      ValueError: the config is not supported, or the tensors do not fit it.
    """
    config = VAEConfig.from_folder(path)
    params = load_params(
        TensorFolder(path),
        vae_rules(config),
        vae.abstract_params(config),
        aliases=VAE_ALIASES,
        dtype=np.dtype(np.float32),
        placement=placement,
    )
    return config, params


def load_transformer(
    path: str | pathlib.Path, *, params_dtype: DTypeLike | None = None, placement: Placement | None = None, **overrides
) -> tuple[TransformerConfig, dict]:
    """A transformer folder as published: its config and parameters.

    Args:
      path: the folder with `config.json` and safetensors files.
      params_dtype: precision of the parameters; None keeps what is stored.
      placement: where the parameters go, see `hf.rules.load_params`.
      **overrides: config fields that the file does not have: `dtype` (of the products), `remat`, `lora_alpha`.

    Raises:
      FileNotFoundError: config or weights are absent.
      ValueError: the config is not supported, or the tensors do not fit it.
    """
    config = TransformerConfig.from_folder(path, **overrides)
    return config, load_params(
        TensorFolder(path),
        transformer_rules(config),
        abstract_params(config),
        dtype=numpy_dtype(params_dtype),
        placement=placement,
    )


def load_adapter(path: str | pathlib.Path, config: TransformerConfig) -> tuple[TransformerConfig, dict]:
    """An adapter of peft or of diffusers (`pytorch_lora_weights.safetensors`) for any of the transformer's linear maps.

    Args:
      path: folder, or a single file of diffusers.
      config: sizes of the base model.

    Returns:
      The config with the adapter's alpha, and the adapter tree in float32 (numpy).

    Raises:
      FileNotFoundError: no such folder or weights.
      ValueError: see `hf.adapters.read_adapter`.
    """
    adapter = read_adapter(survey_transformer_adapter(path, config), np.dtype(np.float32))
    return dataclasses.replace(config, lora_alpha=adapter.alpha), adapter.tree


def survey_transformer_adapter(path: str | pathlib.Path, config: TransformerConfig | None) -> AdapterFiles:
    """What `load_adapter` would read, understood but not read; None stands for a base model that is not known.

    Raises:
      FileNotFoundError: no such folder or weights.
      ValueError: see `hf.adapters.survey_adapter`.
    """
    table, abstract = (None, {}) if config is None else (transformer_rules(config), abstract_params(config))
    return survey_adapter(TensorFolder(path), table, abstract, aliases=DIFFUSERS_ALIASES)
