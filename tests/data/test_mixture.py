"""A mixture gives every source its weight, the same example for the same index, and every example in an epoch."""

import collections

import pytest

from uae_jax.data.mixture import PERIOD, Mixture
from uae_jax.data.sources import SceneSource


def mixture(sizes, weights):
    return Mixture([SceneSource(seed=seed, length=size) for seed, size in enumerate(sizes)], weights)


@pytest.mark.parametrize(
    "sizes, weights", [((30, 20), (0.7, 0.3)), ((7, 2000, 40), (1, 1, 2)), ((5, 5, 5), (1e-7, 1, 3)), ((9,), (4,))]
)
def test_weights_are_met_and_every_example_is_shown(sizes, weights):
    mixed = mixture(sizes, weights)
    places = [mixed.place_of(index) for index in range(len(mixed))]
    assert {number: {i for n, i in places if n == number} for number in range(len(sizes))} == {
        number: set(range(size)) for number, size in enumerate(sizes)
    }
    # one example less would not be an epoch
    assert places[-1] not in places[:-1]
    counts = collections.Counter(mixed.place_of(index)[0] for index in range(3 * PERIOD))
    for number, weight in enumerate(weights):
        assert counts[number] / (3 * PERIOD) == pytest.approx(weight / sum(weights), abs=1.01e-4)


def test_sources_take_turns_within_a_batch():
    mixed = mixture((1000, 1000, 1000), (0.5, 0.25, 0.25))
    for start in range(0, 400, 8):
        counts = collections.Counter(mixed.place_of(index)[0] for index in range(start, start + 8))
        assert counts == {0: 4, 1: 2, 2: 2}


def test_an_index_keeps_its_example_and_a_source_begins_again():
    mixed, again = mixture((3, 50), (1, 1)), mixture((3, 50), (1, 1))
    for index in (0, 17, len(mixed) - 1):
        assert mixed[index].id == again[index].id and mixed[index].caption == again[index].caption
    inside = [place for number, place in map(mixed.place_of, range(len(mixed))) if number == 0]
    assert inside[:7] == [0, 1, 2, 0, 1, 2, 0]
    far = 10**9 + 7
    assert mixed[far].id == again[far].id


def test_mixtures_that_cannot_be_are_refused():
    for sizes, weights in (((), ()), ((1, 0), (1, 1)), ((1,), (1, 2))):
        with pytest.raises(ValueError, match="needs sources with examples and a weight each"):
            mixture(sizes, weights)
    for weight in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="each must be above 0"):
            mixture((2, 2), (1, weight))
