"""Published tensors of Qwen2.5-VL, its projector and its adapters, to and from our parameters.

Canonical names are those of the published files (`model.layers...`, `visual...`). Aliases read two other kinds: those
that transformers 4.52 and newer have in memory, and those that peft makes around the text model or the complete model
(as in the release's `llm_lora` folder).
"""

import pathlib
import re
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from jax.typing import DTypeLike

from uae_jax.hf.adapters import Adapter, AdapterFiles, read_adapter, survey_adapter
from uae_jax.hf.rules import Placement, Rule, canonical, check_params, load_params, published_tensors
from uae_jax.hf.safetensors import TensorFolder, Tensors
from uae_jax.models.language import weights
from uae_jax.models.language.weights import ADAPTER_TENSOR, PEFT_ALIASES, language_rules, of_language_alone
from uae_jax.models.precision import numpy_dtype
from uae_jax.models.qwen2_5_vl import model
from uae_jax.models.qwen2_5_vl.config import Qwen2_5VLConfig, VisionConfig, from_folder

PREFIX = "model."  # of the language model's tensors
ALIASES = (
    *PEFT_ALIASES,
    (r"^(model\.)?(language_model\.)?(?=(layers|embed_tokens|norm)\.)", PREFIX),
    (r"^model\.visual\.", "visual."),
)
BUFFERS = r".*\.(rotary_emb|rotary_pos_emb)\..*inv_freq"


def vision_rules(config: VisionConfig) -> list[Rule]:
    """The table of the image encoder; names of ours start with `vision/`."""
    layers, size = tuple(range(config.depth)), config.patch_size
    shape = (config.width, config.channels, config.temporal_patch_size, size, size)
    table = [
        Rule("vision/patch_embed/kernel", "visual.patch_embed.proj.weight", "patch", torch_shape=shape),
        Rule("vision/merger/norm/scale", "visual.merger.ln_q.weight"),
    ]
    table += [
        Rule(f"vision/blocks/{ours}/scale", f"visual.blocks.{{}}.{theirs}.weight", layers=layers)
        for ours, theirs in (("attention_norm", "norm1"), ("mlp_norm", "norm2"))
    ]
    blocks = {
        "qkv": "attn.qkv",
        "output": "attn.proj",
        "mlp/gate": "mlp.gate_proj",
        "mlp/up": "mlp.up_proj",
        "mlp/down": "mlp.down_proj",
    }
    for ours, theirs in blocks.items():
        table.append(Rule(f"vision/blocks/{ours}/kernel", f"visual.blocks.{{}}.{theirs}.weight", "dense", layers))
        table.append(Rule(f"vision/blocks/{ours}/bias", f"visual.blocks.{{}}.{theirs}.bias", layers=layers))
    return (
        table
        + _affine("vision/merger/first", "visual.merger.mlp.0")
        + _affine("vision/merger/second", "visual.merger.mlp.2")
    )


def projector_rules() -> list[Rule]:
    """The table of the projector; names of ours start with `projector/`."""
    return _affine("projector/first", "projector.0") + _affine("projector/second", "projector.2")


def _affine(ours: str, theirs: str) -> list[Rule]:
    return [Rule(f"{ours}/kernel", f"{theirs}.weight", "dense"), Rule(f"{ours}/bias", f"{theirs}.bias")]


def rules(config: Qwen2_5VLConfig, projector: bool) -> list[Rule]:
    """The complete table, with or without the projector."""
    return vision_rules(config.vision) + language_rules(config.text, PREFIX) + (projector_rules() if projector else [])


def load(
    path: str | pathlib.Path,
    config: Qwen2_5VLConfig | None = None,
    dtype: DTypeLike | Mapping[str, DTypeLike] | None = None,
    placement: Placement | None = None,
) -> tuple[Qwen2_5VLConfig, dict]:
    """Reads a model folder of either generation, or the release's peft-wrapped one (without its adapter).

    Args:
      path: folder with safetensors files, and `config.json` unless `config` is given.
      config: sizes, when known.
      dtype: precision to store the parameters in, or one by part; None keeps that of the files.
      placement: where the parameters go, see `hf.rules.load_params`.

    Returns:
      The config, and parameters `{"vision", "language"}` with `"projector"` if the folder has one.

    Raises:
      FileNotFoundError: no such folder, config or weights.
      ValueError: config and tensors do not fit, both ways; all are named.
    """
    config = from_folder(path) if config is None else config
    folder = TensorFolder(path)
    check_head(folder, config)
    table, abstract, ignore = contents(folder, config)
    if isinstance(dtype, Mapping):
        precision = {part: np.dtype(own) for part, own in dtype.items()}
    else:
        precision = numpy_dtype(dtype)
    return config, load_params(
        folder, table, abstract, aliases=ALIASES, ignore=ignore, dtype=precision, placement=placement
    )


def check(path: str | pathlib.Path, config: Qwen2_5VLConfig) -> None:
    """The checks of `load`, for a folder whose weights are not used because others stand for them.

    Raises:
      FileNotFoundError: no such folder or weights.
      ValueError: config and tensors do not fit, both ways, or there are non-finite numbers; all are named.
    """
    folder = TensorFolder(path)
    check_head(folder, config)
    table, abstract, ignore = contents(folder, config)
    check_params(folder, table, abstract, aliases=ALIASES, ignore=ignore)


def contents(folder: TensorFolder, config: Qwen2_5VLConfig) -> tuple[list[Rule], dict, str]:
    """Table and shapes of what a folder should hold, with the projector if it has one, and the names to pass over."""
    abstract, projector = model.abstract_params(config), abstract_projector(folder, config)
    if projector is not None:
        abstract = {**abstract, "projector": projector}
    ignore = "|".join((BUFFERS, ADAPTER_TENSOR, *((r"lm_head\.weight",) if config.text.tied else ())))
    return rules(config, projector is not None), abstract, ignore


def check_head(folder: Tensors, config: Qwen2_5VLConfig) -> None:
    """See `language.weights.check_head`."""
    weights.check_head(folder, config, ALIASES, PREFIX)


def abstract_projector(folder: TensorFolder, config: Qwen2_5VLConfig) -> dict | None:
    """The projector's shapes, with inner and outer width as stored; None if the folder holds none."""
    stored = {canonical(name, ALIASES): name for name in folder.names()}
    if not {"projector.0.weight", "projector.2.weight"} <= set(stored):
        return None
    hidden, features = (folder.shape(stored[f"projector.{index}.weight"])[0] for index in (0, 2))
    return jax.eval_shape(lambda: model.init_projector(jax.random.key(0), config.text.width, hidden, features))


def load_projector(
    path: str | pathlib.Path,
    config: Qwen2_5VLConfig,
    dtype: DTypeLike | None = None,
    placement: Placement | None = None,
) -> dict | None:
    """Reads the projector alone from a folder that may hold more, sharded as by `load`; None if it holds none.

    Raises:
      FileNotFoundError: no such folder or weights.
      ValueError: tensors that do not fit.
    """
    folder = TensorFolder(path)
    abstract = abstract_projector(folder, config)
    if abstract is None:
        return None
    return load_params(
        folder,
        projector_rules(),
        {"projector": abstract},
        aliases=ALIASES,
        ignore=r"(?!projector\.).*",
        dtype=numpy_dtype(dtype),
        placement=placement,
    )["projector"]


def load_language(
    path: str | pathlib.Path,
    config: Qwen2_5VLConfig,
    dtype: DTypeLike | None = None,
    placement: Placement | None = None,
) -> dict:
    """Reads the language model alone from a folder of the complete model, sharded as by `load`.

    Raises:
      FileNotFoundError: no such folder or weights.
      ValueError: config and tensors do not fit, both ways; all are named.
    """
    folder = TensorFolder(path)
    check_head(folder, config)
    table, abstract, ignore = contents(folder, config)
    others = (re.escape(name) for rule in table if not rule.ours.startswith("language/") for name in rule.sources())
    return load_params(
        folder,
        language_rules(config.text, PREFIX),
        {"language": abstract["language"]},
        aliases=ALIASES,
        ignore="|".join((ignore, *others)),
        dtype=numpy_dtype(dtype),
        placement=placement,
    )["language"]


def holds_base(path: str | pathlib.Path) -> bool:
    """Whether a folder holds weights of the model itself beside those of an adapter, as the release's `llm_lora`
    does.
    """
    return any(not re.search(r"\.lora_|\.alpha$", name) for name in TensorFolder(path).names())


def tensors(
    config: Qwen2_5VLConfig, params: Mapping, dtype: DTypeLike | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Published names and arrays of `{"vision", "language"}`, and `"projector"` if there; the inverse of `load`."""
    parts = {name: params[name] for name in ("vision", "language", "projector") if name in params}
    return published_tensors(parts, rules(config, "projector" in parts), numpy_dtype(dtype))


def read_adapters(path: str | pathlib.Path, config: Qwen2_5VLConfig, dtype: DTypeLike | None = None) -> Adapter:
    """Reads an adapter of the language model, of the image encoder, or of both.

    Args:
      path: peft folder around the text or complete model of either generation, or the release's `llm_lora`.
      config: sizes of the base model.
      dtype: precision to store the adapter in; None keeps that of the files.

    Returns:
      The adapter, its tree `{"language"}`, `{"vision"}` or both.

    Raises:
      FileNotFoundError: no such folder or weights.
      ValueError: see `survey_adapters` and `hf.adapters.read_adapter`.
    """
    return read_adapter(survey_adapters(path, config), numpy_dtype(dtype))


def survey_adapters(path: str | pathlib.Path, config: Qwen2_5VLConfig | None) -> AdapterFiles:
    """What `read_adapters` would read, understood but not read; None stands for a base model that is not known.

    Raises:
      FileNotFoundError: no such folder or weights.
      ValueError: see `hf.adapters.survey_adapter`.
    """
    table, abstract = (
        (None, {})
        if config is None
        else (vision_rules(config.vision) + language_rules(config.text, PREFIX), model.abstract_params(config))
    )
    return survey_adapter(
        TensorFolder(path), table, abstract, aliases=ALIASES, parts=("vision", "language"), others=r"(?!.*\.lora_).*"
    )


def load_adapter(
    path: str | pathlib.Path, config: Qwen2_5VLConfig, dtype: DTypeLike | None = None
) -> tuple[Qwen2_5VLConfig, dict]:
    """Reads an adapter of the language model alone, to stay separate from the base; see `read_adapters`.

    Returns:
      The config with the adapter's alpha, and the adapter tree; the rank is that of the tensors.

    Raises:
      FileNotFoundError: no such folder or weights.
      ValueError: see `hf.adapters.read_adapter`; also an adapter of the image encoder or the head.
    """
    adapter = read_adapters(path, config, dtype)
    return config.using(lora_alpha=adapter.alpha), of_language_alone(adapter, path)
