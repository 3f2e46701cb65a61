"""Cosines of pairs of pictures under the benchmark's encoders, and the JSON with the official script's keys."""

import itertools
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from uae_jax import trees
from uae_jax.evaluation.encoders import BenchEncoder, image_features
from uae_jax.evaluation.pairs import read_rgb
from uae_jax.training.summary import interval

Pair = tuple[pathlib.Path, pathlib.Path]
Similarities = Mapping[str, Mapping[str, float | None]]


def pair_cosines(
    encoder: BenchEncoder, params: trees.Tree, pairs: Sequence[Pair], batch_size: int
) -> Iterator[tuple[Pair, float | str]]:
    """The cosine of each pair, in order; for a pair that cannot be read, what is wrong with it.

    Images of the next batch are read while the present one is encoded. Every batch has one shape, so that the encoder
    is compiled once.

    Args:
      encoder: opened.
      params: its parameters.
      pairs: (picture, reference).
      batch_size: pairs in one compiled call.
    """

    def read(pair: Pair) -> list[np.ndarray] | str:
        try:
            return [encoder.pixels(read_rgb(path)) for path in pair]
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor() as pool:
        batches = [pairs[start : start + batch_size] for start in range(0, len(pairs), batch_size)]
        waiting: list[Future] = []
        for batch, following in itertools.zip_longest(batches, batches[1:], fillvalue=()):
            waiting = waiting or [pool.submit(read, pair) for pair in batch]
            coming = [pool.submit(read, pair) for pair in following]
            results = [future.result() for future in waiting]
            yield from zip(batch, _cosines(encoder, params, results, batch_size))
            waiting = coming


def _cosines(
    encoder: BenchEncoder, params: trees.Tree, results: Sequence[list[np.ndarray] | str], size: int
) -> list[float | str]:
    read = [result for result in results if not isinstance(result, str)]
    if not read:
        return list(results)
    filled = read + [read[-1]] * (size - len(read))
    features = image_features(encoder, params, np.stack([pixels for pair in filled for pixels in pair])).astype(
        np.float64
    )
    cosines = iter((features[0::2] * features[1::2]).sum(-1))
    found = [result if isinstance(result, str) else float(next(cosines)) for result in results]
    return [
        value if isinstance(value, str) or math.isfinite(value) else "the encoder's features are not finite"
        for value in found
    ]


def statistics(values: Sequence[float], total: int) -> dict[str, Any]:
    """One model's entry of `statistics_by_model`: the official keys, `n_valid` and a 95 % bootstrap interval of the
    mean.

    Args:
      values: the scores, at least one.
      total: pictures, the ones without a score among them.
    """
    spread = interval(values)
    return {
        "total_images": total,
        "valid_pairs": len(values),
        "average_similarity": sum(values) / len(values),
        "min_similarity": min(values),
        "max_similarity": max(values),
        "n_valid": len(values),
        "interval_95": [spread["low"], spread["high"]],
    }


def image_means(similarities: Similarities) -> dict[str, float]:
    """The mean over all models of each picture that every model scored."""
    scored = list(similarities.values())
    names = [name for name in (scored[0] if scored else ()) if all(model.get(name) is not None for model in scored)]
    return {name: sum(model[name] for model in scored) / len(scored) for name in names}


def results_json(models: Sequence[str], similarities: Similarities) -> dict[str, Any]:
    """The official script's JSON of scores, with intervals.

    `overall_average` is the unweighted mean of the models' means, as in the script; its interval resamples the pictures
    that every model scored, whose number is the summary's `n_valid`.

    Args:
      models: names of the encoders that were asked for, in order.
      similarities: model to picture's file name to cosine, None where there is none.
    """
    valid = {model: [score for score in scores.values() if score is not None] for model, scores in similarities.items()}
    table = {model: statistics(values, len(similarities[model])) for model, values in valid.items() if values}
    averages = {model: entry["average_similarity"] for model, entry in table.items()}
    summary: dict[str, Any] = {}
    if averages:
        means = list(image_means(similarities).values())
        spread = interval(means) if means else None
        summary = {
            "models_used": list(averages),
            "average_scores_by_model": averages,
            "overall_average": sum(averages.values()) / len(averages),
            "best_model": list(max(averages.items(), key=lambda item: item[1])),
            "worst_model": list(min(averages.items(), key=lambda item: item[1])),
            "n_valid": len(means),
            "overall_interval_95": [spread["low"], spread["high"]] if spread else None,
        }
    return {
        "model_types": list(models),
        "similarities_by_model": similarities,
        "statistics_by_model": table,
        "summary": summary,
    }
