"""Schedules, decay mask by path, learning-rate factors by path."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uae_jax.training.optimizer import OptimizerConfig, decay_mask, make_optimizer, make_schedule

PARAMS = {
    "layers": {"attn": {"kernel": jnp.ones((2, 3, 3)), "bias": jnp.ones((2, 3))}, "norm": {"scale": jnp.ones((2, 3))}},
    "embed": {"embedding": jnp.ones((5, 3))},
    "lora": {"a": jnp.ones((3, 2)), "b": jnp.ones((2, 3))},
}


def run(config, gradients, total=10):
    optimizer = make_optimizer(config, total)
    updates, _ = optimizer.update(gradients, optimizer.init(PARAMS), PARAMS)
    return updates


def test_decay_reaches_matrices_only_even_when_stacked():
    mask = decay_mask(PARAMS)
    assert mask["layers"] == {"attn": {"kernel": True, "bias": False}, "norm": {"scale": False}}
    assert mask["embed"]["embedding"] and mask["lora"] == {"a": True, "b": True}
    updates = run(OptimizerConfig(learning_rate=0.1, weight_decay=0.5), jax.tree.map(jnp.zeros_like, PARAMS))
    expected = jax.tree.map(lambda p, m: np.full(p.shape, -0.05 if m else 0.0), PARAMS, mask)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), updates, expected)


def test_multiplier_scales_its_leaves_and_must_match_something():
    ones = jax.tree.map(jnp.ones_like, PARAMS)
    plain = run(OptimizerConfig(), ones)
    scaled = run(OptimizerConfig(multipliers=(("attn/", 0.0), ("^lora", 10.0))), ones)
    assert float(jnp.abs(scaled["layers"]["attn"]["kernel"]).max()) == 0.0
    np.testing.assert_allclose(scaled["lora"]["b"], 10 * plain["lora"]["b"], rtol=1e-6)
    np.testing.assert_array_equal(scaled["embed"]["embedding"], plain["embed"]["embedding"])
    with pytest.raises(ValueError, match="'decoder' matches no parameter"):
        run(OptimizerConfig(multipliers=(("decoder", 2.0),)), ones)


def test_schedules():
    rate = lambda k, **kw: float(make_schedule(OptimizerConfig(learning_rate=2.0, **kw), 10)(jnp.asarray(k)))
    assert rate(0) == rate(99) == 2.0
    assert [rate(k, warmup_steps=4) for k in range(5)] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rate(10, schedule="cosine") == pytest.approx(0.0, abs=1e-6)
    assert rate(5, schedule="cosine") == pytest.approx(1.0)
    assert rate(6, schedule="linear", warmup_steps=2, final_fraction=0.5) == pytest.approx(1.5)


def test_clip_bounds_what_adam_sees():
    big = jax.tree.map(lambda p: 1e3 * jnp.ones_like(p), PARAMS)
    optimizer = make_optimizer(OptimizerConfig(max_grad_norm=1.0), 10)
    _, state = optimizer.update(big, optimizer.init(PARAMS), PARAMS)
    mu = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state) if ".mu" in jax.tree_util.keystr(path)]
    norm = np.sqrt(sum(float(jnp.square(leaf).sum()) for leaf in mu))
    assert norm == pytest.approx(0.1, rel=1e-4)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"schedule": "step"}, "schedule is 'step'; choose one of constant, cosine, linear"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; it must be above 0"),
        ({"warmup_steps": -1}, "warmup_steps is -1; it must be at least 0"),
        ({"b1": 1.5}, "b1 is 1.5; it must be at least 0, at most 1"),
    ],
)
def test_bad_config_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**fields)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
@pytest.mark.parametrize("warmup_steps", [10, 500])
def test_a_warmup_as_long_as_the_run_is_shortened_to_half_of_it(schedule, warmup_steps):
    long = OptimizerConfig(learning_rate=2.0, schedule=schedule, warmup_steps=warmup_steps)
    assert long.warmup_of(10) == 5 and long.warmup_of(warmup_steps + 1) == warmup_steps
    short = OptimizerConfig(learning_rate=2.0, schedule=schedule, warmup_steps=5)
    updates = jnp.arange(12)
    rates = np.asarray(jax.vmap(make_schedule(long, 10))(updates))
    np.testing.assert_array_equal(rates, jax.vmap(make_schedule(short, 10))(updates))
    np.testing.assert_allclose(rates[:5], [0.4, 0.8, 1.2, 1.6, 2.0], rtol=1e-6)
    assert long.warmup_of(1) == 0 and float(make_schedule(long, 1)(jnp.asarray(0))) == 2.0
