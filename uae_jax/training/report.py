"""`report.html` of a workdir: one self-contained page about the training, its results and their limits."""

import base64
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib.figure

from uae_jax.files.paths import to_path
from uae_jax.training import guard
from uae_jax.training.curves import curve_figures
from uae_jax.training.findings import direction, findings, scoring_changes, scorings
from uae_jax.training.metrics import read_lines
from uae_jax.training.summary import read_summary

# the meaning of each score, shown in its row
MEANINGS = {
    "reward": "maximised by training: cosine of the reward encoder between image and reconstruction",
    "unified_score": "mean cosine over the image encoders",
    "heldout_score": "cosine of an encoder that was never a reward: catches reward hacking",
    "caption_tokens": "length of the caption; longer is not better by itself",
    "truncated": "share of captions truncated at the length limit",
    "repetition": "share of a caption's sequences of four tokens that are repetitions",
    "fact_recall": "share of the scene's facts that the caption states",
    "fact_precision": "share of the stated facts that are true",
    "scene_accuracy": "share of the scene's facts found in the reconstruction",
    "true_caption_reward": "the decoder alone: the same cosine for the data set's own captions",
    "true_caption_scene_accuracy": "the decoder alone: facts found in images of the full true captions",
    guard.UNDERSTANDING: "share of fixed questions answered right; their categories have rows of their own",
    "geneval": "prompts of unseen texts whose image has what they ask for (mean of the tags below)",
    "geneval_exact": "the same prompts, with no other object in the image",
}
# scores for which neither up nor down is good by itself
NEUTRAL = ("caption_tokens", "truncated", "repetition")
# stage -> (model that learns, source of learning)
STAGES = {
    "pretrain": ("decoder", "images with captions: the decoder learns to generate an image from its caption"),
    "cold_start": (
        "decoder",
        "its reconstructions: the loss between reconstruction and image, through all sampling steps",
    ),
    "gen_for_und": (
        "encoder",
        "the reward: the frozen decoder reconstructs an image from several captions, and captions with better "
        "reconstructions become more probable (\u201cgeneration for understanding\u201d)",
    ),
    "und_for_gen": (
        "decoder",
        "the reward: several reconstructions from the encoder's caption, and those nearer to the image become more "
        "probable (\u201cunderstanding for generation\u201d)",
    ),
}
MATCHING = "the images: flow matching on the encoder's captions, without a reward"  # of und_for_gen's method
TIMES = 9  # moments in the captions through training


def write_report(workdir: Path, *, max_samples: int = 8) -> Path:
    """Writes `workdir/report.html` from summary.json, metrics.jsonl, config.json and samples/, and returns its path.

    Samples are read from `samples/<stage>_before`, `samples/<stage>_step<n>` and `samples/<stage>_after`:
    `samples.json` in each is a list of {"original": file, "caption": text, "reconstruction": file, "scores": {name:
    number}}, files relative to that folder.

    Args:
      workdir: folder of a run; only summary.json has to exist. `decoder.json` of `evaluate decoder` is shown too.
      max_samples: number of images in the report.

    Raises:
      FileNotFoundError: no summary.json, or a sample's image is missing.
      ValueError: a damaged JSON file.
    """
    workdir = to_path(workdir)
    summary, lines = read_summary(workdir), read_lines(workdir / "metrics.jsonl")
    stages, config = summary["stages"], read_config(workdir)
    decoder = _json_of(workdir / "decoder.json")
    moments = sample_moments(workdir / "samples", stages, max_samples)
    strips = [moment for moment in moments if not moment["during"]]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("uae_jax.training", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html").render(
        summary=summary,
        stages=[described(stage, config) for stage in stages],
        curves=curves(lines, stages),
        findings=findings(stages),
        decoder=decoder,
        columns=score_columns(stages),
        rows=score_rows(stages),
        strips=strips,
        histories=histories(moments),
        guard=guard_bounds(config),
        deductions=deductions(config, stages),
        meaning=guard.meaning,
        watched=any("eval/reward" in line for line in lines),
    )
    path = workdir / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def described(stage: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The stage with `learner` and `source`; a repeated stage (`gen_for_und_2`) gets those of the first."""
    name = re.sub(r"_\d+$", "", stage["name"])
    learner, source = STAGES.get(name, ("", ""))
    if config.get(name, {}).get("method") == "matching":
        source = MATCHING
    return {**stage, "learner": learner, "source": source}


def score_columns(stages: Sequence[Mapping[str, Any]]) -> list[str]:
    """Headings of the score table: the start, and the end of each stage."""
    return [moment for moment, _ in scorings(stages)]


def score_rows(stages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the score table: name, meaning, and a cell for each of `score_columns`.

    A cell is None or {"score", "change", "direction"}. The change is against the column before; the direction is 1, -1,
    or 0 if the two intervals touch. Scores of different settings are not compared.
    """
    points = [stages[0]["before"]] if stages and stages[0]["before"] else []
    points += [stage["after"] for stage in stages]
    others = scoring_changes(stages)
    alike = [moment not in others for moment, _ in scorings(stages)]
    rows = []
    for name in [*MEANINGS, *sorted(set().union(*points) - MEANINGS.keys())]:
        cells, previous = [], {}
        for point, comparable in zip(points, alike, strict=True):
            score, old = point.get(name), previous.get(name) if comparable else None
            change = score["value"] - old["value"] if isinstance(score, dict) and isinstance(old, dict) else None
            cells.append(
                {"score": score, "change": change, "direction": direction(previous, point, name) if comparable else 0}
                if isinstance(score, dict)
                else None
            )
            previous = point
        if any(cells):
            rows.append({"name": name, "meaning": MEANINGS.get(name, ""), "cells": cells, "neutral": name in NEUTRAL})
    return rows


def sample_moments(folder: Path, stages: Sequence[Mapping[str, Any]], count: int) -> list[dict[str, Any]]:
    """The moments with samples, in order: {"title", "during", "samples"}."""
    places = [("start", False, folder / f"{stages[0]['name']}_before")] if stages else []
    for stage in stages:
        name = stage["name"]
        numbers = sorted(int(path.name.rpartition("_step")[2]) for path in folder.glob(f"{name}_step*"))
        places += [(f"{name}, step {number}", True, folder / f"{name}_step{number}") for number in numbers]
        places.append((f"after {name}", False, folder / f"{name}_after"))
    moments = [
        {"title": title, "during": during, "samples": _read_samples(place, count)} for title, during, place in places
    ]
    return [moment for moment in moments if moment["samples"]]


def histories(moments: Sequence[Mapping[str, Any]], pictures: int = 3) -> list[dict[str, Any]]:
    """The first images, each with its original and its captions through training; equal neighbours are listed once."""
    during = [moment for moment in moments if moment["during"]]
    room = max(TIMES - (len(moments) - len(during)), 0)
    kept = set(range(len(during)))
    if len(during) > room:
        kept = {round(at * (len(during) - 1) / max(room - 1, 1)) for at in range(room)}
    shown = [moment for moment in moments if not moment["during"] or during.index(moment) in kept]
    found = []
    for index in range(min(pictures, min((len(moment["samples"]) for moment in shown), default=0))):
        entries: list[dict[str, Any]] = []
        for moment in shown:
            sample = moment["samples"][index]
            if entries and entries[-1]["caption"] == sample["caption"]:
                entries[-1] |= {"last": moment["title"], "reconstruction": sample["reconstruction"]}
            else:
                title, words = moment["title"], len(sample["caption"].split())
                entries.append({**sample, "first": title, "last": title, "words": words})
        found.append({"original": shown[0]["samples"][index]["original"], "entries": entries})
    return found


def read_config(workdir: Path) -> dict[str, Any]:
    """The run's configuration; empty without a config.json."""
    return _json_of(to_path(workdir) / "config.json")


def _json_of(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def deductions(config: Mapping[str, Any], stages: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The deductions from the similarity in a stage's reward, in words, by stage; without stages that have none."""
    words = {
        "contrast": "the similarity to the batch's other images",
        "overlong_penalty": "a penalty for captions without an end",
    }
    rewards = {stage["name"]: config.get(stage["name"], {}).get("reward", {}) for stage in stages}
    found = {
        name: " and ".join(words[field] for field in words if reward.get(field)) for name, reward in rewards.items()
    }
    return {name: text for name, text in found.items() if text}


def guard_bounds(config: Mapping[str, Any]) -> dict[str, float] | None:
    """The active bounds of the run's guard; None if the configuration has no guard."""
    section = config.get("guard")
    if section is None:
        return None
    return {name: section[name] for name in (*guard.MEANINGS, "gradient_ratio", "flow_kl") if section.get(name)}


def curves(lines: list[dict[str, Any]], stages: Sequence[Mapping[str, Any]] = ()) -> list[dict[str, str]]:
    """`curve_figures` as {"title", "light", "dark"}, the last two data URIs of PNGs; none for empty logs."""
    light, dark = (curve_figures(lines, stages, dark=look) for look in (False, True))
    return [
        {"title": title, "light": _figure_uri(figure), "dark": _figure_uri(other)}
        for (title, figure), (_, other) in zip(light, dark)
    ]


def _figure_uri(figure: matplotlib.figure.Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, facecolor=figure.get_facecolor())
    return _data_uri(buffer.getvalue())


def _read_samples(folder: Path, count: int) -> list[dict[str, Any]]:
    path = folder / "samples.json"
    if not path.exists():
        return []
    try:
        samples = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is not JSON ({error}); delete it to write the report without these samples"
        ) from error
    return [
        {**sample, **{key: _data_uri((folder / sample[key]).read_bytes()) for key in ("original", "reconstruction")}}
        for sample in samples[:count]
    ]


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
