"""Ctrl-C is answered at once, also where the interpreter does not run; the second one ends the process."""

import signal
import subprocess
import sys
import time

import pytest

# the lock of a C function without the interpreter's, as a compiler that runs for minutes
BUSY = """
import ctypes, signal, sys, time
from uae_jax.training.signals import stop_on_signals
with stop_on_signals(doing=lambda: "toy: compiling the step") as flag:
    print("ready", flush=True)
    ctypes.CDLL(None).usleep(SECONDS * 1_000_000 // 4)
    for _ in range(3):
        ctypes.CDLL(None).usleep(SECONDS * 1_000_000 // 4)
    print("flag", int(flag.signum), flush=True)
"""


def started(seconds):
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY.replace("SECONDS", str(seconds))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


def test_the_first_is_answered_at_once_and_heard_when_the_work_returns():
    process = started(2)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    begin = time.monotonic()
    assert process.stderr.readline() == "\n"
    answer = process.stderr.readline()
    assert time.monotonic() - begin < 0.4, "while the C function still runs"
    assert answer.startswith("stopping: toy: compiling the step ends first")
    out, err = process.communicate(timeout=30)
    assert out == f"flag {int(signal.SIGINT)}\n" and err == "" and process.returncode == 0


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_second_aborts_in_one_line_without_a_traceback(number, code):
    process = started(60)
    process.send_signal(number)
    process.stderr.readline(), process.stderr.readline()
    begin = time.monotonic()
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert time.monotonic() - begin < 5 and process.returncode == code
    assert err.strip().splitlines() == [
        "aborted; what is saved stays, and the same command continues from the newest checkpoint"
    ]


# a signal that comes while the garbage collector calls back, as jax has it do
COLLECTING = """
import gc, os, signal, time
from uae_jax.training.signals import Interrupted, stop_on_signals
def callback(phase, info):
    if phase == "stop" and not flag.signum:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
class Last:
    def __del__(self):
        callback("stop", {})
with stop_on_signals() as flag:
    PREPARE
    try:
        with flag.at_once():
            PROVOKE
            time.sleep(30)
    except Interrupted:
        print("interrupted", int(flag.signum), flush=True)
"""


@pytest.mark.parametrize("prepare, provoke", [("gc.callbacks.append(callback)", "gc.collect()"), ("pass", "Last()")])
def test_a_signal_in_a_call_whose_errors_are_forgotten_interrupts_after_it(prepare, provoke):
    begin = time.monotonic()
    code = COLLECTING.replace("PREPARE", prepare).replace("PROVOKE", provoke)
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert found.stdout == f"interrupted {int(signal.SIGTERM)}\n" and time.monotonic() - begin < 25
    assert "Traceback" not in found.stderr and "ignored" not in found.stderr


ENDED = """
import atexit, os, sys
from uae_jax import main

class Thread:  # of a library: it crashes when the interpreter is taken apart under it
    def __del__(self):
        os.abort()

def stopped():
    global kept
    kept = Thread()
    atexit.register(print, "closed")
    sys.exit({code})

main.main = stopped
main.program()
"""


@pytest.mark.parametrize("code", [0, 130])
def test_a_run_that_is_over_ends_with_its_own_code_whatever_its_libraries_still_do(code):
    done = subprocess.run([sys.executable, "-c", ENDED.format(code=code)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (code, "closed\n", "")
