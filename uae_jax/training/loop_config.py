"""What the host loop of a stage is told: its durations, what it does around the steps, and where batches come from."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from uae_jax.training.records import Scores
from uae_jax.training.step import TrainState

PyTree = Any


class DataIterator(Protocol):
    """A Grain iterator, or anything with its three methods. The state is JSON-able and names the next batch."""

    def __next__(self) -> PyTree: ...

    def get_state(self) -> dict[str, Any]:
        """The position, JSON-able."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues at a position of `get_state`."""
        ...


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """Durations in train steps.

    Attributes:
      steps: length of the stage.
      log_every: a metrics line each so many steps, and after the first and the last.
      save_every: a checkpoint each so many steps; 0 = only at the end and when stopped.
      save_every_minutes: a checkpoint also so long after the last one; 0 = never.
      eval_every: `evaluate` each so many steps; 0 = never.
      keep: newest checkpoints to keep; the last good one is kept beside them when a guard is on.
      headline: the metric beside the progress bar; `loss` where the stage has no such metric.
    """

    steps: int
    log_every: int = 1
    save_every: int = 50
    eval_every: int = 0
    keep: int = 2
    save_every_minutes: float = 0.0
    headline: str = "reward"

    def __post_init__(self) -> None:
        if self.steps < 0 or self.log_every < 1 or self.save_every < 0 or self.eval_every < 0:
            raise ValueError("loop: steps, save_every and eval_every must be 0 or more, log_every 1 or more")


@dataclasses.dataclass(frozen=True)
class Hooks:
    """What a stage does around its steps; each may be None. None of them is timed as training.

    Attributes:
      before: `(state) -> scores`, before the first step; not repeated after a restart from a checkpoint.
      after: `(state) -> scores`, after the last step.
      evaluate: `(state, step) -> {name: number}`, logged as `eval/name`.
      answers: the same for accuracies on questions, which the guard judges; also after the last step if it does.
      on_step: `(step)`, after step number `step` (1, 2, ...) was started.
    """

    before: Callable[[TrainState], Scores] | None = None
    after: Callable[[TrainState], Scores] | None = None
    evaluate: Callable[[TrainState, int], Mapping[str, float]] | None = None
    answers: Callable[[TrainState, int], Mapping[str, float]] | None = None
    on_step: Callable[[int], None] | None = None
