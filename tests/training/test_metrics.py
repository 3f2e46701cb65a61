"""Metrics files after a restart, and the clock."""

import json
import sys
import time
import types

import pytest

from runs import make_samples
from uae_jax.files.json_files import write_json
from uae_jax.training.metrics import STRIP_SIDE, Clock, MetricWriter, read_lines


def write(workdir, stage, start, steps):
    writer = MetricWriter(workdir)
    writer.begin(stage, start)
    for step in range(start + 1, steps + 1):
        writer.write(stage, step, float(step), {"reward": step / 10, "loss": 1.0})
    writer.close()


def test_resumed_file_equals_an_uninterrupted_one(tmp_path):
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, "pretrain", 0, 9)
    write(tmp_path / "whole", "gen_for_und", 0, 5)
    write(tmp_path / "parts", "gen_for_und", 0, 4)
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "gen_for_und", "st')
    write(tmp_path / "parts", "gen_for_und", 2, 5)
    files = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "parts")]
    assert files[0] == files[1] and len(files[0].splitlines()) == 14
    board = [points(tmp_path / name / "tensorboard" / "gen_for_und", "reward") for name in ("whole", "parts")]
    assert board[0] == board[1] and len(board[0]) == 5


def points(folder, name):
    """(step, value) of all events that are on disk, also those that TensorBoard would purge."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.glob("events.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            length = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + length])
            found += [(event.step, round(v.simple_value, 6)) for v in event.summary.value if v.tag == name]
            at += 12 + length + 4
    return found


def test_no_stale_point_stays_in_tensorboard_after_the_clock_went_back(tmp_path, monkeypatch):
    now = time.time()
    write(tmp_path, "pretrain", 0, 6)
    monkeypatch.setattr(time, "time", lambda: now - 86_400)
    write(tmp_path, "pretrain", 3, 5)
    folder = tmp_path / "tensorboard" / "pretrain"
    assert points(folder, "reward") == [(step, step / 10) for step in range(1, 6)]


class Wandb(types.ModuleType):
    """Takes rows as the service does: one of an earlier step than the last is dropped."""

    def __init__(self):
        super().__init__("wandb")
        self.rows, self.step, self.ids = [], 0, []

    def init(self, *, id, resume, **_):
        self.ids.append(id)
        return self

    def log(self, values, step):
        if step >= self.step:
            self.step = step
            self.rows.append((step, values))

    def finish(self):
        self.step += 1  # a run that continues has its last step behind it


def test_steps_are_sent_to_wandb_once_and_stages_follow_each_other(tmp_path, monkeypatch):
    service = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", service)
    for stage, start, end in [("pretrain", 0, 4), ("pretrain", 2, 6), ("gen_for_und", 0, 3), ("gen_for_und", 1, 4)]:
        writer = MetricWriter(tmp_path, tensorboard=False, wandb_project="uae")
        writer.begin(stage, start)
        for step in range(start + 1, end + 1):
            writer.write(stage, step, 0.0, {"reward": step / 10})
        writer.close()
    assert [step for step, _ in service.rows] == list(range(1, 11))
    assert service.rows[6] == (7, {"gen_for_und/step": 1, "gen_for_und/reward": 0.1})
    assert len(set(service.ids)) == 1


def test_samples_and_scores_reach_tensorboard_and_wandb_and_stay_after_a_restart(tmp_path, monkeypatch):
    service = Wandb()
    service.Image = lambda image, caption: (image.size, caption)
    monkeypatch.setitem(sys.modules, "wandb", service)
    for name in ("rl_before", "rl_step2", "rl_step9"):
        make_samples(tmp_path / "samples" / name, f"caption {name}")
    scores = {"reward": {"value": 0.25, "low": 0.1, "high": 0.3, "n": 4}, "geneval": 0.5}
    for _ in range(2):  # the second time as after a restart at step 4
        writer = MetricWriter(tmp_path, wandb_project="uae")
        writer.begin("rl", 4)
        writer.scores("rl", 0, scores)
        writer.samples("rl", 4, tmp_path / "samples" / "rl_step2")
        writer.scores("rl", 4, {"reward": {"value": 0.75}})
        writer.close()
    folder = tmp_path / "tensorboard" / "rl"
    assert points(folder, "held_out/reward") == [(0, 0.25), (4, 0.75)]
    assert points(folder, "held_out/geneval") == [(0, 0.5)]
    # those of step 9 are of a run that was killed
    assert [step for step, _ in points(folder, "samples/0")] == [0, 2, 4]
    sent = [values for _, values in service.rows if "rl/samples" in values]
    side = STRIP_SIDE
    assert sent[0]["rl/samples"] == [((3 * side + 4 * (side // 32), side + 2 * (side // 32)), "caption rl_step2")]
    assert any(values.get("rl/held_out/reward") == 0.75 for _, values in service.rows)


def test_a_run_without_samples_or_scores_writes_none(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.begin("s", 0)
    writer.scores("s", 0, {})
    writer.samples("s", 0, tmp_path / "nowhere")
    writer.close()
    assert not points(tmp_path / "tensorboard" / "s", "samples/0")


def test_not_finite_is_null_and_the_line_stays_json(tmp_path):
    writer = MetricWriter(tmp_path, tensorboard=False)
    writer.begin("s", 0)
    writer.write("s", 1, 0.5, {"loss": float("nan"), "reward": 1})
    writer.close()
    strict = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=lambda _: pytest.fail("not JSON"))
    assert strict == {"stage": "s", "step": 1, "seconds": 0.5, "loss": None, "reward": 1.0}


def test_broken_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"stage": "s", "step": 1}\noops\n{"stage": "s", "step": 2}\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        read_lines(tmp_path / "metrics.jsonl")


def test_an_object_of_something_else_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"stage": "s", "step": 1}\n{"a": 1}\n')
    with pytest.raises(ValueError, match="metrics.jsonl object 2 has no stage and step; delete that line"):
        read_lines(tmp_path / "metrics.jsonl")


def test_missing_wandb_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(ImportError, match=r"pip install 'uae_jax\[wandb\]'"):
        MetricWriter(tmp_path, wandb_project="uae")


def test_clock_continues_and_pauses():
    clock = Clock(seconds=100.0, wall_seconds=200.0)
    with clock.paused():
        time.sleep(0.2)
    assert 100.0 <= clock.seconds < 100.15
    assert 200.2 <= clock.wall_seconds < 200.6


def test_write_json_leaves_no_temporary(tmp_path):
    write_json(tmp_path / "a" / "x.json", {"k": 1})
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["x.json"]
