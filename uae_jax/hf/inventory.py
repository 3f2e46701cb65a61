"""What a folder of weights holds, beside what a model needs: names and shapes."""

import dataclasses
import json
import pathlib
import re
from collections.abc import Sequence

from uae_jax import trees
from uae_jax.hf.rules import Rule, canonical
from uae_jax.hf.safetensors import TensorFolder


@dataclasses.dataclass(frozen=True)
class Fit:
    """How the tensors of a folder fit a model.

    Attributes:
      published: the model's tensors that are there: canonical name to the name in the files.
      expected: number of tensors that the model has.
      missing, unknown: canonical names that the folder lacks; names in the files that the model has not.
      misshapen: one sentence for each tensor of another shape.
    """

    published: dict[str, str]
    expected: int
    missing: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    misshapen: tuple[str, ...] = ()

    @property
    def matched(self) -> int:
        """Tensors that fit."""
        return self.expected - len(self.missing) - len(self.misshapen)


def compare(
    folder: TensorFolder,
    rules: Sequence[Rule],
    abstract: trees.Tree,
    *,
    aliases: Sequence[tuple[str, str]] = (),
    ignore: str = "",
) -> Fit:
    """The tensors of a folder beside a model's table; the arguments are those of `hf.rules.load_params`.

    Only headers are read, and nothing is raised: everything that does not fit is in the result.
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
    """What is lost of a safetensors file, or of the first such file of a folder, that is not complete; None if all are
    whole.
    """
    path = pathlib.Path(path)
    for file in [path] if path.is_file() else sorted(path.glob("*.safetensors")):
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            text = stream.read(length) if size >= 8 and length < size else b""
        try:
            header = json.loads(text)
            ends = {
                name: 8 + length + entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"
            }
        except (ValueError, KeyError, TypeError, AttributeError):
            return f"{file} has no readable header; it is cut short or not a safetensors file, copy it again"
        lost = sorted((name for name in ends if ends[name] > size), key=ends.get)
        if lost:
            more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
            short = f"{file} is cut short: {size:,} of {max(ends.values()):,} bytes"
            return f"{short}, without the end of {lost[0]}{more}; copy it again"
    return None
