"""Checkpoints of (state, data position, meta) at `workdir/checkpoints/<stage>/<step>`, by Orbax.

A save counts once its commit file is written, the last of its files. No rename is needed, which mounted buckets do not
do at once. Every save has checksums (`training.checksums`), which are compared when it is read. Frozen weights are
never saved.
"""

import contextlib
import dataclasses
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from uae_jax import trees
from uae_jax.files.paths import remove_folder, to_path
from uae_jax.training import processes
from uae_jax.training.checksums import array_checksums, describe, json_checksum, structure_checksum

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Restored:
    """The contents of a checkpoint.

    Attributes:
      step: train steps done at the time of the save.
      state: like the target of `restore`, on the target's devices.
      data: position of the data iterator, for `set_state`.
      meta: seconds so far, stage, config digest and the like.
    """

    step: int
    state: PyTree
    data: dict[str, Any]
    meta: dict[str, Any]


class Damaged(ValueError):
    """A checkpoint that cannot be read, or that holds other numbers than were saved."""


def abstract(state: PyTree) -> PyTree:
    """Shapes, types and shardings of a state, a target for `Checkpoints.restore`."""
    return jax.tree.map(ocp.utils.to_shape_dtype_struct, state)


class _KeepGood(ocp.checkpoint_managers.PreservationPolicy):
    """Keeps the checkpoint of one step, however old."""

    step: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        return [checkpoint.step == self.step for checkpoint in checkpoints]


class Checkpoints:
    """The checkpoints of one stage. At its end, the context manager waits for an unfinished save.

    Args:
      folder: `workdir/checkpoints/<stage>`; created if absent.
      keep: number of newest checkpoints to keep, >= 1.
      clean: delete what a kill left of unfinished saves; False for a look at a folder that another run may hold.
    """

    def __init__(self, folder: Path, *, keep: int = 2, clean: bool = True) -> None:
        if keep < 1:
            raise ValueError(f"checkpoints to keep is {keep}; keep at least 1")
        self.folder = to_path(folder).absolute()
        handlers = {"state": ocp.StandardCheckpointHandler()}
        handlers |= {name: ocp.JsonCheckpointHandler() for name in ("data", "meta", "checksums")}
        self._good = _KeepGood()
        policies = ocp.checkpoint_managers
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), self._good]),
            create=True,
            enable_async_checkpointing=True,
            cleanup_tmp_directories=clean,
            temporary_path_class=ocp.path.atomicity.CommitFileTemporaryPath,
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint; None without a checkpoint."""
        return self._manager.latest_step()

    def save(
        self, step: int, state: PyTree, data: dict[str, Any], meta: dict[str, Any], *, good: int | None = None
    ) -> None:
        """Starts to write a checkpoint, unless this step has one. On return the arrays may be donated.

        Args:
          step: train steps done.
          state: pytree of arrays (no typed keys).
          data: JSON-able position of the data iterator after the batch of step `step`.
          meta: JSON-able.
          good: step of this checkpoint or of an older one, which is kept beside the newest checkpoints.

        Raises:
          OSError: this save or the one before it could not be written; the message has the remedy.
        """
        self._good.step = good
        if step in self._manager.all_steps():
            return
        checksums = {
            "structure": structure_checksum(state),
            "state": array_checksums(state),
            "data": json_checksum(data),
            "meta": json_checksum(meta),
        }
        items = {
            "state": ocp.args.StandardSave(state),
            "data": ocp.args.JsonSave(data),
            "meta": ocp.args.JsonSave(meta),
            "checksums": ocp.args.JsonSave(checksums | {"checksums": json_checksum(checksums)}),
        }
        with self._written():
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def restore(self, target: PyTree, step: int | None = None) -> Restored | None:
        """Reads the checkpoint of `step`, or the newest that can be read; None without such a checkpoint.

        Newer checkpoints that are damaged are renamed and named on stderr, so that no restart needs a hand.

        Args:
          target: the state as arrays or as `jax.ShapeDtypeStruct` with shardings; only structure, shapes, types and
            shardings are used.
          step: train step to read.

        Raises:
          FileNotFoundError: no checkpoint of that step.
          Damaged: the checkpoint of that step cannot be read.
          ValueError: its arrays differ from `target`; the message has the first array and the remedy.
        """
        self.wait()
        wanted = abstract(target)
        found = sorted(self._manager.all_steps())
        if step is not None:
            if step not in found:
                raise FileNotFoundError(f"{self.folder} has no checkpoint of step {step}; it has {found}")
            try:
                return self._read(step, wanted)
            except Damaged as error:
                raise Damaged(f"{error}; delete {self.folder} to train the stage again") from error
        while found:
            read = self._read_or_none(found[-1], wanted)
            if read is not None:
                return read
            found.pop()
        return None

    def meta(self) -> dict[str, Any] | None:
        """The meta of the newest checkpoint whose meta can be read; None without one. The arrays are not read."""
        self.wait()
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                return self._texts(step, ("meta",))["meta"]
            except Damaged:
                continue  # `restore` says so
        return None

    def reached_preemption(self, step: int) -> bool:
        """Whether the machines are about to be preempted; all processes get the same answer at the same step."""
        return self._manager.reached_preemption(step)

    def wait(self) -> None:
        """Blocks until an unfinished save is on disk. Errors are those of `save`."""
        with self._written():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for an unfinished save and frees the manager. Errors are those of `save`."""
        try:
            self.wait()
        finally:
            self._manager.close()

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        """Errors of a save with its folder and the remedy."""
        try:
            yield
        except Exception as error:
            if processes.lost_process(error):
                raise
            failed = OSError(
                f"a checkpoint could not be written to {self.folder} ({_reason(error)}); make room there or name "
                "another --workdir; older checkpoints are whole"
            )
            failed.errno = _code(error)
            raise failed from error

    def _read_or_none(self, step: int, wanted: PyTree) -> Restored | None:
        """The checkpoint of a step; None, after it was renamed, where one of the processes cannot read it."""
        read, why = None, ""
        try:
            read = self._read(step, wanted)
        except Damaged as error:
            why = str(error)
        if processes.all_agree(read is not None):
            return read
        aside = self.folder / f"damaged_{step}"
        if jax.process_index() == 0:
            remove_folder(aside)
            (self.folder / str(step)).rename(aside)
            older = [other for other in self._manager.all_steps() if other < step]
            then = f"the stage continues from step {max(older)}" if older else "the stage begins again"
            print(
                f"note: {why or 'another process cannot read a checkpoint'}; it is now {aside}, and {then}",
                file=sys.stderr,
            )
        processes.wait_for_all(f"checkpoint {step} set aside")
        self._manager.reload()
        return None

    def _read(self, step: int, wanted: PyTree) -> Restored:
        """Reads a checkpoint and compares its checksums."""
        texts = self._texts(step, ("data", "meta"))
        self._check(step, wanted, texts["checksums"])
        try:
            state = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(wanted)))[
                "state"
            ]
        except Exception as error:
            raise self._damaged(step, _reason(error)) from error
        if saved := texts["checksums"].get("state"):
            found = array_checksums(state)
            changed = [name for name, value in found.items() if value != saved.get(name)]
            if changed:
                raise self._damaged(step, f"{changed[0]} has other numbers than were saved")
        return Restored(step, state, texts["data"], texts["meta"])

    def _texts(self, step: int, names: Sequence[str]) -> dict[str, Any]:
        """The JSON items of a checkpoint by name, and `checksums`; {} for those of an earlier version."""
        names = [*names, "checksums"] if (self.folder / str(step) / "checksums").exists() else names
        items = {name: ocp.args.JsonRestore() for name in names}
        try:
            read = self._manager.restore(step, args=ocp.args.Composite(**items))
            texts = {name: read[name] for name in names}
            known = texts.setdefault("checksums", {})
            own = known.pop("checksums", None)
            for name in names if "checksums" in names else ():
                if json_checksum(texts[name]) != (own if name == "checksums" else known.get(name)):
                    raise ValueError(f"{name} has changed since it was saved")
        except Exception as error:
            raise self._damaged(step, _reason(error)) from error
        return texts

    def _check(self, step: int, target: PyTree, checksums: Mapping[str, Any]) -> None:
        """Compares names, shapes and types with the stored arrays, because Orbax's errors have no remedy."""
        try:
            tree = self._manager.item_metadata(step)["state"].tree
            stored = trees.flatten(tree)
        except Exception as error:
            raise self._damaged(step, _reason(error)) from error
        if checksums.get("structure", "") not in ("", structure_checksum(tree)):
            raise self._damaged(step, "its list of arrays has changed since it was saved")
        wanted = trees.flatten(target)
        # parameters first: a different optimizer moment follows from a different parameter
        for name in sorted([*wanted, *stored], key=lambda name: not name.startswith("params/")):
            ours, theirs = ("absent" if name not in tree else describe(tree[name]) for tree in (wanted, stored))
            if ours != theirs:
                raise ValueError(
                    f"checkpoint {self.folder / str(step)} does not fit this configuration: {name} is {theirs} in "
                    f"the checkpoint and {ours} in the configuration; continue with the configuration of that run, or "
                    "use a new --workdir"
                )

    def _damaged(self, step: int, reason: str) -> Damaged:
        return Damaged(f"checkpoint {self.folder / str(step)} cannot be read ({reason})")


def _reason(error: Exception) -> str:
    """The first line of an error, or its kind; of a failed call of the system the system's own words."""
    text, code = str(error).strip(), _code(error)
    if code is not None:
        return os.strerror(code)
    return text.splitlines()[0][:200] if text else type(error).__name__


def _code(error: Exception) -> int | None:
    """The system's number of a failed call; None for other errors."""
    found = re.search(r"os_error_code='(\d+)'", str(error))
    return int(found[1]) if found else getattr(error, "errno", None)
