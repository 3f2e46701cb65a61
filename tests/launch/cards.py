"""What a process on cards gets to see, and how a host that cannot run is refused."""

import subprocess

H100 = "580.65.06, NVIDIA H100 80GB HBM3, 9.0"
# prints the environment
SHOW = ("env", "-0")
THRESHOLDS = [
    f"--xla_gpu_{name}_combine_threshold_bytes=134217728" for name in ("all_gather", "reduce_scatter", "all_reduce")
]


def shown(done: subprocess.CompletedProcess) -> dict[str, str]:
    """The environment that `SHOW` printed."""
    assert done.returncode == 0, done.stderr
    return dict(line.split("=", 1) for line in done.stdout.split("\0") if "=" in line)


def refused(done: subprocess.CompletedProcess, *parts: str) -> None:
    """Code 2, nothing started, and one line with the thing and the remedy."""
    assert done.returncode == 2 and not done.stdout and done.stderr.count("\n") == 1, done.stderr
    assert all(part in done.stderr for part in parts), done.stderr
