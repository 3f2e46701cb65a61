"""Z-Image (arXiv 2511.22699): a decoder with Qwen3 as its text encoder and one stream of tokens; base and Turbo."""
