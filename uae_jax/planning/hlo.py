"""Parses the text of a compiled program: its computations, their number of runs, and the cost of each instruction.

XLA's own cost analysis counts a loop's body once, and does not exist for absent devices. Here every instruction is
counted as often as it runs, with the operations of its products and the bytes of its reads and writes.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

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
_NAME = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(calls|body|condition|to_apply|true_computation|false_computation|branch_computations|called_computations)"
    r"=(\{[^}]*\}|%?[\w.\-]+)"
)
_TRIPS = r'"known_trip_count":\{"n":"(\d+)"'


@dataclasses.dataclass(frozen=True)
class Array:
    """Type and shape of one array."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> float:
        """Without padding."""
        return WIDTHS.get(self.dtype, 0) * math.prod(self.shape)


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
        """Bytes of all results, without a library's workspace and without operands in the result of a transfer's
        start.
        """
        made = self.results
        if self.opcode.endswith("-start"):
            # a copy's result is first; results of a collective follow its operands, or are alone
            count = len(self.operands)
            made = made[:1] if self.opcode == "copy-start" else made[count : 2 * count] or made
        if self.opcode == "custom-call":
            made = made[:1] + tuple(array for array in made[1:] if array.dtype not in ("s8", "u8"))
        return sum(array.bytes for array in made)

    @property
    def called(self) -> dict[str, tuple[str, ...]]:
        """Called computations by keyword, such as `body` or `calls`."""
        return {word: tuple(re.findall(r"[\w.\-]+", names)) for word, names in _CALLED.findall(self.attributes)}


@dataclasses.dataclass(frozen=True)
class Use:
    """An instruction that runs on the device.

    Attributes:
      instruction: the instruction.
      computation: the name of its computation.
      times: number of runs in one call of the program.
      loops: paths of the enclosing loops, the outermost first.
    """

    instruction: Instruction
    computation: str
    times: float
    loops: tuple[str, ...]


class Module:
    """A compiled module.

    Args:
      text: of `compiled.as_text()`.
      trips: number of runs of a loop whose end depends on data, such as sampling's loop.
    """

    def __init__(self, text: str, trips: int = 1):
        self.trips = trips
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current: dict[str, Instruction] | None = None
        for line in text.splitlines():
            if current is None:
                found = _HEAD.match(line)
                if found:
                    current = self.computations[found[2]] = {}
                    self.entry = found[2] if found[1] else self.entry
            elif line.startswith("}"):
                current = None
            elif (instruction := _parse(line)) is not None:
                current[instruction.name] = instruction

    def uses(self) -> Iterator[Use]:
        """All launches, copies and collectives in the order of the text; a fusion is one launch."""
        yield from self._walk(self.entry, 1.0, ())

    def _walk(self, name: str, times: float, loops: tuple[str, ...]) -> Iterator[Use]:
        for instruction in self.computations.get(name, {}).values():
            called = instruction.called
            if instruction.opcode == "while":
                if not instruction.value(_TRIPS):  # such a loop checks its data before every pass and at the end
                    yield from self._walk(called["condition"][0], times * (self.trips + 1), (*loops, instruction.path))
                yield from self._walk(called["body"][0], times * self.trips_of(instruction), (*loops, instruction.path))
            elif instruction.opcode == "conditional":
                words = ("branch_computations", "true_computation", "false_computation")
                branches = [[*self._walk(branch, times, loops)] for word in words for branch in called.get(word, ())]
                yield from max(
                    branches,
                    key=lambda uses: sum(use.times * (self.flops(use) + self.traffic(use)) for use in uses),
                    default=[],
                )
            elif instruction.opcode in ("call", "async-start"):
                for inner in (
                    *called.get("to_apply", ()),
                    *called.get("calls", ()),
                    *called.get("called_computations", ()),
                ):
                    yield from self._walk(inner, times, loops)
            elif instruction.opcode not in NAMING and not instruction.opcode.endswith(("-done", "-update")):
                yield Use(instruction, name, times, loops)

    def trips_of(self, loop: Instruction) -> int:
        """The number of runs of a loop's body."""
        return int(loop.value(_TRIPS) or self.trips)

    def flops(self, use: Use) -> float:
        """Operations in products and convolutions of one run, two for each multiplication and addition."""
        return self._flops(use.instruction, self.computations[use.computation])

    def _flops(self, instruction: Instruction, around: dict[str, Instruction]) -> float:
        shapes = [around[name].results for name in instruction.operands if name in around]
        operands = [found[0] for found in shapes if found]
        if instruction.opcode == "fusion":
            return self._inner_flops(instruction.called["calls"][0])
        if instruction.opcode == "dot" or "matmul" in instruction.target or "gemm" in instruction.target:
            return _product_flops(instruction, operands)
        if instruction.opcode == "convolution" or instruction.target.startswith("__cudnn$conv"):
            return _convolution_flops(instruction, operands)
        if "fmha" in instruction.target:
            return _attention_flops(instruction, operands)
        return 0.0

    @functools.cache  # noqa: B019 (a module lives as long as its figures are read)
    def _inner_flops(self, name: str) -> float:
        inside = self.computations[name]
        return sum(self._flops(instruction, inside) for instruction in inside.values())

    def traffic(self, use: Use) -> float:
        """Bytes that one run reads and writes; of a stack of layers, only the selected layer."""
        instruction, around = use.instruction, self.computations[use.computation]
        fused = instruction.called.get("calls", ("",))[0] if instruction.opcode == "fusion" else ""
        inside = self.computations.get(fused, {})
        parameters = {int(p.attributes or 0): p for p in inside.values() if p.opcode == "parameter"}
        total = _written(instruction, inside)
        for index, name in enumerate(instruction.operands):
            whole = around[name].bytes if name in around else 0.0
            total += (
                _read(parameters[index], inside, whole) if index in parameters else _picked(instruction, index, whole)
            )
        return total


def _picked(instruction: Instruction, index: int, whole: float) -> float:
    """Bytes that an instruction outside of a fusion reads of an operand."""
    if instruction.opcode in ("dynamic-slice", "slice", "gather"):
        return min(instruction.bytes, whole)
    return 0.0 if instruction.opcode == "dynamic-update-slice" and index == 0 else whole


def _read(parameter: Instruction, inside: dict[str, Instruction], whole: float) -> float:
    """Bytes that a fusion reads of an operand: slices if every reader takes a slice, none if it is only overwritten."""
    total, names = 0.0, {parameter.name}
    for reader in inside.values():
        if not names & set(reader.operands):
            continue
        if reader.opcode == "bitcast":
            names.add(reader.name)
        elif reader.opcode in ("dynamic-slice", "slice", "gather"):
            total += reader.bytes
        elif not (reader.opcode == "dynamic-update-slice" and reader.operands[0] in names):
            return whole
    return min(total, whole)


def _written(instruction: Instruction, inside: dict[str, Instruction]) -> float:
    """Bytes of the results; for an update in place, bytes of the update."""
    root = next((i for i in inside.values() if i.root), None)
    if root is None:
        return _of_root(instruction, {}) if instruction.opcode != "dynamic-update-slice" else 0.0
    if root.opcode == "tuple":
        return sum(_of_root(inside[name], inside) for name in root.operands if name in inside)
    return _of_root(root, inside)


def _of_root(root: Instruction, inside: dict[str, Instruction]) -> float:
    while root.opcode == "bitcast" and root.operands and root.operands[0] in inside:
        root = inside[root.operands[0]]
    if root.opcode == "dynamic-update-slice" and len(root.operands) > 1 and root.operands[1] in inside:
        return inside[root.operands[1]].bytes
    return root.bytes


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
    operands = tuple(re.findall(r"%([\w.\-]+)", inner)) if opcode not in ("parameter", "constant") else ()
    arrays = tuple(
        Array(dtype, tuple(int(side) for side in shape.split(",") if side)) for dtype, shape in _ARRAY.findall(result)
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


def _dimensions(instruction: Instruction, side: str, kind: str) -> list[int]:
    """Axes of a product's operand, from a dot or from the settings of a library call."""
    found = instruction.value(rf'"?{side}_{kind}(?:_dims|_dimensions)"?[=:][\[{{]([^\]}}]*)')
    return [int(axis) for axis in re.findall(r"\d+", found)]


def _product_flops(instruction: Instruction, operands: list[Array]) -> float:
    left, contracted = operands[0].shape, _dimensions(instruction, "lhs", "contracting")
    return 2.0 * math.prod(instruction.results[0].shape) * math.prod(left[axis] for axis in contracted)


def _convolution_flops(instruction: Instruction, operands: list[Array]) -> float:
    """Padding counts as pixels, which is a few percent too much for small images."""
    labels = re.search(r"dim_labels=\w+_(\w+)->", instruction.attributes)
    if labels is None or len(operands) < 2:
        return 0.0
    # images and kernel of the forward convolution; libraries have separate calls for the two gradients
    made, kernel = instruction.results[0], operands[1]
    if instruction.target.endswith("BackwardInput"):
        made = operands[0]
    elif instruction.target.endswith("BackwardFilter"):
        made, kernel = operands[1], instruction.results[0]
    per_output = math.prod(size for size, axis in zip(kernel.shape, labels[1]) if axis != "o")
    return 2.0 * math.prod(made.shape) * per_output


def _attention_flops(instruction: Instruction, operands: list[Array]) -> float:
    (batch, length, heads, width), size = operands[0].shape, operands[1].shape[1]
    # two products forward; five backward, one of them recomputed (arXiv 2205.14135)
    return (10.0 if instruction.target.endswith("Backward") else 4.0) * batch * heads * length * size * width
