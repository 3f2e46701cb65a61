"""Adapters as files: modules and their pairs of tensors under canonical names, merged or written for peft."""

import dataclasses
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from uae_jax.hf.inventory import dtype_name
from uae_jax.hf.safetensors import TensorFolder
from uae_jax.hf.sharded import Item
from uae_jax.models.encoders.config import read_json
from uae_jax.stages.folders.parts import ADAPTERS, Part

# what stands before `layers.N` or `transformer_blocks.N` for peft around the text model, the whole model, the transformer
TEXT_MODEL, WHOLE_MODEL, TRANSFORMER = "base_model.model.", "base_model.model.model.language_model.", "base_model.model."
UNSUPPORTED = ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save")


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A LoRA adapter in its files.

    Attributes:
      folder: its tensors.
      modules: canonical module name, such as `layers.0.mlp.up_proj`, to the names of its `A` `[r, in]` and `B` `[out, r]`.
      config: of adapter_config.json; empty where there is none, as in the release's wrapped folder.
    """

    folder: TensorFolder
    modules: dict[str, dict[str, str]]
    config: dict[str, Any]

    @property
    def rank(self) -> int:
        """Of the first module."""
        return self.folder.shape(next(pair[side] for pair in self.modules.values() for side in pair if side == "A"))[0]

    @property
    def alpha(self) -> float:
        """Numerator of the scale; without a configuration twice the rank, as in the release (64 over 32)."""
        return float(self.config.get("lora_alpha", 2 * self.rank))

    @property
    def scale(self) -> float:
        """What the product of `B` and `A` is multiplied with."""
        return self.alpha / (math.sqrt(self.rank) if self.config.get("use_rslora") else self.rank)


def read_adapter(part: Part) -> Adapter:
    """The adapter of a peft folder, of diffusers' own file, or of the release's wrapped state.

    Raises:
      FileNotFoundError: no weights.
      ValueError: no adapter tensor for this model in it.
    """
    folder = TensorFolder(part.folder)
    pattern = re.compile(rf"(?:.*\.)?({ADAPTERS[part.name]}\.\d+\..*)\.lora_([AB])(?:\.\w+)?\.weight")
    modules: dict[str, dict[str, str]] = {}
    for name in sorted(folder.names()):
        match = pattern.fullmatch(name)
        if match:
            modules.setdefault(match.group(1), {})[match.group(2)] = name
    if not any("A" in pair for pair in modules.values()):
        raise ValueError(f"{part.folder} has no lora_A tensor of {ADAPTERS[part.name]}.N; {part.name} needs the adapter of that model")
    config = read_json(part.folder, "adapter_config.json") if (part.folder / "adapter_config.json").is_file() else {}
    return Adapter(folder, modules, config)


def check_plain(part: Part, adapter: Adapter) -> None:
    """Raises ValueError for kinds of adapters other than LoRA with one rank and scale for all modules."""
    for field in UNSUPPORTED:
        if adapter.config.get(field):
            raise ValueError(f"{part.folder / 'adapter_config.json'} has {field}={adapter.config[field]!r}; merge it with peft first")


def adapter_items(adapter: Adapter, prefix: str, suffix: str = "") -> list[Item]:
    """The adapter's tensors under peft's names: prefix, module, `lora_A` or `lora_B`, suffix (`.default` in memory)."""
    stored = adapter.folder
    return [
        Item(f"{prefix}{module}.lora_{side}{suffix}.weight", stored.shape(pair[side]), np.dtype(dtype_name(stored.dtype(pair[side]))),
             lambda name=pair[side]: stored.read(name), f"{stored.files[pair[side]]}: {pair[side]}")
        for module, pair in sorted(adapter.modules.items(), key=lambda entry: _natural(entry[0])) for side in "AB"]


def _natural(name: str) -> list:
    """Sorts layer 10 after layer 9."""
    return [int(piece) if piece.isdigit() else piece for piece in re.split(r"(\d+)", name)]


def merged(items: list[Item], adapter: Adapter, prefix: str = "", dtype: np.dtype | None = None) -> list[Item]:
    """The base's items with `scale * B @ A` added to each adapted weight in float32, rounded once.

    Args:
      items: of the base, in the published names.
      adapter: to merge.
      prefix: what stands before the module names in the base, `model.` for the captioner.
      dtype: of the sums; None takes the base's.

    Raises:
      ValueError: a module of the adapter is not in the base.
    """
    pairs = {f"{prefix}{module}.weight": pair for module, pair in adapter.modules.items()}
    absent = sorted(set(pairs) - {item.name for item in items})
    if absent:
        raise ValueError(f"{adapter.folder.path} adapts {absent[0]}, which the base model has not; give the adapter of this model")

    def added(item: Item, pair: Mapping[str, str]) -> np.ndarray:
        a, b = (adapter.folder.read(pair[side]).astype(np.float32) for side in "AB")
        return (item.read().astype(np.float32) + np.float32(adapter.scale) * (b @ a)).astype(dtype or item.dtype)

    return [
        dataclasses.replace(
            item, dtype=np.dtype(dtype or item.dtype), read=lambda item=item: added(item, pairs[item.name]),
            source=f"{item.source} with {adapter.folder.path}")
        if item.name in pairs else item for item in items]


def peft_config(adapter: Adapter, layout: str, base: str) -> dict[str, Any]:
    """The contents of adapter_config.json.

    Args:
      adapter: whose settings it keeps.
      layout: `text`, around the text model alone as in the release; `whole`, around Qwen2_5_VLForConditionalGeneration;
        `transformer`, around SD3Transformer2DModel.
      base: name or folder of the base model.
    """
    modules = sorted({re.sub(r"^\w+\.\d+\.", "", module) for module in adapter.modules})
    own = {
        "text": dict(target_modules=[name.split(".")[-1] for name in modules], task_type=None),
        # the image encoder has modules of the same names, which are not adapted
        "whole": dict(target_modules=rf".*language_model\.layers\.\d+\.({'|'.join(map(re.escape, modules))})", task_type="CAUSAL_LM"),
        "transformer": dict(target_modules=modules, task_type=None, auto_mapping={
            "base_model_class": "SD3Transformer2DModel", "parent_library": "diffusers.models.transformers.transformer_sd3"})}
    kept = {name: value for name, value in adapter.config.items() if name not in ("auto_mapping", "target_modules", "task_type")}
    plain = {"peft_type": "LORA", "r": adapter.rank, "lora_alpha": adapter.alpha, "lora_dropout": 0.0, "bias": "none",
             "fan_in_fan_out": False, "inference_mode": True}
    return plain | kept | own[layout] | {"base_model_name_or_path": kept.get("base_model_name_or_path") or base}


def wrapped_items(base: list[Item], adapter: Adapter, tied: bool) -> list[Item]:
    """Base and adapter in the release's `llm_lora` layout: the whole model, its text model wrapped by peft.

    Args:
      base: the captioner's items in the published names.
      adapter: of its text model.
      tied: whether the head is the embedding table, which the release's state holds a second time.
    """
    items = []
    for item in base:
        name = item.name
        if name.startswith("model."):
            inner = name.removeprefix("model.")
            module, _, last = inner.rpartition(".")
            name = f"model.base_model.model.{f'{module}.base_layer.{last}' if module in adapter.modules else inner}"
        items.append(dataclasses.replace(item, name=name))
        if tied and item.name == "model.embed_tokens.weight":
            items.append(dataclasses.replace(item, name="lm_head.weight"))
    return items + adapter_items(adapter, f"model.{TEXT_MODEL}", ".default")


def is_wrapped(folder: pathlib.Path) -> bool:
    """Whether an adapter's folder holds the base model too, as the release's `llm_lora` does."""
    return any(".base_layer." in name for name in TensorFolder(folder).names())
