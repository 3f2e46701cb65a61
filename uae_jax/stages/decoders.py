"""Decoders with a text encoder of their own: the folder `decoder` of a model folder, a pipeline as diffusers saves it.

Captions go into the decoder's prompt by their ids. Its tokenizer must therefore know the captioner's vocabulary.
"""

import json
import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from uae_jax.data import tokenizer as tokens
from uae_jax.files.json_files import read_json
from uae_jax.hf.adapters import DIFFUSERS_ALIASES, read_adapter, survey_adapter
from uae_jax.hf.rules import Placement, load_params
from uae_jax.hf.safetensors import TensorFolder
from uae_jax.models.condition import ConditionTemplate
from uae_jax.models.decoder import Decoder, Family
from uae_jax.models.decoders import FAMILIES
from uae_jax.models.parts import eight_bits

FOLDER = "decoder"
_SENTINEL = "sentinel0caption"


def family_of(folder: pathlib.Path) -> Family:
    """The kind of decoder in a pipeline's folder.

    Raises:
      FileNotFoundError: there is no model_index.json.
      ValueError: a pipeline that is not known.
    """
    name = str(read_json(folder, "model_index.json").get("_class_name"))
    if name not in FAMILIES:
        raise ValueError(f"{folder} holds a {name}; the decoders with a text encoder are {', '.join(FAMILIES)}")
    return FAMILIES[name]


def is_own(folder: pathlib.Path) -> bool:
    """Whether a folder holds a pipeline that is known as a decoder with a text encoder of its own."""
    index = folder / "model_index.json"
    return index.is_file() and read_json(folder, index.name).get("_class_name") in FAMILIES


def defaults(folder: pathlib.Path) -> dict[str, Any] | None:
    """Settings of inference of a model folder whose decoder has its own text encoder; None for another decoder."""
    pipeline = folder / FOLDER
    return family_of(pipeline).defaults(pipeline) if pipeline.is_dir() else None


def decoder_template(family: Family, tokenizer: Any, negative_prompt: str) -> ConditionTemplate:
    """Ids around a caption in the decoder's chat template; its own tokenizer makes them.

    For a caption without white space at its beginning, prefix, ids of the caption and suffix equal the tokens of the
    complete text.

    Args:
      family: of the decoder.
      tokenizer: of the decoder.
      negative_prompt: what guidance moves away from.
    """

    def encode(text: str, control: bool) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False, split_special_tokens=not control)["input_ids"])

    before, after = (encode(part, True) for part in family.text(tokenizer, _SENTINEL).split(_SENTINEL))
    negative = encode(negative_prompt.strip() or family.negative, not tokenizer.split_special_tokens)
    return ConditionTemplate(before, after, negative, int(tokenizer.pad_token_id), family.length, family.most)


def describe(
    folder: pathlib.Path,
    captioner: Any,
    negative_prompt: str,
    *,
    dtype: str,
    remat: str,
    lora_alpha: float,
) -> tuple[Decoder, tuple[tuple[int, int], ...]]:
    """The description of a decoder's folder, and the ids that no caption may have.

    Args:
      folder: the pipeline.
      captioner: tokenizer of the captioner.
      negative_prompt: what guidance moves away from.
      dtype, remat, lora_alpha: of a run.

    Raises:
      FileNotFoundError, ValueError: a part is absent or not supported, or the tokenizers differ.
    """
    family, own = family_of(folder), tokens.load_tokenizer(folder / "tokenizer")
    check_vocabulary(captioner, own, folder / "tokenizer")
    template = decoder_template(family, own, negative_prompt)
    decoder = family.describe(folder, template, dtype=dtype, remat=remat, lora_alpha=lora_alpha)
    return decoder, banned_ids(captioner)


def load_parts(
    folder: pathlib.Path,
    placement: Callable[[str], Placement | None],
    precision: Mapping[str, np.dtype],
    names: Collection[str] = (),
    *,
    in_eight_bits: bool = False,
) -> dict[str, Any]:
    """Parameters of a decoder's parts, each checked against its folder both ways.

    Args:
      folder: the pipeline.
      placement: where the parameters of a part lie.
      precision: by part; others are float32.
      names: parts to read; none for all.
      in_eight_bits: see `models.parts.eight_bits`.
    """
    parts = {}
    for name, component in family_of(folder).components.items():
        if names and component.part not in names:
            continue
        table = component.read_table(component.config(folder / name))
        parts[component.part] = load_params(
            TensorFolder(folder / name),
            table.rules,
            table.abstract,
            aliases=table.aliases,
            ignore=table.ignore,
            dtype=precision.get(component.part, np.dtype(np.float32)),
            placement=placement(component.part),
        )
        if in_eight_bits:
            eight_bits(parts)
    return parts


def read_transformer_adapter(path: pathlib.Path, decoder: Decoder) -> tuple[float, dict]:
    """An adapter of peft or diffusers for any of the transformer's linear maps: its alpha, and its tree in float32.

    Raises:
      FileNotFoundError: no such folder or weights.
      ValueError: see `hf.adapters.read_adapter`.
    """
    abstract = decoder.abstract_parts()["transformer"]
    files = survey_adapter(TensorFolder(path), decoder.transformer_rules(), abstract, aliases=DIFFUSERS_ALIASES)
    adapter = read_adapter(files, np.dtype(np.float32))
    return adapter.alpha, adapter.tree


def check_vocabulary(captioner: Any, decoder: Any, folder: pathlib.Path) -> None:
    """Checks that the decoder's tokenizer makes of every text the ids that the captioner's makes.

    Args:
      captioner, decoder: the tokenizers.
      folder: of the second, for the message.

    Raises:
      ValueError: vocabularies or merges differ.
    """
    ours, theirs = (json.loads(tokenizer.backend_tokenizer.to_str())["model"] for tokenizer in (captioner, decoder))
    if ours["vocab"] != theirs["vocab"]:
        token = next(token for token in {**ours["vocab"], **theirs["vocab"]} if _differ(token, ours, theirs))
        raise ValueError(
            f"{folder} has another vocabulary than the captioner: the token {token!r} is {theirs['vocab'].get(token)} "
            f"there and {ours['vocab'].get(token)} here; captions are given to the decoder by their ids, so take a "
            "decoder of the captioner's family"
        )
    if [list(_pair(merge)) for merge in ours.get("merges", ())] != [list(_pair(m)) for m in theirs.get("merges", ())]:
        raise ValueError(f"{folder} has other merges than the captioner's tokenizer; take a decoder of its family")


def _differ(token: str, ours: Mapping, theirs: Mapping) -> bool:
    return ours["vocab"].get(token) != theirs["vocab"].get(token)


def _pair(merge: Any) -> tuple[str, ...]:
    """A merge, which older files write as one text."""
    return tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge)


def banned_ids(tokenizer: Any, most: int = (1 << 31) - 1) -> tuple[tuple[int, int], ...]:
    """Ranges (first, end) of ids that are no text: control tokens that end no caption, and ids without a token.

    Args:
      tokenizer: of the captioner.
      most: end of the last range; above any vocabulary by default.
    """
    words = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["vocab"].values()
    kept = {*words} - set(tokenizer.added_tokens_decoder) | set(tokens.stop_ids(tokenizer))
    ends = sorted(kept)
    gaps = zip([-1, *ends], [*ends, most])
    return tuple((before + 1, after) for before, after in gaps if after - before > 1)
