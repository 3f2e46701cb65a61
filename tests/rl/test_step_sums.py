"""A sum over steps has the value and the gradient of the plain sum, and computes each step once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uae_jax.rl.step_sums import sum_over_steps

STEPS = {"x": jnp.arange(12.0).reshape(4, 3) / 7, "weight": jnp.array([1.0, -2.0, 0.5, 3.0])}
PARAMS = {"a": jnp.array([0.3, -1.2, 0.8]), "b": jnp.array(0.4, jnp.bfloat16)}


def step_loss(params, step):
    value = step["weight"] * jnp.tanh(params["a"] * step["x"] + params["b"]).sum()
    return value, {"value": value, "largest": jnp.abs(step["x"]).max()}


def plain(params):
    losses = [step_loss(params, jax.tree.map(lambda leaf: leaf[index], STEPS)) for index in range(4)]
    return sum(loss for loss, _ in losses), jax.tree.map(
        lambda *leaves: jnp.stack(leaves), *(more for _, more in losses)
    )


@pytest.mark.parametrize("scale", [1.0, -0.3])
def test_value_gradient_and_the_rest_are_those_of_the_plain_sum(scale):
    def scaled(total):
        return lambda params: (lambda found: (scale * found[0], found[1]))(total(params))

    ours, theirs = (
        jax.value_and_grad(scaled(total), has_aux=True)(PARAMS)
        for total in (lambda params: sum_over_steps(step_loss, params, STEPS), plain)
    )
    assert ours[1]["b"].dtype == jnp.bfloat16
    np.testing.assert_allclose(ours[1].pop("b").astype(float), theirs[1].pop("b").astype(float), rtol=2e-2)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5), ours, theirs)
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-6),
        sum_over_steps(step_loss, PARAMS, STEPS),
        plain(PARAMS),
    )


def test_no_step_is_computed_twice():
    seen = []

    def counted(params, step):
        jax.debug.callback(lambda weight: seen.append(float(weight)), step["weight"])
        return step_loss(params, step)

    jax.block_until_ready(jax.jit(jax.grad(lambda params: sum_over_steps(counted, params, STEPS)[0]))(PARAMS))
    jax.effects_barrier()
    assert sorted(seen) == sorted(STEPS["weight"].tolist())
