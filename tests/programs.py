"""What a traced function is made of, for tests about precision and memory; and how programs of tests are compiled."""

import os
import re
from collections.abc import Callable, Iterator

import jax


def equations(function, *arguments) -> Iterator:
    """Every equation of the traced function, those inside loops, branches and recomputed parts too."""
    todo = [jax.make_jaxpr(function)(*arguments).jaxpr]
    while todo:
        for equation in todo.pop().eqns:
            yield equation
            for value in jax.tree.leaves(
                tuple(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
            ):
                if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
                    todo.append(getattr(value, "jaxpr", value))


def on_devices(count: int):
    """Context in which programs are for so many of the faked devices, all in the mesh axis `data`."""
    return jax.set_mesh(
        jax.make_mesh((count,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:count])
    )


def compiler_flags(devices: int = 1) -> str:
    """XLA_FLAGS for another process: those of the tests, with another number of faked devices."""
    count = "--xla_force_host_platform_device_count="
    return re.sub(rf"{count}\d+", f"{count}{devices}", os.environ["XLA_FLAGS"])


def jit_as_users_do(function: Callable, **arguments) -> Callable:
    """`jax.jit` with the fusions that the tests do without: two programs round alike, bit for bit, only with them."""
    left_out = "--xla_cpu_use_fusion_emitters=false" in os.environ["XLA_FLAGS"]
    return jax.jit(function, compiler_options={"xla_cpu_use_fusion_emitters": True} if left_out else None, **arguments)
