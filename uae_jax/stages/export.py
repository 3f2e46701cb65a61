"""Writes a model in memory as a folder in the official layout, which `stages.weights` reads."""

import pathlib
from collections.abc import Mapping

import jax
import numpy as np
from numpy.typing import DTypeLike

from uae_jax import sharding
from uae_jax.files.json_files import read_json, write_json
from uae_jax.hf.adapters import adapter_rules, settings_of
from uae_jax.hf.items import Item, published_items, write_items
from uae_jax.hf.rules import Rule
from uae_jax.models.language import weights as lm_weights
from uae_jax.models.parts import SCALES
from uae_jax.models.qwen2_5_vl import weights as qwen_weights
from uae_jax.stages.decoders import FOLDER as DECODER
from uae_jax.stages.folders.files import begin, copy_file, copy_folder_again, take_place
from uae_jax.stages.folders.parts import with_dtype
from uae_jax.stages.weights import ENCODERS, REFERENCE, System, config_folder

STEMS = {name: "diffusion_pytorch_model" for name in ("dit", f"{DECODER}/transformer")}
STEMS |= {name: "adapter_model" for name in ("llm_lora", "dit_lora")}


def export_system(system: System, parts: Mapping, folder: pathlib.Path, dtype: DTypeLike = np.float32) -> None:
    """Writes a model in the official layout; frozen parts are copied from the system's folder.

    All processes of a run call it together. Tensors are gathered one at a time, and process 0 alone keeps and writes
    them: its host holds one tensor, and no device more than one besides the model.

    Args:
      system: the description, and the folder of the unchanged parts.
      parts: parameters to write.
      folder: replaced completely, once everything is written; a kill before leaves the old one whole.
      dtype: stored precision of the trained parts.
    """
    dtype = np.dtype(dtype)
    outputs = _outputs(system, parts, dtype)
    if jax.process_index():
        for items in outputs.values():
            for item in items:
                item.read()
        return
    fresh = begin(folder)
    for name, items in outputs.items():
        write_items(fresh / name, items, stem=STEMS.get(name, "model"), finite=False)
    for name in {"llm", REFERENCE} & set(outputs):
        _write_captioner_config(system, fresh / name, dtype)
    _write_other_configs(system, parts, fresh)
    for name in ("llm_processor", "SD3", DECODER, *ENCODERS):
        if (system.folder / name).is_dir():
            left = "" if _as_read(parts) else "transformer"
            copy_folder_again(system.folder / name, fresh / name, folder / name, skip=left)
    take_place(fresh, folder)


def written_parts(parts: Mapping) -> list[str]:
    """Names of the parts that an export writes, once for each time; the others are copied as files."""
    beside = [name for name in ("vision", "projector") if name in parts]
    names = ["language", *beside]
    if "language_policy" in parts:
        names += ["language_policy", *beside]
    names += [name for name in ("language_lora", "transformer_lora") if name in parts]
    whole = "transformer_policy" if "transformer_policy" in parts else "transformer"
    return names if _as_read(parts) else [*names, whole]


def _transformer_folder(system: System) -> str:
    """Where the transformer is written: a decoder with its own text encoder stays a complete pipeline."""
    return f"{DECODER}/transformer" if (system.folder / DECODER).is_dir() else "dit"


def _as_read(parts: Mapping) -> bool:
    """Whether the transformer is copied from the system's folder: what is in memory are integers of 8 bits."""
    return f"transformer{SCALES}" in parts


def _outputs(system: System, parts: Mapping, dtype: np.dtype) -> dict[str, list[Item]]:
    """The tensors of each folder of weights, in the order of writing."""
    captioner, rules = system.model.captioner, system.model.decoder.transformer_rules()

    def items(params: Mapping, rules: list[Rule]) -> list[Item]:
        return published_items(params, rules, dtype, sharding.first_process_value)

    # the trained copy writes captions, and the reference encodes them for the decoder
    languages = {"llm": parts["language"]}
    if "language_policy" in parts:
        languages = {"llm": parts["language_policy"], REFERENCE: parts["language"]}
    table, beside = qwen_weights.rules(captioner, projector="projector" in parts), {"vision", "projector"} & set(parts)
    outputs = {
        name: items({"language": language} | {part: parts[part] for part in sorted(beside)}, table)
        for name, language in languages.items()
    }
    if adapter := parts.get("language_lora"):
        outputs["llm_lora"] = items(adapter, lm_weights.rules_of_adapter(captioner, adapter))
    weights = parts.get("transformer_policy", parts["transformer"])
    if not _as_read(parts):
        outputs[_transformer_folder(system)] = items(weights, rules)
    if adapter := parts.get("transformer_lora"):
        outputs["dit_lora"] = items(adapter, adapter_rules(rules, adapter))
    return outputs


def _write_captioner_config(system: System, folder: pathlib.Path, dtype: np.dtype) -> None:
    """Writes the captioner's config.json with the stored precision, and copies its generation_config.json."""
    source = config_folder(system.folder)
    if (source / "generation_config.json").exists():
        copy_file(source / "generation_config.json", folder)
    write_json(folder / "config.json", with_dtype(read_json(source), dtype.name), indent=1)


def _write_other_configs(system: System, parts: Mapping, folder: pathlib.Path) -> None:
    """The settings of the transformer and of the adapters."""
    captioner, decoder = system.model.captioner, system.model.decoder
    if not _as_read(parts):
        write_json(folder / _transformer_folder(system) / "config.json", decoder.transformer.published(), indent=1)
    if adapter := parts.get("language_lora"):
        content = lm_weights.adapter_config(captioner, adapter)
        write_json(folder / "llm_lora" / "adapter_config.json", content, indent=1)
    if adapter := parts.get("transformer_lora"):
        table = decoder.transformer_rules()
        content = settings_of(adapter, adapter_rules(table, adapter), table, decoder.transformer.lora_alpha)
        write_json(folder / "dit_lora" / "adapter_config.json", content, indent=1)
