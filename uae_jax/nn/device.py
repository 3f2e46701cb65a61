"""Which devices a computation is for."""

import re

import jax
from jax.sharding import AbstractMesh


def current_mesh() -> AbstractMesh | None:
    """The mesh that `jax.set_mesh` or `jax.sharding.use_abstract_mesh` made current; None without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def platform() -> str:
    """`cpu`, `gpu` or `tpu`: the devices of the current mesh, else the default ones."""
    device = getattr(current_mesh(), "abstract_device", None)
    return jax.default_backend() if device is None else device.platform


# of GPUs older than Ampere, by words of their CUDA name (developer.nvidia.com/cuda-gpus); all others are 8.0 or newer
_OLDER = (
    (
        r"\bT4\b|\bT[1246]00\b|\bT[12][02]00\b|T2000|Quadro RTX [3-8]000\b|GeForce RTX 20\d\d|TITAN RTX|GTX "
        r"16\d\d|MX450",
        (7, 5),
    ),
    (r"V100|TITAN V\b", (7, 0)),
    (r"P100|P40\b|P4\b|GTX 10\d\d|GTX 9\d\d|M60|TITAN X", (6, 0)),
    (r"^AMD|^gfx", (0, 0)),
)


def compute_capability() -> tuple[int, int]:
    """Generation (major, minor) of the NVIDIA GPU that a computation is for: of the current mesh, else the process.

    (0, 0) is a GPU of another maker. A GPU that is not present is known by its name alone; (8, 0) stands for every one
    that is not older.
    """
    device = getattr(current_mesh(), "abstract_device", None)
    present = jax.local_devices() if jax.default_backend() == "gpu" else []
    for real in present:
        if device is None or device.device_kind == real.device_kind:
            found = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(real, "compute_capability", "")))
            return (int(found[1]), int(found[2])) if found else (0, 0)  # a GPU of another maker
    name = "" if device is None else device.device_kind
    return next((version for words, version in _OLDER if re.search(words, name)), (8, 0))


def on_one_cpu() -> bool:
    """Whether the computation is on a single CPU device, so that the batch may be merged with other axes."""
    mesh = current_mesh()
    return platform() == "cpu" and (jax.device_count() if mesh is None else mesh.size) == 1
