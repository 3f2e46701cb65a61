"""How programs are compiled for CPUs."""

import numpy as np
from jax.typing import DTypeLike

from uae_jax.nn.device import platform

# XLA before jaxlib 0.12 copies all stacked bfloat16 weights to float32 before a loop over tokens: 22 GiB for medium
_KEEP_IN_LOOPS = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}


def compiler_options(dtype: DTypeLike) -> dict[str, str]:
    """The `compiler_options` of `jax.jit` for a program that computes in a precision.

    A CPU multiplies bfloat16 weights in float32. With these options each layer's weights are cast where a loop reads
    them, so that one layer at a time is held in float32.

    Args:
      dtype: of the activations of most of the program.
    """
    return dict(_KEEP_IN_LOOPS) if platform() == "cpu" and np.dtype(dtype).itemsize < 4 else {}
