"""What a stage leaves on disk beside its checkpoints, and whether a run may continue it.

`checkpoints/<stage>/finished.json` is the record of a finished stage. `trained/<stage>/` has what it trained, without
the moments of its optimizer; its checkpoints are deleted when the next stage has finished too.
"""

import dataclasses
import json
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax

from uae_jax.files.paths import remove_folder, to_path
from uae_jax.settings import differences
from uae_jax.training import processes
from uae_jax.training.checkpoint import Checkpoints

PyTree = Any
Scores = dict[str, Any]
ADDED = ("contents of model.folder",)  # of an identity; workdirs of earlier versions lack them


@dataclasses.dataclass(frozen=True)
class StageResult:
    """A finished stage. `seconds` is training, `wall_seconds` includes evaluation; both go on over restarts.

    `steps` are those that the parameters have seen. `guard` is None, or what tripped: a `guard.Trip.record` with
    `restored_step`. `scoring` has the settings of the scores `before` and `after`, which a restart may change.
    """

    name: str
    state: Any  # a TrainState; None where nothing was trained
    steps: int
    seconds: float
    wall_seconds: float
    before: Scores
    after: Scores
    guard: dict[str, Any] | None = None
    scoring: dict[str, Any] = dataclasses.field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """The JSON-able part, one entry of `stages` in summary.json."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "state"}


def finished_record(workdir: Path, name: str, steps: int = 0) -> dict[str, Any] | None:
    """The record of a finished stage; None for a stage that is not, or whose last checkpoint is gone.

    Args:
      workdir: the training folder.
      name: stage name.
      steps: of the stage now; one that finished after fewer steps is not finished, unless the guard ended it.

    Raises:
      ValueError: the record is not JSON.
    """
    folder = to_path(workdir) / "checkpoints" / name
    path = folder / "finished.json"
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        whole = record["steps"] >= steps or record["guard"] is not None
        there = any((place / str(record["steps"])).is_dir() for place in (folder, _trained(workdir, name)))
        return record if whole and there else None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it, and the stage continues") from error


def tripped_record(path: Path) -> dict[str, Any] | None:
    """What the guard left on disk when it ended a stage; None where there is no such file.

    Raises:
      ValueError: the file is damaged.
    """
    if not path.exists():
        return None
    try:
        trip = json.loads(path.read_text(encoding="utf-8"))
        _ = trip["restored_step"], trip["step"], trip["seconds"], trip["wall_seconds"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); delete it, and the stage goes on") from error
    return trip


def _trained(workdir: Path, name: str) -> Path:
    return to_path(workdir) / "trained" / name


def keep_trained(workdir: Path, result: StageResult, trained: PyTree, identity: Mapping[str, Any]) -> None:
    """Writes what a finished stage has trained, unless it is there.

    Args:
      workdir: the training folder.
      result: of the stage.
      trained: its parameters as the following stages read them.
      identity: of the stage.
    """
    with Checkpoints(_trained(workdir, result.name), keep=1) as checkpoints:
        checkpoints.save(result.steps, trained, {}, {"identity": identity})


def read_trained(workdir: Path, name: str, target: PyTree) -> PyTree | None:
    """What a finished stage has trained; None where that is not on disk, or cannot be read.

    Args:
      workdir: the training folder.
      name: stage name.
      target: its parameters, as arrays or shapes with shardings.

    Raises:
      ValueError: the arrays on disk differ from the target.
    """
    folder = _trained(workdir, name)
    if not folder.is_dir():
        return None
    with Checkpoints(folder, keep=1) as checkpoints:
        found = checkpoints.restore(target)
    return None if found is None else found.state


def drop_checkpoints(workdir: Path, name: str) -> None:
    """Deletes the checkpoints of a finished stage whose trained parameters are on disk."""
    kept = _trained(workdir, name)
    if jax.process_index() == 0 and any(kept.glob("*/commit_success.txt")):
        for path in [*(to_path(workdir) / "checkpoints" / name).iterdir()]:
            if path.is_dir():
                remove_folder(path)
    processes.wait_for_all(f"checkpoints of {name} dropped")


def check_configuration(
    workdir: Path, name: str, identity: Mapping[str, Any], *, free: Collection[str] = (), steps: int | None = None
) -> None:
    """Refuses a workdir whose stage was trained with other settings, before a run writes anything there.

    Args:
      workdir: the training folder; it may not exist yet.
      name: stage name.
      identity: the settings that change the numbers.
      free: fields of the identity that may differ.
      steps: of the stage now; None is not checked.

    Raises:
      ValueError: the stage's newest checkpoint has other settings, or more steps.
    """
    folder = to_path(workdir) / "checkpoints" / name
    if not folder.is_dir():
        return
    with Checkpoints(folder, clean=False) as checkpoints:
        meta, done = checkpoints.meta(), checkpoints.latest_step()
    if meta is not None:
        check_identity(folder, meta, identity, free)
        check_steps(folder, done or 0, steps)
        return
    kept = _trained(workdir, name)
    if not kept.is_dir():
        return
    with Checkpoints(kept, clean=False) as checkpoints:
        meta = checkpoints.meta()
    if meta is not None:  # without its optimizer's moments the stage cannot be made longer
        check_identity(folder, meta, identity, [field for field in free if not field.endswith(".steps")])


def check_steps(folder: Path, done: int, steps: int | None) -> None:
    if steps is not None and done > steps:
        raise ValueError(
            f"{folder} has done {done} steps, and the stage now has {steps}; set {folder.name}.steps to {done} or "
            "more, or use a new --workdir"
        )


def check_identity(
    folder: Path,
    meta: Mapping[str, Any],
    identity: Mapping[str, Any] | None,
    free: Collection[str] = (),
    *,
    tell: bool = False,
) -> None:
    """Refuses other settings than a checkpoint's; with `tell`, prints those that may differ and do."""
    stored = meta.get("identity")
    if identity is None or (stored is None and "digest" not in meta):
        return
    remedy = f"use the configuration in {folder.parents[1] / 'config.json'}, or a new --workdir"
    if stored is None:
        raise ValueError(f"{folder} was written by an earlier version, whose settings had other names; {remedy}")
    stored = {name: identity[name] for name in ADDED if name in identity} | stored
    changed = differences(stored, identity, apart=free)
    if changed:
        raise ValueError(f"{folder} was written with another configuration: {'; '.join(changed)}; {remedy}")
    others = differences(stored, identity)
    if others and tell and jax.process_index() == 0:
        print(f"note: {folder.name} continues with other settings: {'; '.join(others)}", file=sys.stderr)
