"""Adapters as files: their factors as items, merged or under the names of peft and the release."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from uae_jax.hf.adapters import DIFFUSERS_ALIASES, AdapterFiles, by_ending, peft_settings, survey_adapter
from uae_jax.hf.items import Item, stored_items
from uae_jax.hf.safetensors import TensorFolder
from uae_jax.models.janus import weights as janus_weights
from uae_jax.models.qwen2_5_vl import weights as qwen_weights
from uae_jax.stages.folders.parts import Folder, Part, part_config, part_table, part_tensors

PEFT_PREFIX = "base_model.model."  # peft's prefix for the names of a wrapped model
# prefixes of a captioner's modules in its text model, Qwen's and Janus's
IN_TEXT_MODEL = ("model.layers.", "model.language_model.layers.")
KEPT = ("lora_dropout", "base_model_name_or_path", "revision")


def survey(part: Part, folder: Folder) -> AdapterFiles:
    """The contents of an adapter's folder, matched to the base model if its configuration can be read.

    Raises:
      FileNotFoundError: no weights.
      ValueError: no adapter tensor, or an adapter of another kind.
    """
    unified = folder.part("janus")
    base = unified or (folder.captioner if part.name == "llm_lora" else folder.transformer)
    try:
        config = None if base is None else part_config(base)
    except (ValueError, FileNotFoundError):
        config = None  # the row of the base model has the error
    if unified:
        return janus_weights.survey_adapters(part.folder, config)
    if part.name == "llm_lora":
        return qwen_weights.survey_adapters(part.folder, config)
    stored = TensorFolder(part.folder)
    table = None if base is None or config is None else part_table(base, config, part_tensors(base))
    rules, abstract = (None, {}) if table is None else (table.rules, table.abstract)
    return survey_adapter(stored, rules, abstract, aliases=DIFFUSERS_ALIASES)


def in_text_model(files: AdapterFiles) -> bool:
    """Whether a captioner's adapter adapts its text model alone, as in the release."""
    return all(module.startswith(IN_TEXT_MODEL) for module in files.pairs)


def peft_name(module: str, layout: str) -> str:
    """A module's name in the model that peft wraps.

    Args:
      module: name in the table of the base model.
      layout: `text`, the text model alone as in the release; `whole`, Qwen2_5_VLForConditionalGeneration;
        `transformer`, the decoder's.
    """
    if layout == "text":
        return module.removeprefix("model.")
    if layout == "whole":
        return re.sub(r"^visual\.", "model.visual.", re.sub(r"^model\.", "model.language_model.", module))
    return module


def adapter_items(files: AdapterFiles, layout: str, prefix: str = PEFT_PREFIX, suffix: str = "") -> list[Item]:
    """The adapter's tensors under peft's names: prefix, module, `lora_A` or `lora_B`, suffix (`.default` in memory)."""
    return stored_items(
        files.folder,
        (
            (f"{prefix}{peft_name(module, layout)}.lora_{side}{suffix}.weight", pair[side])
            for module, pair in sorted(files.pairs.items(), key=lambda entry: _natural(entry[0]))
            for side in "AB"
        ),
    )


def _natural(name: str) -> list[int | str]:
    """A key that sorts layer 10 after layer 9."""
    return [int(piece) if piece.isdigit() else piece for piece in re.split(r"(\d+)", name)]


def merged(items: list[Item], files: AdapterFiles, dtype: np.dtype | None = None) -> list[Item]:
    """The base model's items with `alpha / rank * B @ A` added to each adapted weight in float32, rounded once.

    Args:
      items: of the base model, under the published names.
      files: the adapter.
      dtype: of the sums; None keeps the base model's.
    """
    pairs, ranks = {f"{module}.weight": pair for module, pair in files.pairs.items()}, files.ranks

    def added(item: Item, pair: Mapping[str, str]) -> np.ndarray:
        a, b = (files.folder.read(pair[side]).astype(np.float32) for side in "AB")
        scale = np.float32(files.alpha / ranks[item.name.removesuffix(".weight")])
        return (item.read().astype(np.float32) + scale * (b @ a)).astype(dtype or item.dtype)

    return [
        dataclasses.replace(
            item,
            dtype=np.dtype(dtype or item.dtype),
            read=lambda item=item: added(item, pairs[item.name]),
            source=f"{item.source} with {files.folder.path}",
        )
        if item.name in pairs
        else item
        for item in items
    ]


def peft_config(files: AdapterFiles, layout: str, base: str, wrapped: tuple[str, str] = ("", "")) -> dict[str, Any]:
    """The contents of adapter_config.json.

    Args:
      files: the adapter.
      layout: see `peft_name`.
      base: name or folder of the base model.
      wrapped: class of a transformer that peft wraps, and its module.
    """
    ranks = {peft_name(module, layout): rank for module, rank in files.ranks.items()}
    present = [
        peft_name(module, layout) for module in files.modules if layout != "text" or module.startswith(IN_TEXT_MODEL)
    ]
    content = peft_settings(by_ending(ranks, present), files.alpha)
    content |= {name: files.settings[name] for name in KEPT if files.settings.get(name) is not None}
    if files.settings.get("use_rslora"):
        content |= {"use_rslora": True, "lora_alpha": files.settings["lora_alpha"]}
    if layout == "whole":
        content["task_type"] = "CAUSAL_LM"
    if layout == "transformer":
        content["auto_mapping"] = dict(zip(("base_model_class", "parent_library"), wrapped))
    return content | {"base_model_name_or_path": content["base_model_name_or_path"] or base}


def wrapped_items(base: list[Item], files: AdapterFiles, tied: bool) -> list[Item]:
    """Base model and adapter in the release's `llm_lora` layout: the complete model, its text model wrapped by peft.

    Args:
      base: the captioner's items under the published names.
      files: the adapter.
      tied: whether the head is the embedding table, which the release's state stores twice.

    Raises:
      ValueError: the adapter adapts more than the text model.
    """
    if not in_text_model(files):
        raise ValueError(
            f"{files.folder.path} adapts more than the text model, which the wrapped layout cannot hold; choose "
            "--llm-lora peft or --merge-adapters"
        )
    items = []
    for item in base:
        name = item.name
        if name.startswith("model."):
            module, _, last = name.rpartition(".")
            inner = peft_name(f"{module}.base_layer.{last}" if module in files.pairs else name, "text")
            name = f"model.{PEFT_PREFIX}{inner}"
        items.append(dataclasses.replace(item, name=name))
        if tied and item.name == "model.embed_tokens.weight":
            items.append(dataclasses.replace(item, name="lm_head.weight"))
    return items + adapter_items(files, "text", f"model.{PEFT_PREFIX}", ".default")
