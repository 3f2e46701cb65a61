"""The train step: gradients do not depend on how samples are split, nothing aliases, bad updates are skipped."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from learners import PairSettings, learner

from uae_jax import trees
from uae_jax.methods.method import gradients_of, make_train_step, split_samples
from uae_jax.methods.stage_settings import SupervisedSettings
from uae_jax.training.step import OldPolicy, ema_decay_at, init_state, step_key

PARAMS = {"layer": {"kernel": jnp.arange(6.0).reshape(3, 2) / 10, "bias": jnp.zeros(2)}}


def predict(params, x):
    return x @ params["layer"]["kernel"] + params["layer"]["bias"]


def masked_loss(params, frozen, rollout, key):
    """Squared error over valid rows only: micro-batches have unequal counts. Noise is folded by sample id."""
    s = rollout["samples"]
    noise = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), (2,)))(s["id"])
    error = jnp.square(predict(params, s["x"]) - s["y"] + 0.1 * noise).sum(-1)
    total = (error * s["mask"]).sum()
    return total, s["mask"].sum(), {"error": (total, s["mask"].sum())}


def make_batch(n=8, seed=0):
    rng = np.random.default_rng(seed)
    mask = np.array([1, 1, 1, 0, 0, 1, 0, 1], np.float32)[:n]
    return {
        "id": jnp.arange(n),
        "x": jnp.asarray(rng.normal(size=(n, 3)), jnp.float32),
        "y": jnp.asarray(rng.normal(size=(n, 2)), jnp.float32),
        "mask": jnp.asarray(mask),
    }


@pytest.mark.trap(11)
@pytest.mark.parametrize("micro_batches", [2, 4, 8])
def test_gradient_is_the_same_for_every_micro_batch_count(micro_batches):
    rollout = {"samples": make_batch(), "shared": {}}
    key = jax.random.key(0)
    whole, *rest = gradients_of(masked_loss, PARAMS, {}, rollout, key, 1)
    parts, *others = gradients_of(masked_loss, PARAMS, {}, rollout, key, micro_batches)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-6), (whole, rest), (parts, others))
    mean = jax.grad(lambda p: (lambda s, c, _: s / c)(*masked_loss(p, {}, rollout, key)))(PARAMS)
    total, count, _ = masked_loss(PARAMS, {}, rollout, key)
    assert float(rest[0]) == pytest.approx(float(total / count), rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), whole, mean)


def test_count_carries_no_gradient():
    def loss(params, frozen, rollout, key):
        return params["w"] * 3.0, jnp.square(params["w"]), {}

    params = {"w": jnp.asarray(2.0)}
    gradient, *_ = gradients_of(loss, params, {}, {"samples": jnp.ones(1), "shared": {}}, jax.random.key(0), 1)
    assert float(gradient["w"]) == pytest.approx(3.0 / 4.0)


def test_split_keeps_groups_whole_and_interleaves_them():
    parts = split_samples(
        {"group": jnp.repeat(jnp.arange(4), 3), "member": jnp.tile(jnp.arange(3), 4)}, 2, group_size=3
    )
    assert parts["group"].tolist() == [[0, 0, 0, 2, 2, 2], [1, 1, 1, 3, 3, 3]]
    assert parts["member"].tolist() == [[0, 1, 2] * 2] * 2


@pytest.mark.parametrize("parts", [1, 2, 3, 6])
def test_mapped_samples_come_back_in_their_order_a_part_at_a_time(parts):
    sizes = []

    def double(samples):
        sizes.append(len(samples["x"]))
        return {"y": 2 * samples["x"], "n": samples["n"]}

    mapped = trees.map_parts(double, split_samples({"x": jnp.arange(12.0).reshape(6, 2), "n": jnp.arange(6)}, parts))
    assert set(sizes) == {6 // parts} and mapped["n"].tolist() == list(range(6))
    np.testing.assert_array_equal(mapped["y"], 2 * np.arange(12.0).reshape(6, 2))


@pytest.mark.parametrize(
    "samples, message", [({"x": jnp.ones(6)}, "do not divide"), ({"x": jnp.ones(()), "y": jnp.ones(4)}, "leading axis")]
)
def test_samples_that_do_not_divide_are_refused(samples, message):
    with pytest.raises(ValueError, match=message):
        split_samples(samples, 4)


@pytest.mark.trap(35)
def test_ratio_leaves_one_after_the_first_update():
    """With old and new parameters aliased every ratio would stay 1 and the clip would be dead."""

    def rollout(params, frozen, batch, key):
        return {
            "samples": {"x": batch, "old": predict(params, batch)},
            "metrics": {"old": predict(params, batch).mean()},
        }

    def loss(params, frozen, rollout, key):
        s = rollout["samples"]
        ratio = jnp.exp(predict(params, s["x"]) - s["old"])
        gap = jnp.abs(ratio - 1).max()
        return ratio.sum(), jnp.asarray(ratio.size), {"gap": gap, "shared": rollout["shared"]["c"]}

    def sample(*arguments):
        return {**rollout(*arguments), "shared": {"c": jnp.asarray(5.0)}}

    optimizer = optax.sgd(0.1)
    batch = make_batch(8)["x"]
    batch = jnp.tile(batch[:4], (2, 1))
    gaps = {}
    for updates in (1, 2):
        method = learner(loss, sample, updates_per_rollout=updates)
        step = jax.jit(make_train_step(method, optimizer), donate_argnames="state")
        state, metrics = step(init_state(PARAMS, optimizer), {}, batch, jax.random.key(0))
        gaps[updates] = float(metrics["gap"])
        assert float(metrics["shared"]) == 5.0
        assert int(state.step) == 1 and int(state.updates) == updates
    assert gaps[1] == 0.0
    assert gaps[2] > 1e-3
    assert np.isfinite(PARAMS["layer"]["kernel"]).all()  # the caller's arrays survive the donation


def test_each_update_takes_its_own_complete_groups_with_its_own_key():
    optimizer, seen = optax.sgd(0.0), []

    def loss(params, frozen, rollout, key):
        found = rollout["samples"]["id"], jax.random.key_data(key)
        jax.debug.callback(lambda ids, key: seen.append((ids.tolist(), key.tolist())), *found)
        return params["layer"]["bias"].sum(), jnp.asarray(1.0), {}

    method = learner(loss, kind=PairSettings, updates_per_rollout=2, micro_batches=2)
    state, _ = jax.jit(make_train_step(method, optimizer))(
        init_state(PARAMS, optimizer), {}, make_batch(), jax.random.key(0)
    )
    jax.effects_barrier()
    assert (int(state.step), int(state.updates)) == (1, 2)
    updates = {}
    for ids, own_key in seen:
        updates.setdefault(tuple(own_key), []).extend(ids)
    assert len(seen) == 4 and sorted(sorted(ids) for ids in updates.values()) == [[0, 1, 4, 5], [2, 3, 6, 7]]


def test_non_finite_gradient_skips_the_update_and_counts_it():
    optimizer = optax.adam(0.1)
    step = jax.jit(make_train_step(learner(masked_loss, ema_decay=0.9), optimizer))
    start = init_state(PARAMS, optimizer, ema=True)
    bad = make_batch()
    bad["x"] = bad["x"].at[0, 0].set(jnp.nan)
    state, metrics = step(start, {}, bad, jax.random.key(0))
    assert float(metrics["skipped_updates"]) == 1 and int(state.updates) == 0 and int(state.step) == 1
    for name in ("params", "opt_state", "ema"):
        jax.tree.map(np.testing.assert_array_equal, getattr(start, name), getattr(state, name))
    state, metrics = step(state, {}, make_batch(), jax.random.key(0))
    assert float(metrics["skipped_updates"]) == 1 and int(state.updates) == 1
    assert np.abs(state.params["layer"]["kernel"] - PARAMS["layer"]["kernel"]).max() > 0


@pytest.mark.trap(29)
def test_ema_follows_its_formula_once_an_update():
    optimizer = optax.sgd(0.1)
    step = jax.jit(make_train_step(learner(masked_loss, ema_decay=0.2), optimizer))
    state = init_state(PARAMS, optimizer, ema=True)
    expected = np.asarray(PARAMS["layer"]["kernel"])
    for k in range(4):
        state, _ = step(state, {}, make_batch(), jax.random.key(0))
        decay = min(0.2, (1 + k) / (10 + k))
        expected = decay * expected + (1 - decay) * np.asarray(state.params["layer"]["kernel"])
    np.testing.assert_allclose(state.ema["layer"]["kernel"], expected, rtol=1e-6)
    assert float(ema_decay_at(jnp.asarray(10**6), 0.99)) == pytest.approx(0.99)


def test_ema_must_be_asked_for_twice():
    optimizer = optax.sgd(0.1)
    with pytest.raises(ValueError, match="ema=True"):
        make_train_step(learner(masked_loss, ema_decay=0.9), optimizer)(
            init_state(PARAMS, optimizer), {}, make_batch(), jax.random.key(0)
        )


class LaggingSettings(SupervisedSettings):
    """Settings whose rollouts come from a moving average."""

    old_policy = OldPolicy(0.25, 0.6)


def test_the_policy_of_the_rollouts_follows_its_formula():
    optimizer, seen = optax.sgd(0.1), []

    def sample(params, frozen, batch, key):
        jax.debug.callback(lambda kernel: seen.append(np.asarray(kernel)), params["layer"]["kernel"])
        return {"samples": batch}

    step = jax.jit(make_train_step(learner(masked_loss, sample, kind=LaggingSettings), optimizer))
    state = init_state(PARAMS, optimizer, old=True)
    expected = np.asarray(PARAMS["layer"]["kernel"])
    for k in range(5):
        state, _ = step(state, {}, make_batch(), jax.random.key(0))
        jax.effects_barrier()
        np.testing.assert_allclose(seen[-1], expected, rtol=1e-6)
        decay = min(0.6, 0.25 * k)
        expected = decay * expected + (1 - decay) * np.asarray(state.params["layer"]["kernel"])
    np.testing.assert_allclose(state.old["layer"]["kernel"], expected, rtol=1e-6)


def test_an_old_policy_must_be_asked_for_twice():
    optimizer = optax.sgd(0.1)
    with pytest.raises(ValueError, match="old=True"):
        make_train_step(learner(masked_loss, kind=LaggingSettings), optimizer)(
            init_state(PARAMS, optimizer), {}, make_batch(), jax.random.key(0)
        )


def test_metric_named_twice_is_refused():
    optimizer = optax.sgd(0.1)
    method = learner(masked_loss, lambda p, f, b, k: {"samples": b, "metrics": {"error": 0.0}})
    with pytest.raises(ValueError, match="'error' is reported twice"):
        make_train_step(method, optimizer)(init_state(PARAMS, optimizer), {}, make_batch(), jax.random.key(0))


@pytest.mark.trap(24)
def test_step_key_depends_on_root_name_and_step():
    root = jax.random.key(0)
    data = lambda *a: tuple(jax.random.key_data(step_key(*a)).tolist())
    keys = {
        data(root, "rollout", 0),
        data(root, "rollout", 1),
        data(root, "loss", 0),
        data(jax.random.key(1), "rollout", 0),
    }
    assert len(keys) == 4 and data(root, "rollout", 1) == data(root, "rollout", jnp.asarray(1))
