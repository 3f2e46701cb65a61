"""UAE, the unified multimodal model as an auto-encoder (arXiv 2509.09666), in JAX and Flax."""

from os import PathLike
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uae_jax.api import Model

__version__ = "0.1.0"


def load(folder: str | PathLike = "", **settings: Any) -> "Model":
    """A model ready to caption, draw and reconstruct; see `uae_jax.api.load`."""
    from uae_jax import api  # its imports take seconds, which other users of the package should not wait for

    return api.load(folder, **settings)
