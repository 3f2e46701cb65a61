"""The scores of Unified-Bench: JSON with the official script's keys, and `report.html` with the image pairs."""

import base64
import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from PIL import Image

from uae_jax.evaluation.pairs import Pair, read_rgb
from uae_jax.files.whole import write_bytes
from uae_jax.training.summary import interval

Similarities = Mapping[str, Mapping[str, float | None]]
THUMBNAIL = 224  # longest side in pixels
# means x 100 over the 100 pictures of Unified-Bench: arXiv 2509.09666, table of protocol 1
PUBLISHED = {
    "UAE": {"clip": 90.50, "longclip": 94.35, "dinov2": 81.98, "dinov3": 77.54},
    "GPT-4o-Image": {"clip": 90.42, "longclip": 94.37, "dinov2": 81.74, "dinov3": 77.27},
    "BAGEL": {"clip": 88.97, "longclip": 93.35, "dinov2": 78.55, "dinov3": 73.05},
    "Janus-Pro": {"clip": 88.72, "longclip": 93.45, "dinov2": 78.30, "dinov3": 70.61},
    "UniWorld-V1": {"clip": 85.49, "longclip": 91.53, "dinov2": 72.12, "dinov3": 66.83},
}


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
    found: dict[str, float] = {}
    for name in scored[0] if scored else ():
        values = [value for model in scored if (value := model.get(name)) is not None]
        if len(values) == len(scored):
            found[name] = sum(values) / len(values)
    return found


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


def thumbnail(path: pathlib.Path) -> str:
    """A picture as a data URI: JPEG with the longest side cut to `THUMBNAIL`; small pictures as PNG, unchanged.

    Raises:
      ValueError: it cannot be read.
    """
    image, data = read_rgb(path), io.BytesIO()
    small = max(image.size) <= THUMBNAIL
    if not small:
        image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    image.save(data, *(("PNG",) if small else ("JPEG",)), **({} if small else {"quality": 88}))
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(data.getvalue()).decode()}"


def pair_rows(
    similarities: Mapping[str, Mapping[str, float | None]],
    pairs: Sequence[Pair],
    captions: Mapping[str, str],
    limit: int,
) -> list[dict]:
    """The pairs with the lowest mean over the models that scored them, lowest first, as the page shows them.

    Args:
      similarities: model to picture's file name to cosine.
      pairs: (picture, reference).
      captions: stem of the picture to its caption; may be empty.
      limit: how many.
    """
    rows = []
    for picture, reference in pairs:
        scores = {
            model: value for model, values in similarities.items() if (value := values.get(picture.name)) is not None
        }
        if scores:
            rows.append(
                {
                    "name": picture.name,
                    "scores": scores,
                    "mean": sum(scores.values()) / len(scores),
                    "picture": picture,
                    "reference": reference,
                    "caption": captions.get(picture.stem, ""),
                }
            )
    rows.sort(key=lambda row: (row["mean"], row["name"]))
    return [
        {**row, "picture": thumbnail(row["picture"]), "reference": thumbnail(row["reference"])} for row in rows[:limit]
    ]


def write_page(
    path: pathlib.Path, results: Mapping[str, Any], pairs: Sequence[Pair], captions: Mapping[str, str], limit: int
) -> None:
    """Writes the page.

    Args:
      path: of the page.
      results: the JSON of the scores.
      pairs, captions, limit: see `pair_rows`.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("uae_jax.evaluation", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    models = [model for model in results["model_types"] if model in results["statistics_by_model"]]
    published = (
        [
            {
                "name": name,
                "scores": [row[model] for model in models],
                "mean": sum(row[model] for model in models) / len(models),
            }
            for name, row in PUBLISHED.items()
        ]
        if models
        else []
    )
    page = environment.get_template("unified_bench.html").render(
        results=results,
        models=models,
        rows=pair_rows(results["similarities_by_model"], pairs, captions, limit),
        published=published,
        total=len(pairs),
    )
    write_bytes(path, page.encode("utf-8"))
