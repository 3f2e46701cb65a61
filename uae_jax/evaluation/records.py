"""A JSON-lines file that grows with the work, so that an interrupted run continues."""

import json
import pathlib
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from uae_jax.files.json_files import json_line, read_records
from uae_jax.files.paths import to_path


class RecordLog:
    """Appends complete lines to a JSON-lines file; used in a `with` block.

    Args:
      path: created with its folder if absent; a truncated last line is removed first.

    Attributes:
      records: of the file when it was opened.

    Raises:
      ValueError: a line of the file is not a JSON object.
    """

    def __init__(self, path: str | pathlib.Path):
        self.path = to_path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.records = read_records(self.path) if self.path.is_file() else []
        self._file = self.path.open("ab")

    def __enter__(self) -> "RecordLog":
        end = self._file.tell()
        if end:
            text = self.path.read_bytes()
            tail = text[text.rfind(b"\n") + 1 :]
            try:
                whole = not tail.strip() or bool(json.loads(tail.decode("utf-8")))
            except ValueError:
                whole = False
            if tail and whole:
                self._file.write(b"\n")
            elif tail:
                self._file.truncate(end - len(tail))
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def append(self, record: Mapping[str, Any]) -> None:
        """Writes one object and flushes it."""
        self._file.write(json_line(record))
        self._file.flush()
