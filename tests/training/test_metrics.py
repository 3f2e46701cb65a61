"""Metrics files after a restart, and the clock."""

import json
import time

import pytest

from uae_jax.files.json_files import write_json
from uae_jax.training.metrics import Clock, MetricWriter, read_lines


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
    assert len(list((tmp_path / "parts" / "tensorboard" / "gen_for_und").glob("events.*"))) == 2


def test_not_finite_is_null_and_the_line_stays_json(tmp_path):
    writer = MetricWriter(tmp_path, tensorboard=False)
    writer.begin("s", 0)
    writer.write("s", 1, 0.5, {"loss": float("nan"), "reward": 1})
    strict = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=lambda _: pytest.fail("not JSON"))
    assert strict == {"stage": "s", "step": 1, "seconds": 0.5, "loss": None, "reward": 1.0}


def test_broken_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"stage": "s", "step": 1}\noops\n{"stage": "s", "step": 2}\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
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
