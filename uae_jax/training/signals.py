"""Ctrl-C, SIGTERM and SIGHUP (a closed terminal) as a flag: the loop finishes its step, saves and exits.

The first is answered at once, the second ends the process.
"""

import atexit
import contextlib
import gc
import os
import signal
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator

ANSWER = "\nstopping: {doing} ends first, and is saved; a second Ctrl-C or signal aborts\n"
RETRY = 0.05  # seconds until an interruption is tried again
ABORTED = b"\naborted; what is saved stays, and the same command continues from the newest checkpoint\n"


def end_within(seconds: float, code: int) -> None:
    """Ends this process after so long if it still runs: threads of a data source that never answers would keep it."""

    def end() -> None:
        time.sleep(seconds)
        os._exit(code)

    threading.Thread(target=end, daemon=True).start()


def end_before_teardown(code: Callable[[], int]) -> None:
    """Ends this process as soon as every `atexit` function that is registered later has run.

    Threads of compilers, readers and checkpoints outlive the main thread. They may call what the interpreter has taken
    apart by then: a run that has saved everything would end as a crash, which no launcher takes for a stop.

    Args:
      code: gives the exit code at the end.
    """

    def end() -> None:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code())

    atexit.register(end)


class StopTraining(Exception):  # noqa: N818 - a normal exit, not an error
    """Training was asked to stop, and has saved everything to continue.

    Attributes:
      exit_code: 128 + signal number, the shell's convention: 130 after Ctrl-C, 143 after SIGTERM or a preemption.
    """

    def __init__(self, stage: str, step: int, signum: int = signal.SIGTERM) -> None:
        super().__init__(f"stopped at {stage} step {step}; the same command continues")
        self.stage, self.step, self.exit_code = stage, step, 128 + int(signum)


class Interrupted(Exception):  # noqa: N818 - a normal exit, not an error
    """A stop was asked for inside a block of `StopFlag.at_once`."""


class StopFlag:
    """`signum` is the first signal received, 0 before that."""

    signum: int = 0
    _at_once: bool = False

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """A stop that is asked for in the block ends the block, by `Interrupted`; for work that may be repeated."""
        self._at_once = True
        try:
            if self.signum:
                raise Interrupted
            yield
        finally:
            self._at_once = False

    def interrupt(self, frame: types.FrameType | None) -> None:
        """Ends a block of `at_once`, from the handler of a signal that came in this frame; later, where an error of the
        frame would be shown and forgotten.

        Raises:
          Interrupted: inside such a block.
        """
        if not self._at_once:
            return
        if forgets_errors(frame):
            signal.setitimer(signal.ITIMER_REAL, RETRY)
            return
        raise Interrupted


def forgets_errors(frame: types.FrameType | None) -> bool:
    """Whether a frame is inside of a call whose errors Python forgets: of the garbage collector, or `__del__`."""
    collecting = {getattr(callback, "__code__", None) for callback in gc.callbacks}
    while frame is not None:
        if frame.f_code in collecting or frame.f_code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False


class _Answers:
    """Answers signals at once, also while the main thread is inside a compiler that does not look at them.

    The interpreter's handler in C writes the number of every signal to a pipe, which a thread reads. The second one
    ends the process with one line: threads and locks of libraries would make a traceback of it.

    Args:
      signals: that ask for a stop.
      doing: what is under way, in words.
    """

    def __init__(self, signals: tuple[int, ...], doing: Callable[[], str]) -> None:
        self.signals, self.doing, self.seen = signals, doing, 0
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.writer, False)
        self.previous = signal.set_wakeup_fd(self.writer, warn_on_full_buffer=False)
        self.thread = threading.Thread(target=self._answer, daemon=True)
        self.thread.start()

    def _answer(self) -> None:
        while True:
            for number in os.read(self.reader, 64):
                if number == 0:
                    return
                if number in self.signals:
                    self._answer_one(number)

    def _answer_one(self, number: int) -> None:
        self.seen += 1
        if self.seen == 1:
            os.write(2, ANSWER.format(doing=self.doing()).encode())  # a print may be under way in the main thread
            return
        os.write(2, ABORTED)
        os._exit(128 + number)

    def close(self) -> None:
        """Ends the thread, and gives the descriptor back to whom it belonged."""
        signal.set_wakeup_fd(self.previous)
        os.write(self.writer, b"\0")
        self.thread.join()
        for end in (self.reader, self.writer):
            os.close(end)


@contextlib.contextmanager
def stop_on_signals(
    signals: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP),
    doing: Callable[[], str] = lambda: "the step under way",
) -> Iterator[StopFlag]:
    """Collects `signals` in a flag inside the block; a second signal ends the process at once.

    Needs the main thread. Several processes under `jax.distributed` must leave SIGTERM to jax, which agrees on one step
    for all processes.

    Args:
      signals: that ask for a stop.
      doing: what is under way, in words for the answer.
    """
    flag = StopFlag()
    previous = {number: signal.getsignal(number) for number in signals}
    answers = _Answers(signals, doing)

    def receive(number: int, frame: types.FrameType | None) -> None:
        if not flag.signum:
            flag.signum = number
            flag.interrupt(frame)

    for number in signals:
        signal.signal(number, receive)
    previous[signal.SIGALRM] = signal.signal(signal.SIGALRM, lambda number, frame: flag.interrupt(frame))
    try:
        yield flag
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in previous.items():
            signal.signal(number, handler)
        answers.close()


@contextlib.contextmanager
def interrupt_as_terminate() -> Iterator[StopFlag]:
    """For one of several processes: Ctrl-C becomes SIGTERM, on which all agree; a second Ctrl-C aborts this process.

    The loop sets the flag, at the step that the processes have agreed on.
    """
    previous = signal.getsignal(signal.SIGINT)

    def receive(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.write(2, ANSWER.format(doing="the step that all processes agree on").encode())
        os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGINT, receive)
    try:
        yield StopFlag()
    finally:
        signal.signal(signal.SIGINT, previous)
