"""Seconds of steps, the share of waiting, utilisation, stacks of a hang, and traces."""

import os
import signal
import time

import jax
import pytest

from uae_jax.planning import utilisation
from uae_jax.settings import frozen
from uae_jax.stages.run_config import LoopSettings
from uae_jax.training import watch as watch_module
from uae_jax.training.watch import Watch, traced_steps


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(watch_module.time, "monotonic", lambda: now[0])
    return now


def test_seconds_are_those_between_steps_without_pauses(tmp_path, clock):
    watch = Watch(tmp_path, "toy", seconds_at_peak=1.0)
    assert watch.metrics() == {}
    for number in range(1, 5):
        clock[0] += 100.0 if number == 1 else 4.0  # the first compiles
        watch.done(number)
    assert watch.metrics() == {"perf/step_seconds": 4.0, "perf/data_wait": 0.0, "perf/mfu": 0.25}
    with watch.waiting():
        clock[0] += 3.0
    clock[0] += 1.0
    watch.done(5)
    assert watch.metrics()["perf/data_wait"] == 0.75
    watch.pause()
    clock[0] += 1000.0
    watch.done(6)
    clock[0] += 12.0
    watch.done(9)  # two steps without a line of metrics
    assert watch.recent == [4.0] * 5 and watch.metrics()["perf/step_seconds"] == 4.0


def test_a_hang_writes_all_stacks_and_a_run_without_one_leaves_no_file(tmp_path):
    path = tmp_path / "hang_0.txt"
    watch = Watch(tmp_path, "toy", hang_minutes=0.2 / 60)
    with watch.steps():
        while not path.exists() or not path.stat().st_size:
            time.sleep(0.05)
    assert "test_a_hang_writes_all_stacks" in path.read_text()
    path.unlink()
    with Watch(tmp_path, "toy", hang_minutes=10).steps() as quiet:
        quiet.alive()
    assert not path.exists()


def steps(watch, count):
    double = jax.jit(lambda x: x * 2)
    with watch.steps():
        watch.started(0)
        for number in range(1, count + 1):
            double(1.0).block_until_ready()
            watch.started(number)
            yield number


def test_steps_are_traced_when_asked_before_and_by_a_signal(tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: events.append(("start", folder)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: events.append(("stop", None)))
    seen = {number: len(events) for number in steps(Watch(tmp_path, "toy", profile="2:3"), 5)}
    assert seen == {1: 1, 2: 1, 3: 1, 4: 2, 5: 2} and events[0] == ("start", str(tmp_path / "profile" / "toy"))
    events.clear()
    for number in steps(Watch(tmp_path, "toy"), 8):
        if number == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
    assert [name for name, _ in events] == ["start", "stop"]
    events.clear()
    list(steps(Watch(tmp_path, "toy", profile="4:9"), 5))
    assert [name for name, _ in events] == ["start", "stop"], "a trace ends with the steps"


def test_a_trace_is_written(tmp_path):
    list(steps(Watch(tmp_path, "toy", profile="1:2"), 3))
    assert list((tmp_path / "profile" / "toy").rglob("*.xplane.pb"))


@pytest.mark.parametrize("text", ["3", "a:b", "0:2", "4:3", ":", "1:2:3"])
def test_other_forms_of_steps_are_refused(text):
    with pytest.raises(ValueError, match="write FIRST:LAST"):
        traced_steps(text)
    with pytest.raises(ValueError, match="write FIRST:LAST"):
        frozen(LoopSettings, {"profile": text})


def test_utilisation_needs_a_known_peak(monkeypatch):
    assert utilisation.peak_flops() is None and utilisation.seconds_at_peak(None, "pretrain") is None
    card = type("Device", (), {"device_kind": "NVIDIA H200"})()
    monkeypatch.setattr(utilisation.jax, "devices", lambda: [card, card])
    assert utilisation.peak_flops() == 2 * 989e12
