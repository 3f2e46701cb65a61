"""UAE, the unified multimodal model as an auto-encoder (arXiv 2509.09666), in JAX and Flax."""

__version__ = "0.1.0"
