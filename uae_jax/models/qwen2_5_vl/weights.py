"""Published tensors of Qwen2.5-VL, its projector and its adapters, to and from our parameters.

Canonical names are those of the published files (`model.layers...`, `visual...`); the names that transformers 5 has in
memory, and those of the release's peft-wrapped `llm_lora` folder, are read through aliases.
"""

import json
import pathlib
import re
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from uae_jax import trees
from uae_jax.hf.rules import Placement, Rule, load_params, published_tensors
from uae_jax.hf.safetensors import TensorFolder
from uae_jax.models.qwen2_5_vl import model
from uae_jax.models.qwen2_5_vl.config import Qwen2_5VLConfig, TextConfig, VisionConfig, from_folder

MODULES = {
    "attention/query": "self_attn.q_proj", "attention/key": "self_attn.k_proj", "attention/value": "self_attn.v_proj",
    "attention/output": "self_attn.o_proj", "mlp/gate": "mlp.gate_proj", "mlp/up": "mlp.up_proj", "mlp/down": "mlp.down_proj"}
WITH_BIAS = ("attention/query", "attention/key", "attention/value")
ALIASES = (
    (r"^model\.language_model\.", "model."), (r"^model\.visual\.", "visual."),
    (r"^model\.base_model\.model\.", "model."), (r"\.base_layer\.", "."))
BUFFERS = r".*\.(rotary_emb|rotary_pos_emb)\..*inv_freq"
ADAPTER_TENSOR = r".*\.lora_[AB](\.default)?\.weight"
ADAPTER_PREFIX = "base_model.model."  # peft around the text model alone, as in the release
ADAPTER_ALIASES = (
    (r"^(model\.)?base_model\.model\.(model\.)?(language_model\.)?layers\.", "base_model.model.layers."),
    (r"\.(lora_[AB])\.default\.weight$", r".\1.weight"))


def language_rules(config: TextConfig) -> list[Rule]:
    """The table of the language model; names of ours start with `language/`."""
    layers = tuple(range(config.layers))
    table = [
        Rule("language/embedding/table", "model.embed_tokens.weight"), Rule("language/final_norm/scale", "model.norm.weight"),
        Rule("language/layers/attention_norm/scale", "model.layers.{}.input_layernorm.weight", layers=layers),
        Rule("language/layers/mlp_norm/scale", "model.layers.{}.post_attention_layernorm.weight", layers=layers)]
    for ours, theirs in MODULES.items():
        table.append(Rule(f"language/layers/{ours}/kernel", f"model.layers.{{}}.{theirs}.weight", "dense", layers))
        if ours in WITH_BIAS:
            table.append(Rule(f"language/layers/{ours}/bias", f"model.layers.{{}}.{theirs}.bias", layers=layers))
    if not config.tied:
        table.append(Rule("language/head/kernel", "lm_head.weight", "dense"))
    return table


def vision_rules(config: VisionConfig) -> list[Rule]:
    """The table of the image encoder; names of ours start with `vision/`."""
    layers, size = tuple(range(config.depth)), config.patch_size
    shape = (config.width, config.channels, config.temporal_patch_size, size, size)
    table = [
        Rule("vision/patch_embed/kernel", "visual.patch_embed.proj.weight", "patch", torch_shape=shape),
        Rule("vision/merger/norm/scale", "visual.merger.ln_q.weight")]
    table += [Rule(f"vision/blocks/{ours}/scale", f"visual.blocks.{{}}.{theirs}.weight", layers=layers)
              for ours, theirs in (("attention_norm", "norm1"), ("mlp_norm", "norm2"))]
    blocks = {"qkv": "attn.qkv", "output": "attn.proj", "mlp/gate": "mlp.gate_proj", "mlp/up": "mlp.up_proj",
              "mlp/down": "mlp.down_proj"}
    for ours, theirs in blocks.items():
        table.append(Rule(f"vision/blocks/{ours}/kernel", f"visual.blocks.{{}}.{theirs}.weight", "dense", layers))
        table.append(Rule(f"vision/blocks/{ours}/bias", f"visual.blocks.{{}}.{theirs}.bias", layers=layers))
    return table + _affine("vision/merger/first", "visual.merger.mlp.0") + _affine("vision/merger/second", "visual.merger.mlp.2")


def projector_rules() -> list[Rule]:
    """The table of the projector; names of ours start with `projector/`."""
    return _affine("projector/first", "projector.0") + _affine("projector/second", "projector.2")


def _affine(ours: str, theirs: str) -> list[Rule]:
    return [Rule(f"{ours}/kernel", f"{theirs}.weight", "dense"), Rule(f"{ours}/bias", f"{theirs}.bias")]


def rules(config: Qwen2_5VLConfig, projector: bool) -> list[Rule]:
    """The whole table, with or without the projector."""
    return vision_rules(config.vision) + language_rules(config.text) + (projector_rules() if projector else [])


def load(
    path: str | pathlib.Path, config: Qwen2_5VLConfig | None = None, dtype: np.dtype | None = None,
    placement: Placement | None = None) -> tuple[Qwen2_5VLConfig, dict]:
    """Reads a model folder of either generation, or the release's peft-wrapped one (without its adapter).

    Args:
      path: folder with safetensors files, and `config.json` unless `config` is given.
      config: sizes, when known.
      dtype: precision to store the parameters in; None keeps that of the files.
      placement: where the parameters go, see `hf.rules.load_params`.

    Returns:
      The config, and parameters `{"vision", "language"}` with `"projector"` if the folder has one.

    Raises:
      FileNotFoundError: no such folder, config or weights.
      ValueError: config and tensors do not fit, both ways; all are named.
    """
    config = from_folder(path) if config is None else config
    folder = TensorFolder(path)
    abstract = model.abstract_params(config)
    projector = _abstract_projector(folder, config)
    if projector is not None:
        abstract = {**abstract, "projector": projector}
    ignore = "|".join((BUFFERS, ADAPTER_TENSOR, *((r"lm_head\.weight",) if config.text.tied else ())))
    table = rules(config, projector is not None)
    return config, load_params(folder, table, abstract, aliases=ALIASES, ignore=ignore, dtype=dtype, placement=placement)


def _abstract_projector(folder: TensorFolder, config: Qwen2_5VLConfig) -> dict | None:
    if not {"projector.0.weight", "projector.2.weight"} <= folder.names():
        return None
    hidden, features = (folder.shape(f"projector.{index}.weight")[0] for index in (0, 2))
    return jax.eval_shape(lambda: model.init_projector(jax.random.key(0), config.text.width, hidden, features))


def tensors(config: Qwen2_5VLConfig, params: Mapping, dtype: np.dtype | None = None) -> Iterator[tuple[str, np.ndarray]]:
    """Published names and arrays of `{"vision", "language"}`, and `"projector"` if there; the inverse of `load`."""
    parts = {name: params[name] for name in ("vision", "language", "projector") if name in params}
    return published_tensors(parts, rules(config, "projector" in parts), dtype)


def adapter_rules(layers: int, modules: tuple[str, ...] = tuple(MODULES), prefix: str = ADAPTER_PREFIX) -> list[Rule]:
    """The table of an adapter in peft's names: `lora_A` is `a` transposed, `lora_B` is `b` transposed.

    Args:
      layers: number of layers.
      modules: adapted modules, keys of `MODULES`.
      prefix: what stands before `layers.N`; `base_model.model.model.language_model.` for peft around the whole model.
    """
    numbers = tuple(range(layers))
    return [Rule(f"layers/{ours}/{leaf}", f"{prefix}layers.{{}}.{MODULES[ours]}.{theirs}.weight", "dense", numbers)
            for ours in modules for leaf, theirs in (("a", "lora_A"), ("b", "lora_B"))]


def load_adapter(
    path: str | pathlib.Path, config: Qwen2_5VLConfig, dtype: np.dtype | None = None, placement: Placement | None = None) -> dict:
    """Reads the language model's adapter from a peft folder, or from the release's `llm_lora` folder.

    Args:
      path: folder with safetensors files.
      config: sizes of the base model; its `lora_alpha` must be that of `adapter_config.json`, where there is one.
      dtype: precision to store the adapter in; None keeps that of the files.
      placement: where the adapter goes, see `hf.rules.load_params`.

    Returns:
      The adapter tree; its rank is that of the tensors.

    Raises:
      FileNotFoundError: no such folder or weights.
      ValueError: no adapter tensor, tensors that do not fit the model, or another `lora_alpha`.
    """
    folder = TensorFolder(path)
    _check_alpha(pathlib.Path(path) / "adapter_config.json", config.text.lora_alpha)
    found = {_canonical(name): name for name in folder.names() if re.fullmatch(ADAPTER_TENSOR, name)}
    first = {ours: found.get(f"{ADAPTER_PREFIX}layers.0.{theirs}.lora_A.weight") for ours, theirs in MODULES.items()}
    modules = tuple(ours for ours, name in first.items() if name is not None)
    if not modules:
        raise ValueError(f"{path} holds no adapter of the language model; give a peft folder or merge it before")
    kernels = trees.flatten(model.abstract_params(config)["language"])
    abstract = {}
    for ours in modules:
        rank = folder.shape(first[ours])[0]
        layers, fan_in, fan_out = kernels[f"layers/{ours}/kernel"].shape
        abstract[f"layers/{ours}/a"] = jax.ShapeDtypeStruct((layers, fan_in, rank), jnp.float32)
        abstract[f"layers/{ours}/b"] = jax.ShapeDtypeStruct((layers, rank, fan_out), jnp.float32)
    others = r"(?!.*\.lora_).*"  # the base model's own tensors in a wrapped folder
    return load_params(folder, adapter_rules(config.text.layers, modules), trees.unflatten(abstract),
                       aliases=ADAPTER_ALIASES, ignore=others, dtype=dtype, placement=placement)


def _canonical(name: str) -> str:
    for pattern, replacement in ADAPTER_ALIASES:
        name = re.sub(pattern, replacement, name)
    return name


def _check_alpha(file: pathlib.Path, alpha: float) -> None:
    if not file.exists():
        return
    stored = json.loads(file.read_text())
    if stored.get("lora_alpha") != alpha:
        raise ValueError(f"{file} has lora_alpha {stored.get('lora_alpha')}, the model is configured with {alpha}; make them equal")
    for field in ("use_rslora", "use_dora"):
        if stored.get(field):
            raise ValueError(f"{file} has {field}, which is not supported; export the adapter without it")


def adapter_tensors(
    config: Qwen2_5VLConfig, adapter: Mapping, prefix: str = ADAPTER_PREFIX, dtype: np.dtype | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Names and arrays of an adapter as peft saves it; the inverse of `load_adapter`."""
    leaves = trees.flatten(adapter)
    modules = tuple(ours for ours in MODULES if f"layers/{ours}/a" in leaves)
    return published_tensors(adapter, adapter_rules(config.text.layers, modules, prefix), dtype)


def adapter_config(config: Qwen2_5VLConfig, adapter: Mapping) -> dict:
    """The contents of peft's `adapter_config.json` for an adapter."""
    leaves = trees.flatten(adapter)
    modules = [ours for ours in MODULES if f"layers/{ours}/a" in leaves]
    return {
        "peft_type": "LORA", "r": int(leaves[f"layers/{modules[0]}/a"].shape[-1]), "lora_alpha": config.text.lora_alpha,
        "target_modules": [MODULES[ours].split(".")[-1] for ours in modules], "lora_dropout": 0.0, "bias": "none",
        "fan_in_fan_out": False, "inference_mode": True, "task_type": None, "base_model_name_or_path": None}


def wrapped_tensors(
    config: Qwen2_5VLConfig, params: Mapping, adapter: Mapping, dtype: np.dtype | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Names and arrays of base and adapter in the release's `llm_lora` layout (text model wrapped by peft)."""
    leaves = trees.flatten(adapter)
    adapted = {f"{MODULES[ours]}." for ours in MODULES if f"layers/{ours}/a" in leaves}
    for name, tensor in tensors(config, params, dtype):
        if name.startswith("model."):
            name = "model.base_model.model." + name.removeprefix("model.")
            if any(module in name for module in adapted):
                stem, _, last = name.rpartition(".")
                name = f"{stem}.base_layer.{last}"
        yield name, tensor
    if config.text.tied:
        table = np.asarray(params["language"]["embedding"]["table"])
        yield "lm_head.weight", table if dtype is None else table.astype(dtype)
    for name, tensor in adapter_tensors(config, adapter, dtype=dtype):
        yield "model." + re.sub(r"\.(lora_[AB])\.weight$", r".\1.default.weight", name), tensor
