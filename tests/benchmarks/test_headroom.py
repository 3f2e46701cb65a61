"""What choosing by reward is worth, on numbers that are known."""

import numpy as np
import pytest

from benchmarks import headroom


def test_a_reward_that_knows_chooses_the_best_and_one_that_does_not_is_worth_nothing():
    accuracy = np.array([[0.2, 0.8, 0.5], [1.0, 0.6, 0.6]])
    found = headroom.headroom(accuracy, 2 * accuracy + 1)
    assert (
        found["best"] == pytest.approx(0.9)
        and found["mean"] == pytest.approx(accuracy.mean())
        and found["correlation"] == pytest.approx(1)
    )
    assert headroom.headroom(accuracy, -accuracy)["correlation"] == pytest.approx(-1)


def test_groups_without_spread_have_no_correlation():
    found = headroom.headroom(np.ones((2, 3)), np.random.default_rng(0).random((2, 3)))
    assert np.isnan(found["correlation"]) and found["best"] == found["mean"] == 1


def test_one_drawing_is_no_group(capsys):
    with pytest.raises(SystemExit):
        headroom.main(["--drawings=1"])
    assert "two drawings" in capsys.readouterr().err
