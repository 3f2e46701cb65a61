"""The host loop: resume equals no interruption, one compilation, errors, order of things."""

import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from learners import learner

from uae_jax.methods.method import make_train_step
from uae_jax.training.loop import Hooks, LoopConfig, check_configuration, run_stage
from uae_jax.training.metrics import MetricWriter, read_lines
from uae_jax.training.optimizer import OptimizerConfig, make_optimizer
from uae_jax.training.signals import StopTraining
from uae_jax.training.step import init_state


class Batches:
    """Batches that depend on their index; `bad` has a NaN in it."""

    def __init__(self, bad=None, length=100):
        self.index, self.bad, self.length = 0, bad, length

    def __next__(self):
        if self.index >= self.length:
            raise StopIteration
        x = np.random.default_rng(self.index).normal(size=(4, 3)).astype(np.float32)
        if self.index == self.bad:
            x[0, 0] = np.nan
        self.index += 1
        return {"id": np.arange(4) + 4 * self.index, "x": x}

    def get_state(self):
        return {"next_index": self.index}

    def set_state(self, state):
        self.index = state["next_index"]


def make_stage():
    """A noisy regression with two updates a rollout; returns the jitted step, its trace counter and a fresh state."""
    traces = []

    def rollout(params, frozen, batch, key):
        noise = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i)))(batch["id"])
        return {"samples": {**batch, "noise": noise}, "metrics": {"reward": (noise.sum(), noise.shape[0])}}

    def loss(params, frozen, rollout, key):
        traces.append(1)
        s = rollout["samples"]
        error = jnp.square(s["x"] @ params["kernel"] - s["x"] @ frozen + 0.1 * s["noise"][:, None])
        return error.sum(), jnp.asarray(error.size), {}

    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.01, schedule="cosine", warmup_steps=2), 20)
    method = learner(loss, rollout, updates_per_rollout=2, ema_decay=0.9)
    step = jax.jit(make_train_step(method, optimizer), donate_argnames="state")
    return step, traces, init_state({"kernel": jnp.ones((3, 2))}, optimizer, ema=True)


def train(workdir, *, steps=10, data=None, hooks=None, **config):
    step, traces, state = make_stage()
    writer = MetricWriter(workdir, tensorboard=False)
    config = LoopConfig(steps=steps, **({"save_every": 4, "log_every": 3} | config))
    result = run_stage(
        "toy",
        step,
        state=state,
        frozen=jnp.full((3, 2), 0.5),
        data=data or Batches(),
        key=jax.random.key(1),
        workdir=workdir,
        config=config,
        writer=writer,
        hooks=hooks,
        identity={"rate": 0.01, "names": ("a",)},
    )
    assert step._cache_size() <= 1  # compiled once at most, on a restored state too
    return result, traces


def lines(workdir):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read_lines(workdir / "metrics.jsonl")]


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stop_and_resume_is_bit_exact(tmp_path, capsys, number, code):
    (tmp_path / "whole").mkdir(), (tmp_path / "parts").mkdir()
    evaluate = lambda state, step: {"norm": float(jnp.abs(state.params["kernel"]).sum())}
    hooks = Hooks(before=lambda s: {"reward": 1.0}, after=lambda s: {"reward": 2.0}, evaluate=evaluate)
    whole, traces = train(tmp_path / "whole", hooks=hooks, eval_every=5)
    assert len(traces) == 1

    calls = []
    stop = Hooks(
        before=lambda s: calls.append(1) or {"reward": 1.0},
        evaluate=evaluate,
        after=hooks.after,
        on_step=lambda step: os.kill(os.getpid(), number) if step == 5 else None,
    )
    handler = signal.getsignal(number)
    with pytest.raises(StopTraining, match="stopped at toy step 5; the same command continues") as stopped:
        train(tmp_path / "parts", hooks=stop, eval_every=5)
    assert stopped.value.exit_code == code
    assert signal.getsignal(number) is handler
    resumed, _ = train(tmp_path / "parts", hooks=stop, eval_every=5)

    equal(whole.state, resumed.state)
    assert int(resumed.state.step) == 10 and int(resumed.state.updates) == 20
    assert lines(tmp_path / "whole") == lines(tmp_path / "parts")
    assert [line["step"] for line in lines(tmp_path / "parts")] == [1, 3, 5, 6, 9, 10]
    assert calls == [1] and resumed.before == {"reward": 1.0} and resumed.after == {"reward": 2.0}
    again, traces = train(tmp_path / "parts", hooks=stop)
    assert not traces and again.record() == resumed.record()
    equal(again.state, whole.state)
    assert "toy step 9/10 reward" in capsys.readouterr().err


def test_a_kill_without_saving_continues_from_the_last_checkpoint(tmp_path):
    (tmp_path / "whole").mkdir(), (tmp_path / "parts").mkdir()
    whole, _ = train(tmp_path / "whole", log_every=1)

    def crash(step):
        if step == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", hooks=Hooks(on_step=crash), log_every=1)
    assert lines(tmp_path / "parts")[-1]["step"] == 6
    resumed, _ = train(tmp_path / "parts", log_every=1)
    equal(whole.state, resumed.state)
    assert lines(tmp_path / "whole") == lines(tmp_path / "parts")


def test_non_finite_loss_stops_with_its_step_and_saves_nothing(tmp_path):
    with pytest.raises(
        FloatingPointError, match=r"toy: the loss is not finite at step 7 \(steps 7 to 8.*checkpoint is of step 4"
    ):
        train(tmp_path, data=Batches(bad=6), log_every=6)
    assert sorted(p.name for p in (tmp_path / "checkpoints" / "toy").iterdir() if p.name.isdigit()) == ["4"]


def test_data_that_end_early(tmp_path):
    with pytest.raises(RuntimeError, match="the data ended at step 3 of 10"):
        train(tmp_path, data=Batches(length=3))


@pytest.mark.parametrize(
    "identity, message",
    [
        ({"rate": 0.02, "names": ("a",)}, "another configuration: rate was 0.01 and is 0.02; use .*new --workdir"),
        ({"rate": 0.01, "names": ("a", "b")}, r"names was \['a'\] and is \('a', 'b'\); use"),
        ({"names": ("a",), "more": {"b": 1}}, "rate was 0.01 and is absent; more was absent and is set; use"),
    ],
)
def test_another_configuration_is_refused_with_its_fields(tmp_path, identity, message):
    train(tmp_path, steps=1)
    step, _, state = make_stage()
    check_configuration(tmp_path, "toy", {"names": ["a"], "rate": 0.01})
    with pytest.raises(ValueError, match=message):
        check_configuration(tmp_path, "toy", identity)
    with pytest.raises(ValueError, match=message):
        run_stage(
            "toy",
            step,
            state=state,
            frozen=jnp.ones((3, 2)),
            data=Batches(),
            key=jax.random.key(1),
            workdir=tmp_path,
            config=LoopConfig(steps=1),
            writer=MetricWriter(tmp_path, tensorboard=False),
            identity=identity,
        )
