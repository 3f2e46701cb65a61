"""Groups that part at one step: the drawings of the windowed sampler, one evaluation a group, the same gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uae_jax.diffusion import sampler
from uae_jax.diffusion.branching import finish, sample_branches
from uae_jax.diffusion.schedule import sigma_schedule
from uae_jax.diffusion.steps import CpsStep, DanceStep, SdeStep
from uae_jax.planning.flops import count_work

SIGMAS = jnp.asarray(sigma_schedule(6, 4.0, "single"))
GROUPS, MEMBERS, SHAPE = 3, 4, (2, 5)
RULES = [SdeStep(0.7), DanceStep(0.3), CpsStep(0.8)]


def params(seed=0):
    a, b = jax.random.normal(jax.random.key(seed), (2, 5, 5)) * 0.3
    return {"in": a, "out": b}


def predict(params, context):
    """A toy denoiser whose rows have a context each."""

    def velocity(x, sigma):
        hidden = jnp.tanh(x @ params["in"] + sigma + context[: len(x), None])
        return x + hidden @ params["out"]

    return velocity


CONTEXT = jax.random.normal(jax.random.key(2), (GROUPS, 5))
EACH = CONTEXT.repeat(MEMBERS, axis=0)
NOISE = jax.random.normal(jax.random.key(5), (GROUPS, *SHAPE))
KEYS = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(9), jnp.arange(GROUPS * MEMBERS))


def branches(rule, index):
    return sample_branches(
        predict(params(), CONTEXT), predict(params(), EACH), NOISE, SIGMAS, rule, index, KEYS.reshape(GROUPS, MEMBERS)
    )


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_members_are_the_drawings_of_a_window_of_one_step_from_one_noise(rule):
    program = jax.jit(lambda index: branches(rule, index))
    for index in range(5):
        found = program(index)
        alone = sampler.sample_window(
            predict(params(), EACH), NOISE.repeat(MEMBERS, axis=0), SIGMAS, rule, index, 1, KEYS
        )
        np.testing.assert_allclose(found.latents.repeat(MEMBERS, axis=0), alone.latents[0], atol=1e-5)
        np.testing.assert_allclose(found.velocities.repeat(MEMBERS, axis=0), alone.velocities[0], atol=1e-5)
        np.testing.assert_allclose(found.next_latents.reshape(alone.final.shape), alone.next_latents[0], atol=1e-5)
        np.testing.assert_allclose(found.log_probs.reshape(-1), alone.log_probs[0], atol=1e-4)
        np.testing.assert_allclose(found.final, alone.final, atol=2e-5)
    assert program._cache_size() == 1


def weighted_log_prob(params, rule, index, found, shared):
    """A loss of the scored transitions, and its number of evaluated rows."""
    weights = jax.random.normal(jax.random.key(11), (GROUPS, MEMBERS))
    if shared:
        steps, context = (found.latents[None], found.next_latents[None]), CONTEXT
    else:
        after = found.next_latents.reshape(1, GROUPS * MEMBERS, *SHAPE)
        steps, context = (found.latents.repeat(MEMBERS, axis=0)[None], after), EACH
    now = sampler.replay_window(predict(params, context), *steps, jnp.array([index]), SIGMAS, rule)
    return jnp.sum(now.log_probs.reshape(-1) * weights.reshape(-1))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("index", [0, 1, 3])
def test_one_replay_of_a_group_has_the_value_and_gradient_of_one_a_member(rule, index):
    found, other = branches(rule, index), params(1)  # the policy has moved since
    one, each = (
        jax.jit(
            jax.value_and_grad(lambda params, shared=shared: weighted_log_prob(params, rule, index, found, shared))
        )(other)
        for shared in (True, False)
    )
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(each[1]))
    assert scale > 1e-3
    np.testing.assert_allclose(one[0], each[0], rtol=1e-4, atol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a / scale, b / scale, atol=1e-5), one[1], each[1])


def test_one_replay_evaluates_a_group_once_forward_and_backward():
    """Products of the traced program: those of the denoiser are the only ones."""
    found = branches(RULES[0], 1)

    def flops(shared, transform):
        return count_work(
            transform(lambda params: weighted_log_prob(params, RULES[0], 1, found, shared)), (params(),), (0,)
        ).flops

    for transform in (lambda function: function, jax.grad):
        assert flops(False, transform) == MEMBERS * flops(True, transform) > 0


def test_the_beginning_of_a_group_is_computed_once():
    rows = []

    def counted(context):
        def velocity(x, sigma):
            rows.append(len(x))
            return predict(params(), context)(x, sigma)

        return velocity

    jax.make_jaxpr(
        lambda index: sample_branches(
            counted(CONTEXT), counted(EACH), NOISE, SIGMAS, RULES[0], index, KEYS.reshape(GROUPS, MEMBERS)
        )
    )(1)
    assert rows == [GROUPS, GROUPS, GROUPS * MEMBERS]  # before, at, and after the step


def test_the_ode_finishes_from_any_state_what_the_sampler_draws():
    whole = sampler.sample(predict(params(), CONTEXT), NOISE, SIGMAS)
    program = jax.jit(lambda x, index: finish(predict(params(), CONTEXT), x, SIGMAS, index))
    x = NOISE
    for index in range(6):
        np.testing.assert_allclose(program(x, index), whole, atol=1e-5)
        x = x + predict(params(), CONTEXT)(x, SIGMAS[index]) * (SIGMAS[index + 1] - SIGMAS[index])
    assert program._cache_size() == 1


def test_the_last_step_is_never_the_stochastic_one():
    with pytest.raises(ValueError, match="does not end by step 5"):
        branches(RULES[0], 5)
