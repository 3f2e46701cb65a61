"""Questions about images: tables in the layout of VLMEvalKit, their prompts, and the options of an answer.

Columns are `index`, `question`, `answer`, `category`, `l2-category`, `hint`, the options `A`, `B`, ... and the image.
`image` holds base64 text, or a list of it; a short value is the index of the row with the image. Without the column
`image`, the column `image_path` names the files. A question without options is open, or answered with Yes or No.
"""

import ast
import base64
import binascii
import collections
import dataclasses
import pathlib
import re
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from uae_jax.data.images import eight_bits, opened
from uae_jax.data.qwen_inputs import Grid, ImageProcessor
from uae_jax.data.tokenizer import turn_ids
from uae_jax.files.tables import MISSING, Line, read_tsv

REFERENCE = 64  # characters; a value of `image` that is not longer is the index of the row with the image
NEEDED = ("index", "question")
YES_NO = ("Yes", "No")
_MARK = re.compile(r"<image (\d+)>")

Picture = Image.Image | np.ndarray


class Statement(NamedTuple):
    """A caption that states an option: its words given what comes before them in the caption."""

    said: str
    given: str = ""

    @property
    def text(self) -> str:
        """The whole caption."""
        return f"{self.given} {self.said}".strip()


@dataclasses.dataclass(frozen=True)
class Question:
    """A question with options, one of which is right.

    Attributes:
      index: its name in messages.
      text: the whole prompt, options included.
      options: {letter: text}, or Yes and No.
      answer: a key of the options.
      category: what it asks for.
      images: decodes its images.
      statements: captions that state each option, for a model that only writes captions; {} for none.
    """

    index: str
    text: str
    options: Mapping[str, str]
    answer: str
    category: str
    images: Callable[[], Sequence[Picture]]
    statements: Mapping[str, tuple[Statement, ...]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises ValueError where the answer is no option."""
        if self.answer not in self.options:
            raise ValueError(f"question {self.index} has the answer {self.answer!r}, which is not an option of it")


def read_items(path: pathlib.Path, needed: Sequence[str] = NEEDED) -> list[Line]:
    """The rows in the order of the file, without images; rows without an image are skipped, as in VLMEvalKit.

    Args:
      path: a TSV.
      needed: columns that it must have, beside `image` or `image_path`.

    Raises:
      FileNotFoundError, ValueError: the table cannot be read, lacks a column, or repeats an index.
    """
    found: dict[str, Line] = {}
    for row in read_tsv(path):
        absent = [name for name in needed if name not in row] + (
            ["image or image_path"] if not {"image", "image_path"} & set(row) else []
        )
        if absent:
            raise ValueError(f"{path} has no column {', '.join(absent)}; give a TSV in the layout of VLMEvalKit")
        if row["index"] in found:
            raise ValueError(f"{path} has the index {row['index']} twice")
        if row.pop("image", "image") not in MISSING:
            found[row["index"]] = row
    if not found:
        raise ValueError(f"{path} has no item with an image")
    return list(found.values())


def options_of(row: Mapping[str, str]) -> dict[str, str]:
    """{letter: text} of a row's options, without values that pandas reads as missing."""
    return {letter: row[letter] for letter in string.ascii_uppercase if row.get(letter, "") not in MISSING}


def yes_or_no(row: Mapping[str, str]) -> bool:
    """Whether a row has no options and its answer is Yes or No in any case."""
    return not options_of(row) and row.get("answer", "").strip().title() in YES_NO


def question_text(row: Mapping[str, str]) -> str:
    """The prompt of VLMEvalKit: hint, question, options and instruction."""
    hint = f"Hint: {row['hint']}\n" if row.get("hint", "") not in MISSING else ""
    options = options_of(row)
    choices = "".join(f"{letter}. {text}\n" for letter, text in options.items())
    request = f"Options:\n{choices}Please select the correct answer from the options above. \n" if options else ""
    return f"{hint}Question: {row['question']}\n{request}"


def yes_no_text(row: Mapping[str, str]) -> str:
    """The question alone, which asks for yes or no."""
    asked = row["question"].strip()
    return asked if "yes or no" in asked.lower() else f"{asked} Please answer yes or no."


def placed_images(text: str, images: Sequence[Picture]) -> list[str | Picture]:
    """A prompt's texts and images in order.

    `<image 2>` in the text stands for the second image, as in MMMU; images that such a text does not name are left out.
    A text without marks comes after its images.

    Raises:
      ValueError: no image, or a mark without its image.
    """
    if not images:
        raise ValueError("a question needs at least one image")
    texts = _MARK.split(text)
    if len(texts) == 1:
        return [*images, text]
    parts: list[str | Picture] = []
    for place, piece in enumerate(texts):
        if place % 2 == 0:
            parts += [piece] if piece else []
            continue
        if not 1 <= int(piece) <= len(images):
            raise ValueError(f"its text names <image {piece}>, but it has {len(images)} images")
        parts.append(images[int(piece) - 1])
    return parts


def question_inputs(
    tokenizer, processor: ImageProcessor, parts: Sequence[str | Picture]
) -> tuple[list[int], list[tuple[np.ndarray, Grid]]]:
    """Prompt tokens `[T]` with every image expanded, and (patches, grid) of each image.

    Args:
      tokenizer: of the captioner; processor: of its images.
      parts: texts and images in order (`placed_images`).

    Raises:
      ValueError: an image without content, or an aspect ratio above 200.
    """
    seen = [processor(part) for part in parts if not isinstance(part, str)]
    counts = iter([processor.image_tokens(grid) for _, grid in seen])
    return turn_ids(tokenizer, [part if isinstance(part, str) else next(counts) for part in parts]), seen


def _listed(value: str) -> list[str]:
    """The parts of a field that may hold a list written as text."""
    return [str(part) for part in ast.literal_eval(value)] if value.startswith("[") and value.endswith("]") else [value]


def _decoded(text: str) -> Image.Image:
    try:
        content = base64.b64decode(text)
    except binascii.Error as error:
        raise ValueError(f"its image cannot be decoded ({error})") from error
    with opened(content, "its image") as image:
        return eight_bits(image).convert("RGB")


def _opened(name: str, roots: Sequence[pathlib.Path]) -> Image.Image:
    found = next((root / name for root in roots if (root / name).is_file()), None)
    if found is None:
        raise ValueError(f"its image {name} is in none of {', '.join(map(str, roots))}; give --image_root")
    with opened(found) as image:
        return eight_bits(image).convert("RGB")


def item_images(
    path: pathlib.Path, wanted: set[str], image_root: pathlib.Path | None = None
) -> Iterator[tuple[str, Callable[[], list[Image.Image]]]]:
    """Yields (index, function that decodes the images) of the wanted rows while the file is read.

    Args:
      path: a TSV.
      wanted: indices.
      image_root: folder of relative names in `image_path`; None for the working folder and those beside the table.
    """
    roots = [pathlib.Path(), path.parent, path.parent / "images" / path.stem] if image_root is None else [image_root]
    pointers = {
        row["index"]: row["image"]
        for row in read_tsv(path)
        if row["index"] in wanted and row.get("image", "") not in MISSING and len(row["image"]) <= REFERENCE
    }
    targets = set(pointers.values())
    shared = {row["index"]: row["image"] for row in read_tsv(path) if row["index"] in targets} if targets else {}

    def images(row: Line) -> list[Image.Image]:
        if "image" not in row:
            return [_opened(name, roots) for name in _listed(row["image_path"])]
        text = shared.get(row["image"], row["image"])
        if len(text) <= REFERENCE:
            raise ValueError(f"its image is that of row {row['image']}, which has none")
        return [_decoded(part) for part in _listed(text)]

    for row in read_tsv(path):
        if row["index"] in wanted:
            yield row["index"], lambda row=row: images(row)


def read_questions(path: pathlib.Path, count: int) -> list[Question]:
    """The first questions of a table that have options, in turn from each category.

    The category is the column `l2-category`, or `category` where that is absent. Open questions are left out.

    Args:
      path: a TSV.
      count: how many, at most.

    Raises:
      FileNotFoundError, ValueError: the table cannot be read, no row can be asked, or an answer is no option.
    """
    rows = [row for row in read_items(path, (*NEEDED, "answer")) if options_of(row) or yes_or_no(row)]
    if not rows:
        raise ValueError(f"{path} has no question with options, or with the answer Yes or No")
    chosen = {row["index"]: row for row in _spread(rows, count)}
    found = {}
    for index, images in item_images(path, set(chosen)):
        row = chosen[index]
        closed, said = yes_or_no(row), row["answer"].strip()
        options: dict[str, str] = {key: key for key in YES_NO} if closed else options_of(row)
        if not closed and said not in options:
            raise ValueError(f"{path} row {index} has the answer {said!r}; its options are {', '.join(options)}")
        text = yes_no_text(row) if closed else question_text(row)
        found[index] = Question(index, text, options, said.title() if closed else said, _category(row), images)
    return [found[index] for index in chosen]


def _category(row: Mapping[str, str]) -> str:
    return next((row[name] for name in ("l2-category", "category") if row.get(name, "") not in MISSING), "all")


def _spread(rows: Sequence[Line], count: int) -> list[Line]:
    """The first `count` rows, in turn from each category: a sorted table is not asked for one category alone."""
    seen: collections.Counter[str] = collections.Counter()
    turns = []
    for row in rows:
        turns.append(seen[_category(row)])
        seen[_category(row)] += 1
    order = sorted(range(len(rows)), key=lambda place: (turns[place], place))
    return [rows[place] for place in order[:count]]
