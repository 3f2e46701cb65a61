"""Low-rank adapters (LoRA, arXiv 2106.09685) in the files of peft and diffusers, matched to a model's linear layers."""

import dataclasses
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from numpy.typing import DTypeLike

from uae_jax import trees
from uae_jax.hf.adapter_settings import DIFFUSERS_PREFIX, read_settings
from uae_jax.hf.rules import Rule, canonical, listed, load_params
from uae_jax.hf.safetensors import Tensors

# peft's name of the adapter in memory, and diffusers' older names of the two factors
LEAVES = (
    (r"\.lora[._]down\.weight$", ".lora_A.weight"),
    (r"\.lora[._]up\.weight$", ".lora_B.weight"),
    (r"\.lora_([AB])\.(?!weight$)[^.]+\.weight$", r".lora_\1.weight"),
)
FACTOR = r"(.+)\.lora_([AB])\.weight"
ALPHA = r"(.+)\.alpha"
SPECIAL = r".*(\.lora_|lora_magnitude_vector|\.dora_scale).*"  # factors of other kinds of adapters
NOT_A_FACTOR = r"(?!.*\.lora_[AB]\.weight$).*"
LAYER = r"^(.*\.)?(layers|blocks|transformer_blocks)\.\d+\."  # the prefix of a module in a layer
# peft's prefix, and that of diffusers' own adapter files, for diffusion transformers
DIFFUSERS_ALIASES = ((r"^(transformer\.)?(base_model\.model\.)?", ""),)


@dataclasses.dataclass(frozen=True)
class Adapter:
    """The factors of an adapter.

    Attributes:
      tree: `a` `[..., in, rank]` and `b` `[..., rank, out]` of each adapted module, nested by the names of the table.
      alpha: numerator of the scale `alpha / rank`, one for all modules.
      tensors: number of tensors that were read.
    """

    tree: dict[str, Any]
    alpha: float
    tensors: int


@dataclasses.dataclass(frozen=True)
class AdapterFiles:
    """An adapter in its files: names, shapes and settings, without the factors.

    Attributes:
      folder: the adapter's tensors.
      pairs: adapted module, by the base model's names, to the names in the files of its factors `A` `[r, in]` and `B`
        `[out, r]`.
      modules: the base model's linear layers and their rules; only those of `pairs` if the base model is unknown.
      abstract: shapes of the base model, or shapes derived from the factors.
      aliases: pairs that turn the names in the files into those of the table.
      settings: of `read_settings`.
      alpha: numerator of the scale `alpha / rank`, one for all modules.
      assumed: whether alpha is a default, because the files do not state alpha.
      missing: names of absent factors.
      unknown: names of tensors without a place.
      problems: one sentence for each reason why the adapter is unusable.
    """

    folder: Tensors
    pairs: dict[str, dict[str, str]]
    modules: dict[str, Rule]
    abstract: trees.Tree
    aliases: tuple[tuple[str, str], ...]
    settings: dict[str, Any]
    alpha: float
    assumed: bool
    missing: tuple[str, ...]
    unknown: tuple[str, ...]
    problems: tuple[str, ...]

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each adapted module, from factor A or, without A, from B."""
        return {
            module: self.folder.shape(pair["A"])[0] if "A" in pair else self.folder.shape(pair["B"])[-1]
            for module, pair in self.pairs.items()
        }


def peft_settings(ranks: Mapping[str, int], alpha: float) -> dict[str, Any]:
    """The contents of peft's `adapter_config.json`.

    Args:
      ranks: rank by ending of the names of the adapted modules.
      alpha: numerator of the scale.
    """
    rank = max(ranks.values())
    return {
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {name: other for name, other in ranks.items() if other != rank},
        "lora_alpha": alpha,
        "target_modules": list(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "task_type": None,
        "base_model_name_or_path": None,
    }


def by_ending(ranks: Mapping[str, int], modules: Iterable[str]) -> dict[str, int]:
    """The ranks by endings without the layer, if the endings match exactly the same modules with the same ranks.

    Args:
      ranks: rank by name of the adapted module.
      modules: names of all linear layers; an ending may also match what they lie in, such as the list `to_out`.
    """
    parts = [name.split(".") for name in modules]
    everything = {".".join(words[:count]) for words in parts for count in range(1, len(words) + 1)}
    short = {re.sub(LAYER, "", name): rank for name, rank in sorted(ranks.items())}
    meant = {name: rank for name in everything for ending, rank in short.items() if f".{name}".endswith(f".{ending}")}
    return short if meant == ranks else dict(sorted(ranks.items()))


def settings_of(
    adapter: trees.Tree, factors: Sequence[Rule], model: Sequence[Rule], alpha: float, prefix: str = "base_model.model."
) -> dict[str, Any]:
    """The contents of peft's `adapter_config.json` for the modules that an adapter has, and no others of the model.

    Args:
      adapter: the tree of factors.
      factors: its table.
      model: the table of the model that peft wraps.
      alpha: numerator of the scale.
      prefix: what stands before the model's names in those of the factors.
    """
    leaves, ranks = trees.flatten(adapter), {}
    for rule in factors:
        if rule.ours.endswith("/a"):
            names = (source.removeprefix(prefix).removesuffix(".lora_A.weight") for source in rule.sources())
            ranks |= {name: int(leaves[rule.ours].shape[-1]) for name in names}
    modules = (source.removesuffix(".weight") for rule in model if rule.layout == "dense" for source in rule.sources())
    return peft_settings(by_ending(ranks, modules), alpha)


def survey_adapter(
    folder: Tensors,
    rules: Sequence[Rule] | None,
    abstract: trees.Tree,
    *,
    aliases: Sequence[tuple[str, str]] = (),
    parts: tuple[str, ...] = (),
    others: str = "",
) -> AdapterFiles:
    """Describes an adapter of a model's linear layers from names, shapes and settings.

    The scale comes from `adapter_config.json`, from diffusers' header, or from `alpha` tensors. The default alpha is
    the rank in diffusers' files, as in diffusers, and otherwise twice the rank, as in the UAE release.

    Args:
      folder: a peft folder, a folder or file of diffusers, or a complete wrapped model.
      rules: the table of the base model, whose `dense` kernels can be adapted; None if the base model is unknown.
      abstract: shapes of the base model.
      aliases: pairs that turn other names into those of the table.
      parts: first words of our names that an adapter may leave out completely, such as `vision`.
      others: regular expression of names allowed beside the adapter.

    Raises:
      ValueError: no adapter tensor, unreadable settings, or another kind of adapter. Other errors are in `problems`.
    """
    aliases = (*aliases, *LEAVES)
    pairs, alphas, special = _survey(folder, aliases, others)
    if rules is None:
        rules, abstract = _own_table(folder, pairs)
    modules = {
        source.removesuffix(".weight"): rule for rule in rules if rule.layout == "dense" for source in rule.sources()
    }
    settings, by_diffusers = read_settings(folder), _is_diffusers(folder)
    known = {module: pair for module, pair in pairs.items() if module in modules}
    foreign = sorted(name for module in set(pairs) - set(modules) for name in pairs[module].values())
    halves = [_other(name, letter) for pair in known.values() if len(pair) == 1 for letter, name in pair.items()]
    whole = {rule.ours.split("/")[0] for rule in rules} - set(parts) | {
        modules[module].ours.split("/")[0] for module in known
    }
    candidates = {module: rule for module, rule in modules.items() if rule.ours.split("/")[0] in whole}
    absent = _absent(known, candidates, settings, allow_subset=by_diffusers)
    problems = _problems(folder, special, foreign, halves, absent, bool(settings))
    files = AdapterFiles(
        folder,
        known,
        modules,
        abstract,
        aliases,
        settings,
        0.0,
        False,
        (*sorted(halves), *(f"{module}.lora_{letter}.weight" for module in absent for letter in "AB")),
        (*special, *foreign),
        (),
    )
    try:
        alpha, assumed = _alpha(folder, settings, alphas, set(files.ranks.values()) or {1}, by_diffusers)
    except ValueError as error:
        alpha, assumed, problems = 0.0, False, [*problems, str(error)]
    return dataclasses.replace(files, alpha=alpha, assumed=assumed, problems=tuple(problems))


def adapter_rules(table: Sequence[Rule], adapter: trees.Tree, prefix: str = "base_model.model.") -> list[Rule]:
    """The table of a peft adapter of the modules that `adapter` has.

    Args:
      table: of the base model.
      adapter: factors `a` and `b` by module.
      prefix: what stands before the names of modules.
    """
    leaves = trees.flatten(adapter)
    return [
        Rule(f"{module}/{part}", f"{prefix}{theirs}.lora_{part.upper()}.weight", "dense", rule.layers)
        for rule in table
        for module, theirs in ((rule.ours.removesuffix("/kernel"), rule.theirs.removesuffix(".weight")),)
        if rule.layout == "dense" and f"{module}/a" in leaves
        for part in ("a", "b")
    ]


def read_adapter(files: AdapterFiles, dtype: DTypeLike | None = None) -> Adapter:
    """Reads the factors of an adapter. Layers of a stack without factors get zero factors.

    A default alpha gives a warning.

    Args:
      files: of `survey_adapter`, with the base model's table.
      dtype: precision to store the factors in; None keeps the precision of the files.

    Raises:
      ValueError: a tensor without its pair, of another model, or of another kind of adapter; modules that the settings
        name and the files lack; scales that differ between modules.
    """
    if files.problems:
        raise ValueError(files.problems[0])
    if files.assumed:
        rule = "the rank, as diffusers does" if _is_diffusers(files.folder) else "twice the rank, as in the UAE release"
        warnings.warn(
            f"{files.folder.path} does not state lora_alpha; {files.alpha:g} is used, {rule}; "
            "put an adapter_config.json beside it if that is wrong",
            stacklevel=2,
        )
    count = 2 * len(files.pairs)
    logging.info(
        "adapter %s: %d of %d linear layers, %d tensors, alpha %g",
        files.folder.path,
        len(files.pairs),
        len(files.modules),
        count,
        files.alpha,
    )
    rules, shapes, partial = adapter_table(files)
    tree = load_params(files.folder, rules, shapes, aliases=files.aliases, ignore=NOT_A_FACTOR, dtype=dtype)
    tree = trees.map_with_name(lambda name, leaf: _fill(leaf, *partial[name]) if name in partial else leaf, tree)
    return Adapter(tree, files.alpha, count)


def adapter_table(files: AdapterFiles) -> tuple[list[Rule], dict[str, Any], dict[str, tuple[int, list[int]]]]:
    """The table of an adapter's factors, stacked like the kernels, with their shapes.

    Returns:
      Rules and shapes for `hf.rules.load_params`. For partly adapted stacks, also by leaf the number of layers in the
      stack and the positions of the adapted ones.

    Raises:
      ValueError: ranks differ within a stack.
    """
    kernels, ranks, rules, shapes = trees.flatten(files.abstract), files.ranks, [], {}
    partial: dict[str, tuple[int, list[int]]] = {}
    for rule in {files.modules[module].ours: files.modules[module] for module in ranks}.values():
        ours = rule.ours.removesuffix("/kernel")
        adapted = [source.removesuffix(".weight") in ranks for source in rule.sources()]
        numbers = rule.layers and tuple(number for number, there in zip(rule.layers, adapted) if there)
        found = {ranks[source.removesuffix(".weight")] for source, there in zip(rule.sources(), adapted) if there}
        _check_one(files.folder, f"ranks in the layers of {rule.theirs}", found)
        *_, fan_in, fan_out = kernels[rule.ours].shape
        for leaf, shape in (("a", (fan_in, max(found))), ("b", (max(found), fan_out))):
            theirs = f"{rule.theirs.removesuffix('.weight')}.lora_{leaf.upper()}.weight"
            rules.append(Rule(f"{ours}/{leaf}", theirs, "dense", numbers))
            stack = () if numbers is None else (len(numbers),)
            shapes[f"{ours}/{leaf}"] = jax.ShapeDtypeStruct((*stack, *shape), np.float32)
            if rule.layers and numbers and numbers != rule.layers:
                partial[f"{ours}/{leaf}"] = (len(rule.layers), [rule.layers.index(number) for number in numbers])
    return rules, trees.unflatten(shapes), partial


def _fill(leaf: np.ndarray, layers: int, places: list[int]) -> np.ndarray:
    """The stack of all layers, with zeros for layers without factors."""
    whole = np.zeros((layers, *leaf.shape[1:]), leaf.dtype)
    whole[places] = leaf
    return whole


def _survey(
    folder: Tensors, aliases: Sequence[tuple[str, str]], others: str
) -> tuple[dict[str, dict[str, str]], dict[str, float], list[str]]:
    """The names of each module's factors, alpha by module from `alpha` tensors, and names of no plain adapter."""
    pairs: dict[str, dict[str, str]] = {}
    alphas, unknown = {}, []
    for name in sorted(folder.names()):
        known = canonical(name, aliases)
        if match := re.fullmatch(FACTOR, known):
            pairs.setdefault(match[1], {})[match[2]] = name
        elif match := re.fullmatch(ALPHA, known):
            alphas[match[1]] = float(np.asarray(folder.read(name)).reshape(-1)[0])
        elif re.fullmatch(SPECIAL, known) or not (others and re.fullmatch(others, known)):
            unknown.append(name)
    if not pairs:
        raise ValueError(f"{folder.path} holds no adapter tensor (lora_A, lora_B); give the folder of a LoRA adapter")
    return pairs, alphas, unknown


def _own_table(folder: Tensors, pairs: Mapping[str, Mapping[str, str]]) -> tuple[list[Rule], dict[str, Any]]:
    """The table and shapes of the adapted linear layers, derived from the factors."""
    rules = [Rule(f"{module}/kernel", f"{module}.weight", "dense") for module in pairs]
    shapes = {
        f"{module}/kernel": jax.ShapeDtypeStruct((folder.shape(pair["A"])[-1], folder.shape(pair["B"])[0]), np.float32)
        for module, pair in pairs.items()
        if len(pair) == 2
    }
    return rules, trees.unflatten(shapes)


def _problems(
    folder: Tensors, special: list[str], foreign: list[str], halves: list[str], absent: list[str], told: bool
) -> list[str]:
    """One sentence for each kind of extra or missing tensors."""
    path, problems = folder.path, []
    if special:
        problems.append(
            f"{path} holds tensors that are not of a plain LoRA adapter; unknown: {listed(special)} in "
            f"{folder.file(special[0])}. Export the adapter without them"
        )
    if foreign:
        problems.append(
            f"{path} adapts modules that this model does not have as linear layers; unknown: {listed(foreign)} in "
            f"{folder.file(foreign[0])}. Check that the adapter belongs to this model"
        )
    if halves:
        problems.append(f"{path} holds half of an adapter; missing: {listed(halves)}. Copy the folder again")
    if absent:
        problems.append(
            f"{path} lacks modules that {'target_modules names' if told else 'it has in other layers'}; "
            f"missing: {listed(absent)}. Copy the folder again"
        )
    return problems


def _other(name: str, letter: str) -> str:
    """The published name of the other factor."""
    for pair in (("lora_A", "lora_B"), ("down", "up")):
        ours, other = pair if letter == "A" else pair[::-1]
        if ours in name:
            return other.join(name.rsplit(ours, 1))
    return name


def _is_diffusers(folder: Tensors) -> bool:
    files = {file.name for file in folder.files.values()}
    prefixed = any(name.startswith(DIFFUSERS_PREFIX) for name in folder.names())
    return prefixed or files == {"pytorch_lora_weights.safetensors"}


def _absent(
    pairs: Mapping[str, Any], modules: Mapping[str, Rule], settings: Mapping[str, Any], *, allow_subset: bool
) -> list[str]:
    """Modules that the settings name and the files lack. Without settings, an adapted module has to be adapted in all
    layers.
    """
    if not settings:
        rules = set() if allow_subset else {modules[module].ours for module in pairs}
        expected = {module for module, rule in modules.items() if rule.ours in rules}
    elif settings.get("exclude_modules") or settings.get("layers_to_transform") is not None:
        expected = set()
    else:
        targets = settings.get("target_modules") or ()
        # a regular expression would need the names of the wrapped model
        targets = () if isinstance(targets, str) else tuple(targets)
        expected = {module for module in modules if any(f".{module}".endswith(f".{target}") for target in targets)}
    return sorted(expected - set(pairs))


def _alpha(
    folder: Tensors, settings: Mapping[str, Any], alphas: Mapping[str, float], ranks: set[int], by_diffusers: bool
) -> tuple[float, bool]:
    """The numerator of the scale of all modules, and whether the numerator is a default."""
    if settings.get("lora_alpha") is not None:
        alpha = float(settings["lora_alpha"])
        if not settings.get("use_rslora"):
            return alpha, False
        _check_one(folder, "ranks under use_rslora", ranks)  # arXiv 2312.03732: alpha / sqrt(rank)
        return alpha * max(ranks) ** 0.5, False
    if alphas:
        _check_one(folder, "alpha tensors", set(alphas.values()))
        return max(alphas.values()), False
    _check_one(folder, "ranks without lora_alpha", ranks)
    return float(max(ranks) * (1 if by_diffusers else 2)), True


def _check_one(folder: Tensors, what: str, values: set[Any]) -> None:
    if len(values) > 1:
        raise ValueError(
            f"{folder.path} has different {what} {sorted(values)}; only one scale for all modules is supported"
        )
