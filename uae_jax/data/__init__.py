"""Data on the host, in numpy: built-in scenes, image processing, tokenizers, sources and the Grain pipeline."""
