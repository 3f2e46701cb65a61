"""Which files of a folder hold its weights: one file, numbered shards, or what an index names; never two sets."""

import json
import pathlib
import re
from collections.abc import Iterable, Mapping

from uae_jax.hf.formats import TORCH_SUFFIXES, other_format


def index_of(path: pathlib.Path) -> pathlib.Path | None:
    indexes = without_variants(path.glob("*.safetensors.index.json")) if path.is_dir() else []
    if len(indexes) > 1:
        raise ValueError(
            f"{indexes[0]} and {indexes[1].name} are both there, of two sets of weights; keep one of them and its files"
        )
    return indexes[0] if indexes else None


NAME = re.compile(r"([^.]+?)(?:\.([^.]+?))?(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


def without_variants(files: Iterable[pathlib.Path]) -> list[pathlib.Path]:
    """The files by name, without hidden ones, and without variants beside plain files: `model.fp16.safetensors`."""
    listed = [(file, NAME.fullmatch(file.name)) for file in sorted(files) if not file.name.startswith(".")]
    plain = {(match[1], match[4]) for _, match in listed if match and not match[2]}
    return [file for file, match in listed if not (match and match[2] and (match[1], match[4]) in plain)]


def check_single(path: pathlib.Path, index: pathlib.Path | None) -> None:
    """Weights beside an index and not in it, or two sets of shards, would be a second truth about one model."""
    if not path.is_dir():
        return
    if index is not None:
        known = set(_weight_map(index).values())
        others = [file for file in without_variants(path.glob("*.safetensors")) if file.name not in known]
        if others:
            raise ValueError(
                f"{path} holds two sets of weights, the shards of {index.name} and {others[0].name}, which it does not "
                f"name; delete {index.name} and its shards if {others[0].name} is the newer one, or that file if not"
            )
        return
    sets: dict[str, pathlib.Path] = {}
    for file in without_variants(path.glob("*.safetensors")):
        found = re.fullmatch(r"(.+)-\d{5}-of-(\d{5})\.safetensors", file.name)
        single = path / f"{found[1]}.safetensors" if found else None
        if found and single and single.is_file():
            raise ValueError(
                f"{path} holds two sets of weights, {single.name} and {file.name}; keep the newer one, delete the other"
            )
        if found and sets.setdefault(found[1], file).name[-17:] != file.name[-17:]:
            raise ValueError(
                f"{path} holds two sets of shards, {sets[found[1]].name} and {file.name}; keep the newer set"
            )


def _weight_map(index: pathlib.Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_bytes().decode("utf-8-sig"))["weight_map"]
        return {str(name): str(shard) for name, shard in weight_map.items()}
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{index} is not an index of weights (JSON with a weight_map); copy it again") from None


def shards(index: pathlib.Path, path: pathlib.Path) -> list[pathlib.Path]:
    shards = sorted(set(_weight_map(index).values()))
    odd = [shard for shard in shards if pathlib.PurePath(shard).name != shard or not shard.isprintable()]
    if odd:
        raise ValueError(f"{index} names {ascii(odd[0])}, which is no name of a file in its folder; copy it again")
    missing = [shard for shard in shards if not (path / shard).is_file()]
    if missing:
        raise FileNotFoundError(f"{index} names {missing[0]}, which is not in the folder; copy it there")
    return [path / shard for shard in shards]


def weight_files(path: pathlib.Path) -> list[pathlib.Path]:
    if path.is_file():
        return [path]
    files = without_variants(path.glob("*.safetensors"))
    if not files:
        remedy = other_format(path) or "give the folder that holds the weights"
        raise FileNotFoundError(f"no safetensors file in {path}; {remedy}")
    return files


def check_index(index: pathlib.Path, files: Mapping[str, pathlib.Path], path: pathlib.Path) -> None:
    """Every tensor is in the shard that the index says, and no shard holds one that the index does not list."""
    said = _weight_map(index)
    for name, shard in said.items():
        if files.get(name) != path / shard:
            found = f"it is in {files[name].name}" if name in files else "no shard holds it"
            raise ValueError(
                f"{index} says that {name} is in {shard}, but {found}; copy index and shards again from one place"
            )
    unlisted = sorted(set(files) - set(said))
    if unlisted:
        raise ValueError(
            f"{files[unlisted[0]]} holds {unlisted[0]}, which {index.name} does not list; copy index and shards "
            "again from one place"
        )


def unread_weights(path: pathlib.Path) -> list[str]:
    """Names of weight files beside the safetensors that are read, in other formats and precisions."""
    if not path.is_dir() or not any(path.glob("*.safetensors")):
        return []
    read = {file.name for file in without_variants(path.glob("*.safetensors"))}
    kinds = (".safetensors", ".gguf", ".h5", ".msgpack", *TORCH_SUFFIXES)
    files = (file.name for file in path.iterdir() if file.is_file() and file.name != "training_args.bin")
    return sorted(name for name in files if name.endswith(kinds) and name not in read)
