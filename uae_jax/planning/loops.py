"""How often a loop of a compiled program runs, read from its condition.

libtpu writes no trip count. The condition compares a counter with a constant, which may stand in the condition, in a
fusion inside of it, or among the loop's first values. Where data can end a loop earlier, the constant is the most.
"""

import dataclasses
import re

from uae_jax.planning.hlo_text import Computation, Instruction

Computations = dict[str, Computation]
PASSING = frozenset(("copy", "bitcast", "reshape", "convert", "opt-barrier", "copy-start", "copy-done"))
# a <limit> b holds for so many more values of a than a < b
COMPARED = {"LT": 0, "LE": 1, "NE": 0, "GT": 0, "GE": 1}


@dataclasses.dataclass(frozen=True)
class Scope:
    """A computation where it is called.

    Attributes:
      inside: its instructions.
      given: names of its arguments in `around`.
      around: the caller's; None for the first computation.
      body: of the loop, if the only parameter is what the loop carries.
    """

    inside: Computation
    given: tuple[str, ...] = ()
    around: "Scope | None" = None
    body: Computation | None = None


def trips(computations: Computations, loop: Instruction, around: Scope) -> int | None:
    """The number of runs of a `while` instruction's body, None where its condition has no constant.

    Args:
      computations: of the module.
      loop: the instruction.
      around: the computation that it stands in.
    """
    called = loop.called
    body = computations[called["body"][0]]
    condition = Scope(computations[called["condition"][0]], loop.operands, around, body)
    compares = _compares(computations, condition, _root(condition.inside))
    found = [_runs(computations, condition, compare, scope) for scope, compare in compares]
    known = [count for count in found if count is not None]
    return min(known, default=None)


def _root(inside: Computation) -> Instruction | None:
    return next((instruction for instruction in inside.values() if instruction.root), None)


def _compares(
    computations: Computations, scope: Scope, instruction: Instruction | None
) -> list[tuple[Scope, Instruction]]:
    """The comparisons that all have to hold, with the scopes that they stand in."""
    if instruction is None:
        return []
    if instruction.opcode == "compare":
        return [(scope, instruction)]
    if instruction.opcode in ("and", *PASSING):
        operands = [scope.inside.get(name) for name in instruction.operands]
        return [pair for operand in operands for pair in _compares(computations, scope, operand)]
    if instruction.opcode == "fusion":
        inner = Scope(computations[instruction.called["calls"][0]], instruction.operands, scope)
        return _compares(computations, inner, _root(inner.inside))
    if instruction.opcode == "parameter" and scope.around is not None and scope.body is None:
        name = scope.given[int(instruction.attributes)]
        return _compares(computations, scope.around, scope.around.inside.get(name))
    return []


def _runs(computations: Computations, condition: Scope, compare: Instruction, scope: Scope) -> int | None:
    """The runs until `counter < limit` fails, of a counter that begins at a constant and grows by one."""
    direction = compare.value(r"direction=(\w+)")
    if direction not in COMPARED or len(compare.operands) != 2:
        return None
    counter, limit = compare.operands if direction in ("LT", "LE", "NE") else compare.operands[::-1]
    index, end = _carried(scope, counter), constant(scope, limit)
    if index is None or end is None or condition.around is None or condition.body is None:
        return None
    begin = constant(condition.around, condition.given[0], index) or 0
    step = _step(computations, condition.body, index)
    return max(-(-(end + COMPARED[direction] - begin) // step), 0)


def _carried(scope: Scope, name: str) -> int | None:
    """Which of the values that a loop carries a name inside of its condition stands for; None for another value."""
    instruction = scope.inside.get(name)
    if instruction is None:
        return None
    if instruction.opcode in PASSING:
        return _carried(scope, instruction.operands[0])
    if instruction.opcode == "get-tuple-element" and scope.body is not None:
        return _element(scope.inside, name)
    if instruction.opcode == "parameter" and scope.around is not None and scope.body is None:
        return _carried(scope.around, scope.given[int(instruction.attributes)])
    return None


def _element(inside: Computation, name: str) -> int | None:
    """The index of a value of the computation's only parameter, followed through copies."""
    instruction = inside.get(name)
    while instruction is not None and instruction.opcode in PASSING:
        instruction = inside.get(instruction.operands[0])
    if instruction is None or instruction.opcode != "get-tuple-element":
        return None
    source = inside.get(instruction.operands[0])
    return _index(instruction) if source is not None and source.opcode == "parameter" else None


def _index(instruction: Instruction) -> int:
    return int(instruction.value(r"index=(\d+)") or 0)


def _step(computations: Computations, body: Computation, index: int) -> int:
    """By how much a carried counter grows in one run; 1 where the sum is not found."""
    root = _root(body)
    if root is None or root.opcode != "tuple":
        return 1
    scope, instruction = Scope(body), body.get(root.operands[index])
    while instruction is not None and instruction.opcode in (*PASSING, "fusion"):
        if instruction.opcode == "fusion":
            scope = Scope(computations[instruction.called["calls"][0]], instruction.operands, scope)
            instruction = _root(scope.inside)
        else:
            instruction = scope.inside.get(instruction.operands[0])
    if instruction is None or instruction.opcode != "add":
        return 1
    steps = [value for name in instruction.operands if (value := constant(scope, name)) is not None]
    return steps[0] if steps and steps[0] > 0 else 1


def constant(scope: Scope, name: str, index: int | None = None) -> int | None:
    """The whole number that a name stands for, or that is in a tuple at `index`; None if it is no constant."""
    instruction = scope.inside.get(name)
    if instruction is None:
        return None
    code = instruction.opcode
    if code == "constant":
        whole = index is None and instruction.results and instruction.results[0].dtype in ("s32", "u32", "s64", "u64")
        found = re.match(r"-?\d+(?![\w.])", instruction.attributes) if whole else None
        return int(found[0]) if found else None
    if code in PASSING:
        return constant(scope, instruction.operands[0], index)
    if code == "get-tuple-element":
        return constant(scope, instruction.operands[0], _index(instruction)) if index is None else None
    if code == "tuple":
        return None if index is None else constant(scope, instruction.operands[index])
    if code == "parameter" and scope.around is not None:
        if scope.body is None:
            return constant(scope.around, scope.given[int(instruction.attributes)], index)
        return constant(scope.around, scope.given[0], index) if _kept(scope.body, index) else None
    return None


def _kept(body: Computation, index: int | None) -> bool:
    """Whether a loop carries a value unchanged."""
    root = _root(body)
    if index is None or root is None or root.opcode != "tuple":
        return False
    return _element(body, root.operands[index]) == index
