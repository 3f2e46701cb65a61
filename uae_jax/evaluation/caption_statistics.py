"""What can be said of captions without looking at the pictures: length, variety, repetition."""

import re
from collections.abc import Sequence

from uae_jax.training.summary import interval

REPEATED = 4  # words of the sequences that are looked for twice in one caption


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return re.findall(r"\w+(?:['\u2019-]\w+)*", text.lower())


def _ngrams(text: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(text[start : start + n]) for start in range(len(text) - n + 1)]


def distinct(texts: Sequence[Sequence[str]], n: int) -> float:
    """Distinct-n: different sequences of n words over all of them, in all captions together (arXiv 1510.03055, section
    5).

    It falls as the number of captions grows; compare equal numbers only. 0 where no caption has n words.
    """
    found = [gram for text in texts for gram in _ngrams(text, n)]
    return len(set(found)) / len(found) if found else 0.0


def repetition(text: Sequence[str], n: int = REPEATED) -> float:
    """Share of a caption's sequences of n words that it has said before, in [0, 1) (seq-rep-n, arXiv 1908.04319, eq.
    3).
    """
    found = _ngrams(text, n)
    return 1 - len(set(found)) / len(found) if found else 0.0


def text_statistics(captions: Sequence[str]) -> dict:
    """Length in words, distinct-1 to 3, repetition, and the share of different captions.

    Returns:
      {"words": `training.summary.interval` with "shortest" and "longest"; "distinct_1", "distinct_2", "distinct_3";
      "repetition": interval; "different_captions"}.
    """
    texts = [words(caption) for caption in captions]
    lengths = [len(text) for text in texts]
    return {
        "words": {**interval(lengths), "shortest": min(lengths), "longest": max(lengths)},
        **{f"distinct_{n}": distinct(texts, n) for n in (1, 2, 3)},
        "repetition": interval([repetition(text) for text in texts]),
        "different_captions": len(set(captions)) / len(captions),
    }
