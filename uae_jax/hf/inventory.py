"""Names and shapes in a folder of weights, compared with those that a model needs."""

import dataclasses
import json
import pathlib
import re
from collections.abc import Sequence

from uae_jax import trees
from uae_jax.files.paths import read_range, to_path
from uae_jax.hf.file_sets import without_variants
from uae_jax.hf.rules import Rule, canonical
from uae_jax.hf.safetensors import Tensors


@dataclasses.dataclass(frozen=True)
class Table:
    """The required tensors of a part's folder: arguments of `hf.rules.load_params`."""

    rules: Sequence[Rule]
    abstract: trees.Tree
    aliases: Sequence[tuple[str, str]] = ()
    ignore: str = ""


@dataclasses.dataclass(frozen=True)
class Fit:
    """How the tensors of a folder fit a model.

    Attributes:
      published: canonical name to name in the files, of the model's tensors that the folder has.
      expected: number of tensors of the model.
      missing: canonical names that the folder lacks.
      unknown: names in the files that the model lacks.
      misshapen: one sentence for each tensor of another shape.
    """

    published: dict[str, str]
    expected: int
    missing: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    misshapen: tuple[str, ...] = ()

    @property
    def matched(self) -> int:
        """The number of tensors that fit."""
        return self.expected - len(self.missing) - len(self.misshapen)


def compare(
    folder: Tensors,
    rules: Sequence[Rule],
    abstract: trees.Tree,
    *,
    aliases: Sequence[tuple[str, str]] = (),
    ignore: str = "",
) -> Fit:
    """Compares the headers of a folder with a model's table; raises nothing.

    The arguments are those of `hf.rules.load_params`.
    """
    wanted = trees.flatten(abstract)
    published, unknown = {}, []
    for name in sorted(folder.names()):
        known = canonical(name, aliases)
        if ignore and re.fullmatch(ignore, known):
            continue
        if known in published:
            unknown.append(f"{name} (the same tensor as {published[known]})")
        else:
            published[known] = name
    table = {source: rule for rule in rules for source in rule.sources()}
    misshapen = []
    for source, rule in table.items():
        if source not in published:
            continue
        target = tuple(wanted[rule.ours].shape)[0 if rule.layers is None else 1 :]
        stored = folder.shape(published[source])
        if rule.our_shape(stored) != target:
            misshapen.append(
                f"{published[source]} is {list(stored)}, which does not fit {list(target)} that config.json asks for"
            )
    unknown += [name for known, name in published.items() if known not in table]
    return Fit(
        {source: published[source] for source in table if source in published},
        len(table),
        tuple(sorted(set(table) - set(published))),
        tuple(unknown),
        tuple(misshapen),
    )


def cut_short(path: str | pathlib.Path) -> str | None:
    """One sentence on the first truncated safetensors file of a folder, or on one file; None if all are complete."""
    path = to_path(path)
    for file in [path] if path.is_file() else without_variants(path.glob("*.safetensors")):
        size = file.stat().st_size
        length = int.from_bytes(read_range(file, 0, 8), "little")
        text = read_range(file, 8, length) if size >= 8 and length < size else b""
        try:
            header = json.loads(text)
            ends = {
                name: 8 + length + entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"
            }
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return f"{file} has no readable header; the file is truncated or not safetensors, copy it again"
        lost = sorted((name for name in ends if ends[name] > size), key=lambda name: ends[name])
        if lost:
            more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
            short = f"{file} is truncated: {size:,} of {max(ends.values()):,} bytes"
            return f"{short}, without the end of {lost[0]}{more}; copy it again"
    return None
