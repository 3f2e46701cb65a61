"""What the backward pass recomputes instead of keeping it: policies by name (arXiv 1604.06174)."""

from typing import TypeVar

import flax.linen as nn
import jax

Layer = TypeVar("Layer", bound=nn.Module)
POLICIES = {
    "none": "everything is kept",
    "full": "each layer keeps its input alone",
    "dots": "results of products with weights are kept",
    "all_dots": "results of all matrix products are kept, those of attention too",
    "offload": "as dots, but in the memory of the host",
}


def check_policy(name: str) -> str:
    """The name itself.

    Raises:
      ValueError: there is no such policy.
    """
    if name not in POLICIES:
        raise ValueError(f"remat is {name!r}; use one of {', '.join(POLICIES)}")
    return name


def remat(module: type[Layer], policy: str, in_scan: bool = True) -> type[Layer]:
    """The module with its activations recomputed as one of `POLICIES` says.

    Args:
      module: a layer.
      policy: name.
      in_scan: the layer is the body of a scan, which already keeps the compiler from undoing the recomputation.

    Raises:
      ValueError: there is no such policy.
    """
    if check_policy(policy) == "none":
        return module
    kept = {
        "full": None,
        "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        "all_dots": jax.checkpoint_policies.dots_saveable,
        "offload": jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
    }[policy]
    return nn.remat(module, policy=kept, prevent_cse=not in_scan)
