"""What frozen parts make of examples, computed once: arrays in array_record shards, and a manifest beside them.

`stages.precompute` writes such a folder, and `stages.precomputed` lets a run read it. A record is a tf.train.Example
whose features are the bytes of arrays (little-endian, rows first); the manifest has their shapes and precisions.
"""

import contextlib
import dataclasses
import itertools
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import grain
import ml_dtypes  # noqa: F401  (numpy then knows bfloat16 by name)
import numpy as np

from uae_jax.data.formats.record_files import record_file
from uae_jax.data.formats.tf_example import bytes_features, bytes_message
from uae_jax.data.loader import RowBuilder
from uae_jax.data.mixture import Mixture
from uae_jax.data.qwen_inputs import Fields
from uae_jax.data.sources import Example, Source
from uae_jax.files.json_files import write_json
from uae_jax.files.paths import to_path
from uae_jax.files.whole import replacing

FILE, VERSION = "precomputed.json", 1
COMMAND = "python -m uae_jax.precompute"
SHARD_BYTES = 2**28
MOST_SHARDS = 512  # a shard that was read from stays an open file
# arrays whose first axis is that of tokens, and the field that says which of them there are
MASKS = {"caption_ids": "caption_mask", "text_states": "text_mask"}


@dataclasses.dataclass(frozen=True)
class Kind:
    """One array of every example.

    Attributes:
      shape: of an example; None for the first axis where its length differs between examples.
      dtype: by name.
    """

    shape: tuple[int | None, ...]
    dtype: str

    def byte_size(self, length: float = 1) -> float:
        """Bytes of an example whose first axis has `length` entries, where lengths differ."""
        sizes = [length if size is None else size for size in self.shape]
        return float(np.prod(sizes)) * np.dtype(self.dtype).itemsize

    def array(self, content: bytes) -> np.ndarray:
        """The array of its bytes.

        Raises:
          ValueError: they are not of this kind.
        """
        return np.frombuffer(content, np.dtype(self.dtype)).reshape(
            [-1 if size is None else size for size in self.shape]
        )


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a folder of precomputed inputs holds.

    Attributes:
      made_of: {section: {what it depends on: value}}; those of parts have the part's name.
      parts: what was computed, such as `latents`.
      arrays: of every example, by name.
      examples: records of the whole folder.
      shard_examples: records of each shard but the last.
      shards: bytes of each shard; empty until all are written.
      made_by: versions and devices, for people.
    """

    made_of: Mapping[str, Mapping[str, Any]]
    parts: tuple[str, ...]
    arrays: Mapping[str, Kind]
    examples: int
    shard_examples: int
    shards: tuple[int, ...] = ()
    made_by: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def count(self) -> int:
        """Number of shards."""
        return -(-self.examples // self.shard_examples)

    def size(self, shard: int) -> int:
        """Records of a shard."""
        return min(self.shard_examples, self.examples - shard * self.shard_examples)

    def records(self, shard: int) -> range:
        """Numbers of the records of a shard."""
        first = shard * self.shard_examples
        return range(first, first + self.size(shard))

    @staticmethod
    def name(shard: int) -> str:
        """The file of a shard."""
        return f"inputs-{shard:05d}.array_record"


def shard_examples_of(example_bytes: float, examples: int, batch: int) -> int:
    """Records of a shard: a multiple of the batch, so large that shards have 256 MiB and are at most 512."""
    wanted = max(SHARD_BYTES / example_bytes, examples / MOST_SHARDS)
    return max(1, -(-int(wanted) // batch)) * batch


def read_manifest(folder: str | pathlib.Path) -> Manifest:
    """The manifest of a folder.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is damaged, or of another version.
    """
    path = to_path(folder) / FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no precomputed inputs, for it has no {FILE}; make them by `{COMMAND} --config=... "
            f"--out={folder}` (docs/precompute.md)"
        )
    try:
        content = json.loads(path.read_bytes())
        if content["version"] != VERSION:
            raise ValueError(f"it is of version {content['version']}, and this is {VERSION}")
        fields = {name: content[name] for name in ("made_of", "examples", "shard_examples", "made_by")}
        kinds = {name: Kind(tuple(kind["shape"]), kind["dtype"]) for name, kind in content["arrays"].items()}
        shards, parts = tuple(map(int, content["shards"])), tuple(content["parts"])
        manifest = Manifest(**fields, parts=parts, arrays=kinds, shards=shards)
        if manifest.examples < 1 or manifest.shard_examples < 1 or len(shards) not in (0, manifest.count):
            raise ValueError("its counts do not fit each other")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} cannot be used ({error}); delete {folder} and make it again by `{COMMAND}`"
        ) from error
    return manifest


def write_manifest(folder: pathlib.Path, manifest: Manifest) -> None:
    """Writes the manifest of a folder, completely or not at all."""
    content = {"uae_jax": "precomputed inputs", "version": VERSION, **dataclasses.asdict(manifest)}
    write_json(folder / FILE, content)


def shard_problem(folder: pathlib.Path, manifest: Manifest) -> str:
    """What is wrong with the files of a folder, in one line; empty where all are there and have their sizes."""
    again = "run its command again, which goes on where it is not done"
    if not manifest.shards:
        there = sum((folder / manifest.name(shard)).is_file() for shard in range(manifest.count))
        return f"{folder} is not complete: it has {there} of {manifest.count} shards; {again}"
    for shard, size in enumerate(manifest.shards):
        path = folder / manifest.name(shard)
        if not path.is_file():
            return f"{path} is not there; {again}"
        if path.stat().st_size != size:
            return f"{path} is damaged: it has {path.stat().st_size:,} bytes, not {size:,}; delete it and {again}"
    return ""


def write_shard(path: pathlib.Path, examples: Iterable[Mapping[str, np.ndarray]]) -> None:
    """Writes a shard of examples by their arrays; a kill leaves the whole file or none.

    Raises:
      OSError: it cannot be written.
    """
    from array_record.python.array_record_module import ArrayRecordWriter  # slow, needed only here

    with replacing(path) as partial:
        # numbers of neural networks do not compress: it would cost the time of reading and save a few percent
        writer = ArrayRecordWriter(str(partial), "group_size:1,uncompressed")
        try:
            for arrays in examples:
                message = bytes_message({name: array.tobytes() for name, array in arrays.items()})
                with _written(path):
                    writer.write(message)
        except BaseException:
            with contextlib.suppress(Exception):
                writer.close()
            raise
        with _written(path):
            writer.close()


@contextlib.contextmanager
def _written(path: pathlib.Path) -> Iterator[None]:
    """The writer's C++ errors, which have no common base, are errors of the system with the file's name."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())
        raise OSError(f"{path} cannot be written ({reason}); see to room and rights") from error


def records_in(path: pathlib.Path) -> int:
    """Records of a shard; 0 for a file that is no whole shard."""
    from array_record.python.array_record_data_source import ArrayRecordDataSource  # slow, needed only here

    try:
        return len(ArrayRecordDataSource(record_file(path)))
    except Exception:  # the reader's C++ errors have no common base
        return 0


class StoredExamples:
    """The records of a folder by number; it may be sent to worker processes.

    Args:
      folder: complete (`shard_problem`).
      manifest: of it.
    """

    def __init__(self, folder: pathlib.Path, manifest: Manifest):
        from array_record.python.array_record_data_source import ArrayRecordDataSource  # slow, needed only here

        self.folder, self.manifest = folder, manifest
        # with the number of records in the name no file is opened until it is read from
        names = [f"{record_file(folder / manifest.name(at))}[0:{manifest.size(at)}]" for at in range(manifest.count)]
        self.data: Any = ArrayRecordDataSource(names)

    def __len__(self) -> int:
        return self.manifest.examples

    def __getitem__(self, record: int) -> dict[str, np.ndarray]:
        """The arrays of a record.

        Raises:
          ValueError: its shard is damaged; the message names it.
        """
        try:
            features = bytes_features(self.data[record])
            return {name: kind.array(features[name][0]) for name, kind in self.manifest.arrays.items()}
        except Exception as error:  # a damaged chunk raises the reader's own errors
            shard, place = divmod(int(record), self.manifest.shard_examples)
            path, reason = self.folder / self.manifest.name(shard), " ".join(str(error).split())
            raise ValueError(
                f"{path} is damaged at record {place} ({reason}): delete the file and run `{COMMAND}` again, which "
                "makes it anew"
            ) from error


class Distinct:
    """The examples of a source, each once: of a mixture those of its sources, one source after the other."""

    def __init__(self, source: Source):
        self.source = source
        self.sources = source.sources if isinstance(source, Mixture) else (source,)
        self.starts = [0, *itertools.accumulate(len(part) for part in self.sources)]

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, number: int) -> Example:
        part = max(at for at, start in enumerate(self.starts[:-1]) if start <= number)
        return self.sources[part][number - self.starts[part]]

    def number(self, index: int) -> int:
        """The number of the example that the source has at an index."""
        if not isinstance(self.source, Mixture):
            return int(index)
        part, inside = self.source.place_of(index)
        return self.starts[part] + inside


def first_read(source: Source, seed: int, samples: int) -> list[int]:
    """Numbers (`Distinct`) of the examples that the loader reads as its first samples, each once, in its order."""
    order, distinct = grain.MapDataset.range(len(source)).shuffle(seed=seed), Distinct(source)
    return list(dict.fromkeys(distinct.number(cast(int, order[at])) for at in range(min(samples, len(source)))))


@dataclasses.dataclass(frozen=True)
class Precomputed:
    """An example as it is read: the arrays that are stored of it, and itself where more is needed."""

    arrays: Mapping[str, np.ndarray]
    example: Example | None


class PrecomputedSource:
    """A source of the same length and order whose items have what was computed of them.

    Args:
      source: the examples.
      stored: their records.
      numbers: of the examples that are stored (`first_read`), in the order of the records; None for all.
      whole: whether the examples are read too, such as for their pixels.
    """

    def __init__(self, source: Source, stored: StoredExamples, numbers: Sequence[int] | None, *, whole: bool):
        self.source, self.stored, self.whole = source, stored, whole
        self.distinct = Distinct(source)
        self.records = None if numbers is None else {number: record for record, number in enumerate(numbers)}

    def __len__(self) -> int:
        return len(self.source)

    def record(self, index: int) -> int:
        """The record of an index.

        Raises:
          ValueError: it is not stored.
        """
        number = self.distinct.number(index)
        record = number if self.records is None else self.records.get(number)
        if record is None:
            raise ValueError(
                f"example {index} is not in {self.stored.folder}, which holds the first {len(self.stored)} that its "
                f"command counted; run `{COMMAND}` with a larger --examples"
            )
        return record

    def __getitem__(self, index: int) -> Precomputed:
        return Precomputed(self.stored[self.record(index)], self.source[index] if self.whole else None)


@dataclasses.dataclass(frozen=True)
class PrecomputedRows:
    """Turns what is stored of an example into the fields of a row.

    Attributes:
      rows: of the fields that are made of the example itself.
      wanted: fields of the row.
      room: {array: length to which its first axis is filled with zeros}.
    """

    rows: RowBuilder
    wanted: frozenset[str]
    room: Mapping[str, int]

    def __call__(self, sample_id: int, item: Precomputed) -> Fields:
        """All fields of one row."""
        fields: Fields = {"sample_id": np.int32(sample_id % 2**31)}
        if item.example is not None:
            fields = self.rows(sample_id, item.example)
        return fields | {name: value for name, value in padded(item.arrays, self.room) if name in self.wanted}


def padded(arrays: Mapping[str, np.ndarray], room: Mapping[str, int]) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) of every array, those of tokens at their full length and followed by their mask."""
    for name, array in arrays.items():
        if name not in MASKS:
            yield name, array
            continue
        full = np.zeros((room[name], *array.shape[1:]), array.dtype)
        full[: len(array)] = array
        yield name, full
        yield MASKS[name], np.arange(room[name]) < len(array)


def spread(count: int, wanted: int) -> list[int]:
    """`wanted` numbers below `count` at equal distances, the first of them 0; numbers repeat where there are fewer."""
    return [at * count // wanted for at in range(wanted)]


class Picked:
    """Some examples of a source by their numbers, for a loader that reads them once in order."""

    def __init__(self, examples: Distinct, numbers: Sequence[int]):
        self.examples, self.numbers = examples, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Example:
        return self.examples[self.numbers[int(index)]]
