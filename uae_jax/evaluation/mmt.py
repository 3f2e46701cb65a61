"""MMT-Bench: a model's answers in the tables of VLMEvalKit and of the EvalAI server, and their accuracy.

    python -m uae_jax.evaluate mmt answer --data=MMT-Bench_VAL.tsv --out=OUT --name=uae --checkpoint=RUN
    python -m uae_jax.evaluate mmt check OUT/uae_MMT-Bench_VAL.tsv --data=MMT-Bench_VAL.tsv
    python -m uae_jax.evaluate mmt summary OUT/uae_MMT-Bench_VAL.tsv

`answer` writes `<name>_<data>.tsv` and `.xlsx`: the benchmark's columns without images, and `prediction`. Answers are
greedy unless --temperature is given. An interrupted `answer` continues. Answers of the ALL split are not public, so
`answer` also writes the file to submit, `<name>_<data>_exact_matching_submission.tsv`. Files with several images per
item (`_MI`) work too. `summary` scores by exact matching, or reads the verdicts in VLMEvalKit's `*_result.xlsx`.

The rules of exact matching are those of VLMEvalKit without a judge (open-compass/VLMEvalKit,
vlmeval/utils/matching_util.py, `can_infer`). The averages are those of vlmeval/dataset/utils/multiple_choice.py,
`report_acc_MMT`.
"""

import argparse
import ast
import base64
import binascii
import pathlib
import re
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image
from tqdm import tqdm

from uae_jax.data.images import eight_bits, opened
from uae_jax.evaluation import run_settings
from uae_jax.evaluation.benchmark_commands import add_summary, grouped_scores, refuse, tell
from uae_jax.evaluation.records import RecordLog
from uae_jax.evaluation.tables import MISSING, Line, read_table, read_tsv, write_tsv, write_xlsx
from uae_jax.files.json_files import read_records
from uae_jax.model_flags import add_model_flags, load_model

if TYPE_CHECKING:
    from uae_jax.stages.inference import Inference, Row

REFERENCE = 64  # characters; a value of `image` that is not longer is the index of the row with the image
NEEDED = ("index", "question", "A")
UNDECIDED = "Z"  # counts as wrong
_REFUSAL = "Cannot determine the answer"
_PUNCTUATION = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_LAST_WORDS = 4  # a letter counts if its first place is among so many last words
# without a word boundary after the letter, as in the original: "the answer is a ..." reads as A
_STATED = re.compile(r"answer\s+is\s+\**([ABCD])", re.IGNORECASE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `answer`, `check` and `summary`."""
    actions = parser.add_subparsers()
    answer_flags = actions.add_parser("answer", help="answer the questions")
    answer_flags.set_defaults(run=answer)
    answer_flags.add_argument(
        "--data", type=pathlib.Path, required=True, help="MMT-Bench_VAL.tsv, or another TSV of this form"
    )
    answer_flags.add_argument("--out", type=pathlib.Path, required=True, help="folder of the tables")
    answer_flags.add_argument("--name", default="uae_jax", help="name of the model, the first part of the file names")
    answer_flags.add_argument(
        "--image_root", type=pathlib.Path, help="base folder of relative image_path values (default: beside --data)"
    )
    add_model_flags(answer_flags)
    check_flags = actions.add_parser("check", help="check that every item is answered")
    check_flags.set_defaults(run=check)
    check_flags.add_argument("table", type=pathlib.Path, help="a .tsv or .xlsx of `answer`")
    check_flags.add_argument("--data", type=pathlib.Path, required=True, help="the benchmark's TSV")
    add_summary(
        actions, "print the accuracy", "table", "a table of `answer`, or VLMEvalKit's *_result.xlsx or .tsv", summary
    )


def read_items(path: pathlib.Path) -> list[Line]:
    """The items in the order of the file, without images; items without an image are skipped, as in VLMEvalKit.

    Raises:
      FileNotFoundError, ValueError: the table cannot be read, lacks a column, or repeats an index.
    """
    found: dict[str, Line] = {}
    for row in read_tsv(path):
        absent = [name for name in NEEDED if name not in row] + (
            ["image or image_path"] if not {"image", "image_path"} & set(row) else []
        )
        if absent:
            raise ValueError(f"{path} has no column {', '.join(absent)}; give a TSV of MMT-Bench")
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


def chosen_letter(answer: str, options: Mapping[str, str]) -> str | None:
    """The option that a free answer names.

    The rules in their order: exactly one option letter as a word, near the end; "the answer is" and a letter; the text
    of exactly one option, unless the answer is more than twice as long as all options.

    Args:
      answer: text of the model.
      options: {letter: text}.

    Returns:
      A letter of `options`, "Z" for an answer that declines, None for an answer that names no option.
    """
    if _REFUSAL in answer:
        return UNDECIDED
    words = answer.translate(_PUNCTUATION).split()
    named = [letter for letter in options if letter in words]
    if len(named) == 1 and words.index(named[0]) >= len(words) - _LAST_WORDS:
        return named[0]
    if not named and UNDECIDED in words:
        return UNDECIDED
    stated = _STATED.search(answer)
    if stated and stated[1].upper() in options:
        return stated[1].upper()
    said = answer.lower()
    if len(said) > 2 * sum(map(len, options.values())):
        return None
    held = [letter for letter, text in options.items() if text.lower() in said]
    return held[0] if len(held) == 1 else None


def question_text(row: Mapping[str, str]) -> str:
    """The benchmark's prompt: hint, question, options and instruction."""
    hint = f"Hint: {row['hint']}\n" if row.get("hint", "") not in MISSING else ""
    options = options_of(row)
    choices = "".join(f"{letter}. {text}\n" for letter, text in options.items())
    request = f"Options:\n{choices}Please select the correct answer from the options above. \n" if options else ""
    return f"{hint}Question: {row['question']}\n{request}"


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
    path: pathlib.Path, wanted: set[str], image_root: pathlib.Path | None
) -> Iterator[tuple[str, Callable[[], list[Image.Image]]]]:
    """Yields (index, function that decodes the images) of the wanted items while the file is read.

    `image` holds base64 text, or a list of it; a short value is the index of the row with the image. Without the column
    `image`, the column `image_path` names the files.
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


def write_answers(
    engine: "Inference", items: Sequence[Line], log: RecordLog, path: pathlib.Path, image_root: pathlib.Path | None
) -> dict[str, str]:
    """Answers the items that the log lacks, batch by batch; returns {index: error} of items that cannot be answered.

    Args:
      engine: of the model.
      items: of `read_items`.
      log: lines {"index", "prediction"}.
      path: the benchmark's TSV.
      image_root: see `item_images`.
    """
    from uae_jax.stages.inference import Row  # an import of seconds, which only `answer` needs

    numbers = {row["index"]: number for number, row in enumerate(items)}
    missing, errors = set(numbers) - {record["index"] for record in log.records}, {}

    def rows() -> Iterator["Row"]:
        for index, images in item_images(path, missing, image_root):
            number = numbers[index]
            try:
                yield Row(number, number, engine.question_fields(question_text(items[number]), images()))
            except ValueError as error:
                errors[index] = " ".join(str(error).split())

    with tqdm(total=len(items), initial=len(items) - len(missing), desc="mmt", disable=None) as bar:
        for row, said in engine.captions(rows()):
            log.append({"index": items[row.index]["index"], "prediction": said})
            bar.update(1)
    return errors


def _is_integer(text: str) -> bool:
    return text.lstrip("-").isdigit()


def _submission(rows: Sequence[Line]) -> list[Line]:
    """EvalAI's table, sorted by index: names in lower case, the chosen option in `opt`, the reason in `log`."""
    found = []
    for row in sorted(rows, key=lambda row: (int(row["index"]) if _is_integer(row["index"]) else 0, row["index"])):
        letter = chosen_letter(row["prediction"], options_of(row))
        lower = {name if len(name) == 1 and name.isupper() else name.lower(): value for name, value in row.items()}
        found.append(lower | {"opt": letter or UNDECIDED, "log": row["prediction"] if letter else "no option is named"})
    return found


def answer(options: argparse.Namespace) -> None:
    """Answers all items and writes the tables; items with unreadable images stay empty and are reported at the end."""
    items = read_items(options.data)
    stem = options.out / f"{options.name}_{options.data.stem}"
    answers = stem.with_name(f"{stem.name}.answers.jsonl")
    options.temperature = options.temperature or 0.0
    model = load_model(options, len(items))
    told = run_settings.digest("".join(question_text(row) for row in items))
    run_settings.begin(
        answers,
        {
            "benchmark": "mmt",
            **run_settings.model_settings(options, model, run_settings.ANSWERING),
            "questions": told,
            "count": len(items),
        },
    )
    with RecordLog(answers) as log:
        errors = write_answers(model.engine, items, log, options.data, options.image_root)
    said = {record["index"]: record["prediction"] for record in read_records(answers)}
    rows = [row | {"prediction": said.get(row["index"], "")} for row in items]
    write_tsv(stem.with_name(f"{stem.name}.tsv"), rows)
    write_xlsx(
        stem.with_name(f"{stem.name}.xlsx"), rows, ["index"] if all(_is_integer(row["index"]) for row in rows) else []
    )
    if "answer" not in items[0]:
        write_tsv(stem.with_name(f"{stem.name}_exact_matching_submission.tsv"), _submission(rows))
    print(f"{stem}.tsv: {len(said)} of {len(items)} items answered")
    refuse([f"item {index}: {error}" for index, error in errors.items()], str(options.data))


def check(options: argparse.Namespace) -> None:
    """Reports missing items, and items that are not in the benchmark."""
    rows = read_table(options.table)
    absent = [name for name in ("index", "prediction") if name not in rows[0]]
    if absent:
        raise ValueError(
            f"{options.table} has no column {' and no column '.join(absent)}; give a table of `mmt answer`"
        )
    said = {row["index"]: row["prediction"] for row in rows}
    items = {row["index"]: row for row in read_items(options.data)}
    problems = [f"item {index} is missing" for index in items if index not in said]
    problems += [f"item {index} is not in {options.data}" for index in said if index not in items]
    problems += [f"{len(rows) - len(said)} items occur twice"] if len(rows) != len(said) else []
    changed = [
        row["index"] for row in rows if row["index"] in items and row.get("question") != items[row["index"]]["question"]
    ]
    problems += [f"item {index} has a question that differs from {options.data}" for index in changed]
    refuse(problems, str(options.table))
    print(f"{options.table}: {len(rows)} items, all answered")
    empty = sum(not text.strip() for text in said.values())
    if empty:
        print(f"note: {empty} predictions are empty and count as wrong")


def hits(rows: Sequence[Mapping[str, str]]) -> list[float]:
    """1 for every correct row, else 0; the column `hit` of an evaluator takes precedence.

    Args:
      rows: with `hit`, or with `prediction`, `answer` and the options.

    Raises:
      ValueError: a column is missing.
    """
    if "hit" in rows[0]:
        return [float(row["hit"] or 0) for row in rows]
    absent = [name for name in ("prediction", "answer") if name not in rows[0]]
    if absent:
        raise ValueError(
            f"the table has no column {' and no column '.join(absent)}; only EvalAI has the answers of the ALL split"
        )
    return [float(chosen_letter(row["prediction"], options_of(row)) == row["answer"].strip()) for row in rows]


def scores(rows: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """Accuracy over all items, of every meta-task and of every subtask, in [0, 1], with intervals over items.

    Returns:
      "overall": over items; "mean_of_meta_tasks"; "meta_tasks": {l2-category: mean over its subtasks}; "subtasks":
      {category: over its items}; "undecided": number of predictions without an option (only without `hit`).
    """
    right, numbers = hits(rows), [str(number) for number in range(len(rows))]
    found: dict[str, Any] = {"overall": grouped_scores(zip(["all"] * len(rows), numbers, right))["overall"]}
    if "category" in rows[0]:
        subtasks = [row["category"] for row in rows]
        found["subtasks"] = grouped_scores(zip(subtasks, numbers, right))["groups"]
        if "l2-category" in rows[0]:
            found["meta_tasks"] = {}
            for name in sorted({row["l2-category"] for row in rows}):
                inside = [index for index, row in enumerate(rows) if row["l2-category"] == name]
                found["meta_tasks"][name] = grouped_scores((subtasks[i], numbers[i], right[i]) for i in inside)[
                    "overall"
                ]
            values = [score["value"] for score in found["meta_tasks"].values()]
            found["mean_of_meta_tasks"] = sum(values) / len(values)
    if "hit" not in rows[0]:
        found["undecided"] = sum(chosen_letter(row["prediction"], options_of(row)) in (None, UNDECIDED) for row in rows)
    return found


def summary(options: argparse.Namespace) -> None:
    """Prints the accuracy and writes it as JSON."""
    found = scores(read_table(options.table))
    overall = found["overall"]
    lines = [
        f"overall  {100 * overall['value']:.2f} %  [{100 * overall['low']:.2f}, {100 * overall['high']:.2f}]  "
        f"{overall['n']} items"
    ]
    for name, score in found.get("meta_tasks", {}).items():
        lines.append(
            f"  {name}: {100 * score['value']:.2f} %  [{100 * score['low']:.2f}, {100 * score['high']:.2f}]  "
            f"{score['n']} items"
        )
    if "mean_of_meta_tasks" in found:
        lines.append(f"mean of meta-tasks  {100 * found['mean_of_meta_tasks']:.2f} %")
    undecided = (
        [f"{found['undecided']} predictions name no option and count as wrong"] if found.get("undecided") else []
    )
    tell("\n".join(lines), undecided, found, options.output)
