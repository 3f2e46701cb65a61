"""The card: what it is called, what drives it, and what it does at best."""

import ctypes
import os
from collections.abc import Callable
from typing import Any

import jax

from benchmarks import machine_rates
from benchmarks.gpu_check.card import query_card
from benchmarks.gpu_check.steps import chip_of
from uae_jax.training import summary

PACKAGES = ("jax", "jaxlib", "flax", "torch", "diffusers", "transformers", "peft")
CUDNN = ("libcudnn.so.9", "libcudnn.so.8")


def cudnn_version() -> str:
    """Of the library that jax has loaded; empty without one."""
    for name in CUDNN:
        try:
            number = ctypes.CDLL(name).cudnnGetVersion()
        except (OSError, AttributeError):
            continue
        major, rest = divmod(number, 10000 if number >= 90000 else 1000)
        return f"{major}.{rest // 100}.{rest % 100}"
    return ""


def versions() -> dict[str, str]:
    """Of Python, the packages that are installed, and cuDNN."""
    installed = {name: version for name, version in summary.versions(PACKAGES).items() if version != "source tree"}
    return installed | ({"cudnn": cudnn_version()} if cudnn_version() else {})


def run(size: str, report: Callable[[dict], None]) -> None:
    """Names and versions first, then the rates, in bfloat16 on a card.

    On a CPU the matrices are float32, and smaller in a dry run.
    """
    device, on_card = jax.devices()[0], jax.default_backend() == "gpu"
    if size == "small":
        machine_rates.SIDES["cpu"] = 512
    chip = chip_of(device)
    figures: dict[str, Any] = {
        **query_card(),
        "device_kind": device.device_kind,
        "backend": jax.default_backend(),
        "versions": versions(),
        "compute_capability": str(getattr(device, "compute_capability", "")),
        "cpus": os.cpu_count(),
        "memory_bytes": (device.memory_stats() or {}).get("bytes_limit"),
        "peak_flops": chip.flops if chip else None,
        "memory_bandwidth": chip.memory_bandwidth if chip else None,
        "dtype": "bfloat16" if on_card else "float32",
    }
    report(figures)
    report(figures | machine_rates.machine_rates(figures["dtype"]))
