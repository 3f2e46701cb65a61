"""Published tensors of a captioner's language model and of its adapters, whatever stands before their names."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from uae_jax import trees
from uae_jax.hf.adapters import ALPHA, Adapter, peft_settings
from uae_jax.hf.rules import Rule, canonical, published_tensors
from uae_jax.hf.safetensors import Tensors
from uae_jax.models.language.config import CaptionerConfig, TextConfig
from uae_jax.models.precision import numpy_dtype

MODULES = {
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/output": "self_attn.o_proj",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
}
WITH_BIAS = ("attention/query", "attention/key", "attention/value")
HEAD = "lm_head.weight"
# names that peft makes in a wrapped model
PEFT_ALIASES = ((r"(?<![^.])base_model\.model\.", ""), (r"\.base_layer\.", "."))
ADAPTER_TENSOR = rf".*\.lora_[AB](\.[^.]+)?\.weight|{ALPHA}"
ADAPTER_PREFIX = "base_model.model."  # peft around the text model alone, as in UAE's release


def language_rules(config: TextConfig, prefix: str) -> list[Rule]:
    """The table of the language model; names of ours start with `language/`.

    Args:
      config: sizes.
      prefix: what stands before `layers.N`, such as `model.`.
    """
    table = [
        Rule("language/embedding/table", f"{prefix}embed_tokens.weight"),
        Rule("language/final_norm/scale", f"{prefix}norm.weight"),
        *layer_rules(config, "language/layers", f"{prefix}layers.{{}}", tuple(range(config.layers))),
    ]
    if not config.tied:
        table.append(Rule("language/head/kernel", HEAD, "dense"))
    return table


def layer_rules(config: TextConfig, ours: str, theirs: str, layers: tuple[int, ...]) -> list[Rule]:
    """The table of a stack of layers.

    Args:
      config: sizes.
      ours: name of the stack.
      theirs: name of a layer, with `{}` for its number.
      layers: the numbers.
    """
    norms = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    if config.qk_norm:
        norms |= {"attention/query_norm": "self_attn.q_norm", "attention/key_norm": "self_attn.k_norm"}
    table = [
        Rule(f"{ours}/{name}/scale", f"{theirs}.{published}.weight", layers=layers) for name, published in norms.items()
    ]
    for name, published in MODULES.items():
        table.append(Rule(f"{ours}/{name}/kernel", f"{theirs}.{published}.weight", "dense", layers))
        if config.qkv_bias and name in WITH_BIAS:
            table.append(Rule(f"{ours}/{name}/bias", f"{theirs}.{published}.bias", layers=layers))
    return table


def check_head(
    folder: Tensors, config: CaptionerConfig, aliases: Sequence[tuple[str, str]], prefix: str = "model."
) -> None:
    """Refuses a stored head that differs from the embedding table although the config ties the two.

    PyTorch's files and the release's hold a copy of the table as the head, which is passed over.

    Args:
      folder: the tensors.
      config: of the captioner.
      aliases: see `hf.rules.load_params`.
      prefix: see `language_rules`.

    Raises:
      ValueError: such a head; using the table in its place would be another model.
    """
    stored = {canonical(name, aliases): name for name in folder.names()}
    head, table = stored.get(HEAD), stored.get(f"{prefix}embed_tokens.weight")
    if not config.text.tied or head is None or table is None:
        return
    same = folder.shape(head) == folder.shape(table)
    if same:
        ours, theirs = folder.read(head), folder.read(table)
        rows = range(0, len(ours), 4096)  # a part at a time: tables of the published models have a gigabyte
        same = all(np.array_equal(ours[at : at + 4096], theirs[at : at + 4096], equal_nan=False) for at in rows)
    if not same:
        raise ValueError(
            f"{folder.file(head)} holds {head} with other numbers than {table}, but tie_word_embeddings is true; set "
            "it to false in config.json (also in text_config) if the head is its own, or delete the tensor"
        )


def adapter_rules(layers: int, modules: tuple[str, ...] = tuple(MODULES), prefix: str = ADAPTER_PREFIX) -> list[Rule]:
    """The table of an adapter in peft's names: `lora_A` is `a` transposed, `lora_B` is `b` transposed.

    Args:
      layers: number of layers.
      modules: adapted modules, keys of `MODULES`.
      prefix: what stands before `layers.N`: `base_model.model.model.language_model.` for peft around the complete
        model.
    """
    numbers = tuple(range(layers))
    return [
        Rule(f"layers/{ours}/{leaf}", f"{prefix}layers.{{}}.{MODULES[ours]}.{theirs}.weight", "dense", numbers)
        for ours in modules
        for leaf, theirs in (("a", "lora_A"), ("b", "lora_B"))
    ]


def adapter_tensors(
    config: CaptionerConfig, adapter: Mapping, prefix: str = ADAPTER_PREFIX, dtype: DTypeLike | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Names and arrays of an adapter as peft saves it; the inverse of `load_adapter`."""
    return published_tensors(adapter, rules_of_adapter(config, adapter, prefix), numpy_dtype(dtype))


def rules_of_adapter(config: CaptionerConfig, adapter: Mapping, prefix: str = ADAPTER_PREFIX) -> list[Rule]:
    """The table of the modules that an adapter has."""
    leaves = trees.flatten(adapter)
    modules = tuple(ours for ours in MODULES if f"layers/{ours}/a" in leaves)
    return adapter_rules(config.text.layers, modules, prefix)


def adapter_config(config: CaptionerConfig, adapter: Mapping) -> dict:
    """The contents of peft's `adapter_config.json` for an adapter."""
    leaves = trees.flatten(adapter)
    ranks = {
        theirs.split(".")[-1]: int(leaves[f"layers/{ours}/a"].shape[-1])
        for ours, theirs in MODULES.items()
        if f"layers/{ours}/a" in leaves
    }
    return peft_settings(ranks, config.text.lora_alpha)


def of_language_alone(adapter: Adapter, source: Any) -> dict[str, Any]:
    """The tree of an adapter, which may stay apart from the base if it is of the language model's layers alone.

    Args:
      adapter: of the complete model.
      source: folder of the adapter, for the message.

    Raises:
      ValueError: it adapts another part, or the head.
    """
    if set(adapter.tree) != {"language"} or "head" in adapter.tree["language"]:
        raise ValueError(
            f"{source} adapts more than the text model's layers; merge it into the base (model.merge_adapters=True, or "
            "`convert export --merge-adapters`)"
        )
    return adapter.tree["language"]
