"""Checkpoints of (state, data position, meta) at `workdir/checkpoints/<stage>/<step>`, by Orbax.

A save is written to a temporary folder and renamed when complete, so a kill cannot leave a broken newest checkpoint.
Frozen weights are never saved.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from uae_jax import trees

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
    """

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"checkpoints to keep is {keep}; keep at least 1")
        self.folder = Path(folder).absolute()
        handlers = {
            "state": ocp.StandardCheckpointHandler(),
            "data": ocp.JsonCheckpointHandler(),
            "meta": ocp.JsonCheckpointHandler(),
        }
        self._good = _KeepGood()
        policies = ocp.checkpoint_managers
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), self._good]),
            create=True,
            enable_async_checkpointing=True,
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
        """
        self._good.step = good
        if step in self._manager.all_steps():
            return
        items = {
            "state": ocp.args.StandardSave(state),
            "data": ocp.args.JsonSave(data),
            "meta": ocp.args.JsonSave(meta),
        }
        self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def restore(self, target: PyTree, step: int | None = None) -> Restored | None:
        """Reads the checkpoint of `step` (default: the newest); None without a checkpoint.

        Args:
          target: the state as arrays or as `jax.ShapeDtypeStruct` with shardings; only structure, shapes, types and
            shardings are used.
          step: train step to read.

        Raises:
          FileNotFoundError: no checkpoint of that step.
          ValueError: the folder is damaged, or its arrays differ from `target`; the message has the first array and the
            remedy.
        """
        self.wait()
        found = self._manager.all_steps()
        if step is None and not found:
            return None
        if step is not None and step not in found:
            raise FileNotFoundError(f"{self.folder} has no checkpoint of step {step}; it has {sorted(found)}")
        step = max(found) if step is None else step
        wanted = abstract(target)
        self._check(step, wanted)
        items = {
            "state": ocp.args.StandardRestore(wanted),
            "data": ocp.args.JsonRestore(),
            "meta": ocp.args.JsonRestore(),
        }
        try:
            read = self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:
            raise self._damaged(step, error) from error
        return Restored(step, read["state"], read["data"], read["meta"])

    def meta(self) -> dict[str, Any] | None:
        """The meta of the newest checkpoint; None without a checkpoint. The arrays are not read.

        Raises:
          ValueError: the folder is damaged; the message has the folder and the remedy.
        """
        self.wait()
        step = self.latest_step()
        if step is None:
            return None
        try:
            return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        except Exception as error:
            raise self._damaged(step, error) from error

    def reached_preemption(self, step: int) -> bool:
        """Whether the machines are about to be preempted; all processes get the same answer at the same step."""
        return self._manager.reached_preemption(step)

    def wait(self) -> None:
        """Blocks until an unfinished save is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for an unfinished save and frees the manager."""
        self._manager.wait_until_finished()
        self._manager.close()

    def _check(self, step: int, target: PyTree) -> None:
        """Compares names, shapes and types with the stored arrays, because Orbax's errors have no remedy."""
        try:
            stored = trees.flatten(self._manager.item_metadata(step)["state"].tree)
        except Exception as error:
            raise self._damaged(step, error) from error
        wanted = trees.flatten(target)
        # parameters first: a different optimizer moment follows from a different parameter
        for name in sorted([*wanted, *stored], key=lambda name: not name.startswith("params/")):
            ours, theirs = (_describe(tree.get(name)) for tree in (wanted, stored))
            if ours != theirs:
                raise ValueError(
                    f"checkpoint {self.folder / str(step)} does not fit this configuration: {name} is {theirs} in "
                    f"the checkpoint and {ours} in the configuration; continue with the configuration of that run, or "
                    "use a new --workdir"
                )

    def _damaged(self, step: int, error: Exception) -> ValueError:
        others = sorted(s for s in self._manager.all_steps() if s != step)
        then = f"to continue from step {others[-1]}" if others else "to start the stage again"
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        return ValueError(f"checkpoint {self.folder / str(step)} cannot be read ({reason}); delete that folder {then}")


def _describe(leaf: Any) -> str:
    return "absent" if leaf is None else f"{leaf.dtype}{list(leaf.shape)}"
