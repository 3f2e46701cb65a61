"""JSON files and JSON-lines files, written whole."""

import json
import pathlib
from collections.abc import Iterable
from typing import Any

from uae_jax.files.whole import write_bytes


def write_json(path: str | pathlib.Path, value: Any, indent: int = 2) -> None:
    """Writes a JSON file, whole or not at all, in a folder that is made if absent."""
    write_bytes(path, (json.dumps(value, indent=indent) + "\n").encode("utf-8"))


def write_json_lines(path: str | pathlib.Path, values: Iterable[Any]) -> None:
    """Writes one JSON value a line, whole or not at all, in a folder that is made if absent."""
    write_bytes(path, "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values).encode("utf-8"))
