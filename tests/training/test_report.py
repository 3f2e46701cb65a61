"""summary.json and report.html of a run."""

import json
import re

import matplotlib.colors
import numpy as np
import pytest

from runs import make_run
from uae_jax.training.curves import curve_figures
from uae_jax.training.findings import findings
from uae_jax.training.metrics import MetricWriter, read_lines
from uae_jax.training.report import histories, score_columns, score_rows, write_report
from uae_jax.training.summary import begun, goodput, interval, write_summary


def test_goodput_is_the_share_of_steps_that_count(tmp_path):
    stages = [{"seconds": 30.0, "wall_seconds": 40.0}, {"seconds": 20.0, "wall_seconds": 30.0}]
    assert goodput(stages, 200.0) == 0.25
    assert goodput(stages, -5.0) == round(50 / 70, 4), "the clock went back"
    assert goodput([], 0.0) == 0.0
    first = begun(tmp_path)
    assert begun(tmp_path) == pytest.approx(first, abs=0.01) and begun(tmp_path) == begun(tmp_path)
    (tmp_path / "begun.json").write_text('{"unix_seconds": null}')
    with pytest.raises(ValueError, match="begun.json is damaged .*; delete it"):
        begun(tmp_path)


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
    assert list(stored) == ["preset", "seed", "device", "versions", "seconds", "stages", "goodput"]
    assert stored["seconds"] == 160.0 and stored["versions"]["jax"]
    assert {"name", "steps", "seconds", "before", "after"} <= set(stored["stages"][0])
    assert set(stored["stages"][0]["after"]["reward"]) == {"value", "n", "low", "high"}


def test_report_is_one_file_with_every_stage(tmp_path):
    make_run(tmp_path)
    page = write_report(tmp_path).read_text()
    for name in ("pretrain", "cold_start", "gen_for_und", "und_for_gen"):
        assert f"<td><b>{name}</b></td>" in page and f"<th>after {name}</th>" in page
    sources = re.findall(r'(?:src|srcset)="([^"]{0,30})', page)
    # a link, and no file that the page would need
    (link,) = re.findall(r'href="([^"]*)', page)
    assert link.endswith("docs/results.md")
    # the loop has two pictures; each of six curves is there for light and dark screens; a strip has an original and
    # five columns, a history an original and two captions
    assert len(sources) == 2 + 6 * 2 + 6 + 3 and all(s.startswith("data:image/png;base64,") for s in sources)
    assert "a &lt;red&gt; circle after" in page and "<red>" not in page
    assert "Nothing tripped." in page


def test_report_without_metrics_or_samples(tmp_path):
    with pytest.raises(FileNotFoundError, match="train with --workdir"):
        write_report(tmp_path)
    write_summary(tmp_path, preset="tiny", seed=0, stages=[])
    page = write_report(tmp_path).read_text()
    assert "<img" not in page and "Held-out scores" not in page


ONE = {"value": 0.5, "n": 9, "low": 0.4, "high": 0.6}
HIGH = {"value": 0.7, "n": 9, "low": 0.61, "high": 0.8}
LOW = {"value": 0.3, "n": 9, "low": 0.2, "high": 0.39}


def first_axes(workdir, summary):
    """The curve of the reward."""
    (title, figure), *_ = curve_figures(read_lines(workdir / "metrics.jsonl"), summary["stages"])
    assert title.startswith("Reward")
    return figure.axes[0]


def test_each_curve_is_a_figure_of_its_own_and_has_a_dark_form(tmp_path):
    summary = make_run(tmp_path)
    light, dark = (
        curve_figures(read_lines(tmp_path / "metrics.jsonl"), summary["stages"], dark=look) for look in (False, True)
    )
    assert [title for title, _ in light] == [title for title, _ in dark] and len(light) == 6
    for (_, bright), (_, dim) in zip(light, dark):
        assert len(bright.axes) == len(dim.axes) == 1
        assert np.mean(bright.get_facecolor()[:3]) > 0.9 and np.mean(dim.get_facecolor()[:3]) < 0.2
        # a label can be read on its ground
        for figure in (bright, dim):
            label = matplotlib.colors.to_rgb(figure.axes[0].get_xticklabels()[0].get_color())
            assert abs(np.mean(label) - np.mean(figure.get_facecolor()[:3])) > 0.5


def stage_record(name, before, after, **more):
    return {
        "name": name,
        "steps": 1,
        "seconds": 1.0,
        "wall_seconds": 1.0,
        "before": before,
        "after": after,
        "guard": None,
    } | more


def test_changes_are_over_the_column_before_and_clear_when_intervals_do_not_touch():
    stages = [
        stage_record("a", {"reward": ONE, "geneval": ONE}, {"reward": HIGH, "geneval": {**ONE, "value": 0.45}}),
        stage_record("b", {}, {"reward": ONE, "extra": ONE}),
    ]
    rows = {row["name"]: row["cells"] for row in score_rows(stages)}
    assert list(rows) == ["reward", "geneval", "extra"] and score_columns(stages) == ["start", "after a", "after b"]
    assert [cell["direction"] for cell in rows["reward"]] == [0, 1, -1]
    assert [cell["change"] for cell in rows["reward"]] == [None, pytest.approx(0.2), pytest.approx(-0.2)]
    assert rows["geneval"][1]["direction"] == 0 and rows["geneval"][2] is None and rows["extra"][:2] == [None, None]
    assert score_columns([stage_record("evaluate", {}, {"reward": ONE})]) == ["after evaluate"]


def test_page_colours_only_changes_whose_intervals_do_not_touch(tmp_path):
    after = {"reward": HIGH, "geneval": {**ONE, "value": 0.45}, "caption_tokens": HIGH}
    stage = stage_record("gen_for_und", {"reward": ONE, "geneval": ONE, "caption_tokens": ONE}, after)
    write_summary(tmp_path, preset="tiny", seed=0, stages=[stage])
    page = write_report(tmp_path).read_text()
    assert page.count('<span class="up">+0.200</span>') == 1 and '<span class="grey">-0.050</span>' in page
    assert '<span class="grey">+0.200</span>' in page  # longer is neither good nor bad


def kinds(before, after):
    return {
        finding.title.split(":")[0]: finding.kind for finding in findings([stage_record("gen_for_und", before, after)])
    }


def test_findings_follow_the_intervals():
    facts = {"fact_recall": ONE, "fact_precision": ONE}
    assert kinds(facts, {"fact_recall": HIGH, "fact_precision": ONE}) == {"Understanding": "good"}
    assert kinds(facts, {"fact_recall": HIGH, "fact_precision": LOW}) == {"Understanding": "bad"}
    assert kinds(facts, facts) == {"Understanding": "open"}
    assert kinds({"scene_accuracy": ONE, "geneval": ONE}, {"scene_accuracy": HIGH, "geneval": LOW}) == {
        "The loop": "good",
        "Generation": "bad",
    }
    words = {"caption_tokens": ONE, "truncated": ONE, "repetition": ONE}
    assert kinds(words, words | {"repetition": HIGH}) == {"Length": "bad"} and kinds(words, words) == {"Length": "open"}
    assert kinds({}, facts) == {}


def test_a_reward_that_rises_while_the_held_out_encoder_falls_is_called_gamed():
    before = {"reward": ONE, "heldout_score": ONE}
    assert kinds(before, {"reward": HIGH, "heldout_score": LOW}) == {"The loop": "bad", "gen_for_und": "bad"}
    assert "gen_for_und" not in kinds(before, {"reward": HIGH, "heldout_score": ONE}) | kinds(
        before, {"reward": ONE, "heldout_score": LOW}
    )


def test_a_trip_is_told_and_marked(tmp_path):
    make_run(tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    trip = {"what": "kl", "value": 1.25, "bound": 1.0, "step": 50, "restored_step": 40}
    summary["stages"][2] |= {"guard": trip, "steps": 40}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "config.json").write_text(json.dumps({"guard": {"kl": 1.0, "truncated": 0.0}}))
    MetricWriter(tmp_path, tensorboard=False).event("gen_for_und", 50, 1.0, trip)
    page = write_report(tmp_path).read_text()
    assert "after step 50, the running-mean KL to the reference policy was 1.25 (bound 1)" in page
    assert "checkpoint of step 40" in page and "Bounds: kl 1." in page and "Nothing tripped" not in page
    marked = first_axes(tmp_path, summary).patches
    assert [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in marked][-1] == pytest.approx(
        (2 + 40 / 60, 2 + 50 / 60)
    )


def test_what_is_taken_off_the_similarity_is_told(tmp_path):
    make_run(tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps({"gen_for_und": {"reward": {"contrast": 0.0, "overlong_penalty": 0.2}}, "pretrain": {}})
    )
    page = write_report(tmp_path).read_text()
    assert (
        "gen_for_und trains on is the similarity less a penalty for captions without an end:" in page
        and "other images" not in page
    )
    (tmp_path / "config.json").unlink()
    assert "is the similarity less" not in write_report(tmp_path).read_text()


def test_curves_place_scores_at_the_ends_of_their_stage(tmp_path):
    summary = make_run(tmp_path)
    axes = first_axes(tmp_path, summary)
    dotted = next(line for line in axes.lines if line.get_linestyle() == ":")
    x, y = dotted.get_data()
    # each stage of 60 steps is scored at 20, 40 and 60 and at its end, the first one at its beginning too
    assert sorted(x) == pytest.approx(
        sorted([0, *(n + third / 3 for n in range(4) for third in (1, 2, 3)), *(n + 1 for n in range(4))])
    )
    assert y[0] == pytest.approx(summary["stages"][0]["before"]["reward"]["value"])
    assert curve_figures([]) == []


def test_histories_list_a_caption_once_while_it_stays_the_same():
    def moment(title, text, during=False):
        return {
            "title": title,
            "during": during,
            "samples": [{"original": "o", "caption": text, "reconstruction": title}],
        }

    moments = [
        moment("start", "a"),
        moment("after one", "a"),
        *(moment(f"two, step {n}", f"b {n}", True) for n in range(40)),
        moment("after two", "c"),
    ]
    (found,) = histories(moments)
    assert [(entry["first"], entry["last"], entry["words"]) for entry in found["entries"]][0] == (
        "start",
        "after one",
        1,
    )
    titles = [entry["first"] for entry in found["entries"]]
    assert len(titles) == 8 and titles[1] == "two, step 0" and titles[-2:] == ["two, step 39", "after two"]
    assert found["entries"][0]["reconstruction"] == "after one"


def test_long_captions_are_folded_and_not_cut(tmp_path):
    make_run(tmp_path)
    text = " ".join(f"word{number}" for number in range(200))
    path = tmp_path / "samples" / "und_for_gen_after" / "samples.json"
    path.write_text(path.read_text().replace("a <red> circle after", text))
    page = write_report(tmp_path).read_text()
    assert f"</summary>{text}</details>" in page


def test_scores_of_different_settings_are_marked_and_not_compared():
    two, four = {"images": 2}, {"images": 4}
    stages = [
        stage_record("a", {"reward": ONE}, {"reward": HIGH}, scoring={"before": two, "after": two}),
        stage_record("b", {"reward": HIGH}, {"reward": LOW}, scoring={"before": two, "after": four}),
    ]
    found = findings(stages)
    assert [(finding.kind, finding.title) for finding in found] == [("bad", "Scores of different settings")]
    assert "after b: images was 2 and is 4" in found[0].text
    cells = next(row for row in score_rows(stages) if row["name"] == "reward")["cells"]
    assert cells[1]["change"] == pytest.approx(0.2) and cells[1]["direction"] == 1
    assert cells[2]["change"] is None and cells[2]["direction"] == 0
    assert not findings(stages[:1])


def test_a_decoder_stage_without_rewards_is_not_said_to_learn_from_one(tmp_path):
    make_run(tmp_path)
    assert "those nearer to the image become more" in write_report(tmp_path).read_text()
    (tmp_path / "config.json").write_text(json.dumps({"und_for_gen": {"method": "matching"}}))
    page = write_report(tmp_path).read_text()
    assert "without a reward" in page and "those nearer to the image become more" not in page
