"""Findings from the scores of a run: sentences with their numbers, marked as good, bad or open."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from uae_jax.settings import differences
from uae_jax.training.guard import UNDERSTANDING, meaning

Scores = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Finding:
    """One finding. `kind` is `good`, `bad` or `open` (within chance)."""

    kind: str
    title: str
    text: str


def direction(before: Scores, after: Scores, name: str) -> int:
    """1 or -1 if a score rose or fell and its two 95 % intervals do not touch; 0 otherwise, and for a missing score."""
    old, new = before.get(name), after.get(name)
    if not isinstance(old, dict) or not isinstance(new, dict):
        return 0
    return int(new["low"] > old["high"]) - int(new["high"] < old["low"])


def findings(stages: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """The findings of a run from the stages of its summary, without findings whose scores are missing."""
    sided = [stage for stage in stages if stage["before"] and stage["after"]]
    found = [_guard(stage) for stage in stages if stage.get("guard")]
    changes = scoring_changes(stages)
    found += [_scoring(changes)] if changes else []
    if sided and not changes:
        before, after = sided[0]["before"], sided[-1]["after"]
        for make in (_facts, _answers, _length, _reconstructions, _prompts):
            finding = make(before, after)
            if finding is not None:
                found.append(finding)
    comparable = [stage for stage in sided if not scoring_changes([stage])]
    found += [finding for stage in comparable if (finding := _gamed(stage)) is not None]
    return found


def scorings(stages: Sequence[Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    """(moment, settings of its scores) before the first stage and after each; {} for runs of earlier versions."""
    sides = [stage.get("scoring", {}) for stage in stages]
    start = [("start", sides[0].get("before", {}))] if stages and stages[0]["before"] else []
    return start + [
        (f"after {stage['name']}", side.get("after", {})) for stage, side in zip(stages, sides, strict=True)
    ]


def scoring_changes(stages: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Moments whose scores have other settings than the moment before, with what differs; {} where all are alike."""
    moments = scorings(stages)
    pairs = zip(moments, moments[1:], strict=False)
    changes = {moment: differences(old, new) for (_, old), (moment, new) in pairs if old and new}
    return {moment: changed for moment, changed in changes.items() if changed}


def _scoring(changes: Mapping[str, list[str]]) -> Finding:
    text = " ".join(f"{moment}: {'; '.join(changed)}." for moment, changed in changes.items())
    return Finding(
        "bad",
        "Scores of different settings",
        f"The run was continued with other evaluation settings. {text} Compare only scores of equal settings.",
    )


def _guard(stage: Mapping[str, Any]) -> Finding:
    trip = stage["guard"]
    return Finding(
        "bad",
        f"{stage['name']} was stopped by the guard",
        f"After step {trip['step']}, {meaning(trip)} was {trip['value']:.3g}; its bound is "
        f"{trip['bound']:.3g}. The following stages use the checkpoint of step {trip['restored_step']}.",
    )


def _values(before: Scores, after: Scores, *names: str) -> list[float] | None:
    if not all(isinstance(side.get(name), dict) for side in (before, after) for name in names):
        return None
    return [side[name]["value"] for name in names for side in (before, after)]


def _facts(before: Scores, after: Scores) -> Finding | None:
    values = _values(before, after, "fact_recall", "fact_precision")
    if values is None:
        return None
    recall, precision = (direction(before, after, name) for name in ("fact_recall", "fact_precision"))
    kind = "bad" if min(recall, precision) < 0 else "good" if recall > 0 else "open"
    return Finding(
        kind,
        "Understanding: do captions state more facts, and are the facts true?",
        f"Captions state {values[0]:.0%} of an image's facts at the start and {values[1]:.0%} at the end. Of the "
        f"stated facts, {values[2]:.0%} are true at the start and {values[3]:.0%} at the end.",
    )


def _answers(before: Scores, after: Scores) -> Finding | None:
    values = _values(before, after, UNDERSTANDING)
    if values is None:
        return None
    changes = {name: direction(before, after, name) for name in before if name.startswith(f"{UNDERSTANDING}_")}
    worse, better = (
        [name.removeprefix(f"{UNDERSTANDING}_") for name, change in changes.items() if change == sign]
        for sign in (-1, 1)
    )
    text = f"{values[0]:.0%} of the questions are answered right at the start, {values[1]:.0%} at the end."
    text += f" Worse: {', '.join(worse)}." if worse else ""
    text += f" Better: {', '.join(better)}." if better else ""
    kind = "bad" if worse else "good" if better or direction(before, after, UNDERSTANDING) > 0 else "open"
    return Finding(kind, "Questions: does the encoder still answer them?", text)


def _length(before: Scores, after: Scores) -> Finding | None:
    values = _values(before, after, "caption_tokens")
    if values is None:
        return None
    text = f"Captions go from {values[0]:.1f} to {values[1]:.1f} tokens. "
    text += "A longer caption is not better by itself: compare the facts."
    cut = _values(before, after, "truncated", "repetition")
    if cut is not None:
        text += f" Truncated at the limit: {cut[0]:.1%}, then {cut[1]:.1%}; repeated: {cut[2]:.1%}, then {cut[3]:.1%}."
    worse = max(direction(before, after, "truncated"), direction(before, after, "repetition")) > 0
    return Finding("bad" if worse else "open", "Length: do captions ramble?", text)


def _reconstructions(before: Scores, after: Scores) -> Finding | None:
    name = "scene_accuracy" if _values(before, after, "scene_accuracy") else "heldout_score"
    values = _values(before, after, name)
    if values is None:
        return None
    what, form = "is the cosine of the held-out encoder", ".3f"
    if name == "scene_accuracy":
        what, form = "of an image's facts are found in its reconstruction", ".0%"
    numbers = f"{values[0]:{form}} {what} at the start, {values[1]:{form}} at the end."
    kind = ("open", "good", "bad")[direction(before, after, name)]
    return Finding(kind, "The loop: does the reconstruction show the image?", numbers)


def _prompts(before: Scores, after: Scores) -> Finding | None:
    values = _values(before, after, "geneval")
    if values is None:
        return None
    text = f"For {values[0]:.0%} of short prompts that no captioner wrote, the image is right at the start, "
    text += f"{values[1]:.0%} at the end."
    kind = ("open", "good", "bad")[direction(before, after, "geneval")]
    return Finding(kind, "Generation: do images follow prompts better?", text)


def _gamed(stage: Mapping[str, Any]) -> Finding | None:
    """A reward that rises while the scores that it stands for fall."""
    before, after = stage["before"], stage["after"]
    falls = [
        name
        for name in ("heldout_score", "fact_recall", "fact_precision", "scene_accuracy")
        if direction(before, after, name) < 0
    ]
    if direction(before, after, "reward") <= 0 or not falls:
        return None
    return Finding(
        "bad",
        f"{stage['name']}: the reward may be gamed",
        f"The reward rises outside its interval while {' and '.join(falls)} fall{'s' if len(falls) == 1 else ''}: look "
        "at the images below.",
    )
