"""Rows of a batch for Janus: the image as it is seen and drawn, the caption prompt, and a caption."""

from collections.abc import Iterable, Sequence

import numpy as np

from uae_jax.data.janus_inputs import JanusTokenizer, padded_ids
from uae_jax.data.loader import BatchSpec, RowBuilder, check_max_prompt


def janus_shapes(spec: BatchSpec, batch_size: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of every field of a batch of `batch_size` rows, for compiling without data."""
    side = spec.image_size
    rows = {
        "sample_id": ((), np.int32),
        "pixels": ((side, side, 3), np.uint8),
        "prompt_ids": ((spec.max_prompt,), np.int32),
        "prompt_mask": ((spec.max_prompt,), np.bool_),
        "caption_ids": ((spec.max_caption,), np.int32),
        "caption_mask": ((spec.max_caption,), np.bool_),
        "caption_truncated": ((), np.bool_),
    }
    return {name: ((batch_size, *shape), np.dtype(dtype)) for name, (shape, dtype) in rows.items()}


class JanusRows(RowBuilder):
    """Turns an example into the fields of `janus_shapes`.

    A square crop has no grey border: the network sees the pixels that its drawing is compared with.

    Args:
      tokenizer: of the model.
      spec: shapes of the row.
      prompt: what is asked about the image.
      system: text before it; empty for none.

    Raises:
      ValueError: the spec is too small for the prompt.
    """

    def __init__(self, tokenizer: JanusTokenizer, spec: BatchSpec, prompt: str, system: str):
        self.tokenizer, self.spec = tokenizer, spec
        ids = tokenizer.question_ids(prompt, system)
        check_max_prompt(spec.max_prompt, len(ids), spec.image_size)
        self.constant = padded_ids(ids, spec.max_prompt)
        self.wanted = frozenset(janus_shapes(spec, 1))

    def encode(self, text: str) -> list[int]:
        """A caption's ids with the end token, as the model writes them."""
        return self.tokenizer.encode_caption(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a caption's ids up to the end token."""
        return self.tokenizer.decode_caption(ids)

    def unknown(self, texts: Iterable[str]) -> str:
        """A line that names the words of texts that the vocabulary lacks, or nothing; one of bytes has every word."""
        return self.tokenizer.unknown(texts)
