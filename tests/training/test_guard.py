"""The divergence guard: every bound trips, outliers are left out, the good checkpoint comes back bit for bit, also over
restarts.
"""

import dataclasses
import json
import math
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from learners import learner

from uae_jax.methods.method import make_train_step
from uae_jax.training.guard import OFF, Guard, GuardConfig, skip_outliers
from uae_jax.training.loop import run_stage
from uae_jax.training.loop_config import Hooks, LoopConfig
from uae_jax.training.metrics import MetricWriter, read_lines
from uae_jax.training.signals import StopTraining
from uae_jax.training.step import init_state

FINE = {"loss": 0.1, "grad_norm": 0.2, "reward": 0.5, "kl": 0.01, "truncated_fraction": 0.0, "outlier_updates": 0.0}
ALL = GuardConfig(
    window=4, reward_fall=0.1, non_finite=2, gradient_ratio=5.0, gradient_outliers=2, kl=0.3, truncated=0.5
)


def first_trip(config, stream):
    """The first trip of a stream of metrics, read in one go and with the statistics written and read back at every
    step.
    """
    found, other, statistics = None, None, None
    guard = Guard(config)
    for step, metrics in enumerate(stream, 1):
        found = found or guard.observe(step, metrics)
        resumed = Guard(config, statistics)
        other = other or resumed.observe(step, metrics)
        statistics = json.loads(json.dumps(resumed.statistics()))
    assert found == other
    return found


STREAMS = {  # what trips: metrics that change from step 6 on, the step at which the bound is passed, and the value
    "non_finite": ([{"loss": math.nan}, {}, {"grad_norm": math.inf}], 8, 2),
    "gradient_outliers": ([{"outlier_updates": 1.0}, {"outlier_updates": 1.0}, {"outlier_updates": 2.0}], 8, 2),
    "reward_fall": ([{"reward": 0.5}, {"reward": 0.2}, {"reward": 0.2}, {"reward": 0.2}], 8, 0.15),
    "kl": ([{"kl": 0.5}, {"kl": 0.5}, {"kl": 0.5}], 8, (3 * 0.5 + 0.01) / 4),
    "truncated": ([{"truncated_fraction": 0.9}] * 3, 8, 2.7 / 4),
}


@pytest.mark.parametrize("what", STREAMS)
def test_each_bound_trips_at_its_step_and_not_when_it_is_off(what):
    changes, step, value = STREAMS[what]
    stream = [FINE] * 5 + [FINE | change for change in changes]
    trip = first_trip(ALL, stream)
    assert (trip.what, trip.step, trip.value) == (what, step, pytest.approx(value))
    assert first_trip(dataclasses.replace(ALL, **{what: 0}), stream) is None


def test_a_healthy_noisy_stream_trips_nothing():
    rng = np.random.default_rng(0)
    stream = [
        FINE | {"reward": 0.5 + step / 200 + 0.05 * rng.normal(), "kl": 0.1 * rng.random()} for step in range(100)
    ]
    stream[50] = stream[50] | {"loss": math.nan, "reward": math.nan}  # one lost step is not two
    assert first_trip(ALL, stream) is None
    assert first_trip(OFF, [FINE, FINE | {"loss": math.nan}]) is None


def test_a_slow_fall_from_the_best_mean_trips():
    rise, fall = np.linspace(0.3, 0.6, 30), np.linspace(0.6, 0.4, 60)
    trip = first_trip(ALL, [{"loss": 0.0, "reward": reward} for reward in (*rise, *fall)])
    means = np.convolve((*rise, *fall), np.ones(4) / 4, mode="valid")
    expected = np.flatnonzero(np.maximum.accumulate(means) - means > 0.1)[0] + 4  # the mean of step n ends with it
    assert (trip.what, trip.step) == ("reward_fall", expected)


def test_a_state_near_a_bound_is_not_good():
    guard = Guard(ALL)
    for step in range(4):
        assert guard.fine == (step == 0)  # what no window has judged yet is not good
        guard.observe(step, FINE)
    assert guard.fine
    guard.observe(5, FINE | {"reward": 0.28})  # the mean fell by .055: more than half of .1
    assert not guard.fine
    for step in range(6, 10):
        guard.observe(step, FINE)
    assert guard.fine
    guard.observe(10, FINE | {"grad_norm": math.nan})
    assert guard.fine  # one of two is half


@pytest.mark.parametrize(
    "wrong",
    [
        dict(window=1),
        dict(kl=-1.0),
        dict(margin=0.0),
        dict(reward_fall=math.nan),
        dict(gradient_ratio=0.5),
        dict(gradient_outliers=2),
    ],
)
def test_wrong_bounds_are_refused(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match="^gradient_ratio is" if name == "gradient_outliers" else f"^{name} is"):
        dataclasses.replace(OFF, **wrong)


def test_the_defaults_guard_and_the_one_that_is_off_does_not():
    lost = FINE | {"loss": math.nan}
    assert GuardConfig().on and first_trip(GuardConfig(), [lost] * 3).what == "non_finite"
    assert not OFF.on and not any(OFF.bounds().values())


def test_an_outlier_leaves_parameters_and_moments_as_they_are():
    config = dataclasses.replace(OFF, window=4, gradient_ratio=5.0, gradient_outliers=2)
    plain, guarded = optax.adam(0.1), skip_outliers(optax.adam(0.1), config)
    assert skip_outliers(plain, OFF) is plain
    params = {"w": jnp.ones(3)}
    update = jax.jit(guarded.update)
    state, reference = guarded.init(params), plain.init(params)
    norms = [1.0, 1.1, 0.9, 40.0, 1.0, 0.0, 30.0, 1.0, 1.0, 6.0]  # the fourth comes before the window is full
    left_out = []
    for number, size in enumerate(norms):
        gradients = {"w": jnp.array([size, 0.0, 0.0])}
        changes, state = update(gradients, state, params)
        left_out.append(int(state.outliers) > sum(left_out))
        if left_out[-1]:
            assert not changes["w"].any()
        else:
            expected, reference = plain.update(gradients, reference, params)
            np.testing.assert_allclose(changes["w"], expected["w"], rtol=1e-6)
    assert [number for number, out in enumerate(left_out) if out] == [6, 9]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), state.inner, reference)


# ---- in the loop ----


class Batches:
    """Batch i says what step i + 1 reports; every batch moves the parameters differently."""

    def __init__(self, changes):
        self.index, self.changes = 0, changes

    def __next__(self):
        step = self.index + 1
        self.index += 1
        values = FINE | self.changes(step)
        return {
            "move": np.full((2, 3), 0.01 * step, np.float32),
            "reward": np.full(2, values["reward"], np.float32),
            "scale": np.full(2, values.get("scale", 1.0), np.float32),
        }

    def get_state(self):
        return {"next_index": self.index}

    def set_state(self, state):
        self.index = state["next_index"]


def make_step(guard):
    """Gradients are the batch's `move` times its `scale`; the reward is the batch's."""

    def rollout(params, frozen, batch, key):
        return {"samples": batch, "metrics": {"reward": (batch["reward"].sum(), jnp.float32(2))}}

    def loss(params, frozen, rollout, key):
        samples = rollout["samples"]
        return (samples["scale"][:, None] * samples["move"] * params["w"]).sum(), jnp.float32(2), {}

    optimizer = skip_outliers(optax.adam(0.01), guard)
    step = jax.jit(make_train_step(learner(loss, rollout, ema_decay=0.9), optimizer), donate_argnames="state")
    return step, init_state({"w": jnp.ones(3)}, optimizer, ema=True)


def train(workdir, changes, guard, *, steps=16, hooks=None, **config):
    workdir.mkdir(exist_ok=True)
    step, state = make_step(guard)
    result = run_stage(
        "toy",
        step,
        state=state,
        frozen={},
        data=Batches(changes),
        key=jax.random.key(0),
        workdir=workdir,
        config=LoopConfig(steps=steps, **({"save_every": 3, "keep": 1} | config)),
        writer=MetricWriter(workdir, tensorboard=False),
        hooks=hooks,
        guard=guard,
        identity={"a": 1},
    )
    assert step._cache_size() <= 1
    return result


def fall(step):
    """The reward rises until step 8 and then falls."""
    return {"reward": 0.5 + 0.05 * step if step <= 8 else 0.9 - 0.05 * (step - 8)}


GUARD = dataclasses.replace(OFF, window=3, reward_fall=0.12)


def lines(workdir):
    return [
        {name: value for name, value in line.items() if name != "seconds" and not name.startswith("perf/")}
        for line in read_lines(workdir / "metrics.jsonl")
    ]


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("log_every", [1, 5])
def test_a_trip_restores_the_good_checkpoint_and_not_the_newest(tmp_path, capsys, log_every):
    seen = []
    hooks = Hooks(after=lambda state: seen.append(np.asarray(state.params["w"])) or {"reward": 1.0})
    result = train(tmp_path / "run", fall, GUARD, hooks=hooks, log_every=log_every)
    # running means of three: best .85 (6 to 8); .8833 - .05 ... at steps 9, 10, 11, 12: .867, .85, .8, .75
    assert result.guard["what"] == "reward_fall" and result.guard["bound"] == 0.12
    rewards = [fall(step)["reward"] for step in range(1, 17)]
    means = np.convolve(rewards, np.ones(3) / 3, mode="valid")
    gaps = np.maximum.accumulate(means) - means
    tripped = int(np.flatnonzero(gaps > 0.12)[0]) + 3
    good = max(step for step in range(3, tripped, 3) if gaps[step - 3] <= 0.06)
    assert (result.guard["step"], result.guard["restored_step"], result.steps) == (tripped, good, good)
    assert tripped - good > 3, "the newest checkpoint must not be the good one, or this test shows nothing"
    assert result.guard["value"] == pytest.approx(gaps[tripped - 3])

    expected = train(tmp_path / "short", fall, OFF, steps=good).state
    equal(result.state, expected)
    np.testing.assert_array_equal(seen[0], expected.params["w"])
    written = lines(tmp_path / "run")
    assert written[-1] == {"stage": "toy", "step": tripped, "guard": result.guard}
    assert max(line["step"] for line in written) == tripped and sum("guard" in line for line in written) == 1
    assert "stopped by the guard: the fall of the running-mean reward from its best" in capsys.readouterr().err
    assert not list((tmp_path / "run" / "checkpoints").rglob("*tmp*"))

    again = train(tmp_path / "run", fall, GUARD, hooks=hooks, log_every=log_every)
    assert again.record() == result.record() and len(seen) == 1
    equal(again.state, expected)


def test_a_trip_before_any_checkpoint_restores_the_start(tmp_path):
    early = dataclasses.replace(OFF, window=2, reward_fall=0.1)
    result = train(tmp_path, lambda step: {"reward": 0.9 if step < 3 else 0.1}, early, save_every=0)
    assert (result.guard["step"], result.guard["restored_step"], result.steps) == (3, 0, 0)
    equal(result.state, make_step(early)[1])


@pytest.mark.parametrize("stops", [(2,), (7,), (10,), (4, 5, 7, 8), (11,), (12,)])
def test_stopping_and_resuming_around_a_trip_changes_nothing(tmp_path, stops):
    hooks = Hooks(before=lambda state: {"reward": 0.1}, after=lambda state: {"reward": float(state.params["w"].sum())})
    whole = train(tmp_path / "whole", fall, GUARD, hooks=hooks)
    for stop in stops:
        stopping = dataclasses.replace(
            hooks, on_step=lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == stop else None
        )
        with pytest.raises(StopTraining):
            train(tmp_path / "parts", fall, GUARD, hooks=stopping)
    resumed = train(tmp_path / "parts", fall, GUARD, hooks=hooks)
    equal(whole.state, resumed.state)
    assert resumed.guard == whole.guard and (resumed.before, resumed.after) == (whole.before, whole.after)
    assert lines(tmp_path / "whole") == lines(tmp_path / "parts")


def test_a_process_that_dies_after_the_trip_does_not_train_on(tmp_path):
    def die(state):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", fall, GUARD, hooks=Hooks(after=die))
    steps = []
    resumed = train(tmp_path / "parts", fall, GUARD, hooks=Hooks(on_step=steps.append))
    whole = train(tmp_path / "whole", fall, GUARD)
    assert not steps and resumed.guard == whole.guard
    equal(whole.state, resumed.state)
    assert lines(tmp_path / "whole") == lines(tmp_path / "parts")


def test_lost_steps_trip_when_they_repeat_and_one_alone_does_not(tmp_path):
    guard = dataclasses.replace(OFF, window=4, non_finite=2)
    lost = lambda *steps: lambda step: {"scale": math.nan if step in steps else 1.0}
    one = train(tmp_path / "one", lost(5), guard)
    assert (
        one.guard is None
        and one.steps == 16
        and int(one.state.skipped) == 1
        and np.isfinite(one.state.params["w"]).all()
    )
    two = train(tmp_path / "two", lost(5, 7), guard)
    assert (two.guard["what"], two.guard["step"], two.guard["value"], two.guard["restored_step"]) == (
        "non_finite",
        7,
        2,
        6,
    )
    with pytest.raises(FloatingPointError, match="not finite at step 5"):
        train(tmp_path / "off", lost(5, 7), GUARD)


def test_gradient_outliers_are_left_out_and_trip_when_they_repeat(tmp_path):
    guard = dataclasses.replace(OFF, window=4, gradient_ratio=6.0, gradient_outliers=2)
    spikes = lambda *steps: lambda step: {"scale": 1e4 if step in steps else 1.0}
    one = train(tmp_path / "one", spikes(7), guard)
    assert one.guard is None and int(one.state.opt_state.outliers) == 1
    assert [line["outlier_updates"] for line in lines(tmp_path / "one")] == [0.0] * 6 + [1.0] * 10
    two = train(tmp_path / "two", spikes(7, 9), guard)
    assert (two.guard["what"], two.guard["step"], two.guard["restored_step"]) == ("gradient_outliers", 9, 6)
