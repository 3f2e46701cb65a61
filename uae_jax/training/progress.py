"""What a run shows while it goes on: bars on a terminal, plain lines elsewhere, and one estimate for the whole run.

Work is counted in units of a kind: steps of a stage, passes of scores, compilations, exports. Every kind has the
seconds that its latest unit took. Steps of stages that have not run are taken to be as much slower than measured ones
as they have more work.
"""

import contextlib
import dataclasses
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import TextIO

import jax
import tqdm

COMPILE, SCORES, SCORES_DURING, EXPORT = "compile", "scores", "scores during a stage", "export"
PHASE_BAR = "{desc} {elapsed}{postfix}"
COUNTED_BAR = "{desc} |{bar:24}| {n_fmt}/{total_fmt} {elapsed}{postfix}"
TICK = 1.0  # seconds between two looks at the clock of a phase


def duration(seconds: float) -> str:
    """Seconds in words, such as `45 s`, `12 min` or `3 h 20 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


@dataclasses.dataclass
class _Kind:
    """Units of one kind of work: those that are left, and the seconds of the latest one; None before the first."""

    left: float = 0.0
    seconds: float | None = None


class Estimate:
    """Seconds that a run still takes.

    Args:
      work: of a step by stage, in any unit; stages that it has not are estimated when they have run.
    """

    def __init__(self, work: Mapping[str, float] | None = None) -> None:
        self.work: Mapping[str, float] = work or {}
        self._kinds: dict[str, _Kind] = {}
        self._expects = False  # whether anybody has said what the run will do

    def expect(self, kind: str, units: float) -> None:
        """So many more units of a kind will come; fewer for a negative number."""
        self._expects = self._expects or units > 0
        known = self._kinds.setdefault(kind, _Kind())
        known.left = max(known.left + units, 0.0)

    def took(self, kind: str, seconds: float, units: float = 1.0) -> None:
        """Units of a kind are done."""
        self.expect(kind, -units)
        self._kinds[kind].seconds = seconds / units

    def step(self, kind: str, seconds: float | None) -> None:
        """A step was started; `seconds` are those of a step, None while nothing is known of it."""
        self.expect(kind, -1)
        if seconds is not None:
            self._kinds[kind].seconds = seconds

    def _seconds_of(self, kind: str) -> float | None:
        known = self._kinds[kind]
        if known.seconds is not None or kind not in self.work:
            return known.seconds
        rates = [
            other.seconds / self.work[name]
            for name, other in self._kinds.items()
            if other.seconds is not None and self.work.get(name)
        ]
        return self.work[kind] * rates[-1] if rates else None

    def left(self) -> float | None:
        """Seconds of everything that is left; None while nothing is known of a part of it, or of the whole run."""
        if not self._expects:
            return None
        total = 0.0
        for name, kind in self._kinds.items():
            seconds = self._seconds_of(name)
            if seconds is None and kind.left and name not in (SCORES, SCORES_DURING, COMPILE, EXPORT):
                return None
            total += kind.left * (seconds or 0.0)
        return total

    def words(self) -> str:
        """The estimate in words; empty while there is none."""
        left = self.left()
        return "" if left is None else f"about {duration(left)} left of the run"


class Phase:
    """A phase that is under way.

    Attributes:
      name: in words.
      bar: on a terminal; disabled elsewhere.
    """

    def __init__(self, name: str, bar: tqdm.tqdm, estimate: Estimate) -> None:
        self.name, self.bar, self._estimate = name, bar, estimate

    def advance(self, units: int = 1) -> None:
        """So many more units are done."""
        self.bar.update(units)

    def say(self, text: str) -> None:
        """Words behind the bar, with the estimate of the run."""
        self.bar.set_postfix_str(", ".join(filter(None, (text, self._estimate.words()))))


class Progress:
    """What a run shows.

    Args:
      estimate: of the whole run.
      stream: where to; None for stderr.
      active: whether this process shows anything; None for process 0 alone.
    """

    def __init__(
        self, estimate: Estimate | None = None, stream: TextIO | None = None, active: bool | None = None
    ) -> None:
        self.estimate = estimate or Estimate()
        self.stream = stream or sys.stderr
        self.active = jax.process_index() == 0 if active is None else active
        self.terminal = self.active and self.stream.isatty()
        self.under_way = ""  # the phases that are open, in words

    def line(self, text: str) -> None:
        """A line of its own, above a bar that is shown."""
        if self.active:
            tqdm.tqdm.write(text, file=self.stream)
            self.stream.flush()

    @contextlib.contextmanager
    def phase(self, name: str, *, kind: str = "", total: int | None = None, units: float = 1.0) -> Iterator[Phase]:
        """A phase, whose seconds count for its kind; a bar, or a line at its beginning and one at its end.

        Args:
          name: in words, such as `gen_for_und: compiling`.
          kind: of work; empty for none.
          total: units of the bar; None for a clock alone.
          units: of its kind.
        """
        begin, before, self.under_way = time.monotonic(), self.under_way, name
        form = PHASE_BAR if total is None else COUNTED_BAR
        hidden = not self.terminal
        bar = tqdm.tqdm(desc=name, total=total, bar_format=form, leave=False, disable=hidden, file=self.stream)
        if hidden:
            self.line(name)
        phase = Phase(name, bar, self.estimate)
        phase.say("")
        try:
            with bar, _ticking(bar):
                yield phase
        finally:
            self.under_way = before
        passed = time.monotonic() - begin
        if kind:
            self.estimate.took(kind, passed, units)
        self.line(", ".join(filter(None, (f"{name}: done in {duration(passed)}", self.estimate.words()))))

    @contextlib.contextmanager
    def steps(self, name: str, total: int, done: int) -> Iterator[Phase]:
        """The steps of a stage, from step `done` on; lines of steps are the caller's where there is no terminal."""
        # tqdm's own form has a second estimate, of this stage, which passes of scores between the steps throw far off
        hidden = not self.terminal
        bar = tqdm.tqdm(desc=name, total=total, initial=done, bar_format=COUNTED_BAR, disable=hidden, file=self.stream)
        before, self.under_way = self.under_way, f"the step of {name}"
        try:
            with bar:
                yield Phase(name, bar, self.estimate)
        finally:
            self.under_way = before

    def doing(self) -> str:
        """What is under way, in words."""
        return self.under_way or "the work"


@contextlib.contextmanager
def _ticking(bar: tqdm.tqdm) -> Iterator[None]:
    """Draws the clock of a bar every second: a compiler returns nothing before its end."""
    if bar.disable:
        yield
        return
    ended = threading.Event()

    def tick() -> None:
        while not ended.wait(TICK):
            bar.refresh()

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
