"""Similarity of a caption and its image without any reconstruction: the control reward.

The reward is CLIPScore (arXiv 2104.08718). The text tower of this CLIP reads the captioner's own tokens: sampled
captions are scored inside the compiled step. Shape letters: b images, g captions of each, n = b * g, t caption tokens,
d features.
"""

import dataclasses
import pathlib
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from uae_jax.models.encoders import clip
from uae_jax.models.encoders.config import CLIPConfig
from uae_jax.models.encoders.preprocess import Preprocess, apply
from uae_jax.models.encoders.weights import open_encoder
from uae_jax.trees import Tree

PART = "caption_scorer"  # under which its parameters are kept among the encoders


@dataclasses.dataclass(frozen=True)
class CaptionScorer:
    """A frozen CLIP with both towers; parameters are separate.

    Attributes:
      config: of both towers; the text tower's end token fills the rows after the caption.
      preprocess: how the image tower wants its images.
    """

    config: CLIPConfig
    preprocess: Preprocess

    def image_features(self, params: Tree, pixels: Float[Array, "b H W 3"]) -> Float32[Array, "b d"]:
        """Features of length 1 of images in [-1, 1]."""
        images = apply(self.preprocess, (pixels.astype(jnp.float32) + 1) / 2)
        return _unit(clip.image_features(self.config, params, images))

    def text_features(
        self, params: Tree, tokens: Int[Array, "n t"], lengths: Int[Array, " n"]
    ) -> Float32[Array, "n d"]:
        """Features of length 1 of captions; `lengths` counts the tokens before the stop token."""
        end = self.config.text.eos_token_id
        inside = jnp.arange(tokens.shape[1]) < lengths[:, None]
        ids = jnp.pad(jnp.where(inside, tokens, end), ((0, 0), (0, 1)), constant_values=end)
        return _unit(clip.text_features(self.config, params, ids))


def _unit(features: Float[Array, "n d"]) -> Float32[Array, "n d"]:
    features = features.astype(jnp.float32)
    return features / jnp.linalg.norm(features, axis=-1, keepdims=True)


def load_caption_scorer(
    folder: str | pathlib.Path,
    vocabulary: int,
    max_tokens: int,
    *,
    placement: Callable[[Tree], Tree] | None = None,
) -> tuple[CaptionScorer, dict]:
    """Reads a caption scorer and its parameters, as the bootstrap's phase `caption_scorer` writes them.

    Args:
      folder: CLIP with both towers.
      vocabulary: size of the captioner's; the text tower must read the same tokens.
      max_tokens: of a caption.
      placement: how the parameters are sharded, see `hf.rules.load_params`.

    Raises:
      FileNotFoundError: no such folder.
      ValueError: the folder holds another model, or its text tower reads other tokens or shorter texts.
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
            "reward needs one trained on the captioner's tokens (phase caption_scorer of configs/bootstrap.py)"
        )
    if text.max_position_embeddings <= max_tokens:
        raise ValueError(
            f"the text tower of {folder} has {text.max_position_embeddings} positions; captions of {max_tokens} "
            f"tokens and an end need {max_tokens + 1}"
        )
    return CaptionScorer(source.config, source.preprocess()), source.load(placement=placement)


def caption_reward(
    scorer: CaptionScorer,
    params: Tree,
    original: Float[Array, "b H W 3"],
    tokens: Int[Array, "n t"],
    lengths: Int[Array, " n"],
    group: int,
) -> Float32[Array, "b g"]:
    """Cosine of each image and its captions, in [-1, 1].

    Args:
      scorer, params: the model.
      original: in [-1, 1].
      tokens: captions, those of an image together.
      lengths: their tokens before the stop token.
      group: g.
    """
    said = scorer.text_features(params, tokens, lengths).reshape(len(original), group, -1)
    return jnp.sum(said * scorer.image_features(params, original)[:, None], axis=-1)
