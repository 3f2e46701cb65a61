"""The decoder-only language model that captioners share: Qwen2.5's and Llama's layers, sampling, scores, adapters."""
