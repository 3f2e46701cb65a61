"""Counts matrix products and convolutions in a traced step, with every loop body counted as often as it runs.

XLA's own cost analysis counts the body of a loop once. Here scans over layers, denoising steps, micro-batches and
updates are multiplied out, and a sampling loop runs to the last token. The step is traced to a jaxpr, neither compiled
nor run.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from uae_jax.rollouts.reconstruction import DRAWING

# operations whose result on a weight is still that weight
LAYOUT = frozenset(
    (
        "convert_element_type",
        "transpose",
        "reshape",
        "squeeze",
        "slice",
        "dynamic_slice",
        "expand_dims",
        "broadcast_in_dim",
        "copy",
        "copy_p",
        "rev",
        "pad",
        "optimization_barrier",
        "sharding_constraint",
        "stop_gradient",
    )
)


@dataclasses.dataclass(frozen=True)
class Work:
    """Work of a program, or of a part, over all devices.

    Attributes:
      flops: of matrix products and convolutions, two for each multiplication and addition.
      weight_bytes: bytes of parameters that the products read, counted at each read.
      other_bytes: bytes of the other operands.
      gathered_bytes: of the parameters, counted once in each run of the loop that selects them, such as that over
        layers; of those that no loop selects, once.
    """

    flops: float = 0.0
    weight_bytes: float = 0.0
    other_bytes: float = 0.0
    gathered_bytes: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other))))

    def __mul__(self, times: float) -> "Work":
        return Work(*(times * value for value in dataclasses.astuple(self)))


@dataclasses.dataclass(frozen=True)
class Count:
    """Work inside and outside of sampling loops.

    Attributes:
      decoding: inside sampling loops (`while`), which read the weights for every token.
      rest: outside.
      drawing: FLOPs among them of `rollouts.reconstruction.draw_from`.
    """

    decoding: Work = Work()
    rest: Work = Work()
    drawing: float = 0.0

    def __add__(self, other: "Count") -> "Count":
        return Count(self.decoding + other.decoding, self.rest + other.rest, self.drawing + other.drawing)

    def __mul__(self, times: float) -> "Count":
        return Count(self.decoding * times, self.rest * times, self.drawing * times)

    @property
    def flops(self) -> float:
        """Of the complete program."""
        return self.decoding.flops + self.rest.flops


class Weight:
    """A parameter, or the part of it that a loop selects; the same object wherever the same part is read.

    Attributes:
      width: bytes of a number in memory, if a product converts it on the way; None for those of the product's operand.
      once: whether the whole parameter is gathered at the beginning of the step, and nothing of it later.
    """

    def __init__(self, width: int | None = None, once: bool = False):
        self.width, self.once = width, once

    def size(self, shaped: Any) -> float:
        """Bytes of a product's operand in memory."""
        return math.prod(shaped.shape) * (self.width or shaped.dtype.itemsize)

    def selected(self) -> "Weight":
        """The part that a loop selects."""
        return Weight(self.width, self.once)


Marks = Sequence[Weight | None]
# what was read of each parameter: the most bytes at once
Reads = dict[Weight, float]


def count_work(
    function: Callable[..., Any], arguments: Sequence[Any], weights: Sequence[int], *, trips: int = 1, once: Any = None
) -> Count:
    """Traces a function and counts its work.

    Args:
      function: of jax arrays.
      arguments: trees of arrays or `jax.ShapeDtypeStruct`.
      weights: positions of the arguments with parameters.
      trips: number of runs of the body of a `while` whose condition has no bound.
      once: a tree like the arguments, true for parameters that are gathered at the beginning of the step.
    """
    closed = jax.make_jaxpr(function)(*arguments)
    leaves = [(leaf, index in weights) for index, given in enumerate(arguments) for leaf in jax.tree.leaves(given)]
    flags = [False] * len(leaves) if once is None else jax.tree.leaves(once)
    marks = [
        Weight(1 if leaf.dtype == np.int8 else None, once=flag) if weight else None
        for (leaf, weight), flag in zip(leaves, flags, strict=True)
    ]
    count, _, reads = _walk(closed.jaxpr, marks, trips, [True] * len(closed.jaxpr.outvars))
    whole = sum(_bytes(leaf) for (leaf, _), flag in zip(leaves, flags) if flag)
    return count + Count(rest=Work(gathered_bytes=_gathered(reads) + whole))


def _needed(jaxpr: Any, wanted: Sequence[bool]) -> list[Any]:
    """The equations that the wanted results depend on, in order, each with its wanted results; the compiler drops the
    other equations.
    """
    live = {id(variable) for variable, want in zip(jaxpr.outvars, wanted, strict=True) if want}
    kept = []
    for equation in reversed(jaxpr.eqns):
        if equation.effects or any(id(variable) in live for variable in equation.outvars):
            kept.append((equation, [id(variable) in live for variable in equation.outvars]))
            live |= {id(variable) for variable in equation.invars}
    return kept[::-1]


def _walk(jaxpr: Any, marks: Marks, trips: int, wanted: Sequence[bool]) -> tuple[Count, Marks, Reads]:
    """Work of one jaxpr, which of its results are still weights, and what was read of each weight."""
    known = dict(zip(jaxpr.invars, marks, strict=True))
    total, reads = Count(), Reads()

    def weight_of(variable: Any) -> Weight | None:
        return None if hasattr(variable, "val") else known.get(variable)

    for equation, used in _needed(jaxpr, wanted):
        given = [weight_of(variable) for variable in equation.invars]
        work, returned, read = _equation(equation, given, trips, used)
        if DRAWING in str(equation.source_info.name_stack).split("/"):
            work = dataclasses.replace(work, drawing=work.flops)
        total += work
        _add(reads, read)
        known.update(zip(equation.outvars, returned))
    return total, [weight_of(variable) for variable in jaxpr.outvars], reads


def _gathered(reads: Reads, given: Marks = ()) -> float:
    """Bytes of the weights that are gathered where they are read, but for those that come from outside."""
    return sum(size for weight, size in reads.items() if weight not in given and not weight.once)


def _add(reads: Reads, more: Mapping[Weight, float]) -> None:
    """One gather serves all reads of a weight."""
    for weight, size in more.items():
        reads[weight] = max(size, reads.get(weight, 0.0))


def _equation(equation: Any, given: Marks, trips: int, used: Sequence[bool]) -> tuple[Count, Marks, Reads]:
    name, parameters, results = equation.primitive.name, equation.params, len(equation.outvars)
    nothing = [None] * results
    if name in ("dot_general", "conv_general_dilated"):
        flops = _product_flops(equation) if name == "dot_general" else _convolution_flops(equation)
        sizes = [
            weight.size(variable.aval) if weight else _bytes(variable.aval)
            for variable, weight in zip(equation.invars, given)
        ]
        reads = {weight: size for size, weight in zip(sizes, given) if weight}
        weights = sum(size for size, weight in zip(sizes, given) if weight)
        return Count(rest=Work(flops, weights, sum(sizes) - weights)), nothing, reads
    if name == "scan":
        return _scan(parameters, equation.outvars, given, trips, used)
    if name == "while":
        return _while(parameters, given, trips, results)
    if name == "cond":
        bodies = [getattr(branch, "jaxpr", branch) for branch in parameters["branches"]]
        branches = [_walk(body, given[1:], trips, used) for body in bodies]
        count, _, reads = max(branches, key=lambda branch: branch[0].flops)
        return count, nothing, reads
    inner = next((parameters[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in parameters), None)
    if inner is not None:
        return _walk(getattr(inner, "jaxpr", inner), given, trips, used)
    if name == "convert_element_type" and parameters["new_dtype"] == np.int8:
        return Count(), [Weight(1)], {}  # kernels of a rollout, see `nn.int8`
    if name in LAYOUT:
        return Count(), (given if name == "optimization_barrier" else [*given[:1], *nothing[1:]]), {}
    return Count(), nothing, {}


def _scan(
    parameters: Mapping[str, Any], results: Sequence[Any], given: Marks, trips: int, used: Sequence[bool]
) -> tuple[Count, Marks, Reads]:
    body = getattr(parameters["jaxpr"], "jaxpr", parameters["jaxpr"])  # jax 0.10 has closed ones here
    constants = _constants_of_scan(parameters)
    # results without a loop axis are carried; a carried weight, as in the scan over updates, is still a weight
    carried = sum(inside.aval.shape == outside.aval.shape for inside, outside in zip(body.outvars, results))
    own = [*given[:constants], *(weight and weight.selected() for weight in given[constants:])]
    count, returned, reads = _walk(body, own, trips, [True] * carried + list(used[carried:]))
    # a pass gathers what the loop selects or changes; what it only passes on is gathered once, before
    outer = {weight: size for weight, size in reads.items() if weight in given}
    gathered = _gathered(reads, given)
    count = (count + Count(rest=Work(gathered_bytes=gathered))) * parameters["length"]
    return count, returned, outer


def _constants_of_scan(parameters: Mapping[str, Any]) -> int:
    """How many arguments of a scan its body only reads; jax 0.12 tells it by the groups of its arguments."""
    if "num_consts" in parameters:
        return parameters["num_consts"]
    return len(parameters["ft_in"].unpack()[0])


def _while(parameters: Mapping[str, Any], given: Marks, trips: int, results: int) -> tuple[Count, Marks, Reads]:
    body = getattr(parameters["body_jaxpr"], "jaxpr", parameters["body_jaxpr"])
    passed, constants = given[parameters["cond_nconsts"] :], parameters["body_nconsts"]
    own = [*passed[:constants], *(weight and weight.selected() for weight in passed[constants:])]
    inside, _, reads = _walk(body, own, trips, [True] * results)
    outer = {weight: size for weight, size in reads.items() if weight in given}
    gathered = _gathered(reads, given)
    work = inside.decoding + inside.rest + Work(gathered_bytes=gathered)
    return Count(decoding=work * _most_trips(parameters, trips)), [None] * results, outer


def _most_trips(parameters: Mapping[str, Any], otherwise: int) -> int:
    """How often the body of a `while` runs at most: what its condition compares a counter with, where that is known."""
    condition = getattr(parameters["cond_jaxpr"], "jaxpr", parameters["cond_jaxpr"])
    bounds = [
        int(equation.invars[1].val)
        for equation in condition.eqns
        if equation.primitive.name == "lt"
        and hasattr(equation.invars[1], "val")
        and equation.invars[0].aval.shape == ()
        and jnp.issubdtype(equation.invars[0].aval.dtype, jnp.integer)
    ]
    return min(bounds, default=otherwise)


def _bytes(shaped: Any) -> float:
    return math.prod(shaped.shape) * shaped.dtype.itemsize


def _product_flops(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _convolution_flops(equation: Any) -> float:
    """Two for each pair of a weight and an input; padding and the holes of a dilation are no inputs."""
    parameters = equation.params
    numbers = parameters["dimension_numbers"]
    image, kernel, result = (variable.aval.shape for variable in (*equation.invars, *equation.outvars))
    pairs = 1.0
    for index, (at, kernel_at, result_at) in enumerate(
        zip(numbers.lhs_spec[2:], numbers.rhs_spec[2:], numbers.out_spec[2:])
    ):
        pairs *= window_pairs(
            image[at],
            kernel[kernel_at],
            result[result_at],
            stride=parameters["window_strides"][index],
            low=parameters["padding"][index][0],
            dilation=parameters["lhs_dilation"][index],
            kernel_dilation=parameters["rhs_dilation"][index],
        )
    channels = kernel[numbers.rhs_spec[1]]  # of one group
    batch = image[numbers.lhs_spec[0]] // parameters["batch_group_count"]
    return 2.0 * batch * kernel[numbers.rhs_spec[0]] * channels * pairs


def window_pairs(
    image: int, kernel: int, result: int, *, stride: int, low: int, dilation: int, kernel_dilation: int
) -> int:
    """How often a weight of a convolution meets an input along one axis.

    Args:
      image, kernel, result: lengths of the axis.
      stride: of the window.
      low: padding before the first input; may be negative.
      dilation, kernel_dilation: distance of neighbouring inputs, and of neighbouring weights.
    """
    position = np.arange(result)[:, None] * stride + np.arange(kernel)[None] * kernel_dilation - low
    last = (image - 1) * dilation
    return int(np.sum((position >= 0) & (position <= last) & (position % dilation == 0)))
