"""The time of a step if every chip did nothing but its products, its reading of weights and its gathering of them."""

import dataclasses

from uae_jax.planning.chips import Topology
from uae_jax.planning.flops import Count, Work


@dataclasses.dataclass(frozen=True)
class MeshSizes:
    """How many ways each axis of the mesh cuts; stands for a mesh where there are no devices."""

    data: int
    fsdp: int
    tensor: int

    @property
    def shape(self) -> dict[str, int]:
        """As a mesh has it, for the sharding rules."""
        return dataclasses.asdict(self)

    @property
    def batch(self) -> int:
        """Ways in which rows are cut."""
        return self.data * self.fsdp


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of a step, each term by itself and the bound that they give.

    Attributes:
      compute: products at the chip's peak.
      memory: reading weights for every product, and when sampling keys and values too, at the memory's bandwidth.
      links: receiving the weights that other chips hold, at the links' bandwidth.
      decoding: of the bound, the part inside sampling loops.
      seconds: the bound: in sampling and in the rest, the largest of the three terms; nothing of one hides in the
        other.
      utilisation: model FLOPs (without recomputation) over what the chips could have done in that time.
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
      count: of the step as it runs, recomputation included.
      model_flops: of the step without recomputation.
      topology: the chips; those of a `cpu` topology have no peak, and the result is not a number.
      sizes: of the mesh.
      gathers: for one token sampled, how often its weights are gathered: 1, or 1 / T when they are gathered once a
        rollout.
    """
    compute, memory, links = _terms(count.decoding, topology, sizes, other=True)
    decoding = compute, memory, links * gathers
    rest = _terms(count.rest, topology, sizes, other=False)
    seconds = max(decoding) + max(rest)
    compute, memory, links = (a + b for a, b in zip(decoding, rest))
    return Roofline(
        compute, memory, links, max(decoding), seconds, model_flops / (seconds * topology.devices * topology.chip.flops)
    )
