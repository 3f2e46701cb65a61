"""A folder of images in any format as a source: every image checked once (`verdicts`), the bad ones counted and told.

The check reads as training reads, so that nothing which passes it can end a run later.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from uae_jax.data.formats import ImageRecords, ReadOptions, open_records
from uae_jax.data.sources import Example
from uae_jax.data.verdicts import Verdict, verdicts_on

NAMES_TOLD = 3


@dataclasses.dataclass(frozen=True)
class Limits:
    """Which images are used.

    Attributes:
      min_side: shortest side in pixels.
      max_aspect: longer side over shorter side.
      bad_images: "skip" leaves out images that are broken, too small, too thin or copies; "refuse" raises.
    """

    min_side: int = 8
    max_aspect: float = 20.0
    bad_images: str = "skip"


@dataclasses.dataclass(frozen=True)
class FolderSource:
    """Some records of a folder as examples.

    Attributes:
      records: the folder.
      indices: numbers of the records that are used.
      more_captions: captions of copies of an image, by the number of the record that is used.
    """

    records: ImageRecords
    indices: Sequence[int]
    more_captions: Mapping[int, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        record = self.indices[int(index)]
        return self.records.example(record, self.captions(record))

    def captions(self, record: int) -> tuple[str, ...]:
        """The captions of a record and of its copies."""
        return self.records.captions(record) + self.more_captions.get(record, ())

    def parted(self, count: int) -> tuple["FolderSource", "FolderSource"]:
        """The examples without the last `count`, and these."""
        at = len(self.indices) - count
        first, last = (dataclasses.replace(self, indices=part) for part in (self.indices[:at], self.indices[at:]))
        return first, last

    def digest(self) -> str:
        """A digest of the names of the records that are used, in order: 16 hexadecimal digits."""
        found = hashlib.blake2b(digest_size=8)
        for record in self.indices:
            found.update(self.records.name_of(record).encode("utf-8", "surrogateescape") + b"\n")
        return found.hexdigest()

    def captions_digest(self) -> str:
        """A digest of all captions of these records; empty for a format whose captions lie in files with the images."""
        if not self.records.captions_at_hand:
            return ""
        found = hashlib.blake2b(digest_size=8)
        for record in self.indices:
            found.update("\0".join((*self.captions(record), "\n")).encode("utf-8", "surrogateescape"))
        return found.hexdigest()

    def without_caption(self, looked_at: int | None = None) -> int | None:
        """The first record without a caption, or None; of the first `looked_at` examples, None for all."""
        return next((record for record in self.indices[:looked_at] if not self.captions(record)), None)


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What the check of a folder found.

    Attributes:
      folder, format: what was checked.
      images: records of the folder.
      bad: {"broken", "small", "thin" or "duplicate": (name, what is wrong) of each}.
      contents: a digest of the bytes of all images that are used, in order.
    """

    folder: str
    format: str
    images: int
    bad: Mapping[str, tuple[tuple[str, str], ...]]
    contents: str = ""

    @property
    def left_out(self) -> int:
        """Number of images that are not used."""
        return sum(len(found) for found in self.bad.values())

    def told(self, limits: Limits) -> str:
        """The counts with the first names, such as `1 broken (a.jpg), 2 duplicates (b.jpg, c.jpg)`."""
        words = {
            "broken": "broken",
            "small": f"below {limits.min_side} pixels",
            "thin": f"thinner than 1:{limits.max_aspect:g}",
            "duplicate": "of the same bytes as another",
        }
        parts = []
        for kind, found in self.bad.items():
            names = [name for name, _ in found[:NAMES_TOLD]] + (["..."] if len(found) > NAMES_TOLD else [])
            parts += [f"{len(found)} {words[kind]} ({', '.join(names)})"] if found else []
        return ", ".join(parts)

    def record(self) -> dict[str, Any]:
        """For `summary.json`: counts, and the first names with what is wrong."""
        counts = {kind: len(found) for kind, found in self.bad.items()}
        first = [f"{name}: {problem}" for found in self.bad.values() for name, problem in found[:NAMES_TOLD]]
        whole = {"folder": self.folder, "format": self.format, "images": self.images}
        return whole | {"used": self.images - self.left_out, "left_out": counts, "first": first}


@dataclasses.dataclass(frozen=True)
class OpenedFolder:
    """A folder that was opened.

    Attributes:
      source: its examples.
      inspection: what the check found; None where nothing was checked.
      lines: for the reader: the format that was found, and what was left out or could not be kept.
      contents: digest of the bytes of all images that are used; empty where nothing was checked.
    """

    source: FolderSource
    inspection: Inspection | None
    lines: tuple[str, ...]
    contents: str = ""


def open_folder(
    folder: str | pathlib.Path,
    options: ReadOptions | None = None,
    limits: Limits | None = None,
    *,
    name: str = "",
    check: bool = True,
) -> OpenedFolder:
    """Opens a folder of images.

    Args:
      folder: the folder, or COCO's JSON file.
      options: how records are read.
      limits: which images are used.
      name: of the format; empty to find it out.
      check: read and decode every image that was not checked before, and keep what was found.

    Raises:
      FileNotFoundError, ValueError: see `formats.open_records`; bad images where `limits` refuses them; none that can
        be used.
    """
    limits = limits or Limits()
    records = open_records(folder, options or ReadOptions(), name)
    count = f"{len(records):,} image{'s' if len(records) != 1 else ''}"
    line = f"data: {folder} is {records.title} ({count})"
    if not check:
        return OpenedFolder(FolderSource(records, range(len(records))), None, (line,))
    verdicts, unkept = verdicts_on(records)
    source, inspection = inspect(records, str(folder), limits, verdicts)
    lines = (line,)
    if inspection.left_out:
        told = f"{inspection.left_out:,} of {count}"
        if limits.bad_images == "refuse" or not len(source):
            problem = next(found[0] for found in inspection.bad.values() if found)[1]
            remedy = (
                "remove them, or set config.data.bad_images to skip" if len(source) else "give a folder with others"
            )
            why = f"{inspection.told(limits)}; the first: {problem}; {remedy}"
            raise ValueError(f"{folder}: {told} cannot be used: {why}")
        lines = (*lines, f"data: {told} are left out: {inspection.told(limits)}")
    if unkept:
        lines = (*lines, f"data: the check of {folder} is done again at every start, for it cannot be kept ({unkept})")
    contents = hashlib.blake2b("\n".join(verdicts[index].digest for index in source.indices).encode(), digest_size=8)
    return OpenedFolder(source, inspection, lines, contents.hexdigest())


def inspect(
    records: ImageRecords, folder: str, limits: Limits, verdicts: Sequence[Verdict]
) -> tuple[FolderSource, Inspection]:
    """The records that are good by their verdicts, and what is wrong with the others.

    Two rows that name one file are no copies; of copies the first is used, with the captions of all.
    """
    bad: dict[str, list[tuple[str, str]]] = {"broken": [], "small": [], "thin": [], "duplicate": []}
    seen: dict[str, int] = {}
    kept: list[int] = []
    more: dict[int, tuple[str, ...]] = {}
    for index, verdict in enumerate(verdicts):
        name = records.name_of(index)
        kind, problem = judged(verdict, name, limits)
        first = seen.setdefault(verdict.digest, index) if not kind else index
        if kind:
            bad[kind].append((name, problem))
        elif first != index and records.name_of(first) != name:
            bad["duplicate"].append((name, f"{name} has the same bytes as {records.name_of(first)}"))
            own = (*records.captions(first), *more.get(first, ()))
            more[first] = more.get(first, ()) + tuple(text for text in records.captions(index) if text not in own)
        else:
            kept.append(index)
    told = {kind: tuple(found) for kind, found in bad.items()}
    contents = hashlib.blake2b("".join(verdicts[index].digest for index in kept).encode("ascii"), digest_size=8)
    inspection = Inspection(folder, records.name, len(records), told, contents.hexdigest())
    return FolderSource(records, kept, {index: texts for index, texts in more.items() if texts}), inspection


def judged(verdict: Verdict, name: str, limits: Limits) -> tuple[str, str]:
    """(kind of what is wrong or nothing, message) of an image of this name."""
    if verdict.problem:
        return "broken", verdict.problem
    height, width = verdict.height, verdict.width
    size = f"{name} is {width} x {height} pixels"
    if min(height, width) < limits.min_side:
        return "small", f"{size}, and config.data.min_side is {limits.min_side}"
    if max(height, width) > limits.max_aspect * min(height, width):
        return "thin", f"{size}, and config.data.max_aspect is {limits.max_aspect:g}"
    return "", ""
