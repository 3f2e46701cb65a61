"""Captions images, generates images from texts, or reconstructs images and shows both side by side.

    python -m uae_jax.infer caption photo.png more/*.jpg
    python -m uae_jax.infer generate "gray background , top left large red circle" --out generated
    python -m uae_jax.infer reconstruct folder_of_images --checkpoint runs/tiny --out strips

Without --checkpoint the built-in model of 32-pixel scenes is used, which was trained through all four stages;
`--checkpoint start` is the same model before. --checkpoint takes an official UAE folder, a training workdir, or the
folder of a Janus-Pro model.

Results are written after each batch; images of one shape share a batch, so the order of results may differ from the
order of inputs. An image that cannot be read is reported, the other images are processed, and the exit code is 1.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from uae_jax.command_line import run_command, stay_offline
from uae_jax.files.paths import to_path
from uae_jax.files.pictures import save_picture
from uae_jax.model_flags import add_model_flags, load_model

if TYPE_CHECKING:
    from uae_jax.api import Model

stay_offline()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument("command", choices=("caption", "generate", "reconstruct"), help="what to do with the inputs")
    parser.add_argument(
        "inputs", nargs="+", metavar="IMAGE|TEXT", help="image files, folders or patterns; texts for `generate`"
    )
    parser.add_argument("--out", type=to_path, default=to_path("out"), help="folder of the written images")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    add_model_flags(parser)
    parser.set_defaults(run=run)


def _names(paths: list[pathlib.Path]) -> list[str]:
    """A file stem for each input, with a number where another input has the same stem."""
    taken: set[str] = set()
    names = []
    for path in paths:
        name, number = path.stem, 1
        while {name, f"{name}_strip"} & taken:
            number += 1
            name = f"{path.stem}_{number}"
        taken |= {name, f"{name}_strip"}
        names.append(name)
    return names


def _results(options: argparse.Namespace, model: "Model", inputs: list, failed: Callable) -> Iterator[tuple[int, Any]]:
    """(index, caption, image or reconstruction) of each input, batch by batch."""
    each = {"caption": model.each_caption, "generate": model.each_drawing, "reconstruct": model.each_reconstruction}
    return each[options.command](inputs, failed=failed)


def _written(options: argparse.Namespace, inputs: list, names: list[str], index: int, result: Any) -> tuple[dict, str]:
    """JSON record and line of text of one result, whose images are written.

    Raises:
      OSError, ValueError: they cannot be written.
    """
    out, given = options.out, inputs[index]
    if options.command == "caption":
        return {"image": str(given), "caption": result}, f"{given}: {result}"
    if options.command == "generate":
        file = out / f"{index:04d}.png"
        save_picture(result, file, given)
        return {"text": given, "image": str(file)}, f"{file}: {given}"
    file, strip = out / f"{names[index]}.png", out / f"{names[index]}_strip.png"
    save_picture(result.image, file, result.caption)
    save_picture(result.strip(), strip, result.caption)
    record = {"image": str(given), "caption": result.caption, "reconstruction": str(file), "strip": str(strip)}
    return record, f"{given}: {result.caption}\n  -> {strip}"


def run(options: argparse.Namespace) -> None:
    """Runs one command; results are printed and written after each batch.

    Raises:
      ValueError, FileNotFoundError: a bad image, folder or setting. Of several inputs the good ones are processed
        first, and written files stay.
    """
    from tqdm import tqdm

    from uae_jax.data.images import find_images

    inputs = options.inputs if options.command == "generate" else find_images(options.inputs)
    model = load_model(options, len(inputs))
    if options.command == "generate" and (note := model.unknown(options.inputs)):
        print(f"note: {note}", file=sys.stderr)
    problems: list[str] = []
    with tqdm(total=len(inputs), desc=options.command, disable=None) as bar:

        def report(record: dict, text: str) -> None:
            bar.update(1)
            tqdm.write(json.dumps(record) if options.json else text, file=sys.stdout)
            sys.stdout.flush()

        def failed(index: int, error: Exception) -> None:
            problem = " ".join(str(error).split())
            # the error of a system call does not name the input, and the last line has all problems
            problems.append(problem if str(inputs[index]) in problem else f"{inputs[index]}: {problem}")
            kind = "text" if options.command == "generate" else "image"
            report({kind: str(inputs[index]), "error": problems[-1]}, f"{inputs[index]}: not done: {problems[-1]}")

        names = _names(inputs) if options.command == "reconstruct" else []
        for index, result in _results(options, model, inputs, failed):
            try:
                record, text = _written(options, inputs, names, index, result)
            except (OSError, ValueError) as error:
                failed(index, error)
            else:
                report(record, text)
    if problems:
        count = f"{len(problems)} of {len(inputs)} inputs could not be done: " if len(inputs) > 1 else ""
        raise ValueError(count + "; ".join(problems))


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    run_command("uae_jax.infer", __doc__, add_arguments, arguments)


if __name__ == "__main__":
    main()
