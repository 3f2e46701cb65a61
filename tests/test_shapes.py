"""Shapes in signatures are true: a type checker that runs beside a function refuses arrays of another shape.

Complete folders are checked while their own tests run, at several times the cost, by an option of pytest:

    pytest tests/rl tests/diffusion --jaxtyping-packages=uae_jax.rl,uae_jax.diffusion,beartype.beartype
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from beartype import beartype
from jaxtyping import TypeCheckError, jaxtyped

from uae_jax.diffusion.steps import SdeStep
from uae_jax.rl.advantages import group_advantages
from uae_jax.rl.losses import token_grpo_loss

checked = functools.partial(jaxtyped, typechecker=beartype)
SIGMAS = jnp.array([1.0, 0.9, 0.7, 0.0])
TOKENS = {
    "log_prob": jnp.full((4, 6), -0.5),
    "old_log_prob": jnp.full((4, 6), -0.4),
    "ref_log_prob": None,
    "advantage": jnp.array([1.0, -1.0, 0.5, -0.5]),
    "mask": jnp.ones((4, 6), bool),
}
STEP = {
    "x": jnp.ones((2, 4, 4, 3)),
    "velocity": jnp.full((2, 4, 4, 3), 0.5),
    "sigma": SIGMAS[1],
    "next_sigma": SIGMAS[2],
    "sigma_second": SIGMAS[1],
}
FUNCTIONS = [
    (token_grpo_loss, TOKENS),
    (SdeStep(0.7).transition, STEP),
    (group_advantages, {"rewards": jnp.array([[0.1, 0.5, 0.9], [2.0, 1.0, 4.0]])}),
]


@pytest.mark.parametrize("function, right", FUNCTIONS, ids=("loss", "step", "advantages"))
def test_right_shapes_pass_and_change_nothing(function, right):
    plain, watched = function(**right), checked(function)(**right)
    jax.tree.map(np.testing.assert_array_equal, watched, plain)


@pytest.mark.parametrize(
    "wrong",
    [
        {"log_prob": TOKENS["log_prob"].T},  # another order of the axes
        {"mask": jnp.ones((4, 7), bool)},  # another number of tokens
        {"mask": jnp.ones((4, 6))},  # not true or false
        {"advantage": TOKENS["advantage"][:, None]},  # would be broadcast to [n, n, t]
        {"advantage": TOKENS["advantage"][:2]},  # another number of samples
    ],
)
def test_a_loss_refuses_other_shapes(wrong):
    with pytest.raises(TypeCheckError):
        checked(token_grpo_loss)(**TOKENS | wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"velocity": STEP["velocity"][:1]},  # would be broadcast over samples
        {"velocity": STEP["velocity"][..., :1]},  # would be broadcast over channels
        {"sigma": SIGMAS[:2]},  # one level for each sample
    ],
)
def test_a_denoising_step_refuses_other_shapes(wrong):
    with pytest.raises(TypeCheckError):
        checked(SdeStep(0.7).transition)(**STEP | wrong)


@pytest.mark.parametrize("wrong", [jnp.ones(6), jnp.ones((2, 3, 1)), jnp.ones((2, 3), int)])
def test_advantages_refuse_rewards_that_are_not_groups(wrong):
    with pytest.raises(TypeCheckError):
        checked(group_advantages)(wrong)
