"""Writers of metrics (JSON lines, TensorBoard, optionally W&B), and a clock that continues after restarts."""

import contextlib
import json
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from uae_jax.files.json_files import read_records, write_json_lines


class Clock:
    """Seconds of work, continued from earlier runs."""

    def __init__(self, seconds: float = 0.0, wall_seconds: float = 0.0) -> None:
        self._start = time.monotonic()
        self._seconds, self._wall, self._paused = seconds, wall_seconds, 0.0

    @property
    def wall_seconds(self) -> float:
        """Seconds of all runs, with the time inside `paused()` blocks (evaluation, sample images)."""
        return self._wall + time.monotonic() - self._start

    @property
    def seconds(self) -> float:
        """Seconds of all runs without the pauses."""
        return self._seconds + time.monotonic() - self._start - self._paused

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The time in the block does not count as `seconds`. Blocks do not nest."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self._paused += time.monotonic() - begin


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file without a last line truncated by a kill; [] without a file.

    Raises:
      ValueError: another line is not a JSON object; the message has its number.
    """
    return read_records(path) if Path(path).exists() else []


class MetricWriter:
    """Writes `metrics.jsonl`, `tensorboard/<stage>/` and, with a project name, W&B. Only process 0 writes.

    Args:
      workdir: the training folder.
      tensorboard: write event files, one TensorBoard run per stage.
      wandb_project: W&B project; "" for none. The id in `workdir/wandb_id` continues the same run after a restart.
      config: shown by W&B.

    Raises:
      ImportError: a project is given and wandb is not installed.
    """

    def __init__(
        self, workdir: Path, *, tensorboard: bool = True, wandb_project: str = "", config: Mapping | None = None
    ) -> None:
        self.workdir = Path(workdir)
        self.path = self.workdir / "metrics.jsonl"
        self.active = jax.process_index() == 0
        self._tensorboard = tensorboard
        self._board: Any = None
        self._wandb: Any = None
        if self.active and wandb_project:
            self._wandb = _start_wandb(self.workdir, wandb_project, config)

    def begin(self, stage: str, step: int) -> None:
        """Starts a stage, or continues a stage after `step` steps: lines of later steps, written before a kill, are
        dropped, and so are lines of the guard.
        """
        if not self.active:
            return
        lines = read_lines(self.path)
        kept = [line for line in lines if line["stage"] != stage or (line["step"] <= step and "guard" not in line)]
        write_json_lines(self.path, kept)
        if self._tensorboard:
            self._close_board()
            folder = self.workdir / "tensorboard" / stage
            # purged events stay in their file, which the suffix protects from a restart in the same second
            purge = step + 1 if folder.exists() else None
            import tensorboardX  # imports torch if installed, which takes seconds

            self._board = tensorboardX.SummaryWriter(str(folder), purge_step=purge, filename_suffix=f".{step}")

    def write(self, stage: str, step: int, seconds: float, numbers: Mapping[str, float]) -> None:
        """Writes one logged step; non-finite numbers become null in JSON."""
        if not self.active:
            return
        values = {name: float(value) for name, value in numbers.items()}
        line = {"stage": stage, "step": step, "seconds": round(seconds, 3)}
        line |= {name: value if np.isfinite(value) else None for name, value in values.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()
        if self._wandb is not None:
            self._wandb.log({f"{stage}/step": step} | {f"{stage}/{name}": value for name, value in values.items()})

    def event(self, stage: str, step: int, seconds: float, record: Mapping[str, Any]) -> None:
        """Writes the guard's action after a step, JSON-able with finite numbers, as the field `guard` of a new line."""
        if not self.active:
            return
        line = {"stage": stage, "step": step, "seconds": round(seconds, 3), "guard": dict(record)}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.text("guard", step, json.dumps(record))
        if self._wandb is not None:
            self._wandb.log({f"{stage}/step": step, f"{stage}/guard": json.dumps(record)})

    def image(self, name: str, step: int, pixels: np.ndarray) -> None:
        """Writes an image to TensorBoard: uint8 [H, W, 3]."""
        if self._board is not None:
            self._board.add_image(name, np.asarray(pixels), step, dataformats="HWC")

    def text(self, name: str, step: int, text: str) -> None:
        """Writes a text to TensorBoard."""
        if self._board is not None:
            self._board.add_text(name, text, step)

    def close(self) -> None:
        """Flushes and closes everything."""
        self._close_board()
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None

    def _close_board(self) -> None:
        if self._board is not None:
            self._board.close()
            self._board = None


def _start_wandb(workdir: Path, project: str, config: Mapping | None) -> Any:
    try:
        import wandb  # pyright: ignore[reportMissingImports] (an optional extra)
    except ImportError as error:
        raise ImportError(
            f"wandb project {project!r} is set but wandb is not installed; pip install 'uae_jax[wandb]'"
        ) from error
    path = workdir / "wandb_id"
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:12] + "\n", encoding="utf-8")
    return wandb.init(
        project=project,
        id=path.read_text(encoding="utf-8").strip(),
        resume="allow",
        dir=str(workdir),
        config=dict(config or {}),
    )
