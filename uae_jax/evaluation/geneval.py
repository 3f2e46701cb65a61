"""GenEval (djghosh13/geneval): images of its prompts in its evaluator's layout, and the evaluator's scores.

    python -m uae_jax.evaluate geneval write --prompts=evaluation_metadata.jsonl --out=OUT --checkpoint=RUN
    python -m uae_jax.evaluate geneval check OUT --prompts=evaluation_metadata.jsonl
    (the official evaluation/evaluate_images.py OUT --outfile results.jsonl, in its own container)
    python -m uae_jax.evaluate geneval summary results.jsonl

An interrupted `write` continues. For the built-in model the prompts are `--prompts=scenes`, and an exact checker
replaces the detector; its results have the same form:

    python -m uae_jax.evaluate geneval write --prompts=scenes --out=OUT
    python -m uae_jax.evaluate geneval score OUT
"""

import argparse
import collections
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from uae_jax.command_line import in_range
from uae_jax.data.images import opened
from uae_jax.data.scene_checker import read_picture
from uae_jax.data.scene_prompts import check_scene, scene_prompts
from uae_jax.data.scenes import SHAPES, Scene, object_facts
from uae_jax.evaluation import run_settings
from uae_jax.evaluation.benchmark_commands import add_summary, check_folder, grouped_scores, refuse, table, tell, uneven
from uae_jax.evaluation.drawing import Target, content_problems, draw_folder, picture_problem
from uae_jax.files.json_files import read_objects, read_text, write_json_lines
from uae_jax.files.paths import to_path
from uae_jax.files.whole import write_bytes
from uae_jax.model_flags import add_model_flags

SCENES = "scenes"
NEEDED = {"tag": str, "include": list, "prompt": str}
RESULT = {"filename": str, "tag": str, "correct": (bool, int), "metadata": (str, dict)}
PICTURE = re.compile(r"\d+\.png")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `write`, `check`, `score` and `summary`."""
    actions = parser.add_subparsers()
    write_flags = actions.add_parser("write", help="generate the images of the prompts")
    write_flags.set_defaults(run=write)
    write_flags.add_argument("--prompts", required=True, help="evaluation_metadata.jsonl of the benchmark, or `scenes`")
    write_flags.add_argument("--out", type=to_path, required=True, help="folder of the images")
    write_flags.add_argument("--images_per_prompt", default=4, help="the benchmark needs 4", **in_range(int, low=1))
    write_flags.add_argument("--per_tag", default=16, help="prompts of each tag, for `scenes`", **in_range(int, low=1))
    add_model_flags(write_flags)
    check_flags = actions.add_parser("check", help="check that the evaluator finds every image")
    check_flags.set_defaults(run=check)
    check_flags.add_argument("folder", type=to_path, help="the --out of `write`")
    check_flags.add_argument("--prompts", help="compare with the prompts of this file, or `scenes`")
    check_flags.add_argument("--images_per_prompt", help="default: as written, else 4", **in_range(int, low=1))
    check_flags.add_argument("--per_tag", help="for `scenes` (default: as written)", **in_range(int, low=1))
    score_flags = actions.add_parser("score", help="score images of the built-in scenes by the exact checker")
    score_flags.set_defaults(run=score)
    score_flags.add_argument("folder", type=to_path, help="the --out of `write`")
    score_flags.add_argument("--output", type=to_path, help="default: FOLDER.results.jsonl beside the folder")
    add_summary(actions, "summarise the evaluator's results", "results", "results.jsonl", summary)


def read_entries(prompts: str, per_tag: int) -> list[dict[str, Any]]:
    """The benchmark's prompts, one mapping per numbered folder.

    Raises:
      FileNotFoundError, ValueError: no such file, or a line that is not a prompt (named by number).
    """
    return scene_prompts(per_tag) if prompts == SCENES else read_objects(to_path(prompts), NEEDED)


def write(options: argparse.Namespace) -> None:
    """Writes `<index>/metadata.jsonl` and `<index>/samples/<sample>.png`; both numbers have five digits, from 0."""
    if options.images_per_prompt < 1:
        raise ValueError(f"--images_per_prompt is {options.images_per_prompt}; it must be at least 1")
    entries, count = read_entries(options.prompts, options.per_tag), options.images_per_prompt
    targets = [
        Target(
            options.out / f"{index:05d}" / "samples" / f"{sample:05d}.png", entry["prompt"], (index * count + sample,)
        )
        for index, entry in enumerate(entries)
        for sample in range(count)
    ]

    def prepare() -> None:
        for index, entry in enumerate(entries):
            write_bytes(options.out / f"{index:05d}" / "metadata.jsonl", json.dumps(entry).encode("utf-8"))

    settings = {"prompts": run_settings.digest(json.dumps(entries)), "count": len(entries), "images_per_prompt": count}
    settings |= {"per_tag": options.per_tag} if options.prompts == SCENES else {}
    draw_folder(options, "geneval", targets, settings, prepare)


def _numbered_folders(folder: pathlib.Path) -> list[pathlib.Path]:
    """The folders that the evaluator reads: those whose names are digits.

    Raises:
      FileNotFoundError: no such folder, or no numbered folder in it.
    """
    check_folder(folder, "geneval write")
    found = sorted(
        (path for path in folder.iterdir() if path.is_dir() and path.name.isdigit()), key=lambda path: int(path.name)
    )
    if not found:
        raise FileNotFoundError(
            f"folder {folder} holds no numbered folders such as 00000; give the --out of `geneval write`"
        )
    return found


def _metadata(folder: pathlib.Path) -> dict[str, Any]:
    """The one JSON object of `metadata.jsonl`.

    Raises:
      ValueError: the file is missing or malformed.
    """
    path = folder / "metadata.jsonl"
    try:
        value = json.loads(read_text(path))
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing") from error
    except ValueError as error:
        raise ValueError(f"{path} is not one JSON object ({error})") from error
    wrong = [
        name for name, kind in NEEDED.items() if not isinstance(value, dict) or not isinstance(value.get(name), kind)
    ]
    if wrong:
        raise ValueError(f"{path} has no {' and no '.join(wrong)}")
    return value


def _taken(folder: pathlib.Path) -> list[pathlib.Path]:
    """The images of a numbered folder, in the order of their numbers."""
    samples = folder / "samples"
    found = (
        [path for path in samples.iterdir() if path.is_file() and PICTURE.fullmatch(path.name)]
        if samples.is_dir()
        else []
    )
    return sorted(found, key=lambda path: (int(path.stem), path.name))


def _sample_problems(folder: pathlib.Path, expected: int) -> list[str]:
    """What is wrong with the names and the number of samples of a numbered folder."""
    samples, problems = folder / "samples", []
    if not samples.is_dir():
        return [f"{samples} is missing"]
    for path in sorted(samples.iterdir()):
        if not PICTURE.match(path.name):
            problems.append(f"{path} is ignored by the evaluator; samples are PNG files with digits for names")
        elif not PICTURE.fullmatch(path.name):
            problems.append(f"{path} is taken for an image by the evaluator; delete it")
    count = len(_taken(folder))
    return problems + ([f"{samples} holds {count} images instead of {expected}"] if count != expected else [])


def folder_problems(folder: pathlib.Path, entries: Sequence[dict] | None, images_per_prompt: int) -> list[str]:
    """Sentences on everything that the evaluator would miss or misread in a folder; [] for a good folder.

    Args:
      folder: holds one numbered folder per prompt.
      entries: the expected prompts; None for those of the folder, which must be numbered without a gap.
      images_per_prompt: number of images of each prompt.

    Raises:
      FileNotFoundError: there is nothing to check.
    """
    found, problems, pictures = _numbered_folders(folder), [], []
    numbers = [int(path.name) for path in found]
    expected = len(entries) if entries is not None else numbers[-1] + 1
    problems += [f"{folder / f'{number:05d}'} is missing" for number in sorted(set(range(expected)) - set(numbers))]
    problems += [f"{path} is beyond the {expected} prompts" for path in found if int(path.name) >= expected]
    problems += [
        f"{path} has the number of another folder"
        for path, before in zip(found[1:], numbers)
        if int(path.name) == before
    ]
    for path in found:
        try:
            entry = _metadata(path)
            if entries is not None and int(path.name) < expected and entry != entries[int(path.name)]:
                problems.append(f"{path / 'metadata.jsonl'} is not line {int(path.name) + 1} of the prompts")
        except ValueError as error:
            problems.append(str(error))
        problems += _sample_problems(path, images_per_prompt)
        pictures += _taken(path)
    return problems + content_problems(pictures)


def check(options: argparse.Namespace) -> None:
    """Reports everything that the evaluator would miss or misread."""
    settings = run_settings.read(options.folder)
    per_tag = options.per_tag or settings.get("per_tag", 16)
    entries = read_entries(options.prompts, per_tag) if options.prompts else None
    count = options.images_per_prompt or settings.get("images_per_prompt", 4)
    problems = folder_problems(options.folder, entries, count)
    if entries is None and "count" in settings and len(_numbered_folders(options.folder)) != settings["count"]:
        problems.append(
            f"{options.folder} was begun with {settings['count']} prompts; run `geneval write` again to finish it"
        )
    refuse(problems, str(options.folder))
    found = _numbered_folders(options.folder)
    print(f"{options.folder}: {len(found)} prompts with {count} images each, as the evaluator reads them")


def _boxes(scene: Scene, side: int) -> dict[str, list[list[float]]]:
    """The objects in the evaluator's form: {class: [[x0, y0, x1, y1, confidence], ...]}; a box is the object's cell."""
    half, found = side / 2, dict[str, list[list[float]]]()
    for item in scene.objects:
        x, y = item.column * half, item.row * half
        found.setdefault(object_facts(item)["shape"], []).append([x, y, x + half, y + half, 1.0])
    return found


def _words(scene: Scene) -> str:
    found = map(object_facts, scene.objects)
    return ", ".join(f"{item['size']} {item['colour']} {item['shape']}" for item in found) or "no object"


def _seen(file: pathlib.Path) -> tuple[np.ndarray, Scene]:
    """An image, uint8 `[S, S, 3]`, and the scene that the checker reads in it."""
    problem = picture_problem(file)
    if problem:
        raise ValueError(f"{file} {problem}; run `geneval write` again")
    with opened(file) as image:
        pixels = np.asarray(image.convert("RGB"))
    try:
        return pixels, read_picture(pixels)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def score_scenes(folder: pathlib.Path) -> list[dict[str, Any]]:
    """One record per image from the exact checker of the built-in scenes, in the form of the evaluator's results.

    Raises:
      FileNotFoundError: there is nothing to score.
      ValueError: a prompt is not of the built-in scenes, or an image cannot be read.
    """
    records = []
    for path in _numbered_folders(folder):
        entry = _metadata(path)
        strange = sorted({item["class"] for item in entry["include"]} - set(SHAPES))
        if strange:
            raise ValueError(
                f"{path} asks for {strange[0]!r}, which is not in the built-in scenes; run the official evaluator"
            )
        for file in _taken(path):
            pixels, scene = _seen(file)
            right = check_scene(entry, scene)
            records.append(
                {
                    "filename": str(file),
                    "tag": entry["tag"],
                    "prompt": entry["prompt"],
                    "correct": right,
                    "reason": "" if right else f"found {_words(scene)}",
                    "metadata": json.dumps(entry),
                    "details": json.dumps(_boxes(scene, pixels.shape[0])),
                }
            )
    if not records:
        raise ValueError(f"{folder} holds no images; run `geneval write` first")
    return records


def score(options: argparse.Namespace) -> None:
    """Writes the checker's results beside the folder and prints a summary."""
    folder = options.folder.resolve()
    output = options.output or folder.with_name(f"{folder.name}.results.jsonl")
    records = score_scenes(options.folder)
    write_json_lines(output, records)
    print(f"{output}: {len(records)} results")
    scores = summarise(records)
    tell(_report(scores), scores["warnings"])


def summarise(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Scores of the tags and their mean, as the benchmark's summary_scores.py computes them, with intervals.

    Returns:
      "overall" and "tags" of `grouped_scores`; "correct_prompts", the share of prompts with at least one correct image;
      "warnings", sentences.
    """
    prompts = [
        record["metadata"] if isinstance(record["metadata"], str) else json.dumps(record["metadata"])
        for record in records
    ]
    scores = grouped_scores((record["tag"], prompt, record["correct"]) for record, prompt in zip(records, prompts))
    right = dict.fromkeys(prompts, False)
    for record, prompt in zip(records, prompts):
        right[prompt] |= bool(record["correct"])
    folders = [str(pathlib.Path(record["filename"]).parent.parent) for record in records]
    return {
        "overall": scores["overall"],
        "tags": scores["groups"],
        "correct_prompts": sum(right.values()) / len(right),
        "warnings": uneven(collections.Counter(folders)),
    }


def _report(scores: dict[str, Any]) -> str:
    tags = table({"overall": scores["overall"], "groups": scores["tags"]}, "overall (mean of tags)")
    return f"{tags}\nprompts with a correct image: {100 * scores['correct_prompts']:.2f} %"


def summary(options: argparse.Namespace) -> None:
    """Prints the scores of a results file and writes them as JSON."""
    scores = summarise(read_objects(options.results, RESULT))
    tell(_report(scores), scores["warnings"], scores, options.output)
