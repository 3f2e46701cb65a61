"""Runs a model over a folder of images: a caption of each, and the picture drawn from that caption alone."""

import argparse
import dataclasses
import io
import json
import pathlib
import sys
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from uae_jax.api import Model
from uae_jax.evaluation.records import RecordLog, write_bytes

CAPTIONS, PICTURES, SETTINGS = "captions.jsonl", "reconstructions", "settings.json"


def sample_number(stem: str) -> int:
    """The number in 0 .. 2**31 - 1 that an image's random keys follow from: of its name alone, whatever else is in the folder."""
    return zlib.crc32(stem.encode("utf-8")) >> 1


def write_reconstructions(
    model: Model, images: Sequence[pathlib.Path], out: pathlib.Path, origin: Mapping[str, str | bool]) -> list[dict[str, str]]:
    """Writes `out/captions.jsonl` and `out/reconstructions/<stem>.png`; what is there already is kept.

    The lines are {"image_id": stem, "image": file name, "caption": text}; `out/settings.json` says with which settings. A
    picture has its caption in its PNG metadata.

    Args:
      model: as of `uae_jax.load`.
      images: the originals.
      out: where to write.
      origin: what else decides the results beside the model's settings, such as the name of its folder.

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
    keep_settings(out, model, origin)
    errors: list[dict[str, str]] = []
    with RecordLog(out / CAPTIONS) as log:
        captions = {record["image_id"]: record["caption"] for record in log.records}
        missing = [stem for stem in stems if stem not in captions]
        written = model.each_caption(
            [stems[stem] for stem in missing], sample_ids=[sample_number(stem) for stem in missing],
            failed=lambda index, error: errors.append({"image": str(stems[missing[index]]), "error": str(error)}))
        for index, caption in _bar(written, len(stems), len(stems) - len(missing), "caption"):
            stem = missing[index]
            captions[stem] = caption
            log.append({"image_id": stem, "image": stems[stem].name, "caption": caption})
    for stem, error in _draw(model, {stem: captions[stem] for stem in stems if stem in captions}, out / PICTURES).items():
        errors.append({"image": str(stems[stem]), "error": error})
    if len(errors) == len(images):
        raise ValueError(f"none of the {len(images)} images could be reconstructed; the first: {errors[0]['error']}")
    return errors


def origin_of(options: argparse.Namespace) -> dict[str, str | bool]:
    """What beside the settings of inference decides the results, from the flags of `model_flags.add_model_flags`."""
    return {"checkpoint": options.checkpoint, "dtype": options.dtype, "without_adapters": options.without_adapters}


def keep_settings(out: pathlib.Path, model: Model, origin: Mapping[str, str | bool]) -> None:
    """Writes `out/settings.json`, or checks that the folder was begun with the same settings; the batch size may change.

    Raises:
      ValueError: it was begun with others.
    """
    values = {name: value for name, value in dataclasses.asdict(model.settings).items() if name != "batch_size"}
    settings, path = {**origin, **values}, out / SETTINGS
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else settings
    changed = [name for name in settings if before.get(name) != settings[name]]
    if changed:
        raise ValueError(f"{out} was begun with another {', '.join(changed)}; give another --out, or delete that folder")
    write_bytes(path, (json.dumps(settings, indent=2) + "\n").encode("utf-8"))


def _draw(model: Model, captions: Mapping[str, str], folder: pathlib.Path) -> dict[str, str]:
    """Draws the captions that have no picture yet; what is wrong with those that cannot be drawn, by stem."""
    errors: dict[str, str] = {}
    missing = [stem for stem in captions if not (folder / f"{stem}.png").is_file()]
    drawn = model.each_drawing(
        [captions[stem] for stem in missing], sample_ids=[sample_number(stem) for stem in missing],
        failed=lambda index, error: errors.update({missing[index]: str(error)}))
    for index, picture in _bar(drawn, len(captions), len(captions) - len(missing), "draw"):
        stem = missing[index]
        info, data = PngInfo(), io.BytesIO()
        info.add_itxt("caption", captions[stem])
        picture.save(data, "PNG", pnginfo=info)
        write_bytes(folder / f"{stem}.png", data.getvalue())
    return errors


def _bar(results, total: int, done: int, what: str) -> tqdm:
    return tqdm(results, total=total, initial=done, desc=what, file=sys.stderr, disable=not sys.stderr.isatty())
