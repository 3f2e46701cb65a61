"""Metrics, lock and checkpoints of a workdir in a bucket, by TensorStore's own client of the store."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from buckets import served

from uae_jax.files import paths
from uae_jax.files.paths import to_path
from uae_jax.training import lock, metrics
from uae_jax.training.checkpoint import Checkpoints, Damaged
from uae_jax.training.metrics import MetricWriter, read_lines
from uae_jax.training.watch import Watch


@pytest.fixture
def store():
    with served("runs") as found:
        yield found


@pytest.fixture
def workdir(store):
    return to_path("gs://runs/a")


def state_of(value):
    return {"params": {"kernel": jnp.full((4, 8), value), "bias": jnp.arange(3.0) * value}, "step": jnp.int32(value)}


def test_checkpoints_are_saved_kept_and_read_in_a_bucket(store, workdir):
    with Checkpoints(workdir / "checkpoints" / "s", keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state_of(step), {"next_index": step}, {"seconds": 1.0 * step})
        checkpoints.wait()
        assert checkpoints.latest_step() == 3
    found = {name.split("/")[3] for name in store.names("runs", "a/checkpoints/s/")}
    assert found == {"2", "3"}
    with Checkpoints(workdir / "checkpoints" / "s") as checkpoints:
        restored = checkpoints.restore(state_of(0))
        assert checkpoints.meta() == {"seconds": 3.0}
    assert (restored.step, restored.data, restored.meta) == (3, {"next_index": 3}, {"seconds": 3.0})
    jax.tree.map(np.testing.assert_array_equal, restored.state, state_of(3))


def test_a_save_without_its_commit_file_does_not_count(store, workdir):
    folder = workdir / "checkpoints" / "s"
    with Checkpoints(folder) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state_of(step), {}, {})
    commit = [name for name in store.names("runs", "a/checkpoints/s/2/") if name.endswith("commit_success.txt")]
    for name in commit:
        del store.objects["runs", name]
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.latest_step() == 1
        assert checkpoints.restore(state_of(0)).step == 1
    assert not store.names("runs", "a/checkpoints/s/2/")  # what the kill left is gone


def test_a_damaged_checkpoint_is_put_aside_and_the_older_one_continues(store, workdir, capsys):
    folder = workdir / "checkpoints" / "s"
    with Checkpoints(folder) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state_of(step), {}, {})
    largest = max(store.names("runs", "a/checkpoints/s/2/state/"), key=lambda name: len(store.objects["runs", name][0]))
    data = bytearray(store.objects["runs", largest][0])
    data[len(data) // 2] ^= 255
    store.put("runs", largest, bytes(data))
    with Checkpoints(folder) as checkpoints:
        with pytest.raises(Damaged, match="gs://runs/a/checkpoints/s/2 cannot be read"):
            checkpoints.restore(state_of(0), 2)
        assert checkpoints.restore(state_of(0)).step == 1
    assert (
        "it is now gs://runs/a/checkpoints/s/damaged_2, and the stage continues from step 1" in capsys.readouterr().err
    )
    assert store.names("runs", "a/checkpoints/s/damaged_2/") and not store.names("runs", "a/checkpoints/s/2/")


def test_metrics_are_written_anew_and_are_those_of_a_local_folder(store, workdir, tmp_path, monkeypatch):
    seconds = [0.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: seconds[0])
    for place in (workdir, tmp_path):
        writer = MetricWriter(place)
        writer.begin("one", 0)
        for step in range(1, 9):
            seconds[0] += 20.0
            writer.write("one", step, 0.5 * step, {"loss": 1.0 / step, "bad": float("nan")})
        writer.flush()
        writer.begin("one", 5)  # a restart: later lines go
        writer.write("one", 6, 3.0, {"loss": 2.0})
        writer.event("one", 6, 3.5, {"what": "skipped"})
        writer.begin("two", 0)
        writer.write("two", 1, 4.0, {"loss": 3.0})
        writer.close()
    assert (workdir / "metrics.jsonl").read_bytes() == (tmp_path / "metrics.jsonl").read_bytes()
    assert [line["step"] for line in read_lines(workdir / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6, 6, 1]
    boards = [name for name in store.names("runs", "a/tensorboard/")]
    assert sorted(name.split("/")[2] for name in boards) == ["one", "two"]
    assert all(store.objects["runs", name][0] for name in boards)


def test_metrics_of_a_bucket_are_flushed_by_time(store, workdir, monkeypatch):
    seconds = [0.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: seconds[0])
    writer = MetricWriter(workdir, tensorboard=False)
    writer.begin("one", 0)
    store.forget()
    for step in range(1, 121):
        seconds[0] += 1.0
        writer.write("one", step, step, {"loss": 1.0})
    assert 1 <= store.requests["write", "a/metrics.jsonl"] <= 3
    with writer.kept():
        writer.write("one", 121, 121, {"loss": 1.0})
    assert [line["step"] for line in read_lines(workdir / "metrics.jsonl")] == [*range(1, 122)]


def test_a_workdir_in_a_bucket_is_held_by_one_run(store, workdir, monkeypatch):
    with lock.workdir_lock(workdir):
        assert json.loads(store.contents("runs")["a/run.lock"])["process"]
        with pytest.raises(ValueError, match="gs://runs/a is in use by process .*delete gs://runs/a/run.lock"):
            with lock.workdir_lock(workdir):
                pass
    assert "a/run.lock" not in store.contents("runs")
    gone = {"host": lock.socket.gethostname(), "process": 2**22 + 1, "born": "1", "started": "x", "run": None}
    (workdir / lock.NAME).write_text(json.dumps(gone))
    with lock.workdir_lock(workdir):
        assert json.loads(store.contents("runs")["a/run.lock"])["process"] != 2**22 + 1


def test_stacks_of_a_hang_are_added_to(store, workdir):
    watch = Watch(workdir, "one", hang_minutes=1.0)
    watch._write_stacks()
    once = store.contents("runs")["a/hang_0.txt"]
    watch._write_stacks()
    assert b"test_bucket_workdir" in once and store.contents("runs")["a/hang_0.txt"].startswith(once)
    assert len(store.contents("runs")["a/hang_0.txt"]) > len(once)


def test_a_trace_is_copied_into_the_bucket(store, workdir):
    watch = Watch(workdir, "one", profile="1:1")
    with watch.steps():
        watch.started(0)
        jax.block_until_ready(jnp.ones(3) + 1)
        watch.started(2)
    assert [name for name in store.names("runs", "a/profile/one/") if name.endswith(".pb")]


def test_files_that_a_library_writes_are_copied_once_they_change(store, workdir):
    copies = paths.LocalCopies(workdir / "board")
    (copies.local / "a").write_bytes(b"1")
    copies.copy()
    store.forget()
    copies.copy()
    assert not store.requests
    with (copies.local / "a").open("ab") as file:
        file.write(b"2")
    copies.close()
    assert store.contents("runs", "a/board/") == {"a": b"12"} and not copies.local.exists()
