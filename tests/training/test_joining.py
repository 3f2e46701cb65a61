"""When a process joins others, what it says when it cannot, and its exit codes. Several of them are in tests/stages."""

import errno
import os
import signal
import socket
import subprocess
import sys

import jax
import pytest

from uae_jax import main
from uae_jax.training import processes
from uae_jax.training.signals import interrupt_as_terminate


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, False),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}, False),
        ({"SLURM_STEP_NUM_TASKS": "8"}, True),
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"MEGASCALE_COORDINATOR_ADDRESS": "a"}, True),
    ],
)
def test_the_environment_says_whether_there_are_several(environment, expected):
    assert processes.several(environment) == expected


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, (None, None, None)),
        ({"SLURM_STEP_NUM_TASKS": "8"}, (None, None, None)),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "0"}, ("a:1", 4, 0)),
        (
            {"JAX_COORDINATOR_ADDRESS": "a", "JAX_COORDINATOR_PORT": "6002", "NNODES": "2", "NODE_RANK": "1"},
            ("a:6002", 2, 1),
        ),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, ("a:1", None, None)),
    ],
)
def test_variables_give_what_jax_does_not_find_by_itself(environment, expected):
    assert processes._from_environment(environment) == expected


ALONE = """
import pathlib, sys, time
from uae_jax.training import processes

processes.join(sys.argv[1], 2, int(sys.argv[2]))
folder = pathlib.Path(sys.argv[3])


def check():
    if sys.argv[2] == "0":
        time.sleep(1)
        (folder / "found").write_text("all")
        if (folder / "bad").exists():
            raise ValueError("bad images")
    return (folder / "found").read_text()


for turn in range(1 if (folder / "bad").exists() else 2):
    print(processes.first_alone(check, "checked"), flush=True)
"""


@pytest.mark.parametrize("bad", [False, True])
def test_the_others_find_what_process_0_has_done(tmp_path, bad):
    """Also where it fails: the others then go on, and fail for themselves or do not."""
    if bad:
        (tmp_path / "bad").touch()
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        address = f"localhost:{listener.getsockname()[1]}"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", ALONE, address]
    started = [
        subprocess.Popen(
            [*command, str(index), str(tmp_path)],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for index in range(2)
    ]
    try:
        (out, error), (other, _) = [process.communicate(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()
    assert other.startswith("all")
    assert ("ValueError: bad images" in error) if bad else (out == other == "all\nall\n")


def test_a_single_process_waits_for_nobody():
    assert processes.first_alone(lambda: 7, "checked") == 7


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("localhost:1", 2, None), "go together"),
        ((None, 2, 0), "go together"),
        (("localhost:1", 2, 2), "must be from 0 to 1"),
        (("localhost", 2, 0), "must be host:port"),
    ],
)
def test_flags_that_do_not_fit_together_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        processes.join(*arguments)


def test_one_process_alone_joins_nothing(monkeypatch):
    for name in (
        "SLURM_STEP_NUM_TASKS",
        "OMPI_COMM_WORLD_SIZE",
        "JAX_NUM_PROCESSES",
        "TPU_WORKER_HOSTNAMES",
        "JAX_COORDINATOR_ADDRESS",
    ):
        monkeypatch.delenv(name, raising=False)
    processes.join()
    assert processes.alone()
    assert not processes.lost_process(RuntimeError("Gloo: connection closed"))


def test_a_message_and_a_code_end_one_process(capsys):
    with pytest.raises(SystemExit) as left:
        processes.leave("error: this", 3)
    assert left.value.code == 3 and capsys.readouterr().err == "error: this\n"


@pytest.mark.parametrize(
    "error, code",
    [
        (ConnectionError("the processes of this run do not find each other"), 75),
        (ConnectionResetError("reset by peer"), 75),
        (OSError(errno.ENOTCONN, "Transport endpoint is not connected"), 75),
        (OSError(errno.ESTALE, "Stale file handle"), 75),
        (OSError(errno.ENOSPC, "No space left on device"), 1),
        (FileNotFoundError(errno.ENOENT, "No such file"), 1),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1),
        (ValueError("gloo is no setting"), 1),
        (FloatingPointError("the loss is nan"), 1),
        (jax.errors.JaxRuntimeError("INTERNAL: CUDA_ERROR_ECC_UNCORRECTABLE: uncorrectable ECC error"), 75),
        (jax.errors.JaxRuntimeError("UNAVAILABLE: TPU device error"), 75),
    ],
)
def test_the_exit_code_tells_infrastructure_from_the_users_errors(capsys, error, code):
    with pytest.raises(SystemExit) as left:
        main.leave_with(error)
    assert left.value.code == code and "error: " in capsys.readouterr().err


@pytest.mark.parametrize("error", [KeyError("a bug"), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")])
def test_a_bug_and_too_little_memory_keep_their_traceback(error):
    with pytest.raises(type(error)):
        main.leave_with(error)


@pytest.mark.parametrize(
    "error, code, said",
    [
        (RuntimeError("Gloo: connection closed by peer"), 75, "error: another process of this run is gone (Gloo"),
        (ValueError("DEADLINE_EXCEEDED: barrier timed out"), 75, "error: another process of this run is gone"),
        (ValueError("the image is damaged"), 1, "error: the image is damaged"),
        (KeyError("a bug"), 1, "the other processes end too"),
    ],
)
def test_one_of_several_processes_leaves_with_the_same_codes(monkeypatch, capsys, error, code, said):
    left = []
    monkeypatch.setattr(processes, "alone", lambda: False)
    monkeypatch.setattr(processes, "GRACE_SECONDS", 0)

    def leave(code):
        left.append(code)
        raise SystemExit

    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit):
        main.leave_with(error)
    assert left == [code] and said in capsys.readouterr().err


def test_ctrl_c_in_one_of_several_processes_becomes_a_signal_for_all():
    received = []
    before = {
        # a shell starts its background jobs with Ctrl-C ignored
        signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler),
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda number, frame: received.append(number)),
    }
    try:
        with interrupt_as_terminate() as flag:
            os.kill(os.getpid(), signal.SIGINT)
            assert received == [signal.SIGTERM] and flag.signum == 0
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
                signal.pause()
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
