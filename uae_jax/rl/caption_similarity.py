"""Similarity of a caption and its picture without any drawing: the control reward (CLIPScore, arXiv 2104.08718, as a
reward).

A CLIP whose text tower reads the captioner's own tokens, so that sampled captions are scored inside the compiled step.
"""

import dataclasses
import pathlib
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

from uae_jax import trees
from uae_jax.models.encoders import clip
from uae_jax.models.encoders.config import CLIPConfig
from uae_jax.models.encoders.preprocess import Preprocess, apply
from uae_jax.models.encoders.weights import open_encoder

PART = "caption_scorer"  # under which its parameters are kept among the encoders


@dataclasses.dataclass(frozen=True)
class CaptionScorer:
    """A frozen CLIP with both towers; parameters are passed beside it.

    Attributes:
      config: of both towers; the text tower's end token fills the rows after the caption.
      preprocess: how the image tower wants its images.
    """

    config: CLIPConfig
    preprocess: Preprocess

    def image_features(self, params: trees.Tree, pixels: Array) -> Array:
        """Features of length 1, float32 `[B, P]`, of pictures `[B, H, W, 3]` in [-1, 1]."""
        return _unit(
            clip.image_features(self.config, params, apply(self.preprocess, (pixels.astype(jnp.float32) + 1) / 2))
        )

    def text_features(self, params: trees.Tree, tokens: Array, lengths: Array) -> Array:
        """Features of length 1, float32 `[N, P]`, of captions `[N, T]` with `[N]` tokens before their stop token."""
        inside = jnp.arange(tokens.shape[1]) < lengths[:, None]
        ids = jnp.where(inside, tokens, self.config.text.eos_token_id)
        return _unit(
            clip.text_features(
                self.config, params, jnp.pad(ids, ((0, 0), (0, 1)), constant_values=self.config.text.eos_token_id)
            )
        )


def _unit(features: Array) -> Array:
    features = features.astype(jnp.float32)
    return features / jnp.linalg.norm(features, axis=-1, keepdims=True)


def load_caption_scorer(
    folder: str | pathlib.Path,
    vocabulary: int,
    max_tokens: int,
    *,
    placement: Callable[[trees.Tree], trees.Tree] | None = None,
) -> tuple[CaptionScorer, dict]:
    """Reads a scorer, such as the bootstrap's phase `caption_scorer` writes it.

    Args:
      folder: CLIP with both towers.
      vocabulary: size of the captioner's; the text tower must read the same tokens.
      max_tokens: of a caption.
      placement: where the parameters go, see `hf.rules.load_params`.

    Raises:
      FileNotFoundError: no such folder.
      ValueError: it is another model, or one that reads other tokens or shorter texts.
    """
    source = open_encoder(folder)
    if not isinstance(source.config, CLIPConfig):
        raise ValueError(
            f"{folder} holds no CLIP with both towers; give the folder that the bootstrap's phase caption_scorer made"
        )
    text = source.config.text
    if text.vocab_size != vocabulary:
        raise ValueError(
            f"the text tower of {folder} knows {text.vocab_size} tokens and the captioner {vocabulary}; a caption "
            "reward needs one "
            "trained on the captioner's tokens (phase caption_scorer of configs/bootstrap.py)"
        )
    if text.max_position_embeddings <= max_tokens:
        raise ValueError(
            f"the text tower of {folder} has {text.max_position_embeddings} positions; captions of {max_tokens} "
            "tokens and an end need "
            f"{max_tokens + 1}"
        )
    return CaptionScorer(source.config, source.preprocess()), source.load(placement=placement)


def caption_reward(
    scorer: CaptionScorer, params: trees.Tree, original: Array, tokens: Array, lengths: Array, group: int
) -> Array:
    """Cosine of each picture and its captions.

    Args:
      scorer, params: the model.
      original: `[B, H, W, 3]` in [-1, 1].
      tokens, lengths: captions `[B * G, T]` and `[B * G]`, those of a picture together.
      group: G.

    Returns:
      float32 `[B, G]` in [-1, 1].
    """
    said = scorer.text_features(params, tokens, lengths)
    return jnp.sum(said.reshape(len(original), group, -1) * scorer.image_features(params, original)[:, None], axis=-1)
