"""Several processes as one program: start, agreement, and exit after the loss of a process."""

import errno
import itertools
import os
import re
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

# a process that is silent for so long counts as lost, and the others exit
HEARTBEAT_SECONDS = 40
GRACE_SECONDS = 2
# the exit code that asks for another start, EX_TEMPFAIL of sysexits.h; launch/supervise.sh acts on it
START_AGAIN = 75
# a device that fails, by what XLA says of it; a wrong address or too little memory is the program's
BROKEN = r"UNAVAILABLE|DATA_LOSS|uncorrectable|fallen off the bus|CUDA_ERROR_(ECC|NVLINK|HARDWARE|DEVICE_UNAVAILABLE)"
# a file system over a network is gone, or a disk fails; a full disk is the user's to mend
LOST_FILES = frozenset(
    (errno.EIO, errno.ENOTCONN, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETUNREACH)
)
# the others wait so long for what process 0 does alone, such as the check of all images
ALONE_SECONDS = 24 * 3600
# in errors of collectives and of the coordination service after the loss of a process
LOST = r"(?i)gloo|nccl|connection (closed|reset|refused)|heartbeat|coordination|UNAVAILABLE|DEADLINE_EXCEEDED|preempt"

Result = TypeVar("Result")
_barriers = itertools.count()


def several(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the environment has several processes: a TPU slice, GKE, SLURM, MPI, or JAX's own variables."""
    counts = (
        environment.get(name, "1") for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "JAX_NUM_PROCESSES")
    )
    named = ("JAX_COORDINATOR_ADDRESS", "MEGASCALE_COORDINATOR_ADDRESS")
    return (
        "," in environment.get("TPU_WORKER_HOSTNAMES", "")
        or any(environment.get(name) for name in named)
        or any(count.isdigit() and int(count) > 1 for count in counts)
    )


def _from_environment(environment: Mapping[str, str]) -> tuple[str | None, int | None, int | None]:
    """Coordinator, number of processes and own index from variables of JAX and of xpk on GPU nodes; None where JAX
    finds the value.
    """
    address, port = environment.get("JAX_COORDINATOR_ADDRESS"), environment.get("JAX_COORDINATOR_PORT")
    if not address:
        return None, None, None
    numbers: list[int | None] = []
    for names in (("JAX_NUM_PROCESSES", "NNODES"), ("JAX_PROCESS_ID", "NODE_RANK")):
        values = [environment[name] for name in names if environment.get(name, "").isdigit()]
        numbers.append(int(values[0]) if values else None)
    return address if ":" in address or not port else f"{address}:{port}", numbers[0], numbers[1]


def join(coordinator: str | None = None, processes: int | None = None, process_id: int | None = None) -> None:
    """Joins the other processes of the run, before any other use of JAX; does nothing for a single process.

    Args:
      coordinator: host:port of process 0; None for the environment's choice (`several`).
      processes: number of processes; None if JAX knows the cluster.
      process_id: index of this process from 0; None if JAX knows the cluster.

    Raises:
      ValueError: only some of the three are given, or they do not fit together.
      ConnectionError: the other processes cannot be reached.
    """
    if coordinator is None and processes is None and process_id is None:
        if not several():
            return
        coordinator, processes, process_id = _from_environment(os.environ)
    elif coordinator is None or processes is None or process_id is None:
        raise ValueError("--coordinator, --processes and --process_id go together; give all three or none")
    elif not 0 <= process_id < processes:
        raise ValueError(f"--process_id is {process_id}; it must be from 0 to {processes - 1}, one below --processes")
    elif ":" not in coordinator:
        raise ValueError(f"--coordinator is {coordinator!r}; it must be host:port, such as localhost:1234")
    # on CPU two concurrent programs mix up the messages of their collectives; other devices ignore this setting
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        jax.distributed.initialize(coordinator, processes, process_id, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except RuntimeError as error:
        where = coordinator or "the address that the cluster names"
        raise ConnectionError(
            f"the processes of this run do not find each other at {where} ({str(error).splitlines()[0]}); start one "
            "on every host, and check that process 0 can be reached"
        ) from error


def check_shared(folder: Path, flag: str = "--workdir") -> None:
    """Checks that all processes see the same folder, which a flag has named.

    Raises:
      ValueError: a process sees another folder.
    """
    if jax.process_count() == 1:
        return
    number = multihost_utils.broadcast_one_to_all(np.array(uuid.uuid4().int % 2**31, np.int32))
    mark = folder / f".shared_{int(number)}"
    if jax.process_index() == 0:
        mark.touch()
    wait_for_all("shared folder written")
    seen = multihost_utils.process_allgather(np.array(mark.exists()))
    if jax.process_index() == 0:
        mark.unlink()
    if not seen.all():
        raise ValueError(
            f"process {int(np.argmin(seen))} does not see {folder} of process 0; put {flag} on a file system that "
            "all hosts share"
        )


def wait_for_all(name: str) -> None:
    """Waits until all processes have reached the point `name`; returns at once for a single process."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def all_agree(value: bool) -> bool:
    """Whether a condition holds in all processes, which get the same answer."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.process_allgather(np.array(value)).all())


def of_first(value: np.ndarray) -> np.ndarray:
    """The value that process 0 has of an array, on every process."""
    if jax.process_count() == 1:
        return value
    return np.asarray(multihost_utils.broadcast_one_to_all(value))


def first_alone(action: Callable[[], Result], name: str) -> Result:
    """The action's result on every process; the others begin when process 0 has done it, and find what it left on disk.

    Raises:
      Exception: what the action raises, on every process for itself.
    """
    if jax.process_count() == 1:
        return action()
    from orbax.checkpoint import multihost  # checkpointing takes a second to import

    # no collective of the devices: those give up after seconds
    barrier = multihost.get_barrier_sync_fn()
    assert barrier is not None
    key = f"{name} {next(_barriers)}"
    if jax.process_index():
        barrier(key=key, timeout_ms=ALONE_SECONDS * 1000)
        return action()
    try:
        return action()
    finally:
        barrier(key=key, timeout_ms=ALONE_SECONDS * 1000)


def alone() -> bool:
    """Whether this process is the only one of its run."""
    return not jax.distributed.is_initialized()


def lost_process(error: Exception) -> bool:
    """Whether an error of JAX means the loss of another process."""
    return not alone() and re.search(LOST, str(error)) is not None


def infrastructure(error: Exception) -> bool:
    """Whether an error is one of machines, networks or file systems, so that the same command may succeed later."""
    if lost_process(error) or (isinstance(error, jax.errors.JaxRuntimeError) and re.search(BROKEN, str(error))):
        return True
    if not isinstance(error, OSError) or isinstance(error, BrokenPipeError):  # the reader of the output has left
        return False
    return isinstance(error, ConnectionError) or error.errno in LOST_FILES


def leave(message: str, code: int, *, wait: bool = True) -> NoReturn:
    """Ends this process with a message. One of several processes does not wait for the others, to avoid a deadlock."""
    if not alone():
        print(message, file=sys.stderr, flush=True)
        sys.stdout.flush()
        if wait:
            time.sleep(GRACE_SECONDS)  # the other processes get the same error and report it too
        os._exit(code)
    print(message, file=sys.stderr)
    sys.exit(code)
