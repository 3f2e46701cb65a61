"""Runs a model over a folder of images: a caption of each, and the picture drawn from that caption alone."""

import pathlib
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from uae_jax.api import Model
from uae_jax.evaluation.picture_files import picture_problem
from uae_jax.evaluation.records import RecordLog
from uae_jax.evaluation.run_settings import ANSWERING, DRAWING, begin
from uae_jax.files.pictures import save_picture
from uae_jax.files.whole import remove_partial

CAPTIONS, PICTURES = "captions.jsonl", "reconstructions"
SETTINGS = (*dict.fromkeys((*DRAWING, *ANSWERING)), "prompt")  # what captions and pictures follow from


def sample_number(stem: str) -> int:
    """The number in 0 .. 2**31 - 1 that an image's random keys follow from: of its name alone, whatever else is in the
    folder.
    """
    return zlib.crc32(stem.encode("utf-8")) >> 1


def write_reconstructions(
    model: Model, images: Sequence[pathlib.Path], out: pathlib.Path, settings: Mapping[str, Any]
) -> list[dict[str, str]]:
    """Writes `out/captions.jsonl` and `out/reconstructions/<stem>.png`; what is there already is kept.

    The lines are {"image_id": stem, "image": file name, "caption": text}; `captions.jsonl.settings.json` says how
    they were made. A picture has its caption in its PNG metadata.

    Args:
      model: as of `uae_jax.load`.
      images: the originals.
      out: where to write.
      settings: what they follow from, as of `run_settings.model_settings`.

    Returns:
      One {"image", "error"} for each image that could not be read or drawn.

    Raises:
      ValueError: two images have one stem, `out` was begun with other settings, or no image could be reconstructed.
    """
    stems: dict[str, pathlib.Path] = {}
    for image in images:
        if image.stem in stems:
            raise ValueError(f"{image} and {stems[image.stem]} would both become {image.stem}.png; rename one")
        stems[image.stem] = image
    begin(out / CAPTIONS, settings)
    errors: list[dict[str, str]] = []
    with RecordLog(out / CAPTIONS) as log:
        captions = {record["image_id"]: record["caption"] for record in log.records}
        missing = [stem for stem in stems if stem not in captions]
        written = model.each_caption(
            [stems[stem] for stem in missing],
            sample_ids=[sample_number(stem) for stem in missing],
            failed=lambda index, error: errors.append({"image": str(stems[missing[index]]), "error": str(error)}),
        )
        for index, caption in tqdm(
            written, desc="caption", total=len(stems), initial=len(stems) - len(missing), disable=None
        ):
            stem = missing[index]
            captions[stem] = caption
            log.append({"image_id": stem, "image": stems[stem].name, "caption": caption})
    remove_partial(out)
    for stem, error in _draw(
        model, {stem: captions[stem] for stem in stems if stem in captions}, out / PICTURES
    ).items():
        errors.append({"image": str(stems[stem]), "error": error})
    if len(errors) == len(images):
        raise ValueError(f"none of the {len(images)} images could be reconstructed; the first: {errors[0]['error']}")
    return errors


def _draw(model: Model, captions: Mapping[str, str], folder: pathlib.Path) -> dict[str, str]:
    """Draws the captions that have no whole picture yet; what is wrong with those that cannot be drawn, by stem."""
    errors: dict[str, str] = {}
    missing = [stem for stem in captions if picture_problem(folder / f"{stem}.png", model.settings.size)]
    drawn = model.each_drawing(
        [captions[stem] for stem in missing],
        sample_ids=[sample_number(stem) for stem in missing],
        failed=lambda index, error: errors.update({missing[index]: str(error)}),
    )
    for index, picture in tqdm(
        drawn, desc="draw", total=len(captions), initial=len(captions) - len(missing), disable=None
    ):
        stem = missing[index]
        save_picture(picture, folder / f"{stem}.png", captions[stem])
    return errors
