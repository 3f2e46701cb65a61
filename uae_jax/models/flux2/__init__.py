"""FLUX.2-klein (Black Forest Labs, 2026): a decoder with Qwen3 as its text encoder, distilled or not."""
