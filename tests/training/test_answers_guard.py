"""The bound on the fall of answers: it trips by category, and the good checkpoint comes back, also over restarts."""

import dataclasses
import json
import os
import signal

import numpy as np
import pytest
from test_guard import FINE, equal, lines, train

from uae_jax.training.findings import findings
from uae_jax.training.guard import OFF, Guard, GuardConfig
from uae_jax.training.loop_config import Hooks
from uae_jax.training.signals import StopTraining

WATCH = dataclasses.replace(OFF, understanding_fall=0.25)
BEFORE = {"understanding": 0.9, "understanding_colour": 0.95, "understanding_count": 0.6, "reward": 0.1}


def test_the_category_that_fell_most_is_named_with_both_values_and_the_bound():
    guard = Guard(WATCH)
    guard.begin(BEFORE)
    assert guard.observe_answers(5, {"understanding_colour": 0.75, "understanding_count": 0.4}) is None
    trip = guard.observe_answers(10, {"understanding_colour": 0.65, "understanding_count": 0.5, "understanding": 0.1})
    assert trip.record() == {
        "what": "understanding_fall",
        "step": 10,
        "value": pytest.approx(0.3),
        "bound": 0.25,
        "category": "colour",
        "before": 0.95,
        "now": 0.65,
    }
    assert Guard(OFF).observe_answers(5, {"understanding_colour": 0.0}) is None


def test_a_rise_and_a_category_without_a_start_do_not_trip():
    guard = Guard(WATCH)
    guard.begin(BEFORE)
    assert guard.observe_answers(5, {"understanding_colour": 1.0, "understanding_new": 0.0}) is None
    assert guard.fine and "understanding_fall" in guard.measured()
    assert Guard(WATCH).observe_answers(5, {"understanding_colour": 0.0}) is None  # nothing was answered before


def test_a_checkpoint_after_a_fall_near_the_bound_is_not_good_and_statistics_are_kept():
    guard = Guard(WATCH)
    guard.begin(BEFORE)
    guard.observe_answers(5, {"understanding_colour": 0.95 - 0.2})
    assert not guard.fine
    resumed = Guard(WATCH, json.loads(json.dumps(guard.statistics())))
    assert not resumed.fine and resumed.statistics() == guard.statistics()
    assert resumed.observe_answers(10, {"understanding_colour": 0.6}).before == 0.95
    assert resumed.observe(11, FINE).category == "colour"  # what fell is still down


@pytest.mark.parametrize("questions, accuracy", [(40, 0.9), (40, 0.97), (100, 0.5)])
def test_chance_alone_does_not_pass_the_default_bound(questions, accuracy):
    """Two independent samples are noisier than the same questions twice."""
    rng = np.random.default_rng(0)
    before, now = rng.binomial(questions, accuracy, (2, 100_000)) / questions
    assert np.mean(before - now > GuardConfig().understanding_fall) < 5e-4


def test_wrong_bounds_of_answers_are_refused():
    for value in (-0.1, 1.5):
        with pytest.raises(ValueError, match="^understanding_fall is"):
            dataclasses.replace(OFF, understanding_fall=value)


def accuracy_at(step):
    """Falls slowly: by .02 a step from .9."""
    return 0.9 - 0.02 * step


def hooks(**more):
    scores = {"understanding_colour": {"value": 0.9, "n": 40, "low": 0.8, "high": 1.0}}
    return Hooks(
        before=lambda state: scores,
        after=lambda state: {"w": float(state.params["w"].sum())},
        answers=lambda state, step: {"understanding": accuracy_at(step), "understanding_colour": accuracy_at(step)},
        **more,
    )


def healthy(step):
    return {}


def test_a_fall_in_the_loop_restores_the_good_checkpoint(tmp_path, capsys):
    result = train(tmp_path / "run", healthy, WATCH, hooks=hooks(), eval_every=3)
    # falls of .06, .12, .18, .24, .30 at steps 3, 6, 9, 12, 15; up to .125 a checkpoint is good
    assert (result.guard["what"], result.guard["step"], result.guard["restored_step"]) == ("understanding_fall", 15, 6)
    assert (result.guard["category"], result.guard["before"], result.steps) == ("colour", 0.9, 6)
    assert result.guard["value"] == pytest.approx(0.3) and result.guard["now"] == pytest.approx(0.6)
    told = capsys.readouterr().err
    assert (
        "the fall of the accuracy on the questions about colour (0.9 before the stage, 0.6 now) is 0.3 after step 15, "
        "its bound is 0.25; its checkpoint of step 6 is restored"
    ) in told
    equal(result.state, train(tmp_path / "short", healthy, OFF, steps=6).state)
    written = lines(tmp_path / "run")
    assert [line["step"] for line in written if "eval/understanding_colour" in line] == [3, 6, 9, 12, 15]
    assert written[-1] == {"stage": "toy", "step": 15, "guard": result.guard}
    (finding,) = [finding for finding in findings([result.record()]) if "guard" in finding.title]
    assert "questions about colour (0.9 before the stage, 0.6 now) was 0.3; its bound is 0.25" in finding.text
    again = train(tmp_path / "run", healthy, WATCH, hooks=hooks(), eval_every=3)
    assert again.record() == result.record()


def test_a_fall_after_the_last_evaluation_trips_at_the_end(tmp_path):
    result = train(tmp_path / "run", healthy, WATCH, hooks=hooks(), eval_every=10, steps=14)
    # step 10: .2, not good; step 14: .28
    assert (result.guard["step"], result.guard["restored_step"]) == (14, 9)
    assert [line["step"] for line in lines(tmp_path / "run") if "eval/understanding" in line] == [10, 14]
    never = train(tmp_path / "never", healthy, WATCH, hooks=hooks(), eval_every=0, steps=14)
    assert never.guard is None and never.steps == 14


@pytest.mark.parametrize("off", [OFF, dataclasses.replace(WATCH, understanding_fall=0.4)])
def test_without_a_bound_that_is_passed_the_stage_goes_to_its_end(tmp_path, off):
    result = train(tmp_path, healthy, off, hooks=hooks(), eval_every=3)
    assert result.guard is None and result.steps == 16
    logged = [line["step"] for line in lines(tmp_path) if "eval/understanding" in line]
    assert logged == [3, 6, 9, 12, 15] + ([16] if off.understanding_fall else [])


@pytest.mark.parametrize("stops", [(2,), (6,), (12,), (5, 9, 14)])
def test_stopping_and_resuming_around_a_fall_changes_nothing(tmp_path, stops):
    whole = train(tmp_path / "whole", healthy, WATCH, hooks=hooks(), eval_every=3)
    for stop in stops:
        kill = lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == stop else None
        with pytest.raises(StopTraining):
            train(tmp_path / "parts", healthy, WATCH, hooks=hooks(on_step=kill), eval_every=3)
    resumed = train(tmp_path / "parts", healthy, WATCH, hooks=hooks(), eval_every=3)
    equal(whole.state, resumed.state)
    assert resumed.guard == whole.guard and lines(tmp_path / "whole") == lines(tmp_path / "parts")
