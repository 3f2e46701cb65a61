"""Accelerators: memory, peak and bandwidths of a chip or card from the vendors' pages, and names of topologies.

Sources: docs.cloud.google.com/tpu/docs/{v4, v5e, v5p, v6e, tpu7x} (system architecture tables: memory, bandwidth of the
memory and of the links between chips (half of the figure for both directions), bfloat16 peak per chip, data center
network per chip or per pod of 256); NVIDIA's data sheets (dense bfloat16 with float32 sums; links: NVLink in one
direction, or PCI Express x16); memory as reported by the cards, without the memory for error correction.
"""

import dataclasses
import math
import re

from uae_jax.planning.cards import TARGETS

GIB = 2**30
# bytes per second of a card between hosts: a network of 400 Gbit/s per card, as in NVIDIA's DGX H100
CARD_NETWORK = 50e9
POD_SIDE = 16  # of the pods of v5e and v6e: a side of this length has links from its end to its beginning
CUBE_SIDE = 4  # of the blocks that slices of the other chips are built of, whose outer links are switched


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip, or the part of a chip that JAX shows as a device.

    Attributes:
      name: in topologies.
      memory: in bytes.
      flops: bfloat16 peak per second.
      memory_bandwidth: in bytes per second.
      link_bandwidth: bytes per second received from neighbours over all links, if all are there.
      device_kind: libtpu's or CUDA's name.
      network_bandwidth: bytes per second received from other slices or hosts.
      axes: of the grid of links; 0 for cards, which all others of a host reach at once.
      clock: cycles per second of libtpu's estimates, those with which its products take their time at the peak; NaN
        where that was not seen.
    """

    name: str
    memory: float
    flops: float
    memory_bandwidth: float
    link_bandwidth: float
    device_kind: str
    network_bandwidth: float = CARD_NETWORK
    axes: int = 0
    clock: float = math.nan


CHIPS = {
    chip.name: chip
    for chip in (
        # no page has the network of v4; 200 Gbit/s for the four chips of a host are assumed
        Chip("v4", 32 * GIB, 275e12, 1228e9, 300e9, "TPU v4", 6.25e9, 3),
        Chip("v5e", 16 * GIB, 197e12, 819e9, 200e9, "TPU v5 lite", 3.125e9, 2, 1.5e9),
        Chip("v5p", 95 * GIB, 459e12, 2765e9, 600e9, "TPU v5", 6.25e9, 3),
        Chip("v6e", 32 * GIB, 918e12, 1638e9, 400e9, "TPU v6 lite", 12.5e9, 2, 1.75e9),
        # each of a chip's two chiplets is a device: half of 192 GiB, 2307 TFLOP/s, 7380 GB/s, 600 GB/s per direction,
        # and 100 Gbit/s of the network
        Chip("7x", 96 * GIB, 1153.5e12, 3690e9, 300e9, "TPU7x", 6.25e9, 3),
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
CPU = Chip("cpu", math.inf, math.nan, math.nan, math.nan, "cpu", math.nan)
USABLE = 0.92  # of a chip's memory; the rest is for the runtime and fragmentation


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips that run one program.

    Attributes:
      name: as given.
      kind: `tpu` or `gpu` (compiled ahead of time if the compiler is installed), or `cpu` (compiled for simulated
        devices).
      chip: one of the devices.
      devices: number of devices, over all groups.
      groups: slices of TPUs, or hosts of cards: the links are inside of a group, and the network is between groups.
      sides: chips along each axis of one slice; empty for cards and simulated devices.
    """

    name: str
    kind: str
    chip: Chip
    devices: int
    groups: int = 1
    sides: tuple[int, ...] = ()

    @property
    def slice_name(self) -> str:
        """One slice, as libtpu names it."""
        return "x".join(map(str, self.sides))

    @property
    def links(self) -> float:
        """Bytes per second that the device with the fewest links receives from its group.

        The corner of a grid has one link along each axis. Where an axis closes to a ring, every chip has two: on v5e
        and v6e an axis of a whole pod, on the other chips all axes of a slice that is built of whole cubes.
        """
        sides = [side for side in self.sides if side > 1]
        if not sides:
            return self.chip.link_bandwidth
        whole = all(side % CUBE_SIDE == 0 for side in self.sides) and len(self.sides) == self.chip.axes
        rings = [side == POD_SIDE if self.chip.axes == 2 else whole for side in sides]
        return self.chip.link_bandwidth * sum(2 if ring else 1 for ring in rings) / (2 * self.chip.axes)


def parse_topology(name: str) -> Topology:
    """A topology by name: `v6e:8x8`, `v5p:4x4x4`, `2xv5e:8x8` for two slices, `cpu:8`, `gpu:8xH200`, or `gpu:2x8xH200`
    for two hosts.

    Raises:
      ValueError: another form of name, or an unknown chip.
    """
    kind, _, rest = name.partition(":")
    if kind == "cpu" and re.fullmatch(r"[1-9]\d*", rest):
        return Topology(name, "cpu", CPU, int(rest))
    if kind == "gpu" and (found := re.fullmatch(r"(?:([1-9]\d*)x)?([1-9]\d*)x([A-Za-z][\w-]*)", rest)):
        if found[3] not in TARGETS:
            raise ValueError(f"topology {name!r} names the card {found[3]!r}; known are {', '.join(TARGETS)}")
        hosts = int(found[1] or 1)
        return Topology(name, "gpu", CHIPS[found[3]], hosts * int(found[2]), hosts)
    slices = re.fullmatch(rf"(?:([1-9]\d*)x)?({'|'.join(set(CHIPS) - set(TARGETS))})", kind)
    if slices and re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", rest):
        count, chip, sides = int(slices[1] or 1), CHIPS[slices[2]], tuple(map(int, rest.split("x")))
        cores = 2 if chip.name == "7x" else 1
        return Topology(name, "tpu", chip, count * cores * math.prod(sides), count, sides)
    raise ValueError(
        f"topology is {name!r}; give a TPU slice such as v6e:8x8 or v5p:4x4x4, slices such as 2xv5e:16x16, cards such "
        f"as gpu:8xH200 or gpu:2x8xH100 (hosts x cards), or cpu:8 (chips: {', '.join(CHIPS)})"
    )
