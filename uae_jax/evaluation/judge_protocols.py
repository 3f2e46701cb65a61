"""What a judge of captions is asked, and how its answers are read: this project's protocol, and the paper's.

`pairwise`: for each criterion and overall, caption A, caption B or a tie. `paper_v5` (arXiv 2509.09666, version 5):
both captions get 1 to 10 points for each criterion, then one of them wins. The words are this project's in both.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from uae_jax.files.json_files import read_text

OVERALL = "overall"
SCORES = "scores"  # key of a verdict: the points of both captions
CAPTIONS = ("A", "B")
LOWEST, HIGHEST = 1, 10  # points

Verdict = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Criteria:
    """The question to a judge and its criteria, from a JSON file such as `judge_criteria.json`."""

    file: ClassVar[str] = "judge_criteria.json"

    instruction: str
    with_image: str
    without_image: str
    criteria: tuple[tuple[str, str], ...]

    @classmethod
    def from_file(cls, path: pathlib.Path | None = None) -> "Criteria":
        """Reads the criteria of a file; None for those of the package.

        Raises:
          FileNotFoundError: no such file.
          ValueError: the file is not JSON, or lacks a field.
        """
        path = path or pathlib.Path(__file__).with_name(cls.file)
        if not path.is_file():
            raise FileNotFoundError(f"criteria file {path} does not exist")
        try:
            raw = json.loads(read_text(path))
            listed = tuple((item["name"], item["question"]) for item in raw["criteria"])
            found = cls(raw["instruction"], raw["with_image"], raw["without_image"], listed)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} does not hold criteria ({type(error).__name__}: {error}); copy the package's {cls.file}"
            ) from error
        reserved, names = (OVERALL, SCORES), [name for name, _ in listed]
        if not names or len(set(names)) != len(names) or set(reserved) & set(names):
            raise ValueError(
                f"{path} needs criteria with different names, none of them {' or '.join(map(repr, reserved))}; it has "
                f"{names}"
            )
        return found

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of a verdict: every criterion, and `overall`."""
        return (*self.names, OVERALL)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the criteria."""
        return tuple(name for name, _ in self.criteria)

    def text(self, caption_a: str, caption_b: str, has_image: bool) -> str:
        """The question in words; braces inside of captions stay as they are."""
        parts = {
            "image_note": self.with_image if has_image else self.without_image,
            "criteria": "\n".join(f"- {name}: {question}" for name, question in self.criteria),
            "keys": ", ".join(f'"{key}"' for key in self.keys),
            "scores": ", ".join(f'"{name}": {HIGHEST}' for name in self.names),
            "caption_a": caption_a,
            "caption_b": caption_b,
        }
        pattern = rf"\{{({'|'.join(parts)})\}}"
        return re.sub(pattern, lambda match: parts[match[1]], self.instruction)

    def parse(self, answer: str) -> Verdict | None:
        """Reads an answer: {key: "A", "B" or "tie"} for all keys, or None for a malformed answer.

        The JSON object may be in a code block or between sentences.
        """
        for raw in json_objects(answer):
            said = {
                key: re.sub(r"^caption\s+", "", str(raw.get(key, "")).strip(), flags=re.I).lower() for key in self.keys
            }
            if all(value in ("a", "b", "tie") for value in said.values()):
                return {key: value if value == "tie" else value.upper() for key, value in said.items()}
        return None


@dataclasses.dataclass(frozen=True)
class ScoredCriteria(Criteria):
    """The paper's protocol: points for each criterion, and one winner."""

    file: ClassVar[str] = "judge_paper_v5.json"

    def parse(self, answer: str) -> Verdict | None:
        """Reads an answer: what `Criteria.parse` gives, and `scores`, {"A": {criterion: points}, "B": ...}.

        The winner is `overall`; the caption with more points has a criterion. None for an answer without exactly one
        winner, without a comparison, or with points that are not whole numbers from 1 to 10 for exactly the criteria.
        """
        found: list[Verdict] = []
        for raw in json_objects(answer):
            first, second = (self._points(raw.get(caption)) for caption in CAPTIONS)
            compared = isinstance(raw.get("comparison"), str) and raw["comparison"].strip()
            if first and second and compared and raw.get("winner") in CAPTIONS:
                verdict = {name: _more(first[name], second[name]) for name in self.names}
                found.append({**verdict, OVERALL: raw["winner"], SCORES: dict(zip(CAPTIONS, (first, second)))})
        return found[0] if found and all(verdict == found[0] for verdict in found) else None

    def _points(self, given: Any) -> dict[str, int] | None:
        """The points of one caption, or None where they are malformed."""
        if not isinstance(given, dict) or set(given) != set(self.names):
            return None
        return given if all(type(value) is int and LOWEST <= value <= HIGHEST for value in given.values()) else None


PROTOCOLS: dict[str, type[Criteria]] = {"pairwise": Criteria, "paper_v5": ScoredCriteria}


def _more(first: int, second: int) -> str:
    return "tie" if first == second else "A" if first > second else "B"


def json_objects(answer: str) -> Iterator[Mapping[str, Any]]:
    """The JSON objects in a text, outer ones before those inside of them."""
    for start in (match.start() for match in re.finditer(r"\{", answer)):
        try:
            raw, _ = json.JSONDecoder().raw_decode(answer[start:])
        except ValueError:
            continue
        if isinstance(raw, dict):
            yield raw


def points_of(names: Sequence[str], verdicts: Mapping[str, Mapping[str, Verdict]]) -> dict[str, dict[str, list[float]]]:
    """Points of the two models' captions, {criterion: {"a": [image], "b": [image]}}, means over the two orders.

    Args:
      names: of the criteria.
      verdicts: {image: {order: verdict}} of `ScoredCriteria`; only images with both orders count.
    """
    found: dict[str, dict[str, list[float]]] = {name: {"a": [], "b": []} for name in names}
    for answers in verdicts.values():
        if set(answers) != {"ab", "ba"}:
            continue
        for name in names:
            for model, places in (("a", ("A", "B")), ("b", ("B", "A"))):
                given = [answers[order][SCORES][place][name] for order, place in zip(("ab", "ba"), places)]
                found[name][model].append(sum(given) / len(given))
    return found
