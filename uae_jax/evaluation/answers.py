"""A model's answers to a question benchmark, in the tables that VLMEvalKit's scorers read: shared by the commands.

`answer` writes `<name>_<data>.tsv` and `.xlsx`: the benchmark's columns without images, and `prediction`. `check`
compares such a table with the benchmark. Each command has a `summary` of its own.
"""

import argparse
import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from tqdm import tqdm

from uae_jax.data.questions import item_images, question_text, read_items
from uae_jax.evaluation import run_settings
from uae_jax.evaluation.benchmark_commands import add_summary, refuse
from uae_jax.evaluation.records import RecordLog
from uae_jax.files.json_files import read_records
from uae_jax.files.paths import to_path
from uae_jax.files.tables import Line, read_table, write_tsv, write_xlsx
from uae_jax.model_flags import add_model_flags, load_model
from uae_jax.settings import one_line

if TYPE_CHECKING:
    from uae_jax.stages.engines import Engine
    from uae_jax.stages.inference import Row


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """What differs between the commands.

    Attributes:
      name: of the command.
      example: file name of its data.
      needed: columns of the data, beside the image.
      prompt: of a row.
      submission: writes the file to submit where the data have no answers, from the stem of the tables and the answered
        rows; None for benchmarks without one.
    """

    name: str
    example: str
    needed: tuple[str, ...]
    prompt: Callable[[Mapping[str, str]], str] = question_text
    submission: Callable[[pathlib.Path, Sequence[Line]], None] | None = None


def add_actions(
    parser: argparse.ArgumentParser, benchmark: Benchmark, summary: Callable[[argparse.Namespace], None]
) -> None:
    """Adds `answer`, `check` and `summary` to a command.

    Args:
      parser: of the command.
      benchmark: whose answers are written.
      summary: prints the accuracy of `options.table`.
    """
    actions = parser.add_subparsers()
    answer_flags = actions.add_parser("answer", help="answer the questions")
    answer_flags.set_defaults(run=lambda options: answer(benchmark, options))
    answer_flags.add_argument(
        "--data", type=to_path, required=True, help=f"{benchmark.example}, or another TSV of this form"
    )
    answer_flags.add_argument("--out", type=to_path, required=True, help="folder of the tables")
    answer_flags.add_argument("--name", default="uae_jax", help="name of the model, the first part of the file names")
    answer_flags.add_argument(
        "--image_root", type=to_path, help="base folder of relative image_path values (default: beside --data)"
    )
    add_model_flags(answer_flags)
    check_flags = actions.add_parser("check", help="check that every item is answered")
    check_flags.set_defaults(run=lambda options: check(benchmark, options))
    check_flags.add_argument("table", type=to_path, help="a .tsv or .xlsx of `answer`")
    check_flags.add_argument("--data", type=to_path, required=True, help="the benchmark's TSV")
    add_summary(
        actions, "print the accuracy", "table", "a table of `answer`, or VLMEvalKit's *_result.xlsx or .tsv", summary
    )


def write_answers(
    engine: "Engine",
    items: Sequence[Line],
    prompts: Sequence[str],
    log: RecordLog,
    path: pathlib.Path,
    image_root: pathlib.Path | None,
) -> dict[str, str]:
    """Answers the items that the log lacks, batch by batch; returns {index: error} of items that cannot be answered.

    Args:
      engine: of the model.
      items: of `read_items`.
      prompts: one for each item.
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
                yield Row(number, number, engine.question_fields(prompts[number], images()))
            except ValueError as error:
                errors[index] = one_line(error)

    with tqdm(total=len(items), initial=len(items) - len(missing), desc=path.stem, disable=None) as bar:
        for row, said in engine.captions(rows()):
            log.append({"index": items[row.index]["index"], "prediction": said})
            bar.update(1)
    return errors


def is_integer(text: str) -> bool:
    """Whether an index is a whole number."""
    return text.lstrip("-").isdigit()


def answer(benchmark: Benchmark, options: argparse.Namespace) -> None:
    """Answers all items and writes the tables; items with unreadable images stay empty and are reported at the end."""
    items = read_items(options.data, benchmark.needed)
    prompts = [benchmark.prompt(row) for row in items]
    stem = options.out / f"{options.name}_{options.data.stem}"
    answers = stem.with_name(f"{stem.name}.answers.jsonl")
    options.temperature = options.temperature or 0.0
    model = load_model(options, len(items))
    run_settings.begin(
        answers,
        {
            "benchmark": benchmark.name,
            **run_settings.model_settings(options, model, run_settings.ANSWERING),
            "questions": run_settings.digest("".join(prompts)),
            "count": len(items),
        },
    )
    with RecordLog(answers) as log:
        errors = write_answers(model.engine, items, prompts, log, options.data, options.image_root)
    said = {record["index"]: record["prediction"] for record in read_records(answers)}
    rows = [row | {"prediction": said.get(row["index"], "")} for row in items]
    write_tsv(stem.with_name(f"{stem.name}.tsv"), rows)
    write_xlsx(
        stem.with_name(f"{stem.name}.xlsx"), rows, ["index"] if all(is_integer(row["index"]) for row in rows) else []
    )
    if benchmark.submission and "answer" not in items[0]:
        benchmark.submission(stem, rows)
    print(f"{stem}.tsv: {len(said)} of {len(items)} items answered")
    refuse([f"item {index}: {error}" for index, error in errors.items()], str(options.data))


def check(benchmark: Benchmark, options: argparse.Namespace) -> None:
    """Reports missing items, and items that are not in the benchmark."""
    rows = read_table(options.table)
    absent = [name for name in ("index", "prediction") if name not in rows[0]]
    if absent:
        raise ValueError(
            f"{options.table} has no column {' and no column '.join(absent)}; give a table of `{benchmark.name} answer`"
        )
    said = {row["index"]: row["prediction"] for row in rows}
    items = {row["index"]: row for row in read_items(options.data, benchmark.needed)}
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
