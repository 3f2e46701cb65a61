"""One part of the check in a process of its own: `python -m benchmarks.gpu_check.part NAME ...`, by `__main__`."""

import argparse
import math
import pathlib
from collections.abc import Callable
from typing import Any

from uae_jax.files.json_files import write_json


def plain(value: Any) -> Any:
    """Figures as JSON has them: numpy's numbers as Python's, and what is not finite as a text."""
    if isinstance(value, dict):
        return {str(name): plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if hasattr(value, "item"):
        value = value.item()
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def check_card(kind: str) -> None:
    """Checks that a part's library computes on a card; jax is not imported beside torch, whose memory it would take.

    Raises:
      RuntimeError: it does not.
    """
    if kind == "torch":
        import torch

        backend = "gpu" if torch.cuda.is_available() else "cpu"
    else:
        import jax

        backend = jax.default_backend()
    if backend != "gpu":
        library = "torch" if kind == "torch" else "jax"
        raise RuntimeError(f"{library} computes on {backend}, not on a card; install its CUDA build")


def run(name: str, size: str, work: pathlib.Path, until: float, report: Callable[[dict], None]) -> None:
    """Runs a part.

    Args:
      name: of `schedule.PARTS`.
      size: `full` or `small`.
      work: folder that all parts share.
      until: Unix time at which the part should be done.
      report: keeps the figures so far.

    Raises:
      RuntimeError: the full size without a card.
      ValueError: no such part.
    """
    kind, _, stage = name.partition(":")
    if size == "full":
        check_card(kind)
    if kind == "device":
        from benchmarks.gpu_check import device

        device.run(size, report)
    elif kind == "steps":
        from benchmarks.gpu_check import steps

        steps.run(size, stage, until, report)
    elif kind == "attention":
        from benchmarks.gpu_check import forms

        forms.run(size, report)
    elif kind in ("phases", "torch"):
        from benchmarks.gpu_check import sides

        sides.run(kind, size, stage, work, until, report)
    else:
        raise ValueError(f"there is no part {name!r}")


def main() -> None:
    """Keeps the figures in a file, whatever happens afterwards."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--size", required=True)
    parser.add_argument("--work", type=pathlib.Path, required=True)
    parser.add_argument("--until", type=float, required=True)
    parser.add_argument("--figures", type=pathlib.Path, required=True)
    options = parser.parse_args()

    def keep(figures: dict) -> None:
        write_json(options.figures, plain(figures))

    run(options.name, options.size, options.work, options.until, keep)


if __name__ == "__main__":
    main()
