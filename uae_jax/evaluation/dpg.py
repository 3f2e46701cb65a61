"""DPG-Bench (TencentQQGYLab/ELLA): image grids of its prompts in its evaluator's layout, and the evaluator's scores.

    python -m uae_jax.evaluate dpg write --prompts=ELLA/dpg_bench/prompts --out=OUT --checkpoint=RUN
    python -m uae_jax.evaluate dpg check OUT --prompts=ELLA/dpg_bench/prompts
    (the official bash dpg_bench/dist_eval.sh OUT 1024, where 1024 is --size)
    python -m uae_jax.evaluate dpg summary OUT/dpg-bench_20260101-000000_results.txt

Each prompt gets a grid of 2 x 2 samples, `<stem of the prompt's file>.png`. An interrupted `write` continues.
"""

import argparse
import math
import pathlib
import re
from typing import Any

from uae_jax.command_line import in_range
from uae_jax.evaluation import run_settings
from uae_jax.evaluation.benchmark_commands import add_summary, check_folder, grouped_scores, refuse, tell
from uae_jax.evaluation.drawing import GRID_SIDE, Target, content_problems, draw_folder
from uae_jax.files.json_files import read_text
from uae_jax.files.paths import to_path
from uae_jax.model_flags import add_model_flags

SAMPLES = GRID_SIDE**2
PROMPTS = 1065  # of the published benchmark
_TOTAL = re.compile(r"^DPG-Bench score: (\S+)$")
_CATEGORY = re.compile(r"^\t(.*): (\S+)$")
_LEVELS = {"L1 category scores:": "categories", "L2 category scores:": "subcategories"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `write`, `check` and `summary`."""
    actions = parser.add_subparsers()
    write_flags = actions.add_parser("write", help="generate the images of the prompts")
    write_flags.set_defaults(run=write)
    write_flags.add_argument(
        "--prompts", type=to_path, required=True, help="dpg_bench/prompts of the benchmark: a folder of .txt files"
    )
    write_flags.add_argument("--out", type=to_path, required=True, help="folder of the grids")
    add_model_flags(write_flags)
    check_flags = actions.add_parser("check", help="check that the evaluator finds every grid")
    check_flags.set_defaults(run=check)
    check_flags.add_argument("folder", type=to_path, help="the --out of `write`")
    check_flags.add_argument("--prompts", type=to_path, required=True, help="dpg_bench/prompts of the benchmark")
    check_flags.add_argument(
        "--size", help="side of a sample, the evaluator's RESOLUTION (default: as written)", **in_range(int, low=1)
    )
    add_summary(actions, "summarise the evaluator's results", "results", "dpg-bench_*_results.txt", summary)


def read_prompts(folder: pathlib.Path) -> dict[str, str]:
    """{stem: prompt} of the `.txt` files of a folder, by name.

    Raises:
      FileNotFoundError: no such folder, or no prompt in it.
      ValueError: an empty file, or a name with a dot.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"folder {folder} does not exist; give dpg_bench/prompts of the benchmark")
    prompts = {}
    for path in sorted(file for file in folder.glob("*.txt") if not file.name.startswith(".")):
        # the evaluator reads a name up to its first dot
        if "." in path.stem:
            raise ValueError(f"{path} has a dot in its name, at which the evaluator truncates the name; rename it")
        prompts[path.stem] = read_text(path).strip()
        if not prompts[path.stem]:
            raise ValueError(f"{path} is empty; copy the benchmark's prompts again")
    if not prompts:
        raise FileNotFoundError(f"folder {folder} holds no .txt files; give dpg_bench/prompts of the benchmark")
    return prompts


def write(options: argparse.Namespace) -> None:
    """Writes `<stem>.png` for every prompt; the samples of prompt i have the sample ids 4 i to 4 i + 3."""
    prompts = read_prompts(options.prompts)
    targets = [
        Target(options.out / f"{stem}.png", prompt, tuple(range(SAMPLES * index, SAMPLES * (index + 1))))
        for index, (stem, prompt) in enumerate(prompts.items())
    ]
    told = "\n".join(f"{stem}\t{prompt}" for stem, prompt in prompts.items())
    draw_folder(options, "dpg", targets, {"prompts": run_settings.digest(told), "count": len(prompts)})


def check(options: argparse.Namespace) -> None:
    """Reports grids that the evaluator would miss, fail on or crop at wrong places."""
    folder, prompts = options.folder, read_prompts(options.prompts)
    check_folder(folder, "dpg write")
    size = options.size or run_settings.read(folder).get("size")
    if size is None:
        raise ValueError(f"the size of the samples of {folder} is unknown; give --size, the evaluator's RESOLUTION")
    expected = [folder / f"{stem}.png" for stem in prompts]
    problems = content_problems(expected, GRID_SIDE * size)
    problems += [
        f"{path} is none of the benchmark's grids; the evaluator fails on such files, so move it out"
        for path in sorted(set(folder.iterdir()) - set(expected))
    ]
    refuse(problems, str(folder))
    print(f"{folder}: {len(expected)} grids of {SAMPLES} samples, {size} pixels each, as the evaluator reads them")
    if len(expected) != PROMPTS:
        print(f"note: the published benchmark has {PROMPTS} prompts")


def _numbers(fields: list[str]) -> list[float]:
    """The numbers at the end of a line: scores and their mean; the path before them may hold commas."""
    found: list[float] = []
    for field in reversed(fields[1:]):
        try:
            found.insert(0, float(field))
        except ValueError:
            break
    return found


def read_results(path: pathlib.Path) -> dict[str, Any]:
    """Reads the evaluator's results file.

    Returns:
      "prompts": {stem: scores of its samples, in [0, 1]}; "categories" and "subcategories": {name: percent}; "score":
      the total in percent, None if the evaluator has not finished.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a prompt's line is malformed (named by number), or no prompt has a line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give the dpg-bench_*_results.txt of the evaluator")
    found: dict[str, Any] = {"prompts": {}, "categories": {}, "subcategories": {}, "score": None}
    level = ""
    for number, line in enumerate(read_text(path).splitlines(), 1):
        total, category = _TOTAL.match(line), _CATEGORY.match(line)
        if line in _LEVELS:
            level = _LEVELS[line]
        elif category and level:
            found[level][category[1]] = float(category[2])
        elif total:
            found["score"] = float(total[1])
        elif line.strip() and not line.startswith(("Model: ", "Image path: ", "Save results to: ")):
            fields = line.split(", ")
            *scores, mean = _numbers(fields) or [math.nan]
            if not scores or not math.isclose(mean, sum(scores) / len(scores), abs_tol=1e-9):
                raise ValueError(
                    f"{path} line {number} does not hold an image's path, the scores of its samples and their mean"
                )
            name = ", ".join(fields[: len(fields) - len(scores) - 1]).replace("\\", "/").rsplit("/", 1)[-1]
            found["prompts"][name.split(".")[0]] = scores
    if not found["prompts"]:
        raise ValueError(f"{path} has no scores of images; give the dpg-bench_*_results.txt of the evaluator")
    return found


def summarise(results: dict[str, Any]) -> dict[str, Any]:
    """The mean over prompts with an interval over prompts, in percent, beside the evaluator's category scores.

    The mean is computed from the prompts' lines. `warnings` tells a difference from the evaluator's total, and missing
    prompts. The evaluator's category scores use only the last sample of every grid.
    """
    prompts = results["prompts"]
    overall = grouped_scores(("all", stem, sum(scores) / len(scores)) for stem, scores in prompts.items())["overall"]
    percent = {name: 100 * overall[name] for name in ("value", "low", "high")}
    warnings = []
    if results["score"] is None:
        warnings.append("the evaluator has not finished: its total is missing")
    elif not math.isclose(results["score"], percent["value"], abs_tol=1e-3):
        warnings.append(
            f"the evaluator's total is {results['score']}, the mean of the prompts' lines {percent['value']:.4f}"
        )
    if len(prompts) != PROMPTS:
        warnings.append(f"{len(prompts)} prompts were scored; the published benchmark has {PROMPTS}")
    samples = {len(scores) for scores in prompts.values()}
    if samples != {SAMPLES}:
        warnings.append(f"prompts have {sorted(samples)} samples; the benchmark has {SAMPLES}")
    return {
        "overall": overall | percent,
        **{name: results[name] for name in ("categories", "subcategories")},
        "warnings": warnings,
    }


def summary(options: argparse.Namespace) -> None:
    """Prints the scores of a results file and writes them as JSON."""
    scores = summarise(read_results(options.results))
    overall = scores["overall"]
    lines = [
        f"DPG-Bench  {overall['value']:.2f}  [{overall['low']:.2f}, {overall['high']:.2f}]  {overall['prompts']} "
        "prompts"
    ]
    lines += [
        f"  {name}: {value:.2f}" for name, value in (*scores["categories"].items(), *scores["subcategories"].items())
    ]
    tell("\n".join(lines), scores["warnings"], scores, options.output)
