"""One home for every setting: a field of a frozen dataclass with its default, range, meaning, unit and source.

    @dataclasses.dataclass(frozen=True)
    class Sampling(Settings):
        steps: int = setting(10, "denoising steps", low=1)

A configuration file is a mapping of the same fields. `read` makes the dataclasses of it and lists every mistake;
`frozen` raises them. `describe` prints the fields. Sections that a registry names (the methods of a stage) stand in
one field made by `sections`, and beside the other fields in the mapping.
"""

import dataclasses
import difflib
import math
import sys
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, TypeVar

import ml_collections

T = TypeVar("T")
MISSING = object()
# jax.random.key uses 32 bits: of a greater seed it takes the lower ones, so that two seeds would be one stream
LAST_SEED = 2**32 - 1
LAST_NUMBER = 2**31 - 1  # of counts, which become int32 on devices


@dataclasses.dataclass(frozen=True)
class Meaning:
    """What a setting is, beside its name, type and default.

    Attributes:
      text: one line.
      unit: such as `tokens`; empty for none.
      source: where the default comes from, such as an arXiv number; empty where it is this project's choice.
      choices: the values that exist; empty for any.
      low, high: the range, ends included; None for no end.
      above: the range begins above this number.
      free: whether it may change when a run continues: it changes memory, speed or places, and not the method.
    """

    text: str
    unit: str = ""
    source: str = ""
    choices: tuple = ()
    low: float | None = None
    high: float | None = None
    above: float | None = None
    free: bool = False

    def allowed(self) -> str:
        """The range in words, or an empty text."""
        if self.choices:
            return " | ".join(str(choice) or "''" for choice in self.choices)
        ends = [(self.above, "above"), (self.low, "at least"), (self.high, "at most")]
        shown = {end: f"{end:g}" if isinstance(end, float) else str(end) for end, _ in ends if end is not None}
        return ", ".join(f"{word} {shown[end]}" for end, word in ends if end is not None)

    def problem(self, value: Any) -> str | None:
        """What is wrong with a value, as the end of a sentence; None when nothing is."""
        if isinstance(value, tuple) and not any(isinstance(choice, tuple) for choice in self.choices):
            found = (self.problem(item) for item in value)
            return next((problem for problem in found if problem), None)
        if self.choices and value not in self.choices:
            near = difflib.get_close_matches(str(value), [str(choice) for choice in self.choices], 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            return f"choose one of {', '.join(str(choice) for choice in self.choices)}{hint}"
        if not isinstance(value, int | float) or isinstance(value, bool):
            return None
        most = LAST_NUMBER if isinstance(value, int) and self.high is None else None
        if most is not None and value > most:
            return f"it must be at most {most}"
        inside = (
            (isinstance(value, int) or math.isfinite(value))
            and (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
        )
        return None if inside else f"it must be {self.allowed() or 'a finite number'}"


def setting(default: Any, text: str, **more: Any) -> Any:
    """A field of a `Settings` dataclass.

    Args:
      default: its value where nothing else is written.
      text: what it is, in one line.
      **more: `unit`, `source`, `choices`, `low`, `high`, `above`, `free` of `Meaning`.
    """
    meaning = {"meaning": Meaning(text, **more)}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=default.copy, metadata=meaning)
    return dataclasses.field(default=default, metadata=meaning)


def changed(cls: type, name: str, default: Any, **more: Any) -> Any:
    """A field that a base class has, with another default.

    Args:
      cls: the base class; name: of its field.
      default: the new one.
      **more: what else differs in `Meaning`, such as `source`.
    """
    base = next(field for field in dataclasses.fields(cls) if field.name == name)
    meaning = (
        dataclasses.replace(base.metadata["meaning"], source="") if "source" not in more else base.metadata["meaning"]
    )
    return dataclasses.field(default=default, metadata={"meaning": dataclasses.replace(meaning, **more)})


def sections(registry: Callable[[], Mapping[str, type]]) -> Any:
    """A field that holds one settings dataclass for each name of a registry, `{name: settings}`.

    Args:
      registry: the names and their dataclasses; it is called late, so that others may add to it.
    """

    def factory() -> dict[str, Any]:
        return {name: kind() for name, kind in registry().items()}

    return dataclasses.field(default_factory=factory, metadata={"sections": registry})


class Mistakes(ValueError):
    """Settings that are wrong.

    Attributes:
      lines: one for each mistake.
    """

    def __init__(self, lines: list[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks."""
    return " ".join(str(error).split())


@dataclasses.dataclass(frozen=True)
class Settings:
    """Base of all settings: construction checks every range.

    Raises:
      Mistakes: one line each, which begins with the name of a field.
    """

    def __post_init__(self) -> None:
        found = list(self.problems())
        if found:
            raise Mistakes(found)

    def problems(self) -> Iterator[str]:
        """The mistakes of this object's own fields. Classes with rules between fields add to it."""
        for field in dataclasses.fields(self):
            meaning = field.metadata.get("meaning")
            value = getattr(self, field.name)
            problem = meaning.problem(value) if meaning else None
            if problem:
                yield f"{field.name} is {value!r}; {problem}"


def read(
    cls: type[T], config: Mapping[str, Any], path: str = "config", usual: T | None = None
) -> tuple[T | None, list[str]]:
    """Settings from a mapping of the same fields, and all mistakes.

    Args:
      cls: a `Settings` dataclass.
      config: an `ml_collections.ConfigDict` or a dictionary; lists become tuples.
      path: how the mapping is called in messages, such as `config.pretrain`.
      usual: the settings whose values stand where nothing is written; None for the defaults.

    Returns:
      The settings, with the default in place of a field that is wrong, and one line a mistake. The settings are None
      where no object can be made.
    """
    config = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else config
    places = _places(cls)
    mistakes = [unknown_field(path, name, places) for name in config if name not in places]
    values: dict[str, Any] = {}
    for name, (field, kind) in places.items():
        if name not in config:
            continue
        value, found = _value(kind, config[name], f"{path}.{name}", getattr(usual or cls, name, None))
        mistakes += found
        if value is None:
            continue
        if field == name:
            values[name] = value
        else:
            values.setdefault(field, {})[name] = value
    for field in _section_fields(cls):
        known = {name: kind() for name, kind in field.metadata["sections"]().items()}
        values[field.name] = known | (getattr(usual, field.name) if usual else {}) | values.get(field.name, {})
    told: set[str] = set()
    while True:
        try:
            return cls(**values) if usual is None else dataclasses.replace(typing.cast(Any, usual), **values), mistakes
        except ValueError as error:
            lines = {line: line.split()[0].partition(".")[0] for line in str(error).splitlines()}
            mistakes += [f"{path}.{line}" for line, name in lines.items() if name not in told]
            told |= set(lines.values())
            kept = {name: value for name, value in values.items() if name not in told}
            if len(kept) == len(values):
                return None, mistakes
            values = kept
        except TypeError:
            needed = [field.name for field in dataclasses.fields(typing.cast(Any, cls)) if _required(field)]
            return None, mistakes + [f"{path}.{name} is not set" for name in needed if name not in values]


def frozen(cls: type[T], config: Mapping[str, Any], path: str = "config") -> T:
    """`read`, for settings that must be right.

    Raises:
      Mistakes: one line each.
    """
    made, mistakes = read(cls, config, path)
    if mistakes or made is None:
        raise Mistakes(mistakes)
    return made


def unknown_field(path: str, name: str, known: Collection[str]) -> str:
    """What to say of a field that a section does not have: the nearest one, or all of them."""
    name = name if name.isprintable() else ascii(name)[1:-1]
    near = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {path}.{near[0]}?" if near else f"{path} has {', '.join(known) or 'no fields'}"
    return f"{path}.{name} does not exist; {hint}"


def as_dict(settings: Any) -> dict[str, Any]:
    """The mapping of which `read` makes the same settings."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if "sections" in field.metadata:
            found |= {name: as_dict(section) for name, section in value.items()}
        else:
            found[field.name] = as_dict(value) if dataclasses.is_dataclass(value) else value
    return found


def differences(old: Mapping[str, Any], new: Mapping[str, Any], *, apart: Collection[str] = ()) -> list[str]:
    """The fields in which two nested mappings differ, with both values; a field that one of them lacks is named so.

    A section that one of them lacks is one row.

    Args:
      old, new: the mappings.
      apart: fields that may differ, such as `model.remat`.
    """
    return [f"{field} {change}" for field, change in changes(old, new).items() if field not in apart]


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    """The rows of `differences` by field, such as {"model.remat": "was 'none' and is 'full'"}."""
    rows = {}
    for name in dict.fromkeys((*old, *new)):
        a, b = old.get(name, MISSING), new.get(name, MISSING)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            rows |= {f"{name}.{field}": change for field, change in changes(a, b).items()}
        elif _plain(a) != _plain(b):
            rows[name] = f"was {_shown(a)} and is {_shown(b)}"
    return rows


def free_fields(settings: Any, path: str) -> Iterator[str]:
    """The fields under a path that may change when a run continues, such as `model.remat`."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            yield from free_fields(value, f"{path}.{field.name}")
        elif "meaning" in field.metadata and field.metadata["meaning"].free:
            yield f"{path}.{field.name}"


def describe(cls: type, values: Any, path: str = "config", wanted: str = "") -> list[str]:
    """Every field of settings in one or two lines each: type, default, value, range, meaning, source.

    Args:
      cls: a `Settings` dataclass; values: an instance of it, whose values are shown where they are not the default.
      path: of the settings.
      wanted: only fields under this path, such as `und_for_gen.nft`; empty for all.
    """
    return list(_describe(cls, cls(), values, path, f"{path}.{wanted}".rstrip(".")))


def _describe(cls: Any, default: Any, values: Any, path: str, wanted: str) -> Iterator[str]:
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if "sections" in field.metadata:
            for name, kind in field.metadata["sections"]().items():
                own = getattr(values, field.name)[name]
                yield from _describe(kind, kind(), own, f"{path}.{name}", wanted)
            continue
        usual, value, full = getattr(default, field.name), getattr(values, field.name), f"{path}.{field.name}"
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _describe(hints[field.name], usual, value, full, wanted)
        elif full == wanted or full.startswith(f"{wanted}."):
            meaning = field.metadata["meaning"]
            now = "" if _plain(value) == _plain(usual) else f"; here {_short(value)}"
            limits = f" ({meaning.allowed()})" if meaning.allowed() else ""
            unit = f" [{meaning.unit}]" if meaning.unit else ""
            yield f"{full}: {_type_name(hints[field.name])} = {_short(usual)}{now}"
            yield f"    {meaning.text}{unit}{limits}{f'; {meaning.source}' if meaning.source else ''}"


def _places(cls: Any) -> dict[str, tuple[str, Any]]:
    """Name in the mapping -> (field of the dataclass, type)."""
    hints, found = typing.get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        if "sections" in field.metadata:
            found |= {name: (field.name, kind) for name, kind in field.metadata["sections"]().items()}
        else:
            found[field.name] = (field.name, hints[field.name])
    return found


def _section_fields(cls: Any) -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(cls) if "sections" in field.metadata]


def _required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _value(kind: Any, value: Any, path: str, usual: Any = None) -> tuple[Any, list[str]]:
    """A value in the type of its field, or None with what is wrong; a section begins with its usual value."""
    if dataclasses.is_dataclass(kind):
        if isinstance(value, typing.cast(type, kind)):
            return value, []
        if not hasattr(value, "keys"):  # a ConfigDict is no Mapping
            return None, [f"{path} is {value!r}; it is a section with fields of its own"]
        return read(typing.cast(type, kind), value, path, usual if isinstance(usual, typing.cast(type, kind)) else None)
    if typing.get_origin(kind) is dict:
        return (dict(value), []) if isinstance(value, Mapping) else (None, [f"{path} is {value!r}; it is a section"])
    if typing.get_origin(kind) is tuple:
        return _tuple(typing.get_args(kind), value, path)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        if abs(value) > sys.float_info.max:
            return None, [f"{path} is a whole number of {len(str(abs(value)))} digits; it must be a finite number"]
        return float(value), []
    if kind in (int, float, str, bool):
        wrong = not isinstance(value, kind) or (kind is int and isinstance(value, bool))
        if wrong:
            return None, [f"{path} is {value!r}; it must be of type {kind.__name__}"]
    return value, []


def _tuple(kinds: tuple, value: Any, path: str) -> tuple[Any, list[str]]:
    if not isinstance(value, list | tuple):
        return None, [f"{path} is {value!r}; it must be a tuple such as ({value!r},)"]
    wanted = [kinds[0]] * len(value) if len(kinds) == 2 and kinds[1] is Ellipsis else list(kinds)
    if len(wanted) != len(value):
        return None, [f"{path} is {value!r}; it must have {len(wanted)} entries"]
    pairs = [_value(kind, item, f"{path}[{index}]") for index, (kind, item) in enumerate(zip(wanted, value))]
    mistakes = [mistake for _, found in pairs for mistake in found]
    return (None if mistakes else tuple(item for item, _ in pairs)), mistakes


def _type_name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind).replace("typing.", "")


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return "set"
    return "absent" if value is MISSING else _short(value)
