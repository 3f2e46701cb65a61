"""Bytes that devices receive from each other, and the least seconds of receiving them.

A group of devices lies in one or several groups of a topology (slices, or hosts of cards). Inside, bytes come over the
links; between, over the network, where each device brings an equal part into its slice. Both run at once.
"""

import dataclasses

from uae_jax.planning.chips import Topology


@dataclasses.dataclass(frozen=True)
class Group:
    """Devices that take part in one collective.

    Attributes:
      ways: number of devices.
      slices: groups of the topology that they lie in; a divisor of `ways`.
    """

    ways: int
    slices: int = 1


@dataclasses.dataclass(frozen=True)
class Received:
    """Bytes that one device receives.

    Attributes:
      links: from devices of its slice or host.
      network: from other slices or hosts.
    """

    links: float = 0.0
    network: float = 0.0

    def __add__(self, other: "Received") -> "Received":
        return Received(self.links + other.links, self.network + other.network)

    def __mul__(self, times: float) -> "Received":
        return Received(times * self.links, times * self.network)

    def seconds(self, topology: Topology) -> float:
        """The least seconds on the device with the fewest links; 0 for nothing."""
        links = self.links / topology.links if self.links else 0.0
        return max(links, self.network / topology.chip.network_bandwidth if self.network else 0.0)


def gathered(size: float, group: Group) -> Received:
    """An all-gather to `size` bytes, or the reduce-scatter of `size` bytes: all parts but the own one are received.

    Over several slices, each device brings its part of what the other slices hold over the network, and its neighbours
    pass it on.
    """
    inside = group.ways // group.slices
    return Received(size * (inside - 1) / inside, size * (group.slices - 1) / group.slices / inside)


def summed(size: float, group: Group) -> Received:
    """An all-reduce of `size` bytes: a reduce-scatter and an all-gather."""
    return gathered(size, group) * 2
