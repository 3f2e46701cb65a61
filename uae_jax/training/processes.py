"""Several processes as one program: joining them, agreeing, and leaving when one is gone."""

import os
import re
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

# a process that says nothing for so long is taken for dead, and the others end
HEARTBEAT_SECONDS = 40
GRACE_SECONDS = 2
# what collectives and the coordination service say when a peer is gone
LOST = r"(?i)gloo|nccl|connection (closed|reset|refused)|heartbeat|coordination|UNAVAILABLE|DEADLINE_EXCEEDED|preempt"


def several(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the environment says that this process is one of several: a TPU slice, GKE, SLURM, MPI, or JAX's own
    variables.
    """
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
    """What variables say of coordinator, number of processes and own index; None where JAX finds it by itself.

    Besides JAX_* those that xpk sets on GPU nodes are read.
    """
    address, port = environment.get("JAX_COORDINATOR_ADDRESS"), environment.get("JAX_COORDINATOR_PORT")
    if not address:
        return None, None, None
    numbers = []
    for names in (("JAX_NUM_PROCESSES", "NNODES"), ("JAX_PROCESS_ID", "NODE_RANK")):
        values = [environment[name] for name in names if environment.get(name, "").isdigit()]
        numbers.append(int(values[0]) if values else None)
    return address if ":" in address or not port else f"{address}:{port}", *numbers


def join(coordinator: str | None = None, processes: int | None = None, process_id: int | None = None) -> None:
    """Joins the other processes of the run; one process alone needs nothing. Must come before any other use of JAX.

    Args:
      coordinator: host:port where process 0 listens. Without it the environment decides (`several`).
      processes: how many there are; process_id: which one this is, from 0. On clusters that JAX knows it finds both.

    Raises:
      ValueError: only some of the three are given, or they do not fit together.
      ConnectionError: the others cannot be reached.
    """
    given = (coordinator, processes, process_id)
    if all(value is None for value in given):
        if not several():
            return
        coordinator, processes, process_id = _from_environment(os.environ)
    elif None in given:
        raise ValueError("--coordinator, --processes and --process_id go together; give all three or none")
    elif not 0 <= process_id < processes:
        raise ValueError(f"--process_id is {process_id}; it must be from 0 to {processes - 1}, one below --processes")
    elif ":" not in coordinator:
        raise ValueError(f"--coordinator is {coordinator!r}; it must be host:port, such as localhost:1234")
    # on CPU two programs in flight mix up the messages of their collectives; other devices do not read this
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        jax.distributed.initialize(coordinator, processes, process_id, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except RuntimeError as error:
        where = coordinator or "the address that the cluster names"
        raise ConnectionError(
            f"the processes of this run do not find each other at {where} ({str(error).splitlines()[0]}); start one "
            "on every host, "
            f"and check that process 0 can be reached"
        ) from error


def check_shared(folder: Path) -> None:
    """Checks that all processes see one and the same folder.

    Raises:
      ValueError: they do not.
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
            f"process {int(np.argmin(seen))} does not see {folder} of process 0; put --workdir on a file system that "
            "all hosts share"
        )


def wait_for_all(name: str) -> None:
    """Returns when all processes have come to the point `name`; nothing for one process."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def alone() -> bool:
    """Whether this process is the only one of its run."""
    return not jax.distributed.is_initialized()


def lost_process(error: Exception) -> bool:
    """Whether an error of JAX says that another process is gone."""
    return not alone() and re.search(LOST, str(error)) is not None


def leave(message: str, code: int, *, wait: bool = True) -> NoReturn:
    """Ends this process with a message. One of several does not wait for the others, which would wait for it in
    turn.
    """
    if not alone():
        print(message, file=sys.stderr, flush=True)
        sys.stdout.flush()
        if wait:
            time.sleep(GRACE_SECONDS)  # the same error reaches the others, who say it too
        os._exit(code)
    print(message, file=sys.stderr)
    sys.exit(code)
