"""A disk that becomes full while a checkpoint is written: one line, and the checkpoints before it stay."""

import errno
import pathlib
import subprocess
import sys

import pytest

from uae_jax.files.whole import named

PROGRAM = """
import pathlib, resource, sys, time
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/.."]
import jax, jax.numpy as jnp
from test_loop import Batches, make_stage
from uae_jax import main
from uae_jax.training.loop import run_stage
from uae_jax.training.loop_config import Hooks, LoopConfig
from uae_jax.training.metrics import MetricWriter

def fill(step):
    if step == 7 and len(sys.argv) > 3:  # from here on no file can grow beyond this size
        while not (workdir / "checkpoints/toy/4/commit_success.txt").exists():
            time.sleep(0.1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, resource.RLIM_INFINITY))

main.quiet(False)
workdir = pathlib.Path(sys.argv[2])
step, _, state = make_stage()
try:
    result = run_stage(
        "toy", step, state=state, frozen=jnp.full((3, 2), 0.5), data=Batches(), key=jax.random.key(1),
        workdir=workdir, config=LoopConfig(steps=12, save_every=4),
        writer=MetricWriter(workdir, tensorboard=False), hooks=Hooks(on_step=fill),
    )
    print("steps", result.steps)
except Exception as error:
    main.leave_with(error)
"""


def train(workdir, *more):
    command = [sys.executable, "-c", PROGRAM, str(pathlib.Path(__file__).parent), str(workdir), *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    said = [line for line in done.stderr.splitlines() if not line.startswith(("toy step", "toy: "))]
    return done.returncode, done.stdout, said


def test_a_write_without_a_name_gets_one(tmp_path):
    with pytest.raises(OSError, match="No space left on device: .*metrics.jsonl"), named(tmp_path / "metrics.jsonl"):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(FileNotFoundError, match="other"), named(tmp_path / "metrics.jsonl"):
        (tmp_path / "other").read_text()


def test_one_line_and_the_same_command_continues(tmp_path):
    code, _, said = train(tmp_path, "full")
    assert code == 1
    assert len(said) == 1, said
    (line,) = said
    folder = tmp_path / "checkpoints" / "toy"
    written = f"error: a checkpoint could not be written to {folder} (File too large); make room there"
    assert line.startswith((written, f"error: [Errno 27] File too large: '{tmp_path}"))  # whichever file is first
    assert (folder / "4" / "commit_success.txt").exists()
    assert train(tmp_path) == (0, "steps 12\n", [])
