"""MMMU: a model's answers in the tables of VLMEvalKit, and their accuracy by discipline and subject.

    python -m uae_jax.evaluate mmmu answer --data=MMMU_DEV_VAL.tsv --out=OUT --name=uae --checkpoint=RUN
    python -m uae_jax.evaluate mmmu check OUT/uae_MMMU_DEV_VAL.tsv --data=MMMU_DEV_VAL.tsv
    python -m uae_jax.evaluate mmmu summary OUT/uae_MMMU_DEV_VAL.tsv

`<image 2>` in a question is replaced by its second image. The splits dev and validation are summed up apart; papers
report validation. `summary` scores by exact matching, or reads the verdicts in VLMEvalKit's `*_result.xlsx`.

An open question counts as one of two options, its answer and "Other Answers", as in open-compass/VLMEvalKit,
vlmeval/dataset/utils/multiple_choice.py, `MMMU_preproc`. The averages are those of `report_acc` there.
"""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from uae_jax.data.questions import options_of
from uae_jax.evaluation.answers import Benchmark, add_actions
from uae_jax.evaluation.benchmark_commands import tell
from uae_jax.evaluation.matching import accuracy, accuracy_lines, hits, need_columns, undecided
from uae_jax.files.tables import Line, read_table

WITHOUT = "only the MMMU server has the answers of the test split"
BENCHMARK = Benchmark("mmmu", "MMMU_DEV_VAL.tsv", ("index", "question", "A"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `answer`, `check` and `summary`."""
    add_actions(parser, BENCHMARK, summary)


def with_options(rows: Sequence[Mapping[str, str]]) -> list[Line]:
    """The rows, with two options for an open question: its answer, which is right, and any other."""
    return [
        dict(row) if options_of(row) else {**row, "A": row["answer"], "B": "Other Answers", "answer": "A"}
        for row in rows
    ]


def scores(rows: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """Accuracy by split: overall, by discipline (l2-category) and by subject (category), with intervals over items.

    Returns:
      "splits": of `matching.accuracy`; "open": number of open questions; "undecided": predictions without an option
      (only without `hit`).

    Raises:
      ValueError: a column is missing.
    """
    if "hit" in rows[0]:
        return {"splits": accuracy(rows, hits(rows), ("l2-category", "category"))}
    need_columns(rows, ("prediction", "answer"), WITHOUT)
    closed = with_options(rows)
    return {
        "splits": accuracy(rows, hits(closed), ("l2-category", "category")),
        "open": sum(not options_of(row) for row in rows),
        "undecided": undecided(closed),
    }


def summary(options: argparse.Namespace) -> None:
    """Prints the accuracy and writes it as JSON."""
    found = scores(read_table(options.table))
    notes = [f"{found['undecided']} predictions name no option and count as wrong"] if found.get("undecided") else []
    notes += [f"{found['open']} open questions are scored by the text of their answer"] if found.get("open") else []
    tell("\n".join(accuracy_lines(found["splits"])), notes, found, options.output)
