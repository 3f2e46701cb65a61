"""Qwen-Image (arXiv 2508.02324): a decoder with Qwen2.5-VL's language model as its text encoder, and two streams."""
