"""Accelerators: memory, peak and bandwidths of a chip or card from the vendors' pages, and names of topologies.

Sources: docs.cloud.google.com/tpu/docs/{v4, v5e, v5p, v6e, tpu7x} (system architecture tables: memory, bandwidth of the
memory and of the links between chips (half of the figure for both directions), bfloat16 peak per chip); NVIDIA's data
sheets (dense bfloat16 with float32 sums; links: NVLink in one direction, or PCI Express x16); memory as reported by the
cards, without the memory for error correction.
"""

import dataclasses
import math
import re

from uae_jax.planning.cards import TARGETS

GIB = 2**30
# bytes per second of a card between hosts: a network of 400 Gbit/s per card, as in NVIDIA's DGX H100
NETWORK = 50e9


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip, or the part of a chip that JAX shows as a device.

    Attributes:
      name: in topologies.
      memory: in bytes.
      flops: bfloat16 peak per second.
      memory_bandwidth: in bytes per second.
      link_bandwidth: bytes per second received from neighbours over all links.
      device_kind: libtpu's or CUDA's name.
    """

    name: str
    memory: float
    flops: float
    memory_bandwidth: float
    link_bandwidth: float
    device_kind: str


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 32 * GIB, 275e12, 1228e9, 300e9, "TPU v4"),
        Chip("v5e", 16 * GIB, 197e12, 819e9, 200e9, "TPU v5 lite"),
        Chip("v5p", 95 * GIB, 459e12, 2765e9, 600e9, "TPU v5"),
        Chip("v6e", 32 * GIB, 918e12, 1638e9, 400e9, "TPU v6 lite"),
        # each of a chip's two chiplets is a device: half of 192 GiB, 2307 TFLOP/s, 7380 GB/s and 600 GB/s per direction
        Chip("7x", 96 * GIB, 1153.5e12, 3690e9, 300e9, "TPU7x"),
        Chip("H100", 84942979072, 989e12, 3352e9, 450e9, "NVIDIA H100 80GB HBM3"),
        Chip("H200", 150.1e9, 989e12, 4800e9, 450e9, "NVIDIA H200"),
        Chip("A100-40", 42298834944, 312e12, 1555e9, 300e9, "NVIDIA A100-SXM4-40GB"),
        Chip("A100-80", 79.2 * GIB, 312e12, 2039e9, 300e9, "NVIDIA A100-SXM4-80GB"),
        Chip("L4", 22.0 * GIB, 121e12, 300e9, 32e9, "NVIDIA L4"),
        Chip("L40S", 44.5 * GIB, 362e12, 864e9, 32e9, "NVIDIA L40S"),
        Chip("RTX3090", 23.6 * GIB, 71e12, 936e9, 32e9, "NVIDIA GeForce RTX 3090"),
        Chip("RTX4090", 23.6 * GIB, 165e12, 1008e9, 32e9, "NVIDIA GeForce RTX 4090"),
        Chip("RTX5090", 31.4 * GIB, 209e12, 1792e9, 64e9, "NVIDIA GeForce RTX 5090"),
        Chip("B200", 191514411008, 2250e12, 7672e9, 900e9, "NVIDIA B200"),
        # peak in float16: Turing's matrix units have no bfloat16
        Chip("T4", 14.7 * GIB, 65e12, 320e9, 16e9, "Tesla T4"),
    )
}
# simulated host devices are no chip; a plan on them has bytes and operations, and always fits
CPU = Chip("cpu", math.inf, math.nan, math.nan, math.nan, "cpu")
USABLE = 0.92  # of a chip's memory; the rest is for the runtime and fragmentation


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips that run one program.

    Attributes:
      name: as given.
      kind: `tpu` or `gpu` (compiled ahead of time if the compiler is installed), or `cpu` (compiled for simulated
        devices).
      chip: one of the devices.
      devices: number of devices.
      hosts: of cards; 1 for slices of TPUs, whose links do not depend on hosts.
    """

    name: str
    kind: str
    chip: Chip
    devices: int
    hosts: int = 1


def parse_topology(name: str) -> Topology:
    """A topology by name: `v6e:8x8`, `v5p:4x4x4`, `cpu:8`, `gpu:8xH200`, or `gpu:2x8xH200` for two hosts.

    Raises:
      ValueError: another form of name, or an unknown chip.
    """
    kind, _, rest = name.partition(":")
    if kind == "cpu" and re.fullmatch(r"[1-9]\d*", rest):
        return Topology(name, "cpu", CPU, int(rest))
    if kind == "gpu" and (found := re.fullmatch(r"(?:([1-9]\d*)x)?([1-9]\d*)x([A-Za-z][\w-]*)", rest)):
        if found[3] not in TARGETS:
            raise ValueError(f"topology {name!r} names the card {found[3]!r}; known are {', '.join(TARGETS)}")
        hosts, chip = int(found[1] or 1), CHIPS[found[3]]
        if hosts > 1:
            chip = dataclasses.replace(chip, link_bandwidth=min(chip.link_bandwidth, NETWORK))
        return Topology(name, "gpu", chip, hosts * int(found[2]), hosts)
    if kind in CHIPS and kind not in TARGETS and re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", rest):
        cores = 2 if kind == "7x" else 1
        return Topology(name, "tpu", CHIPS[kind], cores * math.prod(map(int, rest.split("x"))))
    raise ValueError(
        f"topology is {name!r}; give a TPU slice such as v6e:8x8 or v5p:4x4x4, cards such as gpu:8xH200 or "
        f"gpu:2x8xH100 (hosts x cards), or cpu:8 (chips: {', '.join(CHIPS)})"
    )
