"""The text of a compiled program as computations of instructions.

Texts of libtpu name memory spaces and tiles: what stays on the chip moves no bytes, and tiles are moved whole.
"""

import dataclasses
import functools
import math
import re

WIDTHS = {
    "pred": 1,
    "s4": 0.5,
    "u4": 0.5,
    "s8": 1,
    "u8": 1,
    "bf16": 2,
    "f16": 2,
    "s16": 2,
    "u16": 2,
    "f32": 4,
    "s32": 4,
    "u32": 4,
    "f64": 8,
    "s64": 8,
    "u64": 8,
    "f8e4m3fn": 1,
    "f8e5m2": 1,
}
# instructions without a result of their own
NAMING = frozenset(
    (
        "parameter",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "constant",
        "after-all",
        "opt-barrier",
        "partition-id",
        "replica-id",
    )
)
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_END = re.compile(r"\}(, execution_thread=.*)?")
_NAME = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_TILE = re.compile(r"T\(([\d,]+)\)")
_ON_CHIP = re.compile(r"S\([1-9]\d*\)")
_CALLED = re.compile(
    r"(calls|body|condition|to_apply|true_computation|false_computation|branch_computations|called_computations)"
    r"=(\{[^}]*\}|%?[\w.\-]+)"
)


@dataclasses.dataclass(frozen=True)
class Array:
    """Type and shape of one array, and how it lies in memory: `2,1,0:T(8,128)(2,1)S(1)`, or nothing."""

    dtype: str
    shape: tuple[int, ...]
    layout: str = ""

    @property
    def bytes(self) -> float:
        """Without padding."""
        return WIDTHS.get(self.dtype, 0) * math.prod(self.shape)

    @functools.cached_property
    def moved(self) -> float:
        """Bytes of the device's main memory: with padding to whole tiles, 0 for what lies on the chip."""
        if _ON_CHIP.search(self.layout):
            return 0.0
        tile = _TILE.search(self.layout)
        if tile is None or not self.shape:
            return self.bytes
        order = [int(axis) for axis in re.findall(r"\d+", self.layout.partition(":")[0])]
        sides = [self.shape[axis] for axis in reversed(order)]
        for at, size in enumerate(reversed([int(side) for side in tile[1].split(",")][-len(sides) :]), 1):
            sides[-at] = -(-sides[-at] // size) * size
        return WIDTHS.get(self.dtype, 0) * math.prod(sides)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name, opcode: as written.
      results: its arrays.
      operands: names of instructions of the same computation.
      attributes: the rest of the line.
      root: whether the instruction is the computation's result.
    """

    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    root: bool

    def value(self, pattern: str) -> str:
        """The first group of a pattern in the attributes; empty without a match."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else ""

    @property
    def target(self) -> str:
        """The target of a custom call; empty for other instructions."""
        return self.value(r'custom_call_target="([^"]*)"')

    @property
    def path(self) -> str:
        """The path of the operation in the traced program."""
        return self.value(r'op_name="([^"]*)"')

    @property
    def bytes(self) -> float:
        """Bytes of `made`, without padding."""
        return sum(array.bytes for array in self.made)

    @property
    def moved(self) -> float:
        """Bytes of `made` in the device's main memory, see `Array.moved`."""
        return sum(array.moved for array in self.made)

    @property
    def made(self) -> tuple[Array, ...]:
        """The results, without a library's workspace and without operands in the result of a transfer's start."""
        made = self.results
        if self.opcode.endswith("-start"):
            # a copy's result is first; results of a collective follow its operands, or are alone
            count = len(self.operands)
            made = made[:1] if self.opcode == "copy-start" else made[count : 2 * count] or made
        if self.opcode == "custom-call":
            made = made[:1] + tuple(array for array in made[1:] if array.dtype not in ("s8", "u8"))
        return made

    @property
    def called(self) -> dict[str, tuple[str, ...]]:
        """Called computations by keyword, such as `body` or `calls`."""
        return {word: tuple(re.findall(r"[\w.\-]+", names)) for word, names in _CALLED.findall(self.attributes)}


Computation = dict[str, Instruction]


def read_computations(text: str) -> tuple[dict[str, Computation], str]:
    """The computations of `compiled.as_text()` by name, and the name of the one that is called first.

    An instruction may go on over several lines: the metadata of a kernel stands on lines of its own.
    """
    computations: dict[str, Computation] = {}
    entry, current, written = "", None, ""

    def add() -> None:
        if current is not None and written and (instruction := _parse(written)) is not None:
            current[instruction.name] = instruction

    for line in text.splitlines():
        if current is None:
            found = _HEAD.match(line)
            if found:
                current, written = computations.setdefault(found[2], {}), ""
                entry = found[2] if found[1] else entry
        elif _END.fullmatch(line):
            add()
            current = None
        elif _NAME.match(line):
            add()
            written = line
        else:
            written += line
    return computations, entry


def _parse(line: str) -> Instruction | None:
    found = _NAME.match(line)
    if not found:
        return None
    rest = re.sub(r"/\*.*?\*/", "", line[found.end() :])
    result, rest = _balanced(rest)
    opcode, _, rest = rest.strip().partition("(")
    inner, attributes = _balanced("(" + rest)
    if opcode == "parameter":
        attributes = inner.strip("()")
    elif opcode == "constant":
        attributes = inner.strip("()") + attributes
    operands = tuple(re.findall(r"%([\w.\-]+)", inner)) if opcode not in ("parameter", "constant") else ()
    arrays = tuple(
        Array(dtype, tuple(int(side) for side in shape.split(",") if side), layout)
        for dtype, shape, layout in _ARRAY.findall(result)
    )
    return Instruction(found[2], opcode.strip(), arrays, operands, attributes.lstrip(", "), bool(found[1]))


def _balanced(text: str) -> tuple[str, str]:
    """The first word or bracketed part of a line, and the rest."""
    depth = 0
    for index, character in enumerate(text):
        depth += character in "([{"
        depth -= character in ")]}"
        if depth == 0 and (character == " " or (character == ")" and text[0] == "(")):
            return text[: index + 1], text[index + 1 :]
    return text, ""


def short_name(name: str) -> str:
    """The end of an operation's path, without the transformations around it."""
    parts = [part for part in name.split("/") if part not in ("while", "body", "closed_call", "checkpoint", "cond")]
    return "/".join(parts[-4:])
