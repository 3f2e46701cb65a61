"""Pictures for a benchmark's evaluator: a file is whole or not there, and what is whole is not drawn again."""

import collections
import concurrent.futures
import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Protocol

from PIL import Image
from tqdm import tqdm

from uae_jax.files.pictures import SAVING, save_picture

GRID_SIDE = 2  # a grid holds 2 x 2 samples


class Painter(Protocol):
    """What draws: `uae_jax.load`, or anything like it."""

    def generate(self, texts: Sequence[str], *, sample_ids: Sequence[int]) -> list[Image.Image]: ...


@dataclasses.dataclass(frozen=True)
class Target:
    """One file to write.

    Attributes:
      path: the file; `.png` or `.jpg`.
      prompt: what it shows.
      sample_ids: noise of its samples: one, or four for a grid in the order top left, top right, bottom left, bottom
        right.
    """

    path: pathlib.Path
    prompt: str
    sample_ids: tuple[int, ...]

    def side(self, size: int) -> int:
        """Side of the file in pixels, of samples of `size` pixels."""
        return size if len(self.sample_ids) == 1 else GRID_SIDE * size

    def compose(self, samples: Sequence[Image.Image]) -> Image.Image:
        """The picture of the file from its samples."""
        if len(samples) == 1:
            return samples[0].convert("RGB")
        size = samples[0].width
        grid = Image.new("RGB", (GRID_SIDE * size, GRID_SIDE * size))
        for number, sample in enumerate(samples):
            row, column = divmod(number, GRID_SIDE)
            grid.paste(sample, (column * size, row * size))
        return grid


def picture_problem(path: pathlib.Path, side: int | None = None) -> str | None:
    """None for a picture that decodes to its end, of the kind that its name says, else what is wrong with it.

    Args:
      path: the file.
      side: width and height that it must have in pixels; None for any.
    """
    return _problem_and_size(path, side)[0]


def _problem_and_size(path: pathlib.Path, side: int | None) -> tuple[str | None, tuple[int, int]]:
    if not path.is_file():
        return "is missing", (0, 0)
    try:
        with Image.open(path) as image:
            image.load()
            kind, size = image.format, image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return f"is not a readable picture ({' '.join(str(error).split())})", (0, 0)
    problem = None
    if kind != SAVING[path.suffix]["format"]:
        problem = f"is a {kind} file by its content"
    elif side is not None and size != (side, side):
        problem = f"is {size[0]} x {size[1]} pixels instead of {side} x {side}"
    return problem, size


def content_problems(paths: Sequence[pathlib.Path], side: int | None = None) -> list[str]:
    """Sentences on the pictures that are damaged, of another kind, or of another size than `side` or than most of
    them.
    """
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
    """Draws every target whose file is missing, damaged or of another size.

    Samples are always drawn in the same batches: a batch with one missing picture is drawn whole and only that picture
    is written. So a picture does not depend on where an earlier call was interrupted.

    Args:
      painter: draws texts.
      targets: all files of the folder, with equally many samples each.
      size: side of a sample in pixels.
      batch_size: samples that the painter draws in one compiled call.
      label: of the progress bar, which counts files.

    Returns:
      How many files were written, and how many stood already.
    """
    with concurrent.futures.ThreadPoolExecutor() as pool:
        problems = list(pool.map(lambda target: picture_problem(target.path, target.side(size)), targets))
    missing = sum(problem is not None for problem in problems)
    samples = len(targets[0].sample_ids) if targets else 1
    stride = math.lcm(batch_size, samples) // samples
    with tqdm(total=len(targets), initial=len(targets) - missing, desc=label, disable=None) as bar:
        for start in range(0, len(targets), stride):
            chunk, wanted = targets[start : start + stride], problems[start : start + stride]
            if not any(wanted):
                continue
            drawn = painter.generate(
                [target.prompt for target in chunk for _ in range(samples)],
                sample_ids=[number for target in chunk for number in target.sample_ids],
            )
            for position, target in enumerate(chunk):
                if wanted[position]:
                    save_picture(target.compose(drawn[position * samples : (position + 1) * samples]), target.path)
                    bar.update(1)
    return missing, len(targets) - missing
