"""Which card, which commit: what tells one check from another. Without jax, which would take the card."""

import hashlib
import os
import pathlib
import subprocess

ROOT = pathlib.Path(__file__).parents[2]
SOURCES = ("uae_jax", "benchmarks", "configs")
QUERIED = {
    "name": "card",
    "driver_version": "driver",
    "memory.total": "memory",
    "compute_cap": "compute_capability",
    "power.limit": "power_limit",
}


def query_card() -> dict[str, str]:
    """What nvidia-smi says of the first card that this process may use; empty without one.

    It is not asked for serial numbers.
    """
    index = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    query = f"--query-gpu={','.join(QUERIED)}"
    lines = _output("nvidia-smi", f"--id={index or 0}", query, "--format=csv,noheader").splitlines()
    return dict(zip(QUERIED.values(), (value.strip() for value in lines[0].split(",")))) if lines else {}


def commit() -> str:
    """The commit, with a digest of the sources where they differ from it or git does not know it."""
    known = _output("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD")
    if known and not _output("git", "-C", str(ROOT), "status", "--porcelain", "--", *SOURCES):
        return known
    digest = hashlib.sha256()
    for path in sorted(path for name in SOURCES for path in (ROOT / name).rglob("*.py")):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return f"{known}+{digest.hexdigest()[:12]}"


def identity(size: str) -> dict[str, str]:
    """Figures of another identity are not mixed with these: `commit`, `card` and `size`."""
    return {"commit": commit(), "card": query_card().get("card", "none"), "size": size}


def _output(*command: str) -> str:
    """What a command prints; empty where it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
