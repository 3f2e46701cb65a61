"""summary.json and report.html of a run."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from uae_jax.training.metrics import MetricWriter
from uae_jax.training.report import score_rows, write_report
from uae_jax.training.summary import interval, intervals, write_summary


def make_samples(folder, caption):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("0_original.png", "0_reconstruction.png"):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(folder / name)
    sample = {"original": "0_original.png", "caption": caption, "reconstruction": "0_reconstruction.png", "scores": {"reward": 0.5}}
    (folder / "samples.json").write_text(json.dumps([sample]))


def make_run(workdir):
    rng = np.random.default_rng(0)
    writer, stages = MetricWriter(workdir, tensorboard=False), []
    for index, name in enumerate(("pretrain", "cold_start", "gen_for_und", "und_for_gen")):
        writer.begin(name, 0)
        for step in range(1, 61):
            numbers = {"loss": np.exp(-step / 20) + 0.1 * rng.normal(), "grad_norm": rng.gamma(2)}
            if index >= 2:
                numbers |= {"reward": 0.5 + step / 200 + 0.05 * rng.normal(), "caption_tokens": 10 + step / 5, "kl": step / 1e4}
            writer.write(name, step, step * 0.5, numbers)
            if step % 20 == 0:
                writer.write(name, step, step * 0.5, {"eval/reward": 0.4 + step / 100, "eval/heldout_score": 0.3 + step / 150})
        before, after = ({"reward": rng.normal(mean, 0.1, 40), "caption_tokens": rng.normal(20, 3, 40)} for mean in (0.5, 0.7))
        stages.append({"name": name, "steps": 60, "seconds": 30.0, "wall_seconds": 40.0, "before": intervals(before), "after": intervals(after)})
        for when in ("before", "after"):
            make_samples(workdir / "samples" / f"{name}_{when}", f"a <red> circle {when}")
    return write_summary(workdir, preset="tiny", seed=3, stages=stages)


def test_interval_is_deterministic_and_covers():
    values = np.random.default_rng(0).normal(1.0, 1.0, 200)
    found = interval(values)
    assert found == interval(values)
    assert found["low"] < found["value"] < found["high"] and found["n"] == 200
    # 95 % of the mean of 200 unit normals: +- 1.96 / sqrt(200)
    assert (found["high"] - found["low"]) / 2 == pytest.approx(1.96 * values.std() / np.sqrt(200), rel=0.1)
    assert interval([0.5]) == {"value": 0.5, "n": 1, "low": 0.5, "high": 0.5}
    for bad in ([], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="finite values"):
            interval(bad)


def test_summary_has_the_fields_of_the_contract(tmp_path):
    summary = make_run(tmp_path)
    stored = json.loads((tmp_path / "summary.json").read_text())
    assert stored == summary
    assert list(stored) == ["preset", "seed", "device", "versions", "seconds", "stages"]
    assert stored["seconds"] == 160.0 and stored["versions"]["jax"]
    assert {"name", "steps", "seconds", "before", "after"} <= set(stored["stages"][0])
    assert set(stored["stages"][0]["after"]["reward"]) == {"value", "n", "low", "high"}


def test_report_is_one_file_with_every_stage(tmp_path):
    make_run(tmp_path)
    page = write_report(tmp_path).read_text()
    for name in ("pretrain", "cold_start", "gen_for_und", "und_for_gen"):
        assert f"<h2>{name}</h2>" in page
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert len(sources) == 1 + 4 * 2 * 2 and all(s.startswith("data:image/png;base64,") for s in sources)
    assert "a &lt;red&gt; circle after" in page and "<red>" not in page


def test_report_without_metrics_or_samples(tmp_path):
    with pytest.raises(FileNotFoundError, match="train with --workdir"):
        write_report(tmp_path)
    write_summary(tmp_path, preset="tiny", seed=0, stages=[])
    assert "<h2>" not in write_report(tmp_path).read_text()


def test_change_is_clear_only_when_intervals_do_not_touch():
    one = {"value": 0.5, "n": 9, "low": 0.4, "high": 0.6}
    rows = score_rows({"reward": one, "geneval": one}, {"reward": {**one, "value": 0.7, "low": 0.61, "high": 0.8}, "geneval": one})
    assert [(r["name"], r["clear"]) for r in rows] == [("reward", True), ("geneval", False)]
    assert rows[0]["change"] == pytest.approx(0.2)


def test_page_colours_only_changes_whose_intervals_do_not_touch(tmp_path):
    one = {"value": 0.5, "n": 9, "low": 0.4, "high": 0.6}
    after = {"reward": {**one, "value": 0.7, "low": 0.61, "high": 0.8}, "geneval": {**one, "value": 0.45}}
    stage = {"name": "gen_for_und", "steps": 1, "seconds": 1.0, "wall_seconds": 1.0, "before": {"reward": one, "geneval": one}, "after": after}
    write_summary(tmp_path, preset="tiny", seed=0, stages=[stage])
    page = write_report(tmp_path).read_text()
    assert '<td class="up">+0.200</td>' in page and '<td class="meaning">-0.050</td>' in page
