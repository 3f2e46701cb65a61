"""POPE: a model's answers to yes/no questions about objects, in the tables of VLMEvalKit, and their scores.

    python -m uae_jax.evaluate pope answer --data=POPE.tsv --out=OUT --name=uae --checkpoint=RUN
    python -m uae_jax.evaluate pope check OUT/uae_POPE.tsv --data=POPE.tsv
    python -m uae_jax.evaluate pope summary OUT/uae_POPE.tsv

`summary` prints F1, accuracy, precision and recall of Yes, overall and for the random, popular and adversarial
questions. A row that belongs to several categories counts once in each, and as often overall, as in
open-compass/VLMEvalKit, vlmeval/dataset/utils/yorn.py, `POPE_rating`. An answer with neither word, or with both, counts
as wrong, and as No in precision and recall.
"""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from uae_jax.data.questions import YES_NO, yes_no_text
from uae_jax.evaluation.answers import Benchmark, add_actions
from uae_jax.evaluation.benchmark_commands import grouped_scores, tell
from uae_jax.evaluation.matching import UNKNOWN, chosen_yes_no, need_columns
from uae_jax.files.tables import read_table

YES = YES_NO[0]
BENCHMARK = Benchmark("pope", "POPE.tsv", ("index", "question", "answer"), yes_no_text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `answer`, `check` and `summary`."""
    add_actions(parser, BENCHMARK, summary)


def _rates(pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """F1, accuracy, precision and recall of Yes, in [0, 1], of (answer, said) pairs; 0 where a denominator is 0."""
    both = sum(answer == said == YES for answer, said in pairs)
    wanted, given = (sum(pair[side] == YES for pair in pairs) for side in (0, 1))
    precision, recall = both / given if given else 0.0, both / wanted if wanted else 0.0
    total = precision + recall
    return {
        "f1": 2 * precision * recall / total if total else 0.0,
        "accuracy": sum(answer == said for answer, said in pairs) / len(pairs),
        "precision": precision,
        "recall": recall,
        "yes_rate": given / len(pairs),
        "n": len(pairs),
    }


def scores(rows: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """F1, accuracy, precision and recall, overall and by category.

    Args:
      rows: with `answer`, and with `prediction` or VLMEvalKit's `extracted`.

    Returns:
      "overall" and "categories": {"f1", "accuracy", "precision", "recall", "yes_rate", "n"} in [0, 1];
      "accuracy_interval": of the overall accuracy, over rows; "unknown": answers with neither word, or both.

    Raises:
      ValueError: a column is missing, or an answer is neither Yes nor No.
    """
    need_columns(rows, ("answer",), "give a table of `pope answer`")
    if "extracted" not in rows[0]:
        need_columns(rows, ("prediction",), "give a table of `pope answer`")
    listed: list[tuple[str, str, str, str]] = []
    for row in rows:
        answer = row["answer"].strip().title()
        if answer not in YES_NO:
            raise ValueError(f"row {row.get('index', '?')} has the answer {row['answer']!r}; it must be Yes or No")
        said = row["extracted"] if "extracted" in row else chosen_yes_no(row["prediction"])
        for name in row.get("category", "all").split(","):
            listed.append((name.strip(), answer, said, row.get("index", "")))
    names = dict.fromkeys(name for name, *_ in listed)
    right = grouped_scores(("all", index, float(answer == said)) for _, answer, said, index in listed)
    return {
        "overall": _rates([(answer, said) for _, answer, said, _ in listed]),
        "accuracy_interval": right["overall"],
        "categories": {name: _rates([(a, said) for own, a, said, _ in listed if own == name]) for name in names},
        "unknown": sum(said == UNKNOWN for _, _, said, _ in listed),
    }


def summary(options: argparse.Namespace) -> None:
    """Prints the scores and writes them as JSON."""
    found = scores(read_table(options.table))
    lines = []
    for name, rates in {"overall": found["overall"], **found["categories"]}.items():
        values = "  ".join(f"{key} {100 * rates[key]:.2f}" for key in ("f1", "accuracy", "precision", "recall"))
        lines.append(f"{name}: {values}  yes {100 * rates['yes_rate']:.2f} %  {rates['n']} questions")
    low, high = (100 * found["accuracy_interval"][name] for name in ("low", "high"))
    lines.append(f"accuracy over all: [{low:.2f}, {high:.2f}]")
    unclear = found["unknown"]
    tell("\n".join(lines), [f"{unclear} answers say neither yes nor no"] if unclear else [], found, options.output)
