"""When a checkpoint is due by time, so that a slow stage risks minutes and not a number of steps."""

import time

import jax
import numpy as np
from jax.experimental import multihost_utils

ASKED = 10  # steps between questions to process 0, whose clock decides for all


class Pace:
    """The clock of checkpoints.

    Args:
      minutes: between two of them; 0 for never.
    """

    def __init__(self, minutes: float) -> None:
        self.seconds, self.last = 60 * minutes, time.monotonic()

    def saved(self) -> None:
        """A checkpoint was begun."""
        self.last = time.monotonic()

    def due(self, number: int) -> bool:
        """Whether one is due before step `number + 1`; all processes get the same answer."""
        if not self.seconds:
            return False
        late = time.monotonic() - self.last >= self.seconds
        if jax.process_count() == 1:
            return late
        return number % ASKED == 0 and bool(multihost_utils.broadcast_one_to_all(np.array(late)))
