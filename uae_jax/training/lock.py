"""One run a workdir: a second one that starts there is refused, and a lock that a dead run left is taken over."""

import contextlib
import json
import os
import pathlib
import socket
import sys
import time
from collections.abc import Iterator

import jax

NAME = "run.lock"
RUN = "UAE_RUN"  # set by launchers that start a run again only after all of its processes have ended


@contextlib.contextmanager
def workdir_lock(workdir: pathlib.Path, flag: str = "--workdir") -> Iterator[None]:
    """Holds the workdir of a run; of several processes the first one does.

    The lock is a file with host, process and start time. A lock of this host whose process is gone is taken over. The
    state of another host's process cannot be seen from here: its lock has to be deleted by hand. The exception is a run
    that a launcher starts again elsewhere: it has the name of the first start in the environment.

    Args:
      workdir: exists.
      flag: of the command that named it.

    Raises:
      ValueError: another run holds it.
    """
    if jax.process_index() != 0:
        yield
        return
    path = workdir / NAME
    _acquire(path, flag)
    try:
        yield
    finally:
        if _owner(path).get("process") == os.getpid():
            path.unlink(missing_ok=True)


def _acquire(path: pathlib.Path, flag: str) -> None:
    own = {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "born": _born(os.getpid()),
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "run": os.environ.get(RUN),
    }
    while True:
        try:
            with path.open("x", encoding="utf-8") as file:
                json.dump(own, file)
            return
        except FileExistsError:
            other = _owner(path)
            if not _gone(other):
                raise ValueError(
                    f"{path.parent} is in use by process {other.get('process')} on {other.get('host')} since "
                    f"{other.get('started')}; use another {flag}, stop that run, or delete {path} if it is gone"
                ) from None
            print(f"note: {path} was left by a run that is gone; it is taken over", file=sys.stderr)
            path.unlink(missing_ok=True)


def _owner(path: pathlib.Path) -> dict:
    """What a lock says; empty for one that is absent or not written completely."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _gone(owner: dict) -> bool:
    """Whether the process of a lock does not exist any more; its number may belong to a later one."""
    process = owner.get("process")
    if not isinstance(process, int):
        return True
    if owner.get("host") != socket.gethostname():
        return bool(owner.get("run")) and owner.get("run") == os.environ.get(RUN)
    if process == os.getpid():
        return False
    born = _born(process)
    return born is None or (owner.get("born") is not None and born != owner["born"])


def _born(process: int) -> str | None:
    """The start time of a process of this host, in the kernel's own units; None for one that does not exist.

    Where there is no /proc, existence alone is told.
    """
    try:
        return pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        if pathlib.Path("/proc/self").exists():
            return None
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return ""
