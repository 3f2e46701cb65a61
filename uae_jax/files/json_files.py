"""JSON and JSON-lines files, written completely or not at all, and read with an error message for each bad line."""

import contextlib
import hashlib
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from uae_jax.files.paths import to_path
from uae_jax.files.whole import write_bytes


def read_json(folder: str | pathlib.Path, name: str = "config.json") -> dict[str, Any]:
    """One JSON file of a model folder.

    Raises:
      FileNotFoundError: the folder has no such file.
      ValueError: the file is not a JSON object.
    """
    path = to_path(folder) / name
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; copy it from the source of the weights")
    try:
        value = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); copy it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object; copy it again")
    return value


def read_class_json(folder: str | pathlib.Path, class_name: str) -> dict[str, Any]:
    """The `config.json` of one model of diffusers.

    Raises:
      FileNotFoundError: the folder has no such file.
      ValueError: the file is not a JSON object, or of another class.
    """
    stored = read_json(folder)
    found = stored.get("_class_name", stored.get("model_type", class_name))
    if found != class_name:
        raise ValueError(
            f"{to_path(folder) / 'config.json'}: the folder holds a {found!r} model, expected {class_name!r}; "
            "give the folder of that model"
        )
    return stored


def image_processor_settings(folder: str | pathlib.Path) -> dict[str, Any]:
    """An image processor's settings: preprocessor_config.json, or their part of transformers 5's processor_config.json.

    Raises:
      FileNotFoundError: the folder has neither file, or the second without `image_processor`.
      ValueError: the file is not a JSON object.
    """
    place, older, newer = to_path(folder), "preprocessor_config.json", "processor_config.json"
    if not (place / older).is_file() and (place / newer).is_file():
        nested = read_json(place, newer).get("image_processor")
        if isinstance(nested, dict):
            return nested
        if nested is not None:
            raise ValueError(f"{place / newer}: image_processor is {nested!r}, not a section; copy it again")
    return read_json(place, older)


def write_json(path: str | pathlib.Path, value: Any, indent: int = 2) -> None:
    """Writes a JSON file completely or not at all; creates the folder if absent."""
    write_bytes(path, (json.dumps(value, indent=indent) + "\n").encode("utf-8"))


def read_text(path: str | pathlib.Path) -> str:
    """A text file in UTF-8, with or without a byte-order mark.

    Raises:
      FileNotFoundError: no such file.
      ValueError: another encoding.
    """
    path = to_path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file in UTF-8 ({error.reason}): save it in UTF-8") from error


def json_digest(value: Any) -> str:
    """A digest of a value, 16 hexadecimal digits, independent of the order of keys; non-JSON values enter as text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def write_json_lines(path: str | pathlib.Path, values: Iterable[Any]) -> None:
    """Writes one JSON value per line, completely or not at all; creates the folder if absent."""
    write_bytes(path, b"".join(map(json_line, values)))


def json_line(value: Any) -> bytes:
    """One line of a JSON-lines file in UTF-8; text with half a character, as in odd file names, is escaped."""
    try:
        return json.dumps(value, ensure_ascii=False).encode("utf-8") + b"\n"
    except UnicodeEncodeError:
        return json.dumps(value).encode("ascii") + b"\n"


def read_records(path: str | pathlib.Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file of ours, without a last line that a kill truncated (no newline, not JSON).

    A person's own file is read by `read_objects`, which names such a line.

    Raises:
      FileNotFoundError: no such file.
      ValueError: another line is not a JSON object; the message has its number.
    """
    path = to_path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; it should hold one JSON object per line")
    *lines, last = path.read_bytes().split(b"\n")
    found = [value for _, value in json_objects(lines, path)]
    with contextlib.suppress(ValueError):
        found += [value for _, value in json_objects([last], path)]
    return found


def read_objects(
    path: pathlib.Path, needed: Mapping[str, type | tuple[type, ...]], remedy: str = "give the file of the benchmark"
) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file of a person or a benchmark, without blank lines.

    Args:
      path: the file.
      needed: fields that every object needs, and their types.
      remedy: the end of the message about a file that is absent or empty.

    Raises:
      FileNotFoundError: no such file.
      ValueError: an empty file, or a line that is not an object with these fields; the message has its number.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; {remedy}")
    found = []
    for where, value in json_objects(path.read_bytes().split(b"\n"), path):
        for name, kind in needed.items():
            if name not in value:
                raise ValueError(f"{where} has no {name!r}; it has {sorted(value)}")
            if not isinstance(value[name], kind):
                raise ValueError(f"{where} has {name}={value[name]!r}, which is not of the right kind")
        found.append(value)
    if not found:
        raise ValueError(f"{path} is empty; {remedy}")
    return found


def json_objects(lines: Iterable[bytes], path: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place for messages, object) of every line that is not blank, without a byte-order mark before the first.

    Raises:
      ValueError: a line is not a JSON object; the message has its number.
    """
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{path} line {number}"
            try:
                value = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where} is not JSON ({error}); correct or delete that line") from error
            if not isinstance(value, dict):
                raise ValueError(f"{where} is not a JSON object; write one object per line")
            yield where, value
