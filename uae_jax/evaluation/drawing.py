"""Generated images in a folder: a file is complete or absent, and what is complete is not generated again."""

import argparse
import collections
import concurrent.futures
import dataclasses
import math
import pathlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from PIL import Image
from tqdm import tqdm

from uae_jax.data.images import opened
from uae_jax.evaluation import run_settings
from uae_jax.evaluation.records import RecordLog
from uae_jax.files.pictures import SAVING, save_picture
from uae_jax.files.whole import remove_partial
from uae_jax.model_flags import load_model

if TYPE_CHECKING:
    from uae_jax.api import Model

GRID_SIDE = 2  # a grid holds 2 x 2 samples
CAPTIONS, PICTURES = "captions.jsonl", "reconstructions"
# settings that captions and reconstructions depend on
SETTINGS = (*dict.fromkeys((*run_settings.DRAWING, *run_settings.ANSWERING)), "prompt")


class Painter(Protocol):
    """Generates images: the model of `uae_jax.load`, or an object with the same method."""

    def generate(self, texts: Sequence[str], *, sample_ids: Sequence[int]) -> list[Image.Image]: ...


@dataclasses.dataclass(frozen=True)
class Target:
    """One file to write.

    Attributes:
      path: the file; `.png` or `.jpg`.
      prompt: its text.
      sample_ids: noise numbers: one, or four of a grid (top left, top right, bottom left, bottom right).
    """

    path: pathlib.Path
    prompt: str
    sample_ids: tuple[int, ...]

    def side(self, size: int) -> int:
        """Side of the file in pixels, for samples of `size` pixels."""
        return size if len(self.sample_ids) == 1 else GRID_SIDE * size

    def compose(self, samples: Sequence[Image.Image]) -> Image.Image:
        """The image of the file from its samples."""
        if len(samples) == 1:
            return samples[0].convert("RGB")
        size = samples[0].width
        grid = Image.new("RGB", (GRID_SIDE * size, GRID_SIDE * size))
        for number, sample in enumerate(samples):
            row, column = divmod(number, GRID_SIDE)
            grid.paste(sample, (column * size, row * size))
        return grid


def picture_problem(path: pathlib.Path, side: int | None = None) -> str | None:
    """What is wrong with an image file; None for a file that decodes completely and has the format of its suffix.

    Args:
      path: the file.
      side: required width and height in pixels; None for any.
    """
    return _problem_and_size(path, side)[0]


def _problem_and_size(path: pathlib.Path, side: int | None) -> tuple[str | None, tuple[int, int]]:
    if not path.is_file():
        return "is missing", (0, 0)
    try:
        with opened(path, "it") as image:
            kind, size = image.format, image.size
    except ValueError as error:
        return str(error).removeprefix("it "), (0, 0)
    problem = None
    if kind != SAVING[path.suffix]["format"]:
        problem = f"is a {kind} file by its content"
    elif side is not None and size != (side, side):
        problem = f"is {size[0]} x {size[1]} pixels instead of {side} x {side}"
    return problem, size


def content_problems(paths: Sequence[pathlib.Path], side: int | None = None) -> list[str]:
    """A sentence on every image that is damaged, of another format, or of another size than `side` or most images."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        seen = list(pool.map(_problem_and_size, paths, [side] * len(paths)))
    sizes = collections.Counter(size for problem, size in seen if problem is None)
    (width, height), _ = sizes.most_common(1)[0] if sizes else ((0, 0), 0)
    problems = []
    for path, (problem, size) in zip(paths, seen):
        if problem is None and size != (width, height):
            problem = f"is {size[0]} x {size[1]} pixels, most are {width} x {height}"
        problems += [f"{path} {problem}"] if problem else []
    return problems


def write_pictures(
    painter: Painter, targets: Sequence[Target], *, size: int, batch_size: int, label: str
) -> tuple[int, int]:
    """Generates every target whose file is missing, damaged or of another size.

    Batches are always the same: a batch with one missing image is generated completely, and only that image is written.
    So an image does not depend on where an earlier call was interrupted.

    Args:
      painter: generates images from texts.
      targets: all files of the folder, each with the same number of samples.
      size: side of a sample in pixels.
      batch_size: samples in one compiled call.
      label: of the progress bar, which counts files.

    Returns:
      Number of written files, and of files that were complete already.

    Raises:
      ValueError: some files could not be written; the others are.
    """
    with concurrent.futures.ThreadPoolExecutor() as pool:
        problems = list(pool.map(lambda target: picture_problem(target.path, target.side(size)), targets))
    missing, failed = sum(problem is not None for problem in problems), []
    samples = len(targets[0].sample_ids) if targets else 1
    stride = math.lcm(batch_size, samples) // samples
    with tqdm(total=len(targets), initial=len(targets) - missing, desc=label, disable=None) as bar:
        for start in range(0, len(targets), stride):
            chunk, wanted = targets[start : start + stride], problems[start : start + stride]
            if not any(wanted):
                continue
            images = painter.generate(
                [target.prompt for target in chunk for _ in range(samples)],
                sample_ids=[number for target in chunk for number in target.sample_ids],
            )
            for position, target in enumerate(chunk):
                if not wanted[position]:
                    continue
                try:
                    save_picture(target.compose(images[position * samples : (position + 1) * samples]), target.path)
                except OSError as error:  # the others are still to be written
                    failed.append(f"{target.path}: {error}")
                bar.update(1)
    if failed:
        raise ValueError(f"{len(failed)} of {missing} images could not be written: {'; '.join(failed[:3])}")
    return missing, len(targets) - missing


def draw_folder(
    options: argparse.Namespace,
    benchmark: str,
    targets: Sequence[Target],
    settings: Mapping[str, Any],
    prepare: Callable[[], None] = lambda: None,
) -> None:
    """Loads the model, generates the missing files of a benchmark's folder, and prints their number.

    Args:
      options: `out` and the flags of `add_model_flags`.
      benchmark: name of the benchmark.
      targets: all files of the folder.
      settings: what else the folder depends on, such as its prompts.
      prepare: writes the other files, after the settings were compared.

    Raises:
      ValueError: a prompt is too long, or the folder was begun with other settings.
    """
    model = load_model(options, sum(len(target.sample_ids) for target in targets))
    for target in targets:
        try:
            model.engine.text_fields(target.prompt)
        except ValueError as error:
            raise ValueError(f"the prompt of {target.path}: {error}") from error
    drawing = {"benchmark": benchmark, **run_settings.model_settings(options, model, run_settings.DRAWING), **settings}
    run_settings.begin(options.out, drawing)
    options.out.mkdir(parents=True, exist_ok=True)
    remove_partial(options.out)
    prepare()
    written, kept = write_pictures(
        model, targets, size=model.settings.size, batch_size=model.settings.batch_size, label=benchmark
    )
    print(f"{options.out}: {written} images written, {kept} were complete")


def sample_number(stem: str) -> int:
    """The sample id of an image, in 0 .. 2**31 - 1: it depends on the stem alone, not on other files of the folder."""
    return zlib.crc32(stem.encode("utf-8", "surrogatepass")) >> 1


def write_reconstructions(
    model: "Model", images: Sequence[pathlib.Path], out: pathlib.Path, settings: Mapping[str, Any]
) -> list[dict[str, str]]:
    """Writes `out/captions.jsonl` and `out/reconstructions/<stem>.png`; existing results are kept.

    A line is {"image_id": stem, "image": file name, "caption": text}. `captions.jsonl.settings.json` has the settings.
    The PNG metadata of an image holds its caption.

    Args:
      model: from `uae_jax.load`.
      images: the originals.
      out: folder of the results.
      settings: of `run_settings.model_settings`.

    Returns:
      One {"image", "error"} for each image that could not be captioned or reconstructed.

    Raises:
      ValueError: two images have one stem, `out` was begun with other settings, or no image could be reconstructed.
    """
    stems: dict[str, pathlib.Path] = {}
    for image in images:
        if image.stem in stems:
            raise ValueError(f"{image} and {stems[image.stem]} would both become {image.stem}.png; rename one")
        stems[image.stem] = image
    run_settings.begin(out / CAPTIONS, settings)
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


def _draw(model: "Model", captions: Mapping[str, str], folder: pathlib.Path) -> dict[str, str]:
    """Generates the reconstructions that are missing; {stem: error} of captions that cannot be reconstructed."""
    errors: dict[str, str] = {}
    missing = [stem for stem in captions if picture_problem(folder / f"{stem}.png", model.settings.size)]
    generated = model.each_drawing(
        [captions[stem] for stem in missing],
        sample_ids=[sample_number(stem) for stem in missing],
        failed=lambda index, error: errors.update({missing[index]: str(error)}),
    )
    for index, image in tqdm(
        generated, desc="reconstruct", total=len(captions), initial=len(captions) - len(missing), disable=None
    ):
        stem = missing[index]
        try:
            save_picture(image, folder / f"{stem}.png", captions[stem])
        except (OSError, ValueError) as error:  # the others are still to be written
            errors[stem] = str(error)
    return errors
