"""The check of every image of a folder, once: what it found is kept beside the data, and later starts read that.

A verdict holds while size and time of its file are the same (`kept`). It says what the image is; whether that is good
enough follows from the settings of the run.
"""

import concurrent.futures
import contextlib
import hashlib
import time
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

import PIL
from tqdm import tqdm

from uae_jax.data.formats import ImageRecords
from uae_jax.data.kept import Stamp, keep, read_kept, stamps

NAME = "checked"
# what is readable depends on the decoders
VERSION = f"1, Pillow {PIL.__version__}"
CHECKED_AT_ONCE = 1024
SECONDS = 60.0  # what was found is kept so often while a folder is checked
FOLDER = "\0"  # stands for the folder in a message that is kept


class Verdict(NamedTuple):
    """What the check found of an image.

    Attributes:
      height, width: upright, in pixels; 0 where it cannot be read.
      digest: of its bytes, hexadecimal; copies of an image have the same.
      problem: why it cannot be read, in one line; empty where it can.
    """

    height: int = 0
    width: int = 0
    digest: str = ""
    problem: str = ""


def verdicts_on(records: ImageRecords) -> tuple[list[Verdict], str]:
    """The verdict on every record, by what is kept where that still holds.

    Returns:
      The verdicts in order, and why they could not be kept, or nothing.
    """
    known = _Known(records)
    found = [known.verdict(index) for index in range(len(records))]
    missing = [index for index, verdict in enumerate(found) if verdict is None]
    if not missing:
        return [verdict for verdict in found if verdict is not None], known.keep()
    due = time.monotonic() + SECONDS
    try:
        with contextlib.closing(_looked_at(records, missing)) as looks:
            for index, verdict, lasting in looks:
                found[index] = verdict
                if lasting:
                    known.add(index, verdict)
                if time.monotonic() > due:
                    known.keep()
                    due = time.monotonic() + SECONDS
    finally:  # also where a person stops the check
        problem = known.keep()
    return [verdict for verdict in found if verdict is not None], problem


def look(records: ImageRecords, index: int) -> tuple[Verdict, bool]:
    """Reads one record as training reads it: the verdict, and whether it will be the same the next time."""
    try:
        records.captions(index)
        content = records.encoded(index)
        height, width = records.measured(index, content)
    except ValueError as error:
        cause = error.__cause__
        passing = isinstance(cause, MemoryError) or isinstance(cause, OSError) and cause.errno is not None
        return Verdict(problem=" ".join(str(error).split())), not passing
    except OSError as error:  # a link to nothing, or a disk that does not answer
        return Verdict(problem=" ".join(str(error).split())), False
    return Verdict(height, width, hashlib.blake2b(content, digest_size=16).hexdigest()), True


def _looked_at(records: ImageRecords, indices: Sequence[int]) -> Generator[tuple[int, Verdict, bool]]:
    """(number, verdict, whether it lasts) of these records, read in parallel."""
    with (
        concurrent.futures.ThreadPoolExecutor() as pool,
        tqdm(total=len(indices), desc="data: checking", disable=None, leave=False) as bar,
    ):
        for start in range(0, len(indices), CHECKED_AT_ONCE):
            some = indices[start : start + CHECKED_AT_ONCE]
            for index, (verdict, lasting) in zip(some, pool.map(lambda index: look(records, index), some)):
                bar.update(1)
                yield index, verdict, lasting


class _Known:
    """The verdicts that are kept of a folder: {scope: {file: [size, time, {name: verdict}]}}.

    A verdict is [height, width, digest] or [problem]; the name is empty where it is that of the file.
    """

    def __init__(self, records: ImageRecords):
        self.records = records
        listed = dict.fromkeys(records.file_of(index) for index in range(len(records)))
        listed.pop("", None)
        contents = read_kept(records.folder, NAME, VERSION)
        listed |= dict.fromkeys(file for content in contents for files in content.values() for file in files)
        # before anything is read: what changes while it is checked is checked again
        self.stamps: dict[str, Stamp] = stamps(records.folder, listed)
        self.kept: dict[str, dict[str, list[Any]]] = {records.scope: {}}
        self.changed = False
        for content in contents:
            for scope, files in content.items():
                holding = {file: entry for file, entry in files.items() if self.stamps.get(file) == tuple(entry[:2])}
                self.changed |= len(holding) < len(files)
                self.kept[scope] = self.kept.get(scope, {}) | holding
        self.files = self.kept[records.scope]

    def _place(self, index: int) -> tuple[str, str]:
        file, name = self.records.file_of(index), self.records.name_of(index)
        return file, "" if name == file else name

    def verdict(self, index: int) -> Verdict | None:
        """The verdict on a record that holds, or None."""
        file, name = self._place(index)
        entry = self.files.get(file)
        if entry is None or name not in entry[2]:
            return None
        value = entry[2][name]
        if len(value) == 1:
            return Verdict(problem=value[0].replace(FOLDER, str(self.records.folder)))
        return Verdict(*value)

    def add(self, index: int, verdict: Verdict) -> None:
        """Adds a verdict, unless its file is unknown."""
        file, name = self._place(index)
        if file not in self.stamps:
            return
        entry = self.files.setdefault(file, [*self.stamps[file], {}])
        problem = verdict.problem.replace(str(self.records.folder), FOLDER)
        entry[2][name] = [problem] if problem else list(verdict[:3])
        self.changed = True

    def keep(self) -> str:
        """Keeps what is known, where it has changed; why that was not possible, or nothing."""
        if not self.changed:
            return ""
        problem = keep(self.records.folder, NAME, VERSION, self.kept)
        self.changed = bool(problem)
        return problem
