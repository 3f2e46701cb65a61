"""Qwen2.5-VL (arXiv 2502.13923): the captioner and the text encoder of UAE."""
