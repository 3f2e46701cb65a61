"""The host loop of a stage, in a fixed order: save -> evaluate -> next batch -> step -> log. The only place that
blocks.

A guard (`training.guard`) may end the steps early; the stage then ends with the parameters of its last good checkpoint.
"""

import contextlib
import errno
import math
import signal
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from uae_jax.files.json_files import write_json
from uae_jax.files.paths import to_path
from uae_jax.settings import differences
from uae_jax.training.checkpoint import Checkpoints, Restored, abstract
from uae_jax.training.guard import OFF, WATCHED, Guard, GuardConfig, Trip, Tripped, reason
from uae_jax.training.loop_config import DataIterator, Hooks, LoopConfig
from uae_jax.training.metrics import Clock, MetricWriter
from uae_jax.training.pace import Pace
from uae_jax.training.progress import COMPILE, SCORES_DURING, Phase, Progress
from uae_jax.training.records import Scores, StageResult, check_identity, check_steps, finished_record, tripped_record
from uae_jax.training.signals import Interrupted, StopFlag, StopTraining, interrupt_as_terminate, stop_on_signals
from uae_jax.training.step import TrainState
from uae_jax.training.watch import Watch

PyTree = Any


def run_stage(
    name: str,
    step: Callable[[TrainState, PyTree, PyTree, jax.Array], tuple[TrainState, dict[str, jax.Array]]],
    *,
    state: TrainState,
    frozen: PyTree,
    data: DataIterator,
    key: jax.Array,
    workdir: Path,
    config: LoopConfig,
    writer: MetricWriter,
    put: Callable[[PyTree], PyTree] = lambda batch: batch,
    hooks: Hooks | None = None,
    guard: GuardConfig | None = None,
    identity: Mapping[str, Any] | None = None,
    free: Collection[str] = (),
    scoring: Mapping[str, Any] | None = None,
    watch: Watch | None = None,
    progress: Progress | None = None,
) -> StageResult:
    """Runs a stage to its end, from its newest checkpoint when there is one; returns at once when it is finished.

    A stage that is finished continues when it got more steps, unless the guard ended it.

    Interrupting and repeating the call gives bit-equal parameters and the same metrics lines (but for times). When
    the guard trips, the stage ends with its last good checkpoint: the newest at a multiple of `save_every` (or at step
    0) whose statistics were well inside their bounds when it was written.

    Args:
      name: stage name; files are `checkpoints/<name>/`, metrics carry it.
      step: the jitted train step, `state` donated.
      state: state at step 0; it is donated, use the result's instead.
      frozen: what the step reads and does not change.
      data: batch iterator at its beginning.
      key: root key of the stage, the same in every run.
      workdir: the training folder.
      config: durations.
      writer: metrics.
      put: host batch -> device batch.
      hooks: evaluation around the steps.
      guard: bounds on what the step reports; None for none. A checkpoint of step 0 is written when it is on.
      identity: the settings that change the numbers; a checkpoint of other settings is refused. None is not checked.
      free: fields of the identity that may differ; those that do are printed.
      scoring: the settings that change the scores before and after; JSON-able. A restart that changes them says so.
      watch: looks at seconds, hangs and traces; None for seconds alone.
      progress: shows what is under way; None for one without an estimate of the run.

    Raises:
      StopTraining: SIGINT, SIGTERM or a preemption; the checkpoint is on disk.
      FloatingPointError: the loss is not finite, and the guard has no bound for that; nothing was saved over the last
        good checkpoint.
      ValueError: damaged or unfitting checkpoint.
      RuntimeError: the data ended early.
    """
    folder = to_path(workdir) / "checkpoints" / name
    with Checkpoints(folder, keep=config.keep) as checkpoints:
        finished, tripped = folder / "finished.json", folder / "tripped.json"
        trip = tripped_record(tripped)
        target = abstract(state)
        stored = checkpoints.latest_step() is not None
        if stored:  # there may be no room for the state at step 0 beside the one that is read
            jax.tree.map(lambda leaf: leaf.delete() if isinstance(leaf, jax.Array) else None, state)
        restored = checkpoints.restore(target, trip["restored_step"] if trip else None)
        if stored and restored is None:
            why = "no checkpoint can be read; the same command begins the stage again"
            raise OSError(errno.EIO, why, str(folder))
        if restored is not None:
            check_identity(folder, restored.meta, identity, free, tell=True)
            check_steps(folder, restored.step, config.steps)
        if restored is not None and (record := finished_record(workdir, name, config.steps)):
            return StageResult(state=restored.state, **record)
        if finished.exists() and not finished_record(workdir, name) and jax.process_index() == 0:
            print(
                f"note: {finished} names a checkpoint that is not there; the stage continues from step "
                f"{restored.step if restored else 0}",
                file=sys.stderr,
            )
        looks = watch or Watch(workdir, name)
        shown = progress or Progress()
        loop = _Loop(
            name, config, checkpoints, writer, hooks or Hooks(), data, identity, guard or OFF, scoring, looks, shown
        )
        if restored is not None:
            state = restored.state
            loop.resume(restored, trip)
        done = restored.step if restored else None
        # several processes must stop at one step: jax listens for SIGTERM, and tells all of them (reached_preemption)
        stops = stop_on_signals(doing=shown.doing) if jax.process_count() == 1 else interrupt_as_terminate()
        with stops as flag, writer.kept(), loop.watch.steps():
            trained = None
            if loop.trip is None:
                loop.begin(state, done, flag)
                trained = loop.train(state, done, step, frozen, key, put, flag)
            result = loop.finish(trained, target, flag)
        if jax.process_index() == 0:
            write_json(finished, result.record())
        if flag.signum:  # it came while the `after` hook ran
            raise StopTraining(name, config.steps, flag.signum)
        return result


class _Loop:
    """Host-side bookkeeping of `run_stage`; the training state is passed through, never kept."""

    def __init__(
        self,
        name: str,
        config: LoopConfig,
        checkpoints: Checkpoints,
        writer: MetricWriter,
        hooks: Hooks,
        data: DataIterator,
        identity: Mapping[str, Any] | None,
        guard: GuardConfig,
        scoring: Mapping[str, Any] | None,
        watch: Watch,
        progress: Progress,
    ) -> None:
        self.name, self.config, self.checkpoints, self.writer = name, config, checkpoints, writer
        self.hooks, self.data, self.identity = hooks, data, identity
        self.clock, self.pace = Clock(), Pace(config.save_every_minutes)
        self.watch = watch
        self.before: Scores = {}
        self.scoring = {"before": dict(scoring or {}), "after": dict(scoring or {})}
        self.guard = Guard(guard)
        self.watched = WATCHED if guard.on else ("loss",)
        self.good: int | None = None  # step of the last good checkpoint
        self.saved: int | None = None  # step of the checkpoint that this run has read or written last
        self.scored: int | None = None  # last step whose scores are known
        self.trip: dict[str, Any] | None = None  # contents of tripped.json
        self.unread: list[tuple[int, dict[str, jax.Array]]] = []  # watched metrics of the steps not looked at yet
        self.pending: tuple[int, dict[str, jax.Array]] | None = None  # the logged step not written yet
        self.progress = progress
        self.shown: Phase | None = None  # the bar of the steps

    def resume(self, restored: Restored, trip: dict[str, Any] | None) -> None:
        """Continues after a checkpoint, or after a trip whose stage was not finished."""
        meta, self.trip = restored.meta, trip
        times = trip or meta
        self.clock, self.before = Clock(times["seconds"], times["wall_seconds"]), meta["before"]
        self.scoring["before"] = meta.get("scoring") or self.scoring["before"]
        changed = differences(*self.scoring.values())
        if changed and self.before and jax.process_index() == 0:
            print(
                f"note: {self.name}: the scores before it had other settings than those after it will have: "
                f"{'; '.join(changed)}",
                file=sys.stderr,
            )
        self.data.set_state(restored.data)
        self.saved, self.scored = restored.step, restored.step if meta.get("judged", True) else None
        if self.guard.config.on:
            self.guard = Guard(self.guard.config, meta["guard"] and meta["guard"]["statistics"])
            self.good = meta["guard"]["good"] if meta["guard"] else restored.step

    def begin(self, state: TrainState, done: int | None, flag: StopFlag) -> None:
        """Before the first step: scores, and the checkpoint of step 0 that a guard needs; `done` as in `train`."""
        self.writer.begin(self.name, done or 0, scored=self.judged(done or 0))
        if done is None and self.hooks.before is not None:
            with self.unless_asked(0, flag):
                self.before = self.hooks.before(state)
            values = {name: score["value"] for name, score in self.before.items() if isinstance(score, Mapping)}
            self.guard.begin(values)
        self.writer.scores(self.name, 0, self.before)
        if done is None and self.guard.config.on and self.config.steps:
            self.save(state, 0)

    def train(
        self,
        state: TrainState,
        done: int | None,
        train_step: Callable,
        frozen: PyTree,
        key: jax.Array,
        put: Callable[[PyTree], PyTree],
        flag: StopFlag,
    ) -> TrainState | None:
        """The steps after the `done` ones (None: from nothing); None where the guard tripped."""
        config, start = self.config, done or 0
        self.progress.estimate.expect(self.name, -start)
        self.progress.estimate.expect(SCORES_DURING, -self.passes_until(start))
        try:
            with self.progress.steps(self.name, config.steps, start) as self.shown:
                self.watch.started(start)
                for number in range(start, config.steps):
                    self.save_if_due(state, number, flag)
                    with contextlib.suppress(Interrupted):
                        self.evaluate(state, number, flag)
                    if flag.signum:  # it came meanwhile
                        self.save_if_due(state, number, flag)
                    with self.watch.waiting(), self.saved_if_unread(state, number):
                        batch = put(self.next_batch(state, number, flag))
                    with self.compiling(number == start):
                        state, metrics = train_step(state, frozen, batch, key)
                    self.log(number + 1, metrics)
                    self.watch.started(number + 1)
                    if self.hooks.on_step is not None:
                        self.hooks.on_step(number + 1)
                self.flush(config.steps)
                if config.steps > start:
                    self.save(state, config.steps)
                if not self.judged(config.steps):
                    with contextlib.suppress(Interrupted):  # `finish` leaves
                        self.answer(state, config.steps, {}, flag)
        except Tripped as tripped:
            self.stop(tripped.trip)
            return None  # there is no room for two states of a large model
        return state

    def compiling(self, first: bool) -> contextlib.AbstractContextManager:
        """The block of a step's call: the first one compiles the step."""
        if not first:
            return contextlib.nullcontext()
        return self.progress.phase(f"{self.name}: compiling the step", kind=COMPILE)

    def finish(self, state: TrainState | None, target: PyTree, flag: StopFlag) -> StageResult:
        """After the last step: the last good state where the guard tripped, and scores.

        Args:
          state: after the last step; None where the guard tripped.
          target: structure, shapes and placement of a state.
          flag: whether the run was asked to stop.
        """
        steps, guard = self.config.steps, None
        if self.trip is not None:
            self.report_trip(self.trip)
            steps = self.trip["restored_step"]
            guard = {name: value for name, value in self.trip.items() if "seconds" not in name}
            good = self.checkpoints.restore(target, steps)
            if good is None:
                raise ValueError(
                    f"{self.checkpoints.folder} has lost its checkpoint of step {steps}; start the stage anew"
                )
            state = good.state
        assert state is not None  # a trip alone leaves none, and restores one
        self.leave_if_asked(self.trip["step"] if self.trip else steps, flag)
        after: Scores = {}
        if self.hooks.after is not None:
            with self.unless_asked(steps, flag):
                after = self.hooks.after(state)
            self.writer.scores(self.name, steps, after)
        times = round(self.clock.seconds, 3), round(self.clock.wall_seconds, 3)
        return StageResult(self.name, state, steps, *times, self.before, after, guard, self.scoring)

    @contextlib.contextmanager
    def unless_asked(self, number: int, flag: StopFlag) -> Iterator[None]:
        """Scores around the steps: their time is no training, and a stop ends them at once."""
        self.watch.alive()
        try:
            with self.clock.paused(), flag.at_once():
                yield
        except Interrupted:
            self.leave_if_asked(number, flag)

    def stop(self, trip: Trip) -> None:
        """Puts the trip on disk: from here on the stage is one that tripped, whatever happens to this process."""
        self.checkpoints.wait()  # the good one may be under way
        times = {"seconds": round(self.clock.seconds, 3), "wall_seconds": round(self.clock.wall_seconds, 3)}
        self.trip = trip.record() | {"restored_step": self.good} | times
        if jax.process_index() == 0:
            write_json(self.checkpoints.folder / "tripped.json", self.trip)

    def report_trip(self, trip: dict[str, Any]) -> None:
        """Says what tripped, in place of the metrics of later steps."""
        record = {name: value for name, value in trip.items() if "seconds" not in name}
        self.writer.begin(self.name, trip["step"])
        self.writer.event(self.name, trip["step"], trip["seconds"], record)
        if jax.process_index() == 0:
            print(
                f"{self.name}: stopped by the guard: {reason(trip)}; its checkpoint of step {trip['restored_step']} is "
                "restored",
                file=sys.stderr,
                flush=True,
            )

    def evaluation_due(self, number: int) -> bool:
        """Whether scores follow step `number`; after the last step these are the answers that the guard judges."""
        every, last = self.config.eval_every, number == self.config.steps
        return bool(every) and (
            bool(self.guard.config.understanding_fall) if last else number > 0 and number % every == 0
        )

    def passes_until(self, number: int) -> int:
        """Passes of scores in the middle of the stage that are done when it continues after step `number`."""
        steps = range(1, min(number + 1, self.config.steps))
        return sum(self.evaluation_due(step) and (step < number or self.judged(step)) for step in steps)

    def judged(self, number: int) -> bool:
        """Whether nothing is open about step `number`: its scores are known, or none are due."""
        return number == self.scored or not self.evaluation_due(number)

    def evaluate(self, state: TrainState, number: int, flag: StopFlag) -> None:
        """Scores after step `number`, if they are due and not known. A restart repeats those that a kill ended."""
        if self.judged(number):
            return
        self.flush(number)
        self.watch.pause()
        scores: Mapping[str, float] = {}
        if self.hooks.evaluate is not None:
            with self.clock.paused(), flag.at_once():
                scores = self.hooks.evaluate(state, number)
        self.answer(state, number, scores, flag)

    def answer(self, state: TrainState, number: int, scores: Mapping[str, float], flag: StopFlag) -> None:
        """Writes scores after a step with those of the questions. Raises `Tripped` if these fell too far."""
        answers: Mapping[str, float] = {}
        if self.hooks.answers is not None:
            with self.clock.paused(), flag.at_once():
                answers = self.hooks.answers(state, number)
        values = {f"eval/{name}": value for name, value in {**scores, **answers}.items()}
        if values:
            self.writer.write(self.name, number, self.clock.seconds, values)
        trip = self.guard.observe_answers(number, answers) if answers and self.guard.config.on else None
        if trip is not None:
            raise Tripped(trip)
        self.scored = number
        if number == self.saved:
            self.mark_good(number)

    def mark_good(self, number: int) -> None:
        """Takes the checkpoint of a step for the last good one, if the guard has judged it and finds it well.

        One written because the run was asked to stop does not count: an uninterrupted run has none there.
        """
        every = self.config.save_every
        if self.judged(number) and (number == 0 or (every and number % every == 0 and self.guard.fine)):
            self.good = number

    def save_if_due(self, state: TrainState, number: int, flag: StopFlag) -> None:
        """A checkpoint after step `number` if it is time for one, or if the run was asked to stop."""
        if number == self.saved:
            self.leave_if_asked(number, flag)
            return
        every = self.config.save_every
        preempted = jax.process_count() > 1 and self.checkpoints.reached_preemption(number)
        due = (every and number and number % every == 0) or self.pace.due(number)
        if flag.signum or preempted or due:
            self.flush(number)
            self.save(state, number)
        if preempted and not flag.signum:
            flag.signum = signal.SIGTERM
        self.leave_if_asked(number, flag)

    def save(self, state: TrainState, number: int) -> None:
        """A checkpoint, before the scores of its step: these may take long, and a kill must not cost the steps."""
        self.saved = number
        meta = {
            "stage": self.name,
            "identity": self.identity,
            "seconds": round(self.clock.seconds, 3),
            "wall_seconds": round(self.clock.wall_seconds, 3),
            "before": self.before,
            "scoring": self.scoring["before"],
            "judged": self.judged(number),
            "guard": None,
        }
        if self.guard.config.on:
            self.mark_good(number)
            meta["guard"] = {"statistics": self.guard.statistics(), "good": self.good}
        self.writer.flush()  # a checkpoint must not be newer than the metrics
        self.watch.pause()
        self.pace.saved()
        self.checkpoints.save(number, state, self.data.get_state(), meta, good=self.good)

    def leave_if_asked(self, number: int, flag: StopFlag) -> None:
        if flag.signum:
            self.checkpoints.wait()
            raise StopTraining(self.name, number, flag.signum)

    @contextlib.contextmanager
    def saved_if_unread(self, state: TrainState, number: int) -> Iterator[None]:
        """Data that cannot be read cost no step: a checkpoint is written before the error goes on."""
        try:
            yield
        except (ValueError, OSError):
            if jax.process_count() == 1 and number != self.saved:
                self.flush(number)
                self.save(state, number)
                self.checkpoints.wait()
                print(
                    f"note: {self.name}: step {number} is saved; the same command continues there when the data can "
                    "be read again: put a readable file in its place, since without it the data would be others",
                    file=sys.stderr,
                )
            raise

    def next_batch(self, state: TrainState, number: int, flag: StopFlag) -> PyTree:
        """The batch of the step after `number`. A stop does not wait for it: a source may never answer."""
        position = self.data.get_state()
        try:
            with flag.at_once():
                return next(self.data)
        except Interrupted:
            self.data.set_state(position)  # the signal may have come just after the batch
            self.save_if_due(state, number, flag)
            raise
        except StopIteration as error:
            raise RuntimeError(
                f"{self.name}: the data ended at step {number} of {self.config.steps}; let the data set repeat"
            ) from error

    def log(self, number: int, metrics: dict[str, jax.Array]) -> None:
        """Called when step `number` runs on the device: writes the logged step before it, which is done by now."""
        self.write_pending()
        self.unread.append((number, {name: metrics[name] for name in self.watched if name in metrics}))
        if number % self.config.log_every == 0 or number in (1, self.config.steps):
            self.pending = number, metrics
        self.progress.estimate.step(self.name, self.watch.step_seconds)
        if self.shown is not None:
            self.shown.advance()

    def flush(self, number: int) -> None:
        """Waits for all steps up to `number`; nothing is saved or evaluated on a broken state."""
        self.write_pending()
        self.look()

    def write_pending(self) -> None:
        if self.pending is None:
            return
        number, metrics = self.pending
        self.pending = None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self.watch.done(number)
        self.writer.write(self.name, number, self.clock.seconds, values | self.watch.metrics())
        self.look(number)
        headline = self.config.headline if self.config.headline in values else "loss"
        if self.progress.terminal and self.shown is not None:
            self.shown.say(f"{headline} {values[headline]:.4f}")
            return
        numbers = " ".join(f"{name} {values[name]:.4f}" for name in dict.fromkeys((headline, "loss")))
        line = f"{self.name} step {number}/{self.config.steps} {numbers} {self.clock.seconds:.1f} s"
        self.progress.line(", ".join(filter(None, (line, self.progress.estimate.words()))))

    def look(self, number: int | None = None) -> None:
        """Looks at the steps up to step `number` (None: all). Raises `Tripped`, or FloatingPointError without a bound
        for that.
        """
        known = [entry for entry in self.unread if number is None or entry[0] <= number]
        self.unread = self.unread[len(known) :]
        read = jax.device_get([metrics for _, metrics in known])
        seen = [
            (step, {name: float(value) for name, value in metrics.items()})
            for (step, _), metrics in zip(known, read, strict=True)
        ]
        for step, metrics in seen:
            if not math.isfinite(metrics["loss"]) and not self.guard.config.non_finite:
                good = self.checkpoints.latest_step()
                raise FloatingPointError(
                    f"{self.name}: the loss is not finite at step {step} (steps {seen[0][0]} to {seen[-1][0]} were "
                    "checked); the last "
                    f"checkpoint is of step {good or 0}; lower the learning rate or look at the data of that step"
                )
            trip = self.guard.observe(step, metrics) if self.guard.config.on else None
            if trip is not None:
                raise Tripped(trip)
