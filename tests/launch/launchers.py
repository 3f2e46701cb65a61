"""Calls of the launch scripts, and commands that stand for a cluster's."""

import os
import pathlib
import re
import shlex
import subprocess

ROOT = pathlib.Path(__file__).parents[2]
SCRIPTS = {"local.sh": 2, "slurm.sh": 2, "tpu_vm.sh": 4, "gke_xpk.sh": 4}  # and how many arguments each needs
CONFIG = ("configs/unified_grpo.py:tiny", "--config.seed=3", "--config.model.folder=/weights/a b")

CARDS = ("CUDA_VISIBLE_DEVICES", "JAX_LOCAL_DEVICE_IDS", "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
# what a cluster, or a host with cards, may have set
OTHERS = re.compile(rf"SLURM_|OMPI_|NCCL_|UAE_|NNODES$|NODE_RANK$|JOB_COMPLETION_INDEX$|MEGASCALE_|{'|'.join(CARDS)}")
# no wait between starts, and quick looks
AT_ONCE = {"UAE_WAIT": "0", "UAE_LOOK": "0.02"}


def environment_of(changes: dict[str, str]) -> dict[str, str]:
    """The environment of this process without what a cluster may have set, on the CPU."""
    kept = {name: value for name, value in os.environ.items() if not OTHERS.match(name)} | {"JAX_PLATFORMS": "cpu"}
    return kept | AT_ONCE | changes


def launch(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", ROOT / "launch" / script, *arguments],
        capture_output=True,
        text=True,
        env=environment_of(environment),
        timeout=60,
    )


def commands(script: str, *arguments: str, **environment: str) -> list[list[str]]:
    """The words of each command of a dry run."""
    done = launch(script, "--dry-run", *arguments, **environment)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line, comments=True) for line in done.stdout.splitlines() if not line.startswith("#")]


def script(path: pathlib.Path, text: str) -> str:
    """A command that can be started; returns its path."""
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def fake(folder: pathlib.Path, name: str, body: str) -> None:
    """A command in a folder of PATH, which notes its calls there."""
    script(folder / name, f'#!/bin/bash\necho {name} "$@" >> {folder}/calls\n{body}\n')


def calls(folder: pathlib.Path, *parts: str) -> int:
    """How many calls of fake commands have all parts."""
    path = folder / "calls"
    lines = path.read_text().splitlines() if path.exists() else []
    return sum(all(part in line for part in parts) for line in lines)


def before(folder: pathlib.Path) -> dict[str, str]:
    """PATH with the fake commands first."""
    return {"PATH": f"{folder}:{os.environ['PATH']}"}
