"""What captions say: facts and false claims about built-in scenes by attribute; length, variety and repetition."""

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from uae_jax.data.scene_checker import caption_score, match_mentions, parse_caption
from uae_jax.data.scenes import Scene, object_facts
from uae_jax.training.summary import interval

ATTRIBUTES = ("shape", "colour", "size", "position", "background", "count")
RESAMPLES = 2000
REPEATED = 4  # words of the sequences that are looked for twice in one caption

Counts = tuple[int, int, int]


def caption_facts(scene: Scene, text: str) -> dict[str, Counts]:
    """Counts of one caption by attribute: (correct, claimed, total).

    `correct` of `claimed` claims are true, which are as many of the scene's `total` facts. A caption counts correctly
    when it mentions as many objects as there are. The sums over all attributes but `count` are those of
    `caption_score`, without relations and unparsed words.

    Args:
      scene: what was described.
      text: the caption.
    """
    said, objects = parse_caption(text), [object_facts(item) for item in scene.objects]
    claims = [dict(mention.claims) for mention in said.mentions for _ in range(mention.count)]
    found = {name: [0, 0, 0] for name in ATTRIBUTES}
    for truth in objects:
        for name in truth:
            found[name][2] += 1
    pairs = match_mentions(claims, objects)
    for number, claim in enumerate(claims):
        truth = objects[pairs[number]] if number in pairs else {}
        for name, value in claim.items():
            found[name][0] += truth.get(name) == value
            found[name][1] += 1
    found["background"] = [int(scene.background in said.backgrounds), len(said.backgrounds), 1]
    found["count"] = [int(len(claims) == len(objects)), int(bool(claims)), 1]
    return {name: (correct, claimed, total) for name, (correct, claimed, total) in found.items()}


def ratio_interval(numerators: ArrayLike, denominators: ArrayLike) -> dict[str, float | int] | None:
    """A ratio of sums over captions with a 95 % bootstrap interval over captions; None where the denominators sum to 0.

    Args:
      numerators, denominators: one each of every caption.
    """
    above, below = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    if not below.sum():
        return None
    rows = np.random.default_rng(0).integers(0, len(above), (RESAMPLES, len(above)))
    sums = below[rows].sum(1)
    ratios = above[rows].sum(1)[sums > 0] / sums[sums > 0]
    low, high = np.quantile(ratios, [0.025, 0.975])
    return {"value": float(above.sum() / below.sum()), "n": int(below.sum()), "low": float(low), "high": float(high)}


def facts_summary(scenes: Sequence[Scene], captions: Sequence[str]) -> dict:
    """Recall and precision by attribute, pooled over captions, and the means over captions that training reports too.

    Returns:
      {"fact_recall", "fact_precision": as `training.summary.interval`; "attributes": {attribute: {"recall",
      "precision": as `ratio_interval`}}; "unparsed_words": share of captions with words outside the scenes' grammar}.
    """
    scores = [caption_score(scene, text) for scene, text in zip(scenes, captions, strict=True)]
    counts = [caption_facts(scene, text) for scene, text in zip(scenes, captions)]
    table = {}
    for name in ATTRIBUTES:
        correct, claimed, total = zip(*(row[name] for row in counts))
        table[name] = {"recall": ratio_interval(correct, total), "precision": ratio_interval(correct, claimed)}
    return {
        "fact_recall": interval([score.fact_recall for score in scores]),
        "fact_precision": interval([score.fact_precision for score in scores]),
        "attributes": table,
        "unparsed_words": sum(bool(score.unparsed) for score in scores) / len(scores),
    }


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
