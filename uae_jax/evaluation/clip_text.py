"""CLIP's similarity of pictures and their captions (CLIPScore, arXiv 2104.08718)."""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from uae_jax import trees
from uae_jax.evaluation.encoders import BenchEncoder, image_features
from uae_jax.evaluation.pairs import read_rgb
from uae_jax.models.encoders import clip
from uae_jax.models.encoders.config import CLIPConfig
from uae_jax.models.encoders.preprocess import Preprocess
from uae_jax.models.encoders.weights import open_encoder

TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
SCORE_SCALE = 2.5  # arXiv 2104.08718, section 3


@dataclasses.dataclass(frozen=True)
class TextScorer:
    """CLIP with both towers and its tokenizer.

    Attributes:
      encoder: its image side.
      params: of both towers.
      tokenizer: of transformers.
    """

    encoder: BenchEncoder
    params: trees.Tree
    tokenizer: object

    @property
    def positions(self) -> int:
        """The longest text in tokens, with start and end."""
        return self.encoder.source.config.text.max_position_embeddings

    def token_ids(self, text: str) -> tuple[np.ndarray, bool]:
        """Ids `[T]` of a text, cut to the positions (the end token stays), and whether it was cut. Filled up with 0."""
        ids = list(self.tokenizer(text)["input_ids"])
        cut = len(ids) > self.positions
        ids = [*ids[: self.positions - 1], ids[-1]] if cut else ids
        return np.pad(np.array(ids, np.int32), (0, self.positions - len(ids))), cut


def open_text_scorer(folder: str | pathlib.Path, longclip: str | pathlib.Path | None = None) -> TextScorer:
    """Reads CLIP with its tokenizer; or Long-CLIP, which takes 248 tokens instead of 77, with CLIP's tokenizer.

    Args:
      folder: of a CLIPModel as on the hub, with its tokenizer.
      longclip: a Long-CLIP file to use instead of the folder's weights.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: it is not a CLIP model with both towers, or a file cannot be read.
    """
    folder = pathlib.Path(folder)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise FileNotFoundError(
            f"{folder} has no tokenizer ({' or '.join(TOKENIZER_FILES)}); give the whole folder of CLIP"
        )
    source = open_encoder(longclip or folder)
    if not isinstance(source.config, CLIPConfig):
        raise ValueError(
            f"{source.path} holds no CLIP model with both towers; the text-image score needs one such as "
            "clip-vit-large-patch14"
        )
    from transformers import AutoTokenizer  # slow import, needed only here

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ValueError(f"the tokenizer in {folder} cannot be read ({error}); copy its files again") from error
    name = "longclip" if longclip else "clip"
    preprocess = Preprocess.longclip(source.config.vision.image_size) if longclip else source.preprocess()
    return TextScorer(BenchEncoder(name, source, preprocess, False), source.load(), tokenizer)


def _text_features(config: CLIPConfig, params: trees.Tree, ids: Array) -> Array:
    features = clip.text_features(config, params, ids)
    return features / jnp.linalg.norm(features, axis=-1, keepdims=True)


_compiled_text_features = jax.jit(_text_features, static_argnums=0)


def caption_cosines(
    scorer: TextScorer, files: Sequence[pathlib.Path], captions: Sequence[str], batch_size: int
) -> Iterator[tuple[float | str, bool]]:
    """Of each picture and its caption the cosine, or what is wrong with the picture; and whether the caption was cut.

    Args:
      scorer: the model.
      files: pictures.
      captions: one each.
      batch_size: pairs in one compiled call.
    """
    for start in range(0, len(files), batch_size):
        pixels: list[np.ndarray | str] = []
        for file in files[start : start + batch_size]:
            try:
                pixels.append(scorer.encoder.pixels(read_rgb(file)))
            except ValueError as error:
                pixels.append(str(error))
        texts = [scorer.token_ids(caption) for caption in captions[start : start + batch_size]]
        blank = np.zeros((*scorer.encoder.preprocess.crop, 3), np.float32)
        filled = [blank if isinstance(image, str) else image for image in pixels] + [blank] * (batch_size - len(pixels))
        ids = np.stack([ids for ids, _ in texts] + [texts[-1][0]] * (batch_size - len(texts)))
        images = image_features(scorer.encoder, scorer.params, np.stack(filled))
        with jax.default_matmul_precision("highest"):
            said = np.asarray(_compiled_text_features(scorer.encoder.source.config, scorer.params, ids))
        cosines = (images.astype(np.float64) * said).sum(-1)
        for image, (_, cut), cosine in zip(pixels, texts, cosines):
            yield (image if isinstance(image, str) else float(cosine)), cut
