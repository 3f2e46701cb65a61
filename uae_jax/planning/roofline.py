"""A lower bound for the time of a step from matrix products, reads of weights and gathers of weights."""

import dataclasses

from uae_jax.planning.chips import Topology
from uae_jax.planning.flops import Count, Work


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


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of a step: each term and the bound.

    Attributes:
      compute: products at the chip's peak.
      memory: reads of weights for every product, and of keys and values in sampling, at the memory's bandwidth.
      links: receipt of the other chips' weight shards, at the links' bandwidth.
      decoding: the part of the bound inside sampling loops.
      seconds: the bound: the largest of the three terms in sampling, plus the largest in the rest.
      utilisation: model FLOPs (without recomputation) over the chips' peak FLOPs in that time.
    """

    compute: float
    memory: float
    links: float
    decoding: float
    seconds: float
    utilisation: float


def _terms(work: Work, topology: Topology, sizes: MeshSizes, other: bool) -> tuple[float, float, float]:
    chip = topology.chip
    weights = work.weight_bytes / sizes.tensor
    read = weights + (work.other_bytes / (sizes.batch * sizes.tensor) if other else 0.0)
    gathered = weights * (sizes.fsdp - 1) / sizes.fsdp
    return work.flops / topology.devices / chip.flops, read / chip.memory_bandwidth, gathered / chip.link_bandwidth


def roofline(count: Count, model_flops: float, topology: Topology, sizes: MeshSizes, gathers: float = 1.0) -> Roofline:
    """The bound of a step.

    Args:
      count: of the step, with recomputation.
      model_flops: of the step without recomputation.
      topology: the chips; a `cpu` topology has no peak, and the result is NaN.
      sizes: of the mesh.
      gathers: gathers of the weights per sampled token: 1, or 1 / T for one gather per rollout.
    """
    compute, memory, links = _terms(count.decoding, topology, sizes, other=True)
    decoding = compute, memory, links * gathers
    rest = _terms(count.rest, topology, sizes, other=False)
    seconds = max(decoding) + max(rest)
    compute, memory, links = (a + b for a, b in zip(decoding, rest))
    return Roofline(
        compute, memory, links, max(decoding), seconds, model_flops / (seconds * topology.devices * topology.chip.flops)
    )
