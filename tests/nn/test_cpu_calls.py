"""What a single CPU compiles separately stays a call of its own, in both directions of differentiation."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import on_devices

from uae_jax.nn.cpu.calls import materialised, separately


def double_sine(x, *, times=1):
    return jnp.pad(jnp.sin(times * x), (1, 0))


def forward(x):
    return jnp.sum(2.0 * separately(double_sine, x, times=3) + 1.0)


def settled(x):
    return jnp.sum(jnp.square(materialised(jnp.cos(x)) + x))


def in_turn(x):
    return jnp.sum(jax.lax.map(jax.checkpoint(settled), jnp.stack([x, 2.0 * x])))


def compiled_calls(function, devices):
    """Calls that were not inlined in the compiled program, and its result."""
    x = jnp.arange(6.0)
    with on_devices(devices):
        program = jax.jit(function).lower(x).compile()
        return len(re.findall(r" call\([^\n]*inlineable=\"false\"", program.as_text())), program(x)


@pytest.mark.parametrize(
    "function, calls",
    [(forward, 1), (settled, 1), (jax.value_and_grad(settled), 2), (in_turn, 1), (jax.value_and_grad(in_turn), 3)],
)
def test_a_call_of_its_own_on_one_cpu_and_no_call_elsewhere(function, calls):
    found, together = compiled_calls(function, 1)
    none, spread = compiled_calls(function, 8)
    assert (found, none) == (calls, 0)
    for one, other in zip(jax.tree.leaves(together), jax.tree.leaves(spread), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_equal_calls_are_traced_once():
    traced = []

    def function(x, *, power):
        traced.append(power)
        return x**power

    with on_devices(1):
        for power in (2, 2, 3, 2):
            np.testing.assert_allclose(separately(function, jnp.full(3, 2.0), power=power), 2.0**power)
    assert traced == [2, 3]
