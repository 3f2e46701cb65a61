"""Looks at a run from outside of its numbers: seconds of a step, waiting for data, hangs, and traces for a profiler."""

import contextlib
import faulthandler
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from uae_jax.files.paths import LocalCopies, is_url, to_path

RECENT = 32  # steps of which seconds are kept
TRACED = 3  # steps in a trace that SIGUSR1 asks for


def traced_steps(text: str) -> tuple[int, int] | None:
    """First and last step of FIRST:LAST, from 1; None for an empty text.

    Raises:
      ValueError: another form.
    """
    first, _, last = text.partition(":")
    if not text:
        return None
    if not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
        raise ValueError(f"profile is {text!r}; write FIRST:LAST, the steps of a stage from 1, such as 10:12")
    return int(first), int(last)


class Watch:
    """Watches the steps of one stage. Open it around the steps.

    Args:
      workdir: traces go to `profile/<stage>`, and the stacks of a hang to `hang_<process>.txt`.
      stage: its name.
      profile: FIRST:LAST, the steps that are traced; empty for none. SIGUSR1 traces the next steps at any time.
      hang_minutes: after so long without a step or a batch of scores all stacks are written; 0 for never.
      seconds_at_peak: seconds that a step would take at the devices' peak; None where that is unknown.
    """

    def __init__(
        self,
        workdir: Path,
        stage: str,
        *,
        profile: str = "",
        hang_minutes: float = 0.0,
        seconds_at_peak: float | None = None,
    ) -> None:
        self.folder, self.stage = to_path(workdir) / "profile" / stage, stage
        self.traced, self.asked, self.tracing = traced_steps(profile), False, False
        self.hang_seconds, self.hang_path = 60 * hang_minutes, to_path(workdir) / f"hang_{jax.process_index()}.txt"
        self.stacks = b""  # written so far, of a file in a bucket
        self.trace: LocalCopies | None = None
        self.seconds_at_peak = seconds_at_peak
        self.recent: list[float] = []  # seconds of the last steps
        self._waited = self._since = 0.0
        self._done: tuple[int, float] | None = None  # a step that is done, and when it was
        self._since_alive = 0.0

    @contextlib.contextmanager
    def steps(self) -> Iterator["Watch"]:
        """The block of the steps: a hang is noticed in it, and SIGUSR1 asks for a trace."""
        previous = signal.getsignal(signal.SIGUSR1)
        signal.signal(signal.SIGUSR1, self._ask)
        ended = threading.Event()
        looker = threading.Thread(target=self._look, args=(ended,), daemon=True)
        self.alive()
        try:
            if self.hang_seconds:
                looker.start()
            yield self
        finally:
            signal.signal(signal.SIGUSR1, previous)
            self._stop_trace()
            ended.set()
            if self.hang_seconds:
                looker.join()

    def alive(self) -> None:
        """Begins the wait for a hang anew."""
        self._since_alive = time.monotonic()

    def _look(self, ended: threading.Event) -> None:
        """Writes all stacks whenever nothing was done for so long.

        This thread holds the interpreter's lock while it looks: frames that change under the eye would end the process.
        """
        written = 0.0
        while not ended.wait(max(self._since_alive, written) + self.hang_seconds - time.monotonic()):
            if time.monotonic() - max(self._since_alive, written) >= self.hang_seconds:
                written = time.monotonic()
                self._write_stacks()

    def _write_stacks(self) -> None:
        if not is_url(self.hang_path):
            with self.hang_path.open("a", encoding="utf-8") as file:
                faulthandler.dump_traceback(file)
            return
        with tempfile.TemporaryFile() as file:  # faulthandler needs a file of the system
            faulthandler.dump_traceback(file)
            file.seek(0)
            self.stacks += file.read()
        self.hang_path.write_bytes(self.stacks)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """The time in the block is that of waiting for data."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self._waited += time.monotonic() - begin

    def pause(self) -> None:
        """The time until the next step is done belongs to no step: scores, or a save."""
        self.alive()
        self._done, self._waited = None, 0.0

    def done(self, number: int) -> None:
        """All steps up to `number` are done on the device."""
        now = time.monotonic()
        if self._done is not None and number > self._done[0]:
            passed = now - self._done[1]
            self.recent = [*self.recent, passed / (number - self._done[0])][-RECENT:]
            self._since += passed
        self._done = number, now

    def started(self, number: int) -> None:
        """Step `number` was started."""
        self.alive()
        if self.tracing and self.traced and number > self.traced[1]:
            self._stop_trace()
        if self.asked:
            self.traced, self.asked = (number + 1, number + TRACED), False
        if self.traced and not self.tracing and self.traced[0] - 1 <= number < self.traced[1]:
            self._start_trace()

    def metrics(self) -> dict[str, float]:
        """Of the steps since the last call: median seconds, share of waiting, and model FLOPs utilisation if known."""
        if not self.recent:
            return {}
        seconds = statistics.median(self.recent)
        found = {"perf/step_seconds": seconds}
        if self._since:
            found["perf/data_wait"] = min(self._waited / self._since, 1.0)
        if self.seconds_at_peak is not None:
            found["perf/mfu"] = self.seconds_at_peak / seconds
        self._waited = self._since = 0.0
        return found

    @property
    def step_seconds(self) -> float | None:
        """Median seconds of the last steps; None before the second one is done."""
        return statistics.median(self.recent) if self.recent else None

    def _ask(self, *_: Any) -> None:
        self.asked = True

    def _start_trace(self) -> None:
        self.trace = LocalCopies(self.folder)
        jax.profiler.start_trace(str(self.trace.local))
        self.tracing = True

    def _stop_trace(self) -> None:
        if self.tracing and self.trace:
            jax.profiler.stop_trace()
            self.trace.close()
            self.tracing, self.traced = False, None
            if jax.process_index() == 0:
                print(
                    f"note: {self.stage}: a trace is in {self.folder}; open it in TensorBoard or Perfetto",
                    file=sys.stderr,
                )
