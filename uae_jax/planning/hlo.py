"""What a compiled program runs: its launches in order, how often each runs, its operations and its traffic.

XLA's own cost analysis counts a loop's body once, and does not exist for absent devices. Here every instruction is
counted as often as it runs, with the operations of its products and the bytes of its reads and writes.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

from uae_jax.planning.flops import window_pairs
from uae_jax.planning.hlo_text import NAMING, Array, Computation, Instruction, read_computations
from uae_jax.planning.loops import Scope, trips

_TRIPS = r'"known_trip_count":\{"n":"(\d+)"'


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
        self.computations, self.entry = read_computations(text)

    @property
    def first(self) -> Scope:
        """The computation that is called first."""
        return Scope(self.computations.get(self.entry, {}))

    def uses(self) -> Iterator[Use]:
        """All launches, copies and collectives in the order of the text; a fusion is one launch."""
        yield from self._walk(self.first, self.entry, 1.0, ())

    def _walk(self, scope: Scope, name: str, times: float, loops: tuple[str, ...]) -> Iterator[Use]:
        for instruction in scope.inside.values():
            if instruction.opcode == "while":
                runs, inner = self.trips_of(instruction, scope), (*loops, instruction.path)
                if not instruction.value(_TRIPS):  # such a loop checks its data before every pass and at the end
                    condition, check = self.condition(instruction, scope)
                    yield from self._walk(condition, check, times * (runs + 1), inner)
                body, repeated = self.body(instruction, scope)
                yield from self._walk(body, repeated, times * runs, inner)
            elif instruction.opcode == "conditional":
                branches = [
                    [*self._walk(Scope(self.computations[branch]), branch, times, loops)]
                    for branch in branches_of(instruction)
                ]
                yield from max(
                    branches,
                    key=lambda uses: sum(use.times * (self.flops(use) + self.traffic(use)) for use in uses),
                    default=[],
                )
            elif instruction.opcode in ("call", "async-start"):
                for inner in called_by(instruction):
                    given = Scope(self.computations[inner], instruction.operands, scope)
                    yield from self._walk(given, inner, times, loops)
            elif instruction.opcode not in NAMING and not instruction.opcode.endswith(("-done", "-update")):
                yield Use(instruction, name, times, loops)

    def body(self, loop: Instruction, scope: Scope) -> tuple[Scope, str]:
        """A loop's body, and its name."""
        name = loop.called["body"][0]
        return Scope(self.computations[name], loop.operands, scope, self.computations[name]), name

    def condition(self, loop: Instruction, scope: Scope) -> tuple[Scope, str]:
        """A loop's condition, and its name."""
        name, body = loop.called["condition"][0], self.computations[loop.called["body"][0]]
        return Scope(self.computations[name], loop.operands, scope, body), name

    def trips_of(self, loop: Instruction, scope: Scope) -> int:
        """The number of runs of a loop's body: as XLA knows it, as the condition says, or `trips`."""
        known = loop.value(_TRIPS)
        found = int(known) if known else trips(self.computations, loop, scope)
        return self.trips if found is None else found

    def flops(self, use: Use) -> float:
        """Operations in products and convolutions of one run, two for each multiplication and addition."""
        return self._flops(use.instruction, self.computations[use.computation])

    def _flops(self, instruction: Instruction, around: Computation) -> float:
        shapes = [around[name].results for name in instruction.operands if name in around]
        operands = [found[0] for found in shapes if found]
        if instruction.opcode == "fusion":
            return self._inner_flops(instruction.called["calls"][0])
        if instruction.opcode == "dot" or "matmul" in instruction.target or "gemm" in instruction.target:
            return _product_flops(instruction, operands)
        if instruction.opcode == "convolution":
            return _window_flops(instruction, operands)
        if instruction.target.startswith("__cudnn$conv"):
            return _library_convolution_flops(instruction, operands)
        if "fmha" in instruction.target:
            return _attention_flops(instruction, operands)
        return 0.0

    @functools.cache  # noqa: B019 (a module lives as long as its figures are read)
    def _inner_flops(self, name: str) -> float:
        inside = self.computations[name]
        return sum(self._flops(instruction, inside) for instruction in inside.values())

    def traffic(self, use: Use) -> float:
        """Bytes of main memory that one run reads and writes; of a stack of layers, only the selected layer."""
        instruction, around = use.instruction, self.computations[use.computation]
        if instruction.target == "AllocateBuffer":  # libtpu's, without values
            return 0.0
        inside = self._fused(instruction)
        total = _written(instruction, inside, around)
        for index, name in enumerate(instruction.operands):
            whole = around[name].moved if name in around else 0.0
            total += self._read(inside, index, whole) if inside else _picked(instruction, index, whole)
        return total

    def _fused(self, instruction: Instruction) -> Computation:
        """The computation of a fusion; empty for every other instruction."""
        return self.computations[instruction.called["calls"][0]] if instruction.opcode == "fusion" else {}

    def _read(self, inside: Computation, index: int, whole: float) -> float:
        """Bytes that a fusion reads of an operand: slices if every reader takes a slice, none if it is only
        overwritten.
        """
        parameter = next(
            (i for i in inside.values() if i.opcode == "parameter" and int(i.attributes or 0) == index), None
        )
        if parameter is None:
            return 0.0
        total, names = 0.0, {parameter.name}
        for reader in inside.values():
            at = [place for place, name in enumerate(reader.operands) if name in names]
            if not at:
                continue
            if reader.opcode == "bitcast":
                names.add(reader.name)
            elif reader.opcode in ("dynamic-slice", "slice", "gather"):
                total += reader.moved or reader.bytes
            elif reader.opcode == "fusion":
                total += sum(self._read(self._fused(reader), place, whole) for place in at)
            elif not (reader.opcode == "dynamic-update-slice" and at == [0]):
                return whole
        return min(total, whole)


def branches_of(conditional: Instruction) -> list[str]:
    """Names of a conditional's computations."""
    called = conditional.called
    words = ("branch_computations", "true_computation", "false_computation")
    return [branch for word in words for branch in called.get(word, ())]


def called_by(instruction: Instruction) -> list[str]:
    """Names of the computations that a call, or the start of an asynchronous call, runs once."""
    called = instruction.called
    return [name for word in ("to_apply", "calls", "called_computations") for name in called.get(word, ())]


def _picked(instruction: Instruction, index: int, whole: float) -> float:
    """Bytes that an instruction outside of a fusion reads of an operand."""
    if instruction.opcode in ("dynamic-slice", "slice", "gather") and index == 0:
        return min(instruction.bytes, whole)
    return 0.0 if instruction.opcode == "dynamic-update-slice" and index == 0 else whole


def _written(instruction: Instruction, inside: Computation, around: Computation) -> float:
    """Bytes of the results; for an update in place, bytes of the update."""
    root = next((i for i in inside.values() if i.root), None)
    if root is None:
        return min(_of_root(instruction, around), instruction.moved)
    if root.opcode != "tuple":
        return min(_of_root(root, inside), instruction.moved)
    pairs = zip(root.operands, instruction.results)
    return sum(min(_of_root(inside[name], inside), array.moved) for name, array in pairs if name in inside)


def _of_root(root: Instruction, inside: Computation) -> float:
    while root.opcode == "bitcast" and root.operands and root.operands[0] in inside:
        root = inside[root.operands[0]]
    if root.opcode == "dynamic-update-slice" and len(root.operands) > 1 and root.operands[1] in inside:
        return inside[root.operands[1]].moved
    return root.moved


def _dimensions(instruction: Instruction, side: str, kind: str) -> list[int]:
    """Axes of a product's operand, from a dot or from the settings of a library call."""
    found = instruction.value(rf'"?{side}_{kind}(?:_dims|_dimensions)"?[=:][\[{{]([^\]}}]*)')
    return [int(axis) for axis in re.findall(r"\d+", found)]


def _product_flops(instruction: Instruction, operands: list[Array]) -> float:
    left, contracted = operands[0].shape, _dimensions(instruction, "lhs", "contracting")
    return 2.0 * math.prod(instruction.results[0].shape) * math.prod(left[axis] for axis in contracted)


def _window_flops(instruction: Instruction, operands: list[Array]) -> float:
    """Padding and the holes of a dilation are no inputs; libtpu writes products, also batched ones, in this way too."""
    found = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if found is None or len(operands) < 2 or not instruction.results:
        return 0.0
    arrays = (*operands[:2], instruction.results[0])
    image, kernel, made = (dict(zip(labels, array.shape)) for labels, array in zip(found.groups(), arrays))
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", instruction.value(r"window=\{([^}]*)\}")))
    pairs = 1.0
    for number, axis in enumerate(sorted(label for label in image if label.isdigit())):
        stride, dilation, kernel_dilation = (
            int(window[name].split("x")[number]) if name in window else 1
            for name in ("stride", "lhs_dilate", "rhs_dilate")
        )
        pairs *= window_pairs(
            image[axis],
            kernel[axis],
            made[axis],
            stride=stride,
            low=int(window["pad"].split("x")[number].partition("_")[0]) if "pad" in window else 0,
            dilation=dilation,
            kernel_dilation=kernel_dilation,
        )
    batch = image["b"] // int(instruction.value(r"batch_group_count=(\d+)") or 1)
    return 2.0 * batch * kernel["i"] * kernel["o"] * pairs


def _library_convolution_flops(instruction: Instruction, operands: list[Array]) -> float:
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
