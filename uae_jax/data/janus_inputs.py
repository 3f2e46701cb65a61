"""What Janus reads: prompts as token ids, and images as it was trained to see them (arXiv 2501.17811).

The published `tokenizer.json` is a byte-level BPE that names LlamaTokenizer as its class, whose decoder would drop
spaces. It is read by `tokenizers` itself, and the first token of a prompt is put there here.
"""

import itertools
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from uae_jax.data.images import to_rgb
from uae_jax.data.qwen_inputs import Fields
from uae_jax.data.tokenizer import UNKNOWN, refuse_half_characters, unknown_line, words_of
from uae_jax.files.json_files import image_processor_settings
from uae_jax.files.known_fields import refuse_unknown
from uae_jax.files.paths import to_path

# of the official processor; it stands before questions about images, and not before drawings
SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
USER, ANSWER = "<|User|>: ", "\n\n<|Assistant|>:"
IMAGE = "<image_placeholder>"
GREY, SMALLEST = 127, 14  # of the official processor: what fills the square, and the shortest side in pixels


class JanusTokenizer:
    """Texts to token ids and back.

    Args:
      folder: with `tokenizer.json`.
      ids: of the special tokens: `bos`, `eos`, `image`, `begin_image`, `end_image` (`models.janus.config.special_ids`).
      image_tokens: embeddings of one image.
      control_tokens: whether names of control tokens in texts of a person are meant as such, and not as plain text.

    Raises:
      FileNotFoundError, ValueError: `tokenizer.json` is absent or cannot be read.
    """

    def __init__(
        self,
        folder: str | pathlib.Path,
        ids: Mapping[str, int],
        image_tokens: int,
        control_tokens: bool = False,
    ):
        from tokenizers import Tokenizer

        path = to_path(folder) / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; copy it from the source of the weights")
        try:
            self._tokenizer = Tokenizer.from_buffer(path.read_bytes())
        except Exception as error:  # of the library's own kind, which has no name
            raise ValueError(f"{path} cannot be read ({' '.join(str(error).split())[:100]}); copy it again") from error
        self.ids, self.image_tokens, self.control_tokens = dict(ids), image_tokens, control_tokens
        added = self._tokenizer.get_added_tokens_decoder().values()
        self._names = tuple(token.content for token in added if token.special)

    def __len__(self) -> int:
        """The number of ids."""
        return self._tokenizer.get_vocab_size()

    def question_ids(self, question: str, system: str = SYSTEM) -> list[int]:
        """The prompt for one image and a question about it, with the image's tokens in place.

        Raises:
          ValueError: a text with half of a character, or one that contains the image's token and means it.
        """
        parts = [(system, True), (f"\n\n{USER}" if system else USER, False), (IMAGE, False)]
        ids = self._encode([*parts, (f"\n{question.strip()}", True), (ANSWER, False)])
        if ids.count(self.ids["image"]) != 1:
            raise ValueError(f"the caption prompt must not contain {IMAGE}: the image is added by the tokenizer")
        at = ids.index(self.ids["image"])
        image = [self.ids["begin_image"], *[self.ids["image"]] * self.image_tokens, self.ids["end_image"]]
        return [self.ids["bos"], *ids[:at], *image, *ids[at + 1 :]]

    def drawing_ids(self, text: str) -> list[int]:
        """The prompt for a drawing of a text, which ends with the token that begins an image.

        Raises:
          ValueError: a text with half of a character.
        """
        ids = self._encode([(USER, False), (text.strip(), True), (ANSWER, False)])
        return [self.ids["bos"], *ids, self.ids["begin_image"]]

    def drawing_template(self) -> tuple[list[int], list[int]]:
        """Ids before and after the tokens of a caption, as the model writes them, in the prompt for its drawing.

        A caption as it is written begins with a space, which the prompt has before the text.
        """
        before, after = self._encode([(USER.rstrip(), False)]), self._encode([(ANSWER, False)])
        return [self.ids["bos"], *before], [*after, self.ids["begin_image"]]

    def encode_caption(self, text: str) -> list[int]:
        """A caption as the model should write it: a space, the text, the end token."""
        return [*self._encode([(f" {text.strip()}", True)]), self.ids["eos"]]

    def decode_caption(self, ids: Sequence[int]) -> str:
        """Text of generated ids up to the end token, without special tokens."""
        kept = itertools.takewhile(lambda index: index != self.ids["eos"], map(int, ids))
        return self._tokenizer.decode(list(kept), skip_special_tokens=True).strip()

    def unknown(self, texts: Iterable[str]) -> str:
        """A line that names the first words that the vocabulary lacks, or nothing; one of bytes has every word."""
        unknown = self._tokenizer.token_to_id(UNKNOWN)
        if unknown is None:
            return ""
        words = dict.fromkeys(word for text in texts for word in words_of(text))
        lacking = [word for word in words if unknown in self._tokenizer.encode(word, add_special_tokens=False).ids]
        return unknown_line(lacking)

    def _encode(self, parts: Sequence[tuple[str, bool]]) -> list[int]:
        """Ids of texts one after the other; True marks those of a person.

        They are encoded as one text, as the official code does, but for texts of a person that name a control token
        without meaning it.
        """
        found: list[int] = []
        for apart, group in itertools.groupby(parts, lambda part: part[1] and self._names_control(part[0])):
            text = "".join(part for part, _ in group)
            refuse_half_characters(text)
            self._tokenizer.encode_special_tokens = apart
            found += self._tokenizer.encode(text, add_special_tokens=False).ids
        return found

    def _names_control(self, text: str) -> bool:
        return not self.control_tokens and any(name in text for name in self._names)


def check_image_settings(folder: str | pathlib.Path, side: int) -> None:
    """Refuses a folder's `preprocessor_config.json` that asks for other images than `padded_square` makes.

    Args:
      folder: of the model; one without the file, of either library, passes.
      side: of the images that the model reads, in pixels.

    Raises:
      ValueError: another setting; the message has its name and value.
    """
    place = to_path(folder)
    if not any((place / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        return
    flags = "do_resize do_rescale do_normalize do_pad do_convert_rgb default_to_square"
    steps = dict.fromkeys(flags.split(), True)
    usual = steps | {
        "image_size": side,
        "size": {"height": side, "width": side},
        "min_size": SMALLEST,
        "background_color": [GREY] * 3,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "rescale_factor": 1 / 255,
        "resample": 3,
        "data_format": "channels_first",
    }
    kinds = {"image_processor_type", "processor_class"}
    refuse_unknown(image_processor_settings(place), kinds, usual, "preprocessor_config.json: ")


def padded_square(image: np.ndarray | Image.Image, side: int) -> Float[np.ndarray, "{side} {side} 3"]:
    """An image for captioning: its longer side at `side`, centred on grey, in [-1, 1].

    The shorter side is rounded down and has at least 14 pixels, as in the official processor; transformers rounds it.

    Raises:
      ValueError: an image without content, see `to_rgb`.
    """
    image = to_rgb(image)
    longest = max(image.size)
    width, height = (max(int(length / longest * side), SMALLEST) for length in image.size)
    canvas = Image.new("RGB", (side, side), (GREY, GREY, GREY))
    small = image.resize((width, height), Image.Resampling.BICUBIC)
    canvas.paste(small, ((canvas.width - width) // 2, (canvas.height - height) // 2))
    return signed(np.asarray(canvas))


def signed(pixels: np.ndarray) -> np.ndarray:
    """uint8 0..255 as float32 in [-1, 1]."""
    return ((pixels.astype(np.float32) / 255.0 - 0.5) / 0.5).astype(np.float32)


def question_fields(
    tokenizer: JanusTokenizer, image: np.ndarray | Image.Image, side: int, question: str, system: str, room: int
) -> Fields:
    """The captioner's inputs for an image of any size: `prompt_ids`, `prompt_mask`, `pixels`.

    Args:
      tokenizer: of the model.
      image: any size.
      side: of the images that the model reads, in pixels.
      question: about the image.
      system: text before the question; empty for none.
      room: padded length of the prompt.

    Raises:
      ValueError: the prompt does not fit, or an image without content.
    """
    return padded_ids(tokenizer.question_ids(question, system), room) | {"pixels": padded_square(image, side)}


def padded_ids(ids: Sequence[int], room: int) -> dict[str, Any]:
    """`prompt_ids` and `prompt_mask` of a padded length; what fills the ids is masked.

    Raises:
      ValueError: more ids than room.
    """
    if len(ids) > room:
        raise ValueError(f"the prompt has {len(ids)} tokens, and there is room for {room}; shorten it")
    filled: Int[np.ndarray, " t"] = np.zeros(room, np.int32)
    filled[: len(ids)] = ids
    return {"prompt_ids": filled, "prompt_mask": np.arange(room) < len(ids)}
