"""MMT-Bench: a model's answers in the tables of VLMEvalKit and of the EvalAI server, and their accuracy.

    python -m uae_jax.evaluate mmt answer --data=MMT-Bench_VAL.tsv --out=OUT --name=uae --checkpoint=RUN
    python -m uae_jax.evaluate mmt check OUT/uae_MMT-Bench_VAL.tsv --data=MMT-Bench_VAL.tsv
    python -m uae_jax.evaluate mmt summary OUT/uae_MMT-Bench_VAL.tsv

`answer` writes `<name>_<data>.tsv` and `.xlsx`: the benchmark's columns without images, and `prediction`. Answers are
greedy unless --temperature is given. An interrupted `answer` continues. Answers of the ALL split are not public, so
`answer` also writes the file to submit, `<name>_<data>_exact_matching_submission.tsv`. Files with several images per
item (`_MI`) work too. `summary` scores by exact matching, or reads the verdicts in VLMEvalKit's `*_result.xlsx`.

The averages are those of open-compass/VLMEvalKit, vlmeval/dataset/utils/multiple_choice.py, `report_acc_MMT`.
"""

import argparse
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from uae_jax.data.questions import options_of
from uae_jax.evaluation.answers import Benchmark, add_actions, is_integer
from uae_jax.evaluation.benchmark_commands import grouped_scores, tell
from uae_jax.evaluation.matching import UNDECIDED, chosen_letter, hits, score_line, undecided
from uae_jax.files.tables import Line, read_table, write_tsv


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `answer`, `check` and `summary`."""
    add_actions(parser, BENCHMARK, summary)


def _submission(rows: Sequence[Line]) -> list[Line]:
    """EvalAI's table, sorted by index: names in lower case, the chosen option in `opt`, the reason in `log`."""
    found = []
    for row in sorted(rows, key=lambda row: (int(row["index"]) if is_integer(row["index"]) else 0, row["index"])):
        letter = chosen_letter(row["prediction"], options_of(row))
        lower = {name if len(name) == 1 and name.isupper() else name.lower(): value for name, value in row.items()}
        found.append(lower | {"opt": letter or UNDECIDED, "log": row["prediction"] if letter else "no option is named"})
    return found


def write_submission(stem: pathlib.Path, rows: Sequence[Line]) -> None:
    """Writes `<stem>_exact_matching_submission.tsv`."""
    write_tsv(stem.with_name(f"{stem.name}_exact_matching_submission.tsv"), _submission(rows))


BENCHMARK = Benchmark("mmt", "MMT-Bench_VAL.tsv", ("index", "question", "A"), submission=write_submission)


def scores(rows: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """Accuracy over all items, of every meta-task and of every subtask, in [0, 1], with intervals over items.

    Returns:
      "overall": over items; "mean_of_meta_tasks"; "meta_tasks": {l2-category: mean over its subtasks}; "subtasks":
      {category: over its items}; "undecided": number of predictions without an option (only without `hit`).
    """
    right = hits(rows, "only EvalAI has the answers of the ALL split")
    numbers = [str(number) for number in range(len(rows))]
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
        found["undecided"] = undecided(rows)
    return found


def summary(options: argparse.Namespace) -> None:
    """Prints the accuracy and writes it as JSON."""
    found = scores(read_table(options.table))
    lines = [score_line("overall", found["overall"])]
    lines += [score_line(f"  {name}", score) for name, score in found.get("meta_tasks", {}).items()]
    if "mean_of_meta_tasks" in found:
        lines.append(f"mean of meta-tasks  {100 * found['mean_of_meta_tasks']:.2f} %")
    unclear = [f"{found['undecided']} predictions name no option and count as wrong"] if found.get("undecided") else []
    tell("\n".join(lines), unclear, found, options.output)
