"""Counts matrix products and convolutions in a traced step, with every loop body counted as often as it runs.

XLA's own cost analysis counts the body of a loop once. Here scans over layers, denoising steps, micro-batches and
updates are multiplied out, and a sampling loop runs to the last token. The step is traced to a jaxpr, neither compiled
nor run.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

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
    """

    flops: float = 0.0
    weight_bytes: float = 0.0
    other_bytes: float = 0.0

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
    """

    decoding: Work = Work()
    rest: Work = Work()

    def __add__(self, other: "Count") -> "Count":
        return Count(self.decoding + other.decoding, self.rest + other.rest)

    def __mul__(self, times: float) -> "Count":
        return Count(self.decoding * times, self.rest * times)

    @property
    def flops(self) -> float:
        """Of the complete program."""
        return self.decoding.flops + self.rest.flops


def count_work(
    function: Callable[..., Any], arguments: Sequence[Any], weights: Sequence[int], *, trips: int = 1
) -> Count:
    """Traces a function and counts its work.

    Args:
      function: of jax arrays.
      arguments: trees of arrays or `jax.ShapeDtypeStruct`.
      weights: positions of the arguments with parameters.
      trips: number of runs of the body of a `while`.
    """
    closed = jax.make_jaxpr(function)(*arguments)
    marks = [index in weights for index, argument in enumerate(arguments) for _ in jax.tree.leaves(argument)]
    return _walk(closed.jaxpr, marks, trips, [True] * len(closed.jaxpr.outvars))[0]


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


def _walk(jaxpr: Any, marks: Sequence[bool], trips: int, wanted: Sequence[bool]) -> tuple[Count, list[bool]]:
    """Work of one jaxpr, and which of its results are still weights."""
    known = dict(zip(jaxpr.invars, marks, strict=True))
    total = Count()

    def is_weight(variable: Any) -> bool:
        return not hasattr(variable, "val") and known.get(variable, False)

    for equation, used in _needed(jaxpr, wanted):
        given = [is_weight(variable) for variable in equation.invars]
        work, returned = _equation(equation, given, trips, used)
        total += work
        known.update(zip(equation.outvars, returned))
    return total, [is_weight(variable) for variable in jaxpr.outvars]


def _equation(equation: Any, given: list[bool], trips: int, used: list[bool]) -> tuple[Count, list[bool]]:
    name, parameters, results = equation.primitive.name, equation.params, len(equation.outvars)
    nothing = [False] * results
    if name in ("dot_general", "conv_general_dilated"):
        flops = _product_flops(equation) if name == "dot_general" else _convolution_flops(equation)
        sizes = [_bytes(variable.aval) for variable in equation.invars]
        weights = sum(size for size, weight in zip(sizes, given) if weight)
        return Count(rest=Work(flops, weights, sum(sizes) - weights)), nothing
    if name == "scan":
        body = getattr(parameters["jaxpr"], "jaxpr", parameters["jaxpr"])  # jax 0.10 has closed ones here
        # results without a loop axis are carried; a carried weight, as in the scan over updates, is still a weight
        pairs = zip(body.outvars, equation.outvars)
        carried = sum(inside.aval.shape == outside.aval.shape for inside, outside in pairs)
        count, returned = _walk(body, given, trips, [True] * carried + used[carried:])
        return count * parameters["length"], returned
    if name == "while":
        body = getattr(parameters["body_jaxpr"], "jaxpr", parameters["body_jaxpr"])
        inside, _ = _walk(body, given[parameters["cond_nconsts"] :], trips, [True] * results)
        return Count(decoding=(inside.decoding + inside.rest) * trips), nothing
    if name == "cond":
        bodies = [getattr(branch, "jaxpr", branch) for branch in parameters["branches"]]
        branches = [_walk(body, given[1:], trips, used) for body in bodies]
        return max((count for count, _ in branches), key=lambda count: count.flops), nothing
    inner = next((parameters[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in parameters), None)
    if inner is not None:
        return _walk(getattr(inner, "jaxpr", inner), given, trips, used)
    if name in LAYOUT:
        return Count(), (given if name == "optimization_barrier" else given[:1] + nothing[1:])
    return Count(), nothing


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
        dilation = parameters["lhs_dilation"][index]
        position = (
            np.arange(result[result_at])[:, None] * parameters["window_strides"][index]
            + np.arange(kernel[kernel_at])[None] * parameters["rhs_dilation"][index]
            - parameters["padding"][index][0]
        )
        last = (image[at] - 1) * dilation
        pairs *= np.sum((position >= 0) & (position <= last) & (position % dilation == 0))
    channels = kernel[numbers.rhs_spec[1]]  # of one group
    batch = image[numbers.lhs_spec[0]] // parameters["batch_group_count"]
    return 2.0 * batch * kernel[numbers.rhs_spec[0]] * channels * pairs
