"""Low-rank adapters in the files of peft and diffusers, matched to the linear maps of a model's table (LoRA, arXiv 2106.09685)."""

import dataclasses
import json
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from safetensors import safe_open

from uae_jax import trees
from uae_jax.hf.rules import Rule, load_params
from uae_jax.hf.safetensors import TensorFolder

# the adapter's name that peft has in memory, and diffusers' older words for the two factors
LEAVES = (
    (r"\.lora[._]down\.weight$", ".lora_A.weight"), (r"\.lora[._]up\.weight$", ".lora_B.weight"),
    (r"\.lora_([AB])\.(?!weight$)[^.]+\.weight$", r".lora_\1.weight"))
FACTOR = r"(.+)\.lora_([AB])\.weight"
ALPHA = r"(.+)\.alpha"
SPECIAL = r".*(\.lora_|lora_magnitude_vector|\.dora_scale).*"  # factors of other kinds of adapter
HEADER = "lora_adapter_metadata"  # key of the safetensors header in which diffusers keeps the settings
DIFFUSERS_PREFIX = "transformer."
PLAIN = ("use_dora", "lora_bias", "modules_to_save", "layer_replication", "target_parameters", "trainable_token_indices",
         "fan_in_fan_out")


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter that was read.

    Attributes:
      tree: `a` `[..., in, rank]` and `b` `[..., rank, out]` of each adapted module, nested by the names of the table.
      alpha: numerator of the scale: `alpha / rank` in every module.
      tensors: how many tensors of the folder were taken.
    """

    tree: dict
    alpha: float
    tensors: int


def peft_settings(ranks: Mapping[str, int], alpha: float) -> dict[str, Any]:
    """The contents of peft's `adapter_config.json`.

    Args:
      ranks: rank by the ending of the names of the adapted modules.
      alpha: numerator of the scale.
    """
    rank = max(ranks.values())
    return {
        "peft_type": "LORA", "r": rank, "rank_pattern": {name: other for name, other in ranks.items() if other != rank},
        "lora_alpha": alpha, "target_modules": list(ranks), "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False,
        "inference_mode": True, "task_type": None, "base_model_name_or_path": None}


def canonical(name: str, aliases: Sequence[tuple[str, str]]) -> str:
    """The name after all (regular expression, replacement) pairs in turn."""
    for pattern, replacement in aliases:
        name = re.sub(pattern, replacement, name)
    return name


def read_adapter(
    folder: TensorFolder, rules: Sequence[Rule], abstract: trees.Tree, *, aliases: Sequence[tuple[str, str]] = (),
    parts: tuple[str, ...] = (), others: str = "", dtype: np.dtype | None = None) -> Adapter:
    """Reads an adapter of any of a model's linear maps.

    The scale comes from `adapter_config.json`, from the header that diffusers writes, or from `alpha` tensors. Without
    any, alpha is the rank in diffusers' files, as diffusers reads them, and otherwise twice the rank, as in the UAE
    release; a warning says so. Layers that an adapter leaves out of a stack have zero factors.

    Args:
      folder: a peft folder, a folder or file of diffusers, or a whole wrapped model.
      rules: the table of the base model; its `dense` kernels can be adapted.
      abstract: shapes of the base model.
      aliases: pairs that turn other names into those of the table.
      parts: first names of ours that an adapter may leave out as a whole, such as `vision`.
      others: regular expression of names that may stand beside the adapter.
      dtype: precision to store the factors in; None keeps that of the files.

    Raises:
      ValueError: no adapter tensor; one without its pair, of another model, or of another kind of adapter; modules
        that the settings name and the files lack; scales that differ between modules.
    """
    aliases = (*aliases, *LEAVES)
    modules = {source.removesuffix(".weight"): rule for rule in rules if rule.layout == "dense" for source in rule.sources()}
    factors, alphas = _survey(folder, aliases, others)
    ranks = _ranks(folder, factors, modules)
    settings, by_diffusers = read_settings(folder), _is_diffusers(folder)
    whole = {rule.ours.split("/")[0] for rule in rules} - set(parts) | {modules[module].ours.split("/")[0] for module in ranks}
    candidates = {module: rule for module, rule in modules.items() if rule.ours.split("/")[0] in whole}
    _check_complete(folder, ranks, candidates, settings, allow_subset=by_diffusers)
    alpha = _alpha(folder, settings, alphas, set(ranks.values()), by_diffusers)
    logging.info("adapter %s: %d of %d linear maps, %d tensors, alpha %g", folder.path, len(ranks), len(modules), 2 * len(ranks), alpha)
    return Adapter(_load(folder, ranks, modules, abstract, aliases, dtype), alpha, 2 * len(ranks))


def _survey(
    folder: TensorFolder, aliases: Sequence[tuple[str, str]], others: str) -> tuple[dict[str, dict[str, str]], dict[str, float]]:
    """The published names of the factors of each adapted module, and alpha where a tensor holds it, by the table's names."""
    factors: dict[str, dict[str, str]] = {}
    alphas, unknown = {}, []
    for name in sorted(folder.names()):
        known = canonical(name, aliases)
        if match := re.fullmatch(FACTOR, known):
            factors.setdefault(match[1], {})[match[2]] = name
        elif match := re.fullmatch(ALPHA, known):
            alphas[match[1]] = float(np.asarray(folder.read(name)).reshape(-1)[0])
        elif re.fullmatch(SPECIAL, known) or not (others and re.fullmatch(others, known)):
            unknown.append(name)
    if not factors:
        raise ValueError(f"{folder.path} holds no adapter tensor (lora_A, lora_B); give the folder of a LoRA adapter")
    if unknown:
        raise ValueError(f"{folder.path} holds tensors that are not of a plain LoRA adapter; unknown: {_listed(unknown)} in {folder.file(unknown[0])}. "
                         "Export the adapter without them")
    return factors, alphas


def _listed(names: Iterable[str], most: int = 8) -> str:
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _ranks(folder: TensorFolder, factors: Mapping[str, Mapping[str, str]], modules: Mapping[str, Rule]) -> dict[str, int]:
    """The rank of each adapted module, once each is known and has both factors."""
    unknown = [name for module in set(factors) - set(modules) for name in factors[module].values()]
    if unknown:
        raise ValueError(f"{folder.path} adapts modules that this model does not have as linear maps; unknown: "
                         f"{_listed(unknown)} in {folder.file(min(unknown))}. Check that the adapter belongs to this model")
    halves = [next(iter(pair.items())) for pair in factors.values() if len(pair) == 1]
    missing = [_other(name, letter) for letter, name in halves]
    if missing:
        raise ValueError(f"{folder.path} holds half of an adapter; missing: {_listed(missing)}. Copy the folder again")
    return {module: folder.shape(pair["A"])[0] for module, pair in factors.items()}


def _other(name: str, letter: str) -> str:
    """The published name of the other factor."""
    for pair in (("lora_A", "lora_B"), ("down", "up")):
        ours, other = pair if letter == "A" else pair[::-1]
        if ours in name:
            return other.join(name.rsplit(ours, 1))
    return name


def _is_diffusers(folder: TensorFolder) -> bool:
    files = {file.name for file in folder.files.values()}
    prefixed = any(name.startswith(DIFFUSERS_PREFIX) for name in folder.names())
    return prefixed or files == {"pytorch_lora_weights.safetensors"}


def read_settings(folder: TensorFolder) -> dict[str, Any]:
    """The adapter's settings: peft's `adapter_config.json`, or what diffusers writes in the header; empty without both.

    Raises:
      ValueError: not JSON, or a kind of adapter other than plain LoRA; the field is named.
    """
    file = (folder.path if folder.path.is_dir() else folder.path.parent) / "adapter_config.json"
    text = file.read_text() if file.exists() else None
    if text is None:
        file = sorted(set(folder.files.values()))[0]
        with safe_open(file, framework="numpy") as handle:
            text = (handle.metadata() or {}).get(HEADER)
    try:
        stored = {} if text is None else json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: the adapter's settings are not JSON ({error}); copy it again") from None
    settings = {name.removeprefix(DIFFUSERS_PREFIX): value for name, value in stored.items()}
    wrong = [name for name in PLAIN if settings.get(name)]
    wrong += [name for name, plain in (("peft_type", "LORA"), ("bias", "none")) if settings.get(name, plain) not in (plain, None)]
    wrong += [name for name in ("alpha_pattern",) if set((settings.get(name) or {}).values()) - {settings.get("lora_alpha")}]
    if wrong:
        raise ValueError(f"{file}: {wrong[0]}={settings[wrong[0]]!r} is not supported; only plain LoRA adapters are")
    return settings


def _check_complete(
    folder: TensorFolder, ranks: Mapping[str, int], modules: Mapping[str, Rule], settings: Mapping[str, Any], *,
    allow_subset: bool) -> None:
    """All modules that the settings name are there; without settings, an adapted module is so in all layers."""
    if not settings:
        rules = set() if allow_subset else {modules[module].ours for module in ranks}
        expected = {module for module, rule in modules.items() if rule.ours in rules}
    elif settings.get("exclude_modules") or settings.get("layers_to_transform") is not None:
        expected = set()
    else:
        targets = settings.get("target_modules") or ()
        # a regular expression is about the names in a model that is not here
        targets = () if isinstance(targets, str) else tuple(targets)
        expected = {module for module in modules if any(f".{module}".endswith(f".{target}") for target in targets)}
    missing = expected - set(ranks)
    if missing:
        raise ValueError(
            f"{folder.path} lacks modules that {'target_modules names' if settings else 'it has in other layers'}; "
            f"missing: {_listed(missing)}. Copy the folder again")


def _alpha(
    folder: TensorFolder, settings: Mapping[str, Any], alphas: Mapping[str, float], ranks: set[int], by_diffusers: bool) -> float:
    """The one numerator of the scale of all modules."""
    if settings.get("lora_alpha") is not None:
        alpha = float(settings["lora_alpha"])
        if not settings.get("use_rslora"):
            return alpha
        _check_one(folder, "ranks under use_rslora", ranks)  # arXiv 2312.03732: alpha / sqrt(rank)
        return alpha * max(ranks) ** 0.5
    if alphas:
        _check_one(folder, "alpha tensors", set(alphas.values()))
        return max(alphas.values())
    _check_one(folder, "ranks without lora_alpha", ranks)
    alpha = float(max(ranks) * (1 if by_diffusers else 2))
    warnings.warn(
        f"{folder.path} does not say its lora_alpha; {alpha:g} is taken, "
        f"{'the rank, as diffusers does' if by_diffusers else 'twice the rank, as in the UAE release'}; "
        "put an adapter_config.json beside it if that is wrong", stacklevel=2)
    return alpha


def _check_one(folder: TensorFolder, what: str, values: set) -> None:
    if len(values) > 1:
        raise ValueError(f"{folder.path} has different {what} {sorted(values)}; only one scale for all modules is supported")


def _load(
    folder: TensorFolder, ranks: Mapping[str, int], modules: Mapping[str, Rule], abstract: trees.Tree,
    aliases: Sequence[tuple[str, str]], dtype: np.dtype | None) -> dict:
    """The factors, stacked as the kernels are."""
    kernels, rules, shapes, partial = trees.flatten(abstract), [], {}, {}
    for rule in {modules[module].ours: modules[module] for module in ranks}.values():
        ours = rule.ours.removesuffix("/kernel")
        numbers = rule.layers if rule.layers is None else tuple(
            number for number, source in zip(rule.layers, rule.sources()) if source.removesuffix(".weight") in ranks)
        found = {ranks[source.removesuffix(".weight")] for source in rule.sources() if source.removesuffix(".weight") in ranks}
        _check_one(folder, f"ranks in the layers of {rule.theirs}", found)
        *_, fan_in, fan_out = kernels[rule.ours].shape
        for leaf, shape in (("a", (fan_in, max(found))), ("b", (max(found), fan_out))):
            theirs = f"{rule.theirs.removesuffix('.weight')}.lora_{leaf.upper()}.weight"
            rules.append(Rule(f"{ours}/{leaf}", theirs, "dense", numbers))
            stack = () if numbers is None else (len(numbers),)
            shapes[f"{ours}/{leaf}"] = jax.ShapeDtypeStruct((*stack, *shape), np.float32)
            if numbers != rule.layers:
                partial[f"{ours}/{leaf}"] = (len(rule.layers), [rule.layers.index(number) for number in numbers])
    tree = load_params(folder, rules, trees.unflatten(shapes), aliases=aliases,
                       ignore=r"(?!.*\.lora_[AB]\.weight$).*", dtype=dtype)
    return trees.map_with_name(lambda name, leaf: _fill(leaf, *partial[name]) if name in partial else leaf, tree)


def _fill(leaf: np.ndarray, layers: int, places: list[int]) -> np.ndarray:
    """The stack of all layers, zero where the adapter has none."""
    whole = np.zeros((layers, *leaf.shape[1:]), leaf.dtype)
    whole[places] = leaf
    return whole
