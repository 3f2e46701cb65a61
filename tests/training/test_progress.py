"""What a run shows: bars on a terminal, lines elsewhere, an estimate for the whole run."""

import io

import pytest

from uae_jax.training import progress
from uae_jax.training.progress import COMPILE, SCORES, Estimate, Progress, duration


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    "seconds, words", [(4.4, "4 s"), (89, "89 s"), (95, "2 min"), (3000, "50 min"), (12_000, "3 h 20 min")]
)
def test_seconds_in_words(seconds, words):
    assert duration(seconds) == words


def test_the_estimate_covers_stages_that_have_not_run():
    """A stage with four times the operations takes four times the seconds of the measured one."""
    estimate = Estimate({"first": 1e9, "second": 4e9})
    estimate.expect("first", 10)
    estimate.expect("second", 5)
    estimate.expect(COMPILE, 2)
    estimate.expect(SCORES, 3)
    assert estimate.left() is None and estimate.words() == ""
    for _ in range(4):
        estimate.step("first", 2.0)
    estimate.took(COMPILE, 30.0)
    estimate.took(SCORES, 7.0)
    assert estimate.left() == 6 * 2.0 + 5 * 8.0 + 30.0 + 2 * 7.0
    assert estimate.words() == "about 2 min left of the run"
    estimate.expect("first", -6)  # a guard ended it
    estimate.step("second", 3.0)
    assert estimate.left() == 4 * 3.0 + 30.0 + 14.0


def test_nothing_is_estimated_of_a_run_that_nobody_has_described():
    estimate = Estimate()
    estimate.step("first", 1.0)
    estimate.took(COMPILE, 30.0)
    assert estimate.left() is None and estimate.words() == ""


def test_without_weights_there_is_no_estimate_until_every_stage_has_run():
    estimate = Estimate()
    estimate.expect("first", 2)
    estimate.expect("second", 2)
    estimate.step("first", 1.0)
    assert estimate.words() == ""
    estimate.step("second", 5.0)
    assert estimate.left() == 1.0 + 5.0


def test_a_phase_is_two_lines_where_there_is_no_terminal():
    stream = io.StringIO()
    shown = Progress(stream=stream, active=True)
    shown.estimate.expect(COMPILE, 2)
    with shown.phase("toy: compiling the step", kind=COMPILE):
        assert shown.doing() == "toy: compiling the step"
    lines = stream.getvalue().splitlines()
    assert lines == ["toy: compiling the step", "toy: compiling the step: done in 0 s, about 0 s left of the run"]
    assert shown.doing() == "the work"


def test_a_phase_is_a_bar_on_a_terminal_whose_clock_runs(monkeypatch):
    monkeypatch.setattr(progress, "TICK", 0.01)
    stream = Terminal()
    shown = Progress(stream=stream, active=True)
    with shown.phase("toy: scores", total=4) as phase:
        phase.advance(3)
        progress.time.sleep(0.2)
    written = stream.getvalue()
    assert "toy: scores |" in written and "3/4" in written and "toy: scores: done in" in written
    with shown.steps("toy", 10, 4) as steps:
        steps.advance()
        steps.say("reward 0.5")
        assert shown.doing() == "the step of toy"
    shown = stream.getvalue()
    assert "5/10" in shown and "reward 0.5" in shown
    assert "/s" not in shown and "s/it" not in shown and "<" not in shown  # the estimate of the run is the only one


def test_other_processes_show_nothing():
    stream = io.StringIO()
    shown = Progress(stream=stream, active=False)
    with shown.phase("toy: scores", total=4) as phase:
        phase.advance()
    assert stream.getvalue() == ""
