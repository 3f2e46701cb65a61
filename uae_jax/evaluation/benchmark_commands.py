"""What the commands of the benchmarks share: the action `summary`, and how problems are told."""

import pathlib
from collections.abc import Sequence
from typing import Any

from uae_jax.files.json_files import write_json


def add_summary(actions: Any, what: str, argument: str, files: str) -> None:
    """Adds `summary` to the sub-parsers: the file that is summarised, and --output.

    Args:
      actions: of `add_subparsers`.
      what: the scores are from.
      argument: name of the file among the options.
      files: which files it may be.
    """
    summary = actions.add_parser("summary", help=what, allow_abbrev=False)
    summary.add_argument(argument, type=pathlib.Path, help=files)
    summary.add_argument("--output", type=pathlib.Path, help="JSON file for the scores")


def tell(report: str, warnings: Sequence[str], scores: Any = None, output: pathlib.Path | None = None) -> None:
    """Prints a report and its warnings, and writes the scores as JSON where there is an output."""
    print("\n".join([report, *(f"note: {warning}" for warning in warnings)]))
    if output:
        write_json(output, scores)


def check_folder(folder: pathlib.Path, action: str) -> None:
    """Refuses a folder that is not there.

    Args:
      folder: that an action has written.
      action: its words on the command line.

    Raises:
      FileNotFoundError: no such folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"folder {folder} does not exist; give the --out of `{action}`")


def refuse(problems: Sequence[str], what: str, shown: int = 20) -> None:
    """Prints problems one a line and ends with an error; does nothing without any.

    Raises:
      ValueError: there are problems.
    """
    for problem in problems[:shown]:
        print(problem)
    if len(problems) > shown:
        print(f"... and {len(problems) - shown} more")
    if problems:
        raise ValueError(f"{what} has {len(problems)} problem{'s' if len(problems) > 1 else ''}, listed above")
