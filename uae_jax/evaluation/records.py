"""A JSON-lines file that grows while the work goes on, so that a run that was cut off continues where it stopped."""

import json
import pathlib
from collections.abc import Mapping
from types import TracebackType
from typing import Any


def read_records(path: str | pathlib.Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; a last line that a kill cut off (no newline, not JSON) is left out.

    Raises:
      FileNotFoundError: no such file.
      ValueError: another line is not a JSON object; the message has its number.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; it should hold one JSON object a line")
    *lines, last = path.read_bytes().split(b"\n")
    found = [_record(line, f"{path} line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if last.strip():
        try:
            found.append(_record(last, str(path)))
        except ValueError:
            pass
    return found


def _record(line: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"{where} is not JSON ({error}); mend or delete that line") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where} is not a JSON object; write one object a line")
    return value


class RecordLog:
    """Appends to a JSON-lines file, one whole line at a time; used in a `with` block.

    Args:
      path: made, with its folder, if absent; a last line that was cut off is removed first.

    Attributes:
      records: what the file held when it was opened.

    Raises:
      ValueError: a line of the file is not a JSON object.
    """

    def __init__(self, path: str | pathlib.Path):
        self.path = pathlib.Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.records = read_records(self.path) if self.path.is_file() else []
        self._file = self.path.open("ab")

    def __enter__(self) -> "RecordLog":
        end = self._file.tell()
        if end:
            text = self.path.read_bytes()
            tail = text[text.rfind(b"\n") + 1:]
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
        """Writes one object and hands it to the operating system."""
        self._file.write(json.dumps(record, ensure_ascii=False).encode("utf-8") + b"\n")
        self._file.flush()
