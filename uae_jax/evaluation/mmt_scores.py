"""MMT-Bench's exact matching and its averages, as VLMEvalKit computes them without a judge.

Rules of vlmeval/utils/matching_util.py (`can_infer`) and vlmeval/dataset/utils/multiple_choice.py (`report_acc_MMT`) of
open-compass/VLMEvalKit.
"""

import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from uae_jax.evaluation.grouped_scores import grouped_scores
from uae_jax.evaluation.tables import MISSING

UNDECIDED = "Z"  # counts as wrong
_REFUSAL = "Cannot determine the answer"
_PUNCTUATION = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_LAST_WORDS = 4  # a letter counts when it first stands among so many last words
# no word boundary after the letter, as in the original: "the answer is a ..." is read as A
_STATED = re.compile(r"answer\s+is\s+\**([ABCD])", re.IGNORECASE)


def options_of(row: Mapping[str, str]) -> dict[str, str]:
    """{letter: text} of a row's options; columns that pandas would read as missing are none."""
    return {letter: row[letter] for letter in string.ascii_uppercase if row.get(letter, "") not in MISSING}


def chosen_letter(answer: str, options: Mapping[str, str]) -> str | None:
    """The option that a free answer names.

    In this order: exactly one option letter as a word, near the end; "the answer is" and a letter; exactly one option
    whose text the answer holds, unless the answer is more than twice as long as all options.

    Args:
      answer: what the model wrote.
      options: {letter: text}.

    Returns:
      A letter of `options`, "Z" for an answer that declines, None where nothing is named.
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


def hits(rows: Sequence[Mapping[str, str]]) -> list[float]:
    """1 for every row that was answered rightly, else 0: the evaluator's own `hit` where there is one.

    Args:
      rows: with `hit`, or with `prediction`, `answer` and the options.

    Raises:
      ValueError: they have neither.
    """
    if "hit" in rows[0]:
        return [float(row["hit"] or 0) for row in rows]
    absent = [name for name in ("prediction", "answer") if name not in rows[0]]
    if absent:
        raise ValueError(
            f"the table has no column {' and no column '.join(absent)}; answers of the ALL split are kept by EvalAI "
            "alone"
        )
    return [float(chosen_letter(row["prediction"], options_of(row)) == row["answer"].strip()) for row in rows]


def scores(rows: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """Accuracy over all items, of every meta-task and of every subtask, in [0, 1], with intervals over items.

    Returns:
      "overall": over items; "mean_of_meta_tasks"; "meta_tasks": {l2-category: mean over its subtasks}; "subtasks":
      {category: over its items}; "undecided": how many predictions name no option (no `hit` column only).
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
