"""A mixture of sources by weights, with random access: the same index always gives the same example."""

import math
from collections.abc import Sequence

import numpy as np

from uae_jax.data.sources import Example, Source

PERIOD = 10_000  # indices after which the pattern of sources repeats; weights are met to one part of it


class Mixture:
    """Several sources in turn, each as often as its weight says.

    A pattern of 10,000 indices spreads the sources evenly, and repeats. A source that is used up begins again. An epoch
    ends when every source was used up once.

    Args:
      sources: each of at least one example.
      weights: above 0; their sum need not be 1.

    Raises:
      ValueError: no sources, an empty one, or a weight that is not above 0.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float]):
        if not sources or len(sources) != len(weights) or not all(len(source) for source in sources):
            raise ValueError(f"a mixture needs sources with examples and a weight each, got {len(sources)} sources")
        if not all(math.isfinite(weight) and weight > 0 for weight in weights):
            raise ValueError(f"the weights of a mixture are {list(weights)}; each must be above 0")
        self.sources = tuple(sources)
        self.slots = _slots(np.asarray(weights, np.float64))
        self.pattern, self.ranks = _pattern(self.slots)
        self.length = max(self._needed(number) for number in range(len(sources)))

    def _needed(self, number: int) -> int:
        """The smallest length that holds every example of a source."""
        rounds, rest = divmod(len(self.sources[number]) - 1, int(self.slots[number]))
        return rounds * PERIOD + int(np.flatnonzero(self.pattern == number)[rest]) + 1

    def __len__(self) -> int:
        return self.length

    def place_of(self, index: int) -> tuple[int, int]:
        """(number of the source, index in it) of an index."""
        rounds, at = divmod(int(index), PERIOD)
        number = int(self.pattern[at])
        return number, (rounds * int(self.slots[number]) + int(self.ranks[at])) % len(self.sources[number])

    def __getitem__(self, index: int) -> Example:
        number, inside = self.place_of(index)
        return self.sources[number][inside]


def _slots(weights: np.ndarray) -> np.ndarray:
    """How many indices of a pattern each source gets, at least one: int [n], their sum is `PERIOD`."""
    shares = weights / weights.sum() * PERIOD
    slots = np.maximum(np.floor(shares), 1).astype(np.int64)
    order = np.argsort(slots - shares, kind="stable")  # the largest remainders first
    for turn in range(max(PERIOD - int(slots.sum()), 0)):
        slots[order[turn % len(slots)]] += 1
    slots[np.argmax(slots)] -= slots.sum() - PERIOD
    return slots


def _pattern(slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The source of each index of a pattern, int [PERIOD], and how many of the same source come before it.

    Each source's turns stand at equal distances, (k + 1/2) / slots; the earlier source wins where two meet.
    """
    turns = np.concatenate([(np.arange(count) + 0.5) / count for count in slots])
    pattern = np.repeat(np.arange(len(slots)), slots)[np.argsort(turns, kind="stable")]
    ranks = np.zeros(PERIOD, np.int64)
    for number, count in enumerate(slots):
        ranks[pattern == number] = np.arange(count)
    return pattern, ranks
