"""A lower bound for the seconds of a step, and so an upper bound for its speed.

Counted are matrix products, reads of weights, gathers of weights, and sums of gradients. A real step takes longer: it
also reads and writes activations, and its kernels and collectives do not reach the peaks.
"""

import dataclasses

from uae_jax.models.language.config import TextConfig
from uae_jax.planning.chips import Topology
from uae_jax.planning.flops import Count, Work
from uae_jax.planning.links import Group, Received, gathered, summed
from uae_jax.sharding import slices_of


@dataclasses.dataclass(frozen=True)
class MeshSizes:
    """The sizes of the mesh axes, in place of a mesh without devices."""

    data: int
    fsdp: int
    tensor: int

    @property
    def shape(self) -> dict[str, int]:
        """Sizes by axis, as in a mesh."""
        return dataclasses.asdict(self)

    @property
    def batch(self) -> int:
        """The number of shards of a batch."""
        return self.data * self.fsdp

    def groups(self, topology: Topology) -> tuple[Group, Group]:
        """The devices along `data` and along `fsdp`, with the slices or hosts that they go over."""
        over_data, over_fsdp = slices_of(self.data, self.fsdp, topology.groups) or (1, 1)
        return Group(self.data, over_data), Group(self.fsdp, over_fsdp)


@dataclasses.dataclass(frozen=True)
class Updates:
    """The gradients of one step.

    Attributes:
      size: bytes of all of them, in the precision in which they are summed.
      sums: how often they are summed over devices in one step: micro-batches times updates.
    """

    size: float = 0.0
    sums: int = 1


@dataclasses.dataclass(frozen=True)
class Rollout:
    """How devices hold the captioner while it samples.

    Attributes:
      gathers: gathers of the weights per sampled token: 1, or 0 where a copy of them stays for the rollout.
      ways: devices that share a copy; each reads its part for the rows of all.
      key_copies: devices of a group that hold the same key heads.
      sums: what a device receives from its group in a step, see `group_sums`.
    """

    gathers: float = 1.0
    ways: int = 1
    key_copies: int = 1
    sums: Received = Received()


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Least seconds of a step: each term and the bound.

    Attributes:
      compute: products at the chip's peak.
      memory: reads of weights for every product, and of keys and values in sampling, at the memory's bandwidth.
      links: receipt of the other devices' weight shards, once for each run of the loop that selects them, of
        gradients, and of the sums of a group that shares the captioner.
      decoding: the part of the bound inside sampling loops.
      seconds: the bound: the largest of the three terms in sampling, plus the largest in the rest.
      utilisation: model FLOPs (without recomputation) over the chips' peak FLOPs in that time; at most so much.
      weights, gradients: bytes that a device receives of either.
    """

    compute: float
    memory: float
    links: float
    decoding: float
    seconds: float
    utilisation: float
    weights: Received = Received()
    gradients: Received = Received()


def _terms(work: Work, topology: Topology, sizes: MeshSizes, rollout: Rollout | None) -> tuple[float, float, Received]:
    chip, (_, fsdp) = topology.chip, sizes.groups(topology)
    read = work.weight_bytes / sizes.tensor
    if rollout is not None:
        read = read / rollout.ways + work.other_bytes * rollout.key_copies / (sizes.batch * sizes.tensor)
    received = gathered(work.gathered_bytes / sizes.tensor, fsdp)
    return work.flops / topology.devices / chip.flops, read / chip.memory_bandwidth, received


def gradient_bytes(updates: Updates, topology: Topology, sizes: MeshSizes) -> Received:
    """What a device receives of gradients: reduce-scattered over `fsdp`, then all-reduced over `data` in shards."""
    data, fsdp = sizes.groups(topology)
    size = updates.size / sizes.tensor
    return (gathered(size, fsdp) + summed(size / sizes.fsdp, data)) * updates.sums


def group_sums(rows: float, tokens: int, ways: int, text: TextConfig) -> Received:
    """What a device receives while it samples, from the others that share the captioner (`shared_decoding`).

    For each token these are two sums a layer and one of the embeddings, over the rows of all, and the logits of its own
    rows.

    Args:
      rows: captions of a device in a step; tokens: of each.
      ways: devices that share a copy.
      text: sizes of the captioner.
    """
    group, width = Group(ways), 2 if text.dtype == "bfloat16" else 4
    joined = summed((2 * text.layers + 1) * ways * rows * text.width * width, group)
    return (joined + gathered(rows * text.vocab_size * 4, group)) * tokens


def roofline(
    count: Count,
    model_flops: float,
    topology: Topology,
    sizes: MeshSizes,
    rollout: Rollout = Rollout(),
    updates: Updates = Updates(),
) -> Roofline:
    """The bound of a step.

    Args:
      count: of the step, with recomputation.
      model_flops: of the step without recomputation.
      topology: the chips; a `cpu` topology has no peak, and the result is NaN.
      sizes: of the mesh.
      rollout: layout of the captioner while it samples.
      updates: the gradients.
    """
    compute, memory, received = _terms(count.decoding, topology, sizes, rollout)
    received = received * rollout.gathers + rollout.sums
    decoding = compute, memory, received.seconds(topology)
    compute, memory, weights = _terms(count.rest, topology, sizes, None)
    gradients = gradient_bytes(updates, topology, sizes)
    rest = compute, memory, (weights + gradients).seconds(topology)
    seconds = max(decoding) + max(rest)
    compute, memory, links = (a + b for a, b in zip(decoding, rest))
    utilisation = model_flops / (seconds * topology.devices * topology.chip.flops)
    return Roofline(compute, memory, links, max(decoding), seconds, utilisation, received + weights, gradients)
