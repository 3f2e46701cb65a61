"""GenEval++ (yejy53/Echo-4o): images of its prompts in the layout of its judge's script, and the judge's scores.

    python -m uae_jax.evaluate geneval_plus write --prompts=Geneval++.jsonl --out=image --checkpoint=RUN
    python -m uae_jax.evaluate geneval_plus check image --prompts=Geneval++.jsonl
    (the official Eval-gpt-4.1-geneval++.py, whose paths are constants at its top: Geneval++.jsonl, image, Output.json)
    python -m uae_jax.evaluate geneval_plus summary Output.json

Each prompt gets one JPEG, named by the prompt's number from 1. An interrupted `write` continues.
"""

import argparse
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from uae_jax.evaluation import run_settings
from uae_jax.evaluation.benchmark_commands import add_summary, check_folder, grouped_scores, refuse, table, tell
from uae_jax.evaluation.drawing import Target, content_problems, draw_folder
from uae_jax.files.json_files import read_objects, read_text
from uae_jax.files.paths import to_path
from uae_jax.model_flags import add_model_flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `write`, `check` and `summary`."""
    actions = parser.add_subparsers()
    write_flags = actions.add_parser("write", help="generate the images of the prompts")
    write_flags.set_defaults(run=write)
    write_flags.add_argument("--prompts", type=to_path, required=True, help="Geneval++.jsonl, or Geneval++.txt")
    write_flags.add_argument("--out", type=to_path, required=True, help="folder of the images")
    add_model_flags(write_flags)
    check_flags = actions.add_parser("check", help="check that the judge's script finds every image")
    check_flags.set_defaults(run=check)
    check_flags.add_argument("folder", type=to_path, help="the --out of `write`")
    check_flags.add_argument("--prompts", type=to_path, help="expect the prompts of this file (default: as written)")
    add_summary(actions, "summarise the judge's answers", "results", "Output.json", summary)


def read_prompts(path: pathlib.Path) -> list[str]:
    """Prompts of `Geneval++.jsonl`, or of a `.txt` file with one per line; blank lines are skipped, as officially.

    Raises:
      FileNotFoundError, ValueError: no such file, an empty file, or a line that is not a prompt (named by number).
    """
    if path.suffix != ".txt":
        return [entry["prompt"].strip() for entry in read_objects(path, {"prompt": str, "tag": str})]
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give the file of the benchmark")
    prompts = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"{path} is empty; give the file of the benchmark")
    return prompts


def write(options: argparse.Namespace) -> None:
    """Writes `1.jpg`, `2.jpg`, ..."""
    prompts = read_prompts(options.prompts)
    targets = [Target(options.out / f"{index + 1}.jpg", prompt, (index,)) for index, prompt in enumerate(prompts)]
    draw_folder(
        options, "geneval_plus", targets, {"prompts": run_settings.digest("\n".join(prompts)), "count": len(prompts)}
    )


def check(options: argparse.Namespace) -> None:
    """Reports images that the judge's script would count as wrong or fail on."""
    folder = options.folder
    check_folder(folder, "geneval_plus write")
    count = len(read_prompts(options.prompts)) if options.prompts else run_settings.read(folder).get("count")
    if count is None:
        raise ValueError(f"the number of images of {folder} is unknown; give --prompts=Geneval++.jsonl")
    expected = [folder / f"{number}.jpg" for number in range(1, count + 1)]
    problems = content_problems(expected)
    problems += [f"{path} is not read by the judge's script" for path in sorted(set(folder.iterdir()) - set(expected))]
    refuse(problems, str(folder))
    print(f"{folder}: {count} images, as the judge's script reads them")


def read_results(path: pathlib.Path) -> list[dict[str, Any]]:
    """The judged prompts of `Output.json`: {"id", "tag", "correct" (1, 0, or -1 if the judge failed), "reason"}.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file is malformed; the message names the result.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give the output of Eval-gpt-4.1-geneval++.py")
    try:
        value = json.loads(read_text(path))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); give the output of Eval-gpt-4.1-geneval++.py") from error
    results = value.get("overall_results") if isinstance(value, dict) else None
    if not isinstance(results, list) or not results:
        raise ValueError(f"{path} has no overall_results; give the output of Eval-gpt-4.1-geneval++.py")
    found = []
    for number, result in enumerate(results, 1):
        try:
            judged = result["result"]
            found.append(
                {
                    "id": result["id"],
                    "tag": str(result["tag"]),
                    "correct": judged.get("correct", 0),
                    "reason": str(judged.get("reason", "")),
                }
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: result {number} lacks a field of id, tag and result ({error})") from error
    return found


def summarise(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Accuracy of the tags and their mean, as the official script computes them, with intervals.

    An image is correct if its verdict is 1. Prompts that the judge failed on count as wrong; `warnings` tells their
    number and the number of missing images.
    """
    scores = grouped_scores((result["tag"], str(result["id"]), result["correct"] == 1) for result in results)
    unjudged = [result["id"] for result in results if result["correct"] not in (0, 1)]
    missing = [result["id"] for result in results if result["reason"] == "Image not found"]
    warnings = [
        f"{len(ids)} {what} and count as wrong, such as number {ids[0]}"
        for ids, what in ((unjudged, "images were not judged"), (missing, "images were missing"))
        if ids
    ]
    return {"overall": scores["overall"], "tags": scores["groups"], "warnings": warnings}


def summary(options: argparse.Namespace) -> None:
    """Prints the scores of a results file and writes them as JSON."""
    scores = summarise(read_results(options.results))
    report = table({"overall": scores["overall"], "groups": scores["tags"]}, "overall (mean of tags)")
    tell(report, scores["warnings"], scores, options.output)
