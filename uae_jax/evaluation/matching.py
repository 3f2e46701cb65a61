"""Which option a free answer names, and the accuracy of a table of answers.

The rules are those of VLMEvalKit without a judge (open-compass/VLMEvalKit): `can_infer` in
vlmeval/utils/matching_util.py for letters, and `YOrN_Extraction` in vlmeval/dataset/utils/yorn.py for Yes and No.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from uae_jax.data.questions import options_of
from uae_jax.evaluation.benchmark_commands import grouped_scores
from uae_jax.files.tables import MISSING

UNDECIDED = "Z"  # counts as wrong
UNKNOWN = "Unknown"  # neither Yes nor No
_REFUSAL = "Cannot determine the answer"
_PUNCTUATION = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_MARKS = re.compile(r"[^a-z0-9]+")
_LAST_WORDS = 4  # a letter counts if its first place is among so many last words
# without a word boundary after the letter, as in the original: "the answer is a ..." reads as A
_STATED = re.compile(r"answer\s+is\s+\**([ABCD])", re.IGNORECASE)


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


def chosen_yes_no(answer: str) -> str:
    """Yes or No if an answer has exactly one of the two words, else Unknown."""
    words = set(_MARKS.sub(" ", answer.lower()).split())
    named = [word for word in ("Yes", "No") if word.lower() in words]
    return named[0] if len(named) == 1 else UNKNOWN


def need_columns(rows: Sequence[Mapping[str, str]], names: Sequence[str], without: str) -> None:
    """Raises ValueError for a table without some columns.

    Args:
      rows: of the table.
      names: of the columns.
      without: the end of the message.
    """
    absent = [name for name in names if name not in rows[0]]
    if absent:
        raise ValueError(f"the table has no column {' and no column '.join(absent)}; {without}")


def hits(rows: Sequence[Mapping[str, str]], without: str = "give a table of `answer`") -> list[float]:
    """1 for every correct row, else 0; the column `hit` of an evaluator takes precedence.

    Args:
      rows: with `hit`, or with `prediction`, `answer` and the options.
      without: what to say of a table without these columns.

    Raises:
      ValueError: a column is missing.
    """
    if "hit" in rows[0]:
        return [float(row["hit"] or 0) for row in rows]
    need_columns(rows, ("prediction", "answer"), without)
    return [float(chosen_letter(row["prediction"], options_of(row)) == row["answer"].strip()) for row in rows]


def undecided(rows: Sequence[Mapping[str, str]]) -> int:
    """Number of predictions that name no option."""
    return sum(chosen_letter(row["prediction"], options_of(row)) in (None, UNDECIDED) for row in rows)


def accuracy(rows: Sequence[Mapping[str, str]], right: Sequence[float], columns: Sequence[str]) -> dict[str, Any]:
    """Accuracy over items in [0, 1] with intervals over items, as `report_acc` of VLMEvalKit groups them.

    Args:
      rows: of a table; right: 1 or 0 for each.
      columns: names of grouping columns; those that the table lacks are left out.

    Returns:
      {split: {"overall": score, column: {value: score}}}; the split is "all" in a table without that column.
    """
    found: dict[str, Any] = {}
    splits = [row.get("split", "") for row in rows]
    names = ["all" if name in MISSING else name for name in splits]
    for split in sorted(set(names)):
        places = [place for place, name in enumerate(names) if name == split]
        found[split] = {"overall": _groups(places, right, ["all"] * len(rows))["all"]}
        for column in columns:
            if column in rows[0]:
                groups = _groups(places, right, [row[column] for row in rows])
                found[split][column] = {name: groups[name] for name in sorted(groups)}
    return found


def _groups(places: Sequence[int], right: Sequence[float], names: Sequence[str]) -> dict[str, Any]:
    return grouped_scores((names[place], str(place), right[place]) for place in places)["groups"]


def accuracy_lines(found: Mapping[str, Any]) -> list[str]:
    """The scores of `accuracy` as lines of text."""
    lines = []
    for split, scores in found.items():
        lines.append(score_line(f"{split}: overall" if len(found) > 1 else "overall", scores["overall"]))
        for column in [name for name in scores if name != "overall"]:
            lines += [score_line(f"  {column} {name}", score) for name, score in scores[column].items()]
    return lines


def score_line(name: str, score: Mapping[str, float]) -> str:
    """One score in percent, with its interval and count."""
    low, high = 100 * score["low"], 100 * score["high"]
    return f"{name}: {100 * score['value']:.2f} %  [{low:.2f}, {high:.2f}]  {score['n']} items"
