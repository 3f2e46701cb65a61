"""Qwen3 (arXiv 2505.09388): the language model that encodes texts for FLUX.2-klein and Z-Image."""
