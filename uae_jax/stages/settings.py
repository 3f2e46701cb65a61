"""Configs become frozen dataclasses here, once, at the edge."""

import dataclasses
import difflib
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def frozen(cls: type[T], config: Mapping[str, Any], path: str = "config") -> T:
    """A frozen dataclass from a mapping of the same fields; nested dataclasses are made from nested mappings.

    Args:
      cls: the dataclass.
      config: an `ml_collections.ConfigDict` or a dictionary; lists become tuples.
      path: how the mapping is called in messages, such as `config.pretrain`.

    Raises:
      ValueError: a field that the dataclass does not have (with the nearest name), or one that it needs and is not
        there.
    """
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name in config:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, 1)
            hint = f"; did you mean {path}.{near[0]}?" if near else f"; it has {', '.join(fields)}"
            raise ValueError(f"{path}.{name} does not exist{hint}")
    values = {}
    for name, field in fields.items():
        if name in config:
            values[name] = _value(hints[name], config[name], f"{path}.{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{path}.{name} is not set")
    return cls(**values)


def _value(hint: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint) and not isinstance(value, hint):
        return frozen(hint, value, path)
    if isinstance(value, list | tuple):
        return tuple(value)
    if hint is float and isinstance(value, int):
        return float(value)
    if hint in (int, float, str, bool) and not isinstance(value, hint):
        raise ValueError(f"{path} is {value!r}; it must be of type {hint.__name__}")
    return value
