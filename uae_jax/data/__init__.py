"""Host-side data: built-in scenes, image processing, tokenizers, sources and the Grain pipeline (numpy only)."""
