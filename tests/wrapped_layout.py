"""The layout of the released `llm_lora` folder, which the package reads and `convert export` writes from stored
files.
"""

import re
from collections.abc import Iterator, Mapping

import numpy as np

from uae_jax import trees
from uae_jax.models.language import weights as lm_weights
from uae_jax.models.qwen2_5_vl import weights
from uae_jax.models.qwen2_5_vl.config import Qwen2_5VLConfig


def wrapped_tensors(config: Qwen2_5VLConfig, params: Mapping, adapter: Mapping) -> Iterator[tuple[str, np.ndarray]]:
    """Names and arrays of base and adapter in the release's `llm_lora` layout (text model wrapped by peft)."""
    leaves = trees.flatten(adapter)
    adapted = {f"{lm_weights.MODULES[ours]}." for ours in lm_weights.MODULES if f"layers/{ours}/a" in leaves}
    for name, tensor in weights.tensors(config, params):
        if name.startswith("model."):
            name = "model.base_model.model." + name.removeprefix("model.")
            if any(module in name for module in adapted):
                stem, _, last = name.rpartition(".")
                name = f"{stem}.base_layer.{last}"
        yield name, tensor
    if config.text.tied:
        yield "lm_head.weight", np.asarray(params["language"]["embedding"]["table"])
    for name, tensor in lm_weights.adapter_tensors(config, adapter):
        yield "model." + re.sub(r"\.(lora_[AB])\.weight$", r".\1.default.weight", name), tensor
