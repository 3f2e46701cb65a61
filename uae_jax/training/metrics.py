"""Writers of metrics and samples (JSON lines, TensorBoard, W&B), and a clock that continues after restarts."""

import contextlib
import io
import json
import math
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from uae_jax.files.json_files import read_records, write_json_lines
from uae_jax.files.paths import LocalCopies, is_url, to_path
from uae_jax.files.strips import strip
from uae_jax.files.whole import named

if TYPE_CHECKING:
    from PIL import Image

FLUSH_SECONDS = 5.0
BUCKET_SECONDS = 60.0  # there the whole file is written anew
BUCKET_SHARE = 20.0  # at most one second of writing in so many
STRIP_SIDE = 192  # of each picture of a strip, in pixels


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
      ValueError: another line is not a JSON object, or has no stage and step; the message has its number.
    """
    found = read_records(path) if to_path(path).exists() else []
    for number, line in enumerate(found, 1):
        if not (isinstance(line.get("stage"), str) and isinstance(line.get("step"), int)):
            raise ValueError(f"{path} object {number} has no stage and step; delete that line")
    return found


class MetricWriter:
    """Writes `metrics.jsonl`, `tensorboard/<stage>/` and, with a project name, W&B. Only process 0 writes.

    What is written reaches the disk within `FLUSH_SECONDS`, before every checkpoint, and when a stage ends or fails. A
    file in a bucket cannot grow: it is written anew, so that this is done every `BUCKET_SECONDS` or more.

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
        self.workdir = to_path(workdir)
        self.path = self.workdir / "metrics.jsonl"
        self.active = jax.process_index() == 0
        self._tensorboard = tensorboard
        self._board: Any = None
        self._wandb: Any = None
        self._lines: list[str] = []  # not on disk yet
        self._whole = ""  # what is on disk, of a file in a bucket
        self._flushed, self._period = -math.inf, FLUSH_SECONDS
        self._events: LocalCopies | None = None
        self._offset = 0  # steps of the stages before, so that W&B's steps only grow
        if self.active and wandb_project:
            self._wandb = _start_wandb(self.workdir, wandb_project, config)

    def begin(self, stage: str, step: int, *, scored: bool = True) -> None:
        """Starts a stage, or continues a stage after `step` steps.

        Lines of later steps, written before a kill, are dropped, and so are lines of the guard.

        Args:
          stage: its name.
          step: steps that are done.
          scored: whether the scores after step `step` stay too; False if they are computed again.
        """
        if not self.active:
            return
        self.flush()

        def stays(line: Mapping[str, Any]) -> bool:
            again = not scored and line["step"] == step and any(name.startswith("eval/") for name in line)
            return line["step"] <= step and "guard" not in line and not again

        kept = [line for line in read_lines(self.path) if line["stage"] != stage or stays(line)]
        write_json_lines(self.path, kept)
        if is_url(self.path):
            self._whole = self.path.read_text(encoding="utf-8")
        before = {line["stage"]: line["step"] for line in kept if line["stage"] != stage}
        self._offset = sum(before.values())
        if self._tensorboard:
            self._close_board()
            self._board = self._begin_board(stage, [line for line in kept if line["stage"] == stage])
            for folder, when in sample_folders(self.workdir, stage):
                if when <= step:
                    self.samples(stage, when, folder, again=True)

    def _begin_board(self, stage: str, kept: Sequence[Mapping[str, Any]]) -> Any:
        """A TensorBoard run with the lines that stay, in a file of its own.

        TensorBoard sorts event files by the clock in their names, so that one written after the clock went back would
        not hide the points of an older one. The older ones are deleted.
        """
        folder = self.workdir / "tensorboard" / stage
        for path in [*folder.glob("events.*")]:
            path.unlink()
        self._events = LocalCopies(folder)
        import tensorboardX  # imports torch if installed, which takes seconds

        board = tensorboardX.SummaryWriter(str(self._events.local))
        for line in kept:
            for name, value in line.items():
                if name not in ("stage", "step", "seconds"):
                    board.add_scalar(name, math.nan if value is None else value, line["step"])
        board.flush()
        return board

    def write(self, stage: str, step: int, seconds: float, numbers: Mapping[str, float]) -> None:
        """Writes one logged step; non-finite numbers become null in JSON."""
        if not self.active:
            return
        values = {name: float(value) for name, value in numbers.items()}
        line = {"stage": stage, "step": step, "seconds": round(seconds, 3)}
        line |= {name: value if np.isfinite(value) else None for name, value in values.items()}
        self._lines.append(json.dumps(line) + "\n")
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        self._log_wandb(stage, step, values)
        if time.monotonic() - self._flushed >= self._period:
            self.flush()

    def scores(self, stage: str, step: int, scores: Mapping[str, Any]) -> None:
        """Shows held-out scores before (step 0) and after a stage as `held_out/NAME`; `summary.json` keeps them."""
        values = {
            f"held_out/{name}": float(score["value"] if isinstance(score, Mapping) else score)
            for name, score in scores.items()
        }
        if not self.active or not values:
            return
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        self._log_wandb(stage, step, values)

    def samples(self, stage: str, step: int, folder: Path, *, again: bool = False) -> None:
        """Shows the samples of a folder as strips, of original, caption and reconstruction.

        Args:
          stage, step: of the samples.
          folder: that `samples.json` lies in; without it nothing is shown.
          again: W&B has these samples, and TensorBoard's file is a new one.
        """
        if not self.active or (self._board is None and self._wandb is None):
            return
        strips = read_strips(folder)
        for index, (image, _) in enumerate(strips):
            if self._board is not None:
                self._board.add_image(f"samples/{index}", np.asarray(image), step, dataformats="HWC")
        if strips and self._board is not None:
            captions = "\n".join(f"{index}. {caption}" for index, (_, caption) in enumerate(strips))
            self._board.add_text("captions", captions, step)
        if strips and self._wandb is not None and not again:
            import wandb  # pyright: ignore[reportMissingImports] (an optional extra)

            self._log_wandb(
                stage, step, {"samples": [wandb.Image(image, caption=caption) for image, caption in strips]}
            )

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """What was written in the block is on disk after it, also where it fails; its own error comes first."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(OSError):
                self.flush()
            raise
        self.flush()

    def flush(self) -> None:
        """Puts on disk what was written so far. A file in a bucket is written anew with each call."""
        begin = time.monotonic()
        if self._lines and is_url(self.path):
            whole = self._whole + "".join(self._lines)
            self.path.write_text(whole, encoding="utf-8")
            self._whole, self._lines = whole, []
        elif self._lines:
            with named(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write("".join(self._lines))
            self._lines = []
        if self._board is not None and self._events is not None:
            self._board.flush()
            self._events.copy()
        self._flushed = time.monotonic()
        if is_url(self.path):
            self._period = max(BUCKET_SECONDS, BUCKET_SHARE * (self._flushed - begin))

    def event(self, stage: str, step: int, seconds: float, record: Mapping[str, Any]) -> None:
        """Writes the guard's action after a step, JSON-able with finite numbers, as the field `guard` of a new line."""
        if not self.active:
            return
        line = {"stage": stage, "step": step, "seconds": round(seconds, 3), "guard": dict(record)}
        self._lines.append(json.dumps(line) + "\n")
        if self._board is not None:
            self._board.add_text("guard", json.dumps(record), step)
        self.flush()
        self._log_wandb(stage, step, {"guard": json.dumps(record)})

    def _log_wandb(self, stage: str, step: int, values: Mapping[str, Any]) -> None:
        """Sends values to W&B, which ignores steps that it has; a restart repeats steps with equal values."""
        if self._wandb is not None:
            named = {f"{stage}/step": step} | {f"{stage}/{name}": value for name, value in values.items()}
            self._wandb.log(named, step=self._offset + step)

    def close(self) -> None:
        """Flushes and closes everything."""
        self.flush()
        self._close_board()
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None

    def _close_board(self) -> None:
        if self._board is not None and self._events is not None:
            self._board.close()
            self._events.close()
            self._board = self._events = None


def sample_folders(workdir: Path, stage: str) -> list[tuple[Path, int]]:
    """The folders of a stage's samples before and during it, with their steps, in order."""
    samples = to_path(workdir) / "samples"
    found = [(samples / f"{stage}_before", 0)]
    for folder in samples.glob(f"{stage}_step*"):
        number = folder.name.removeprefix(f"{stage}_step")
        found += [(folder, int(number))] if number.isdigit() else []
    return sorted((entry for entry in found if (entry[0] / "samples.json").is_file()), key=lambda entry: entry[1])


def read_strips(folder: Path) -> list[tuple["Image.Image", str]]:
    """The samples of a folder as strips with their captions; none where it has no `samples.json`."""
    from PIL import Image

    path = to_path(folder) / "samples.json"
    if not path.is_file():
        return []
    found = []
    for sample in json.loads(path.read_text(encoding="utf-8")):
        files = [path.parent / sample[name] for name in ("original", "reconstruction")]
        pictures = [Image.open(io.BytesIO(file.read_bytes())) for file in files]
        found.append((strip(pictures[0], sample["caption"], pictures[1], STRIP_SIDE), sample["caption"]))
    return found


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
        dir=None if is_url(workdir) else str(workdir),
        config=dict(config or {}),
    )
