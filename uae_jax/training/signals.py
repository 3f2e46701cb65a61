"""Ctrl-C, SIGTERM and SIGHUP (a closed terminal) as a flag: the loop finishes its step, saves and exits."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

ANSWER = b"\nstopping: the step under way is finished and saved; a second signal aborts\n"


def end_within(seconds: float, code: int) -> None:
    """Ends this process after so long if it still runs: threads of a data source that never answers would keep it."""

    def end() -> None:
        time.sleep(seconds)
        os._exit(code)

    threading.Thread(target=end, daemon=True).start()


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

    def receive(self, number: int) -> None:
        """Takes in a signal.

        Raises:
          Interrupted: inside a block of `at_once`.
        """
        self.signum = number
        if self._at_once:
            raise Interrupted


@contextlib.contextmanager
def stop_on_signals(signals: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)) -> Iterator[StopFlag]:
    """Collects `signals` in a flag inside the block; a second signal has its usual effect and aborts at once.

    Needs the main thread. Several processes under `jax.distributed` must leave SIGTERM to jax, which agrees on one step
    for all processes.
    """
    flag = StopFlag()
    previous = {number: signal.getsignal(number) for number in signals}

    def receive(number: int, frame: object) -> None:
        for each in signals:
            signal.signal(each, signal.default_int_handler if each == signal.SIGINT else signal.SIG_DFL)
        os.write(2, ANSWER)  # a signal may arrive inside of a print, which must not be entered twice
        flag.receive(number)

    for number in signals:
        signal.signal(number, receive)
    try:
        yield flag
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def interrupt_as_terminate() -> Iterator[StopFlag]:
    """For one of several processes: Ctrl-C becomes SIGTERM, on which all agree; a second Ctrl-C aborts this process.

    The loop sets the flag, at the step that the processes have agreed on.
    """
    previous = signal.getsignal(signal.SIGINT)

    def receive(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGINT, receive)
    try:
        yield StopFlag()
    finally:
        signal.signal(signal.SIGINT, previous)
