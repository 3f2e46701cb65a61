"""Writes a model in memory as a folder in the official layout, which `stages.weights` reads."""

import pathlib
import shutil
from collections.abc import Mapping

import jax
import numpy as np
from numpy.typing import DTypeLike

from uae_jax.files.json_files import read_json, write_json
from uae_jax.hf.rules import published_tensors
from uae_jax.hf.safetensors import write_tensors
from uae_jax.models.qwen2_5_vl import weights as qwen_weights
from uae_jax.models.sd3 import weights as sd3_weights
from uae_jax.stages.folders.parts import with_dtype
from uae_jax.stages.weights import ENCODERS, REFERENCE, System, config_folder


def export_system(system: System, parts: Mapping, folder: pathlib.Path, dtype: DTypeLike = np.float32) -> None:
    """Writes a model in the official layout; frozen parts are copied from the system's folder.

    Args:
      system: the description, and the folder of the unchanged parts.
      parts: parameters to write.
      folder: replaced completely, once everything is written.
      dtype: stored precision of the trained parts.
    """
    dtype = np.dtype(dtype)
    fresh = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    captioner, parts = system.model.captioner, jax.device_get(dict(parts))
    # the trained copy writes captions, and the reference encodes them for the decoder
    languages = {"llm": parts["language"]}
    if "language_policy" in parts:
        languages = {"llm": parts["language_policy"], REFERENCE: parts["language"]}
    for name, language in languages.items():
        whole = {"vision": parts["vision"], "language": language, "projector": parts["projector"]}
        write_tensors(fresh / name, qwen_weights.tensors(captioner, whole, dtype))
        _write_captioner_config(system, fresh / name, dtype)
    if "language_lora" in parts:
        write_tensors(
            fresh / "llm_lora",
            qwen_weights.adapter_tensors(captioner, parts["language_lora"], dtype=dtype),
            stem="adapter_model",
        )
        write_json(
            fresh / "llm_lora" / "adapter_config.json",
            qwen_weights.adapter_config(captioner, parts["language_lora"]),
            indent=1,
        )
    _export_transformer(system, parts, fresh, dtype)
    for name in ("llm_processor", "SD3", *ENCODERS):
        if (system.folder / name).is_dir():
            skip = shutil.ignore_patterns("transformer")
            shutil.copytree(system.folder / name, fresh / name, ignore=skip)
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)


def _write_captioner_config(system: System, folder: pathlib.Path, dtype: np.dtype) -> None:
    """Writes the captioner's config.json with the stored precision, and copies its generation_config.json."""
    source = config_folder(system.folder)
    if (source / "generation_config.json").exists():
        shutil.copy2(source / "generation_config.json", folder)
    write_json(folder / "config.json", with_dtype(read_json(source), dtype.name), indent=1)


def _export_transformer(system: System, parts: Mapping, folder: pathlib.Path, dtype: np.dtype) -> None:
    config, stem = system.model.transformer, "diffusion_pytorch_model"
    weights = parts.get("transformer_policy", parts["transformer"])
    write_tensors(folder / "dit", published_tensors(weights, sd3_weights.transformer_rules(config), dtype), stem=stem)
    write_json(folder / "dit" / "config.json", config.published(), indent=1)
    if "transformer_lora" in parts:
        adapter = parts["transformer_lora"]
        write_tensors(folder / "dit_lora", sd3_weights.adapter_tensors(config, adapter, dtype), stem="adapter_model")
        write_json(folder / "dit_lora" / "adapter_config.json", sd3_weights.adapter_config(config, adapter), indent=1)
