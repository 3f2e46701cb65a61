"""JSON files of others, with every fault named by its line."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any


def read_objects(path: pathlib.Path, needed: Mapping[str, type | tuple[type, ...]]) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; blank lines are passed over.

    Args:
      path: the file.
      needed: fields that every object has, and their types.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a line that is not an object with these fields (named by number), or no line at all.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give the file of the benchmark")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file in UTF-8 ({error.reason})") from error
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            found.append(_checked(line, needed, f"{path} line {number}"))
    if not found:
        raise ValueError(f"{path} is empty; give the file of the benchmark")
    return found


def _checked(line: str, needed: Mapping[str, type | tuple[type, ...]], where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON ({error.msg})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where} is not a JSON object")
    for name, kind in needed.items():
        if name not in value:
            raise ValueError(f"{where} has no {name!r}; it has {sorted(value)}")
        if not isinstance(value[name], kind):
            raise ValueError(f"{where} has {name}={value[name]!r}, which is not of the right kind")
    return value


def refuse(problems: Sequence[str], what: str, shown: int = 20) -> None:
    """Prints problems one a line and ends with an error; does nothing without any.

    Raises:
      ValueError: there are problems.
    """
    for problem in problems[:shown]:
        print(problem)
    if len(problems) > shown:
        print(f"... and {len(problems) - shown} more")
    if problems:
        raise ValueError(f"{what} has {len(problems)} problem{'s' if len(problems) > 1 else ''}, listed above")
