"""Precisions of stored parameters."""

import numpy as np
from jax.typing import DTypeLike


def numpy_dtype(precision: DTypeLike | None) -> np.dtype | None:
    """The precision as numpy's type; None, which keeps the stored one, stays None."""
    return None if precision is None else np.dtype(precision)
