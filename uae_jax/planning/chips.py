"""Accelerators: what one chip or card can hold and do, from the vendors' pages, and what a topology's name means.

Sources: docs.cloud.google.com/tpu/docs/{v4, v5e, v5p, v6e, tpu7x} (system architecture tables: memory, bandwidth of the memory
and of the links between chips (half of the figure for both directions), peak in bfloat16 a chip); NVIDIA's data sheets of H100 SXM and H200 SXM (dense bfloat16).
"""

import dataclasses
import math
import re

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip, or the part of it that JAX shows as a device.

    Attributes:
      name: as in a topology.
      memory: bytes.
      flops: peak in bfloat16, a second.
      memory_bandwidth: bytes a second.
      link_bandwidth: bytes a second that a chip receives from its neighbours, all links together.
      device_kind: the name that libtpu or CUDA gives it.
    """

    name: str
    memory: float
    flops: float
    memory_bandwidth: float
    link_bandwidth: float
    device_kind: str


CHIPS = {chip.name: chip for chip in (
    Chip("v4", 32 * GIB, 275e12, 1228e9, 300e9, "TPU v4"),
    Chip("v5e", 16 * GIB, 197e12, 819e9, 200e9, "TPU v5 lite"),
    Chip("v5p", 95 * GIB, 459e12, 2765e9, 600e9, "TPU v5"),
    Chip("v6e", 32 * GIB, 918e12, 1638e9, 400e9, "TPU v6 lite"),
    # each of the two chiplets of a chip is a device: half of 192 GiB, 2307 TFLOP/s, 7380 GB/s and 600 GB/s a direction
    Chip("7x", 96 * GIB, 1153.5e12, 3690e9, 300e9, "TPU7x"),
    # 80 GB and 141 GB as the cards report them; NVLink 4: 450 GB/s in each direction
    Chip("H100", 79.6 * GIB, 989e12, 3350e9, 450e9, "NVIDIA H100"),
    Chip("H200", 139.8 * GIB, 989e12, 4800e9, 450e9, "NVIDIA H200"))}
# faked devices on the host stand for no chip; a plan on them shows bytes and operations, and never refuses
CPU = Chip("cpu", math.inf, math.nan, math.nan, math.nan, "cpu")
USABLE = 0.92  # of a chip's memory; the rest is the runtime's, and fragmentation


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips that run one program.

    Attributes:
      name: as given.
      kind: `tpu` (compiled ahead of time), `cpu` (compiled for faked devices) or `gpu` (estimated).
      chip: of which kind.
      devices: how many.
    """

    name: str
    kind: str
    chip: Chip
    devices: int


def parse_topology(name: str) -> Topology:
    """A topology by name: `v6e:8x8`, `v5p:4x4x4`, `cpu:8`, `gpu:8xH200`.

    Raises:
      ValueError: not such a name, or a chip that is not in the table.
    """
    known = ", ".join(CHIPS)
    kind, colon, rest = name.partition(":")
    if kind == "cpu" and re.fullmatch(r"[1-9]\d*", rest):
        return Topology(name, "cpu", CPU, int(rest))
    if kind == "gpu" and (found := re.fullmatch(r"([1-9]\d*)x(\w+)", rest)):
        if found[2] not in CHIPS or not CHIPS[found[2]].device_kind.startswith("NVIDIA"):
            raise ValueError(f"topology {name!r} names the GPU {found[2]!r}; known are H100 and H200")
        return Topology(name, "gpu", CHIPS[found[2]], int(found[1]))
    if kind in CHIPS and CHIPS[kind].device_kind.startswith("TPU") and re.fullmatch(r"\d+(x\d+){1,2}", rest):
        cores = 2 if kind == "7x" else 1
        return Topology(name, "tpu", CHIPS[kind], cores * math.prod(map(int, rest.split("x"))))
    raise ValueError(f"topology is {name!r}; give a TPU slice such as v6e:8x8 or v5p:4x4x4, gpu:8xH200 or cpu:8 (chips: {known})")
