"""The parts in the order of their value, how long each may take, and a process for each."""

import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.gpu_check.card import ROOT

MARGIN = 5.0  # seconds before its end in which a part begins nothing more
KEPT_LINES, KEPT_WIDTH = 15, 300  # of what a part printed before it failed


@dataclasses.dataclass(frozen=True)
class Part:
    """One process of the check.

    Attributes:
      name: as in the report; `kind:stage` where there are several of a kind.
      seconds: expected, in proportion to the others.
      least: seconds below which it is not begun.
      command: in place of `part NAME ...`, for tests.
    """

    name: str
    seconds: float
    least: float
    command: tuple[str, ...] = ()


# most of the time of a step is its compilation; the stages with the longest loops take the longest (docs/cards.md)
PARTS = (
    Part("device", 15, 8),
    Part("steps:gen_for_und", 80, 20),
    Part("steps:und_for_gen", 90, 20),
    Part("attention", 35, 20),
    Part("phases:gen_for_und", 45, 20),
    Part("torch:gen_for_und", 50, 25),
    Part("steps:pretrain", 50, 20),
    Part("steps:cold_start", 85, 20),
    Part("phases:und_for_gen", 40, 20),
    Part("torch:und_for_gen", 45, 25),
)


def select(names: str, parts: Sequence[Part] = PARTS) -> list[Part]:
    """The parts of a list such as `device,steps,torch:gen_for_und`; a kind stands for all of its stages.

    Raises:
      ValueError: a name that no part has.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if not any(name in (part.name, part.name.partition(":")[0]) for part in parts):
            raise ValueError(f"--parts names {name!r}; the parts are {', '.join(part.name for part in parts)}")
    return [part for part in parts if not wanted or {part.name, part.name.partition(":")[0]} & set(wanted)]


def time_limit(part: Part, pending: Sequence[Part], left: float) -> float:
    """Seconds that a part may take: twice its share of what is left, so that early parts have room, late ones the rest.

    Args:
      part: the first of `pending`.
      pending: all parts that have not run.
      left: seconds.
    """
    return min(left, 2 * left * part.seconds / sum(other.seconds for other in pending))


def environment(work: pathlib.Path) -> dict[str, str]:
    """Of every part: one card, most of its memory, and a folder for compiled programs, which a second run finds again.

    Variables that are set already stay.
    """
    # the older name still works, but both together are an error
    memory = {} if "XLA_PYTHON_CLIENT_MEM_FRACTION" in os.environ else {"XLA_CLIENT_MEM_FRACTION": "0.92"}
    return (
        memory
        | {
            "CUDA_VISIBLE_DEVICES": "0",
            "JAX_COMPILATION_CACHE_DIR": str(work / "programs" / "jax"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "TORCHINDUCTOR_CACHE_DIR": str(work / "programs" / "torch"),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "TF_CPP_MIN_LOG_LEVEL": "2",
        }
        | os.environ
    )


def run_part(part: Part, size: str, work: pathlib.Path, limit: float) -> dict[str, Any]:
    """Runs a part to its end or to its limit; nothing that it started outlives it.

    Args:
      part: which.
      size: `full` or `small`.
      work: folder that the parts share.
      limit: seconds.

    Returns:
      `status` (`ok`, `failed` or `timeout`), `seconds`, `limit`, `figures_file`, which need not be there, and without
      success `error`, the last lines that it printed.
    """
    stem = part.name.replace(":", "_")
    figures, log = work / "figures" / f"{stem}.json", work / "figures" / f"{stem}.log"
    figures.parent.mkdir(parents=True, exist_ok=True)
    figures.unlink(missing_ok=True)
    command = part.command or (
        sys.executable,
        "-m",
        "benchmarks.gpu_check.part",
        part.name,
        f"--size={size}",
        f"--work={work}",
        f"--figures={figures}",
        f"--until={time.time() + limit - MARGIN}",
    )
    begin = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=environment(work), start_new_session=True
        )
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end_group(process)
    found: dict[str, Any] = {"status": "timeout" if code is None else "failed" if code else "ok"}
    found |= {"seconds": round(time.monotonic() - begin, 1), "limit": round(limit, 1), "figures_file": figures}
    return found if code == 0 else found | {"error": last_lines(log, work)}


def end_group(process: subprocess.Popen) -> None:
    """Ends a process and all that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def last_lines(log: pathlib.Path, work: pathlib.Path) -> list[str]:
    """The end of what a part printed, with the names of private folders shortened."""
    short = {str(ROOT): ".", str(work): "WORK", sys.prefix: "PYTHON", str(pathlib.Path.home()): "~"}
    short[tempfile.gettempdir()] = "TMP"
    text = log.read_text(errors="replace")
    for folder in sorted(short, key=len, reverse=True):
        text = text.replace(folder, short[folder]) if len(folder) > 1 else text
    return [line[:KEPT_WIDTH] for line in text.splitlines() if line.strip()][-KEPT_LINES:]
