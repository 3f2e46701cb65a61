"""MMBench: a model's answers in the tables of VLMEvalKit, and their accuracy with circular groups.

    python -m uae_jax.evaluate mmb answer --data=MMBench_DEV_EN.tsv --out=OUT --name=uae --checkpoint=RUN
    python -m uae_jax.evaluate mmb check OUT/uae_MMBench_DEV_EN.tsv --data=MMBench_DEV_EN.tsv
    python -m uae_jax.evaluate mmb summary OUT/uae_MMBench_DEV_EN.tsv

Rows whose indices are equal modulo 1,000,000 ask one question with its options in other orders. Such a group counts
once, as right if every answer in it is right (CircularEval, arXiv 2307.06281). `summary` scores by exact matching, or
reads the verdicts in VLMEvalKit's `*_result.xlsx`, which has one row for each group.

Groups and averages are those of open-compass/VLMEvalKit, vlmeval/dataset/utils/multiple_choice.py,
`mcq_circular_eval` and `report_acc`.
"""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from uae_jax.evaluation.answers import Benchmark, add_actions, is_integer
from uae_jax.evaluation.benchmark_commands import tell
from uae_jax.evaluation.matching import accuracy, accuracy_lines, hits, undecided
from uae_jax.files.tables import read_table

CIRCULAR = 1_000_000  # indices that are equal modulo this are one question
BENCHMARK = Benchmark("mmb", "MMBench_DEV_EN.tsv", ("index", "question", "A", "B"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `answer`, `check` and `summary`."""
    add_actions(parser, BENCHMARK, summary)


def grouped(
    rows: Sequence[Mapping[str, str]], right: Sequence[float]
) -> tuple[list[Mapping[str, str]], list[float], list[str]]:
    """The first row of every circular group, whether all of its answers are right, and indices without a first row.

    Raises:
      ValueError: an index that is no whole number.
    """
    wrong = [row["index"] for row in rows if not is_integer(row["index"])]
    if wrong:
        raise ValueError(f"the table has the index {wrong[0]!r}; circular groups need whole numbers")
    whole: dict[int, float] = {}
    for row, hit in zip(rows, right, strict=True):
        group = int(row["index"]) % CIRCULAR
        whole[group] = min(whole.get(group, 1.0), hit)
    first = [row for row in rows if int(row["index"]) < CIRCULAR]
    known = {int(row["index"]) for row in first}
    lost = [row["index"] for row in rows if int(row["index"]) % CIRCULAR not in known]
    return first, [whole[int(row["index"])] for row in first], lost


def scores(rows: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """Accuracy of circular groups by split: overall, by l2-category and by category, with intervals over groups.

    Returns:
      "splits": of `matching.accuracy`; "rows" and "groups": how many; "vanilla": the accuracy of the first rows alone;
      "without_first_row": indices that count nowhere; "undecided": predictions without an option (without `hit`).

    Raises:
      ValueError: a column is missing, or no row is the first of its group.
    """
    right = hits(rows, "only the MMBench server has the answers of the test split")
    first, whole, lost = grouped(rows, right)
    if not first:
        raise ValueError(f"the table has no index below {CIRCULAR:,}: the first rows of its groups are missing")
    alone = [hit for row, hit in zip(rows, right) if int(row["index"]) < CIRCULAR]
    found = {
        "splits": accuracy(first, whole, ("l2-category", "category")),
        "rows": len(rows),
        "groups": len(first),
        "vanilla": sum(alone) / len(alone),
        "without_first_row": lost,
    }
    return found if "hit" in rows[0] else found | {"undecided": undecided(rows)}


def summary(options: argparse.Namespace) -> None:
    """Prints the accuracy and writes it as JSON."""
    found = scores(read_table(options.table))
    lines = [*accuracy_lines(found["splits"]), f"first rows alone: {100 * found['vanilla']:.2f} %"]
    notes = [f"{found['undecided']} predictions name no option and count as wrong"] if found.get("undecided") else []
    lost = found["without_first_row"]
    notes += [f"{len(lost)} rows count nowhere, since the first row of their group is missing"] if lost else []
    tell("\n".join(lines), notes, found, options.output)
