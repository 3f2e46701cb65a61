"""Configuration files: found by path or by name, executed, and changed by the flags of a command line."""

import ast
import difflib
import importlib
import importlib.util
import pathlib
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from uae_jax.settings import unknown_field

PACKAGE = pathlib.Path(__file__).parent
FLAG = "--config."


def builtin_folder() -> pathlib.Path:
    """The configurations of an installed package, or those of the repository."""
    installed = PACKAGE / "configs"
    return installed if installed.is_dir() else PACKAGE.parent / "configs"


def find_config(name: str) -> tuple[pathlib.Path, str | None]:
    """The file and the preset of `--config=NAME[:PRESET]`; NAME is a path, or the name of a built-in configuration.

    Raises:
      FileNotFoundError: there is no such file; names the nearest.
    """
    file, _, preset = name.partition(":")
    for path in (pathlib.Path(file), builtin_folder() / f"{file}.py"):
        if path.is_file():
            return path.absolute(), preset or None
    known = sorted(path.stem for path in builtin_folder().glob("*.py") if "get_config" in path.read_text("utf-8"))
    near = difflib.get_close_matches(pathlib.Path(file).stem, known, 1)
    hint = f"did you mean {near[0]}?" if near else f"built in are {', '.join(known)}"
    raise FileNotFoundError(f"there is no configuration {file}; {hint}")


def load_config(name: str) -> ml_collections.ConfigDict:
    """The configuration of `--config=NAME[:PRESET]`.

    The file may import `configs`, which are its neighbours in a folder of that name and the built-in ones elsewhere.

    Raises:
      FileNotFoundError: see `find_config`.
      ValueError: an unknown preset, or a file without `get_config`.
    """
    path, preset = find_config(name)
    return _module(path).get_config(preset)


def _module(path: pathlib.Path) -> Any:
    configs = types.ModuleType("configs")
    configs.__path__ = [str(path.parent if path.parent.name == "configs" else builtin_folder())]
    sys.modules.setdefault("configs", configs)
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ValueError(f"{path} has no function get_config; a configuration has get_config(preset=None)")
    return module


def machine_presets(config: str) -> list[str]:
    """The presets of a configuration that are made for a machine, such as `...@1x24GB`.

    They are its own, or the ones that all stages of UAE share.

    Raises:
      FileNotFoundError, ValueError: see `load_config`.
    """
    module = _module(find_config(config)[0])
    known = getattr(module, "PRESETS", None) or importlib.import_module("configs.presets").PRESETS
    return [name for name in known if "@" in name]


def split_overrides(arguments: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """The (field, value) pairs of `--config.FIELD=VALUE` or `--config.FIELD VALUE`, and the other arguments."""
    pairs, others, waiting = [], [], None
    for argument in arguments:
        if waiting is not None:
            pairs.append((waiting, argument))
            waiting = None
        elif argument.startswith(FLAG):
            field, equals, value = argument.removeprefix(FLAG).partition("=")
            if equals:
                pairs.append((field, value))
            else:
                waiting = field
        else:
            others.append(argument)
    return pairs + ([(waiting, "")] if waiting is not None else []), others


def apply_overrides(
    config: Mapping[str, Any], overrides: Sequence[tuple[str, str]]
) -> tuple[dict[str, Any], list[str]]:
    """The configuration with the values of a command line, and one line for each that does not fit.

    Args:
      config: all fields, nested.
      overrides: of `split_overrides`; a text takes the type of the value that is there.
    """
    changed, mistakes = _copy(config), []
    for field, text in overrides:
        section, path = changed, field.split(".")
        for depth, name in enumerate(path):
            if not isinstance(section, dict) or name not in section:
                known = section if isinstance(section, dict) else ()
                mistakes.append(unknown_field(".".join(("config", *path[:depth])), name, known))
                break
            if depth == len(path) - 1:
                try:
                    section[name] = parse_value(text, section[name])
                except ValueError as error:
                    mistakes.append(f"config.{field} is {text!r}; {error}")
            else:
                section = section[name]
    return changed, mistakes


def parse_value(text: str, present: Any) -> Any:
    """A value of the type of the present one.

    Raises:
      ValueError: the text is no such value.
    """
    if isinstance(present, dict):
        raise ValueError("it is a section; name one of its fields")
    if isinstance(present, str):
        return text
    if isinstance(present, bool):
        if text.lower() not in ("true", "false", "1", "0"):
            raise ValueError("it must be True or False")
        return text.lower() in ("true", "1")
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if isinstance(present, tuple | list):
        if isinstance(value, str):
            value = tuple(part.strip() for part in value.split(",") if part.strip())
        return tuple(value) if isinstance(value, tuple | list) else (value,)
    if isinstance(present, float) and isinstance(value, int) and not isinstance(value, bool):
        if abs(value) > sys.float_info.max:
            raise ValueError("it must be a finite number")
        return float(value)
    if present is not None and type(value) is not type(present):
        raise ValueError(f"it must be of type {type(present).__name__}")
    return value


def _copy(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _copy(value) if isinstance(value, Mapping) else value for name, value in config.items()}
