"""The host loop: resume equals no interruption, one compilation, errors, order of things."""

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from learners import learner

from uae_jax.methods.method import make_train_step
from uae_jax.training.loop import run_stage
from uae_jax.training.loop_config import Hooks, LoopConfig
from uae_jax.training.metrics import MetricWriter, read_lines
from uae_jax.training.optimizer import OptimizerConfig, make_optimizer
from uae_jax.training.progress import SCORES_DURING, Progress
from uae_jax.training.records import check_configuration
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


IDENTITY = {"rate": 0.01, "names": ("a",)}


def train(workdir, *, steps=10, data=None, hooks=None, stage=None, identity=None, **config):
    """A stage, by default a new one, to its end; what is no duration goes to the loop."""
    step, traces, state = stage or make_stage()
    more = {name: config.pop(name) for name in ("free", "scoring", "progress") if name in config}
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
        identity=identity or IDENTITY,
        **more,
    )
    assert step._cache_size() <= 1  # compiled once at most, on a restored state too
    return result, traces


def lines(workdir):
    """Metrics without times."""
    return [
        {name: value for name, value in line.items() if name != "seconds" and not name.startswith("perf/")}
        for line in read_lines(workdir / "metrics.jsonl")
    ]


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.trap(38)
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


def test_a_continued_stage_expects_the_passes_of_scores_that_are_left(tmp_path):
    stop = Hooks(
        evaluate=lambda state, step: {"norm": 0.0},
        on_step=lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 7 else None,
    )
    with pytest.raises(StopTraining):
        train(tmp_path, hooks=stop, eval_every=2)
    shown = Progress(active=False)
    shown.estimate.expect("toy", 10)
    shown.estimate.expect(SCORES_DURING, 4)
    train(tmp_path, hooks=dataclasses.replace(stop, on_step=None), eval_every=2, progress=shown)
    shown.estimate.took(SCORES_DURING, 3.0)  # after step 8
    assert shown.estimate.left() == 0


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


def test_a_kill_while_scores_are_computed_costs_no_step_and_the_scores_are_repeated(tmp_path):
    """Scores and a checkpoint are due after the same step: the checkpoint is first."""
    (tmp_path / "whole").mkdir(), (tmp_path / "parts").mkdir()
    norm = lambda state, step: {"norm": float(jnp.abs(state.params["kernel"]).sum())}
    whole, _ = train(tmp_path / "whole", hooks=Hooks(evaluate=norm), eval_every=4)

    def killed(state, step):
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "parts", hooks=Hooks(evaluate=killed), eval_every=4)
    steps = []
    hooks = Hooks(evaluate=norm, on_step=steps.append)
    resumed, _ = train(tmp_path / "parts", hooks=hooks, eval_every=4)
    assert steps == list(range(5, 11))
    equal(whole.state, resumed.state)
    assert lines(tmp_path / "whole") == lines(tmp_path / "parts")


def test_a_stop_while_scores_are_computed_ends_them_and_saves(tmp_path):
    steps = []

    def asked(state, step):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0)
        pytest.fail("the scores went on")

    with pytest.raises(StopTraining, match="at toy step 3"):
        train(tmp_path, hooks=Hooks(evaluate=asked, on_step=steps.append), eval_every=3, save_every=0)
    assert steps == [1, 2, 3]
    train(tmp_path, hooks=Hooks(evaluate=lambda state, step: {"norm": 1.0}), eval_every=3, save_every=0)
    scores = [line["step"] for line in lines(tmp_path) if "eval/norm" in line]
    assert scores == [3, 6, 9]


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_stop_while_scores_around_the_steps_are_computed(tmp_path, when):
    def asked(state):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0)
        pytest.fail("the scores went on")

    with pytest.raises(StopTraining, match="at toy step 0" if when == "before" else "at toy step 10"):
        train(tmp_path, hooks=Hooks(**{when: asked}))
    result, _ = train(tmp_path, hooks=Hooks(**{when: lambda state: {"reward": 1.0}}))
    assert result.steps == 10 and result.record()[when] == {"reward": 1.0}


def test_a_checkpoint_is_written_by_time(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("uae_jax.training.pace.time.monotonic", lambda: now[0])

    def slow(step):
        now[0] += 40.0

    def killed(step):
        slow(step)
        if step == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, hooks=Hooks(on_step=killed), save_every=0, save_every_minutes=2, keep=9)
    steps = sorted(int(path.name) for path in (tmp_path / "checkpoints" / "toy").iterdir() if path.name.isdigit())
    assert steps == [3, 6]  # 120 seconds are three steps


def test_other_settings_of_scores_are_told_and_kept_with_them(tmp_path, capsys):
    def run(stop_at, images):
        hooks = Hooks(
            before=lambda state: {"reward": images},
            after=lambda state: {"reward": images},
            on_step=lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == stop_at else None,
        )
        return train(tmp_path, hooks=hooks, scoring={"images": images})[0]

    with pytest.raises(StopTraining):
        run(5, 2)
    result = run(None, 4)
    assert (result.before, result.after) == ({"reward": 2}, {"reward": 4})
    assert result.scoring == {"before": {"images": 2}, "after": {"images": 4}}
    assert "toy: the scores before it had other settings" in capsys.readouterr().err
    assert run(None, 8).record() == result.record()


def test_free_fields_may_change_and_are_told(tmp_path, capsys):
    train(tmp_path, steps=4)
    more = {"rate": 0.01, "names": ("a",), "model": {"remat": "full"}}
    with pytest.raises(ValueError, match="model was absent"):
        check_configuration(tmp_path, "toy", more)
    train(tmp_path, steps=4, identity={"rate": 0.02, "names": ("a",)}, free={"rate", "model.remat"})
    assert "note: toy continues with other settings: rate was 0.01 and is 0.02" in capsys.readouterr().err


def test_a_finished_stage_goes_on_when_it_gets_more_steps_and_fewer_are_refused(tmp_path):
    (tmp_path / "whole").mkdir(), (tmp_path / "parts").mkdir()
    whole, _ = train(tmp_path / "whole")
    assert train(tmp_path / "parts", steps=6)[0].steps == 6
    longer, _ = train(tmp_path / "parts")
    assert longer.steps == 10
    equal(whole.state, longer.state)
    # the last step of each run is always written
    assert [line for line in lines(tmp_path / "parts") if line["step"] != 6] == [
        line for line in lines(tmp_path / "whole") if line["step"] != 6
    ]
    with pytest.raises(ValueError, match=r"toy has done 10 steps, and the stage now has 6; set toy.steps to 10"):
        train(tmp_path / "parts", steps=6)


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
    check_configuration(tmp_path, "toy", {"names": ["a"], "rate": 0.01})
    with pytest.raises(ValueError, match=message):
        check_configuration(tmp_path, "toy", identity)
    with pytest.raises(ValueError, match=message):
        train(tmp_path, steps=1, identity=identity)


def test_a_continued_stage_holds_its_state_once(tmp_path):
    train(tmp_path, steps=4)
    stage, deleted = make_stage(), []
    fresh = jax.tree.leaves(stage[2])
    hooks = Hooks(on_step=lambda number: deleted.append(all(leaf.is_deleted() for leaf in fresh)))
    train(tmp_path, steps=6, stage=stage, hooks=hooks)
    assert deleted == [True, True]


def test_a_stage_begins_again_where_no_checkpoint_can_be_read(tmp_path):
    (tmp_path / "whole").mkdir(), (tmp_path / "parts").mkdir()
    whole, _ = train(tmp_path / "whole")
    train(tmp_path / "parts", steps=6)
    for path in (tmp_path / "parts" / "checkpoints" / "toy").glob("*/state/**/*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(OSError, match="the same command begins the stage again"):
        train(tmp_path / "parts")
    again, _ = train(tmp_path / "parts")
    equal(whole.state, again.state)


def test_data_that_cannot_be_read_cost_no_step(tmp_path, capsys):
    (tmp_path / "whole").mkdir(), (tmp_path / "parts").mkdir()
    whole, _ = train(tmp_path / "whole")

    class Torn(Batches):
        def __next__(self):
            if self.index == 7:
                raise FileNotFoundError("image a.jpg does not exist")
            return super().__next__()

    with pytest.raises(FileNotFoundError, match="a.jpg"):
        train(tmp_path / "parts", data=Torn())
    assert "note: toy: step 7 is saved; the same command continues there" in capsys.readouterr().err
    steps = []
    resumed, _ = train(tmp_path / "parts", hooks=Hooks(on_step=steps.append))
    assert steps == [8, 9, 10]
    equal(whole.state, resumed.state)


@pytest.mark.parametrize("late", [False, True])
def test_a_stop_does_not_wait_for_data_that_never_come(tmp_path, late):
    """The signal comes while the batch is waited for, or when it has just been counted."""
    (tmp_path / "whole").mkdir(), (tmp_path / "parts").mkdir()
    whole, _ = train(tmp_path / "whole")

    class Hung(Batches):
        def __next__(self):
            if self.index != 7:
                return super().__next__()
            if late:
                super().__next__()
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
            threading.Event().wait(60)
            raise AssertionError("the signal was not heard")

    with pytest.raises(StopTraining, match="stopped at toy step 7; the same command continues"):
        train(tmp_path / "parts", data=Hung())
    steps = []
    resumed, _ = train(tmp_path / "parts", hooks=Hooks(on_step=steps.append))
    assert steps == [8, 9, 10]
    equal(whole.state, resumed.state)


def test_threads_that_never_end_do_not_keep_the_process():
    script = """
import concurrent.futures, threading
from uae_jax import main
def hung():
    concurrent.futures.ThreadPoolExecutor(1).submit(threading.Event().wait)
    raise SystemExit(143)
main.main, main.GRACE_SECONDS = hung, 0.5
main.program()
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 143


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"restored_step": 4}'])
def test_a_damaged_record_of_a_trip_is_named(tmp_path, content):
    train(tmp_path, steps=4)
    (tmp_path / "checkpoints" / "toy" / "tripped.json").write_text(content)
    with pytest.raises(ValueError, match="tripped.json is damaged .*; delete it"):
        train(tmp_path, steps=6)
