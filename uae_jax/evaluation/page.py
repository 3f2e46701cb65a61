"""`report.html` of a benchmark: one self-contained page with scores and pairs of pictures, worst first."""

import base64
import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from PIL import Image

from uae_jax.evaluation.pairs import read_rgb
from uae_jax.evaluation.scores import Pair
from uae_jax.files.whole import write_bytes

THUMBNAIL = 224  # longest side in pixels
# means x 100 over the 100 pictures of Unified-Bench: arXiv 2509.09666, table of protocol 1
PUBLISHED = {
    "UAE": {"clip": 90.50, "longclip": 94.35, "dinov2": 81.98, "dinov3": 77.54},
    "GPT-4o-Image": {"clip": 90.42, "longclip": 94.37, "dinov2": 81.74, "dinov3": 77.27},
    "BAGEL": {"clip": 88.97, "longclip": 93.35, "dinov2": 78.55, "dinov3": 73.05},
    "Janus-Pro": {"clip": 88.72, "longclip": 93.45, "dinov2": 78.30, "dinov3": 70.61},
    "UniWorld-V1": {"clip": 85.49, "longclip": 91.53, "dinov2": 72.12, "dinov3": 66.83},
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
            model: values[picture.name]
            for model, values in similarities.items()
            if values.get(picture.name) is not None
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
