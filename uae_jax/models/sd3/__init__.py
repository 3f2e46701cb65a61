"""Stable Diffusion 3 and 3.5: the diffusion transformer and the 16-channel auto-encoder (arXiv 2403.03206)."""
