"""Tokenizers and chat templates from files: Qwen2.5's, or the word-level tokenizer of the built-in scenes.

The chat format is Qwen2.5-VL's: turns between <|im_start|> and <|im_end|>, an image as one <|image_pad|> between
<|vision_start|> and <|vision_end|>. Token ids are looked up by string, so that any vocabulary works.
"""

import itertools
import os
import pathlib
import re
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from uae_jax.files.json_files import read_json, write_json
from uae_jax.files.paths import is_url, local_copies, to_path

UNKNOWN = "<|unknown|>"  # of vocabularies of words
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    UNKNOWN,
)
ROLES = ("user", "assistant", "generate")
END_OF_TURN, END_OF_TEXT, IMAGE_PAD = "<|im_end|>", "<|endoftext|>", "<|image_pad|>"
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")
_SENTINEL, _TEXT = "sentinel0caption", "sentinel0text"

# the template of the built-in model: Qwen's without system turn and newlines, to keep sequences short
_SCENE_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }} "
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)


def load_tokenizer(folder: str | pathlib.Path, control_tokens: bool = False):
    """Reads a transformers tokenizer with its chat template from a local folder, without network access.

    Args:
      folder: of the tokenizer's files.
      control_tokens: False encodes `<|im_end|>` and its like inside of captions, prompts and questions as plain text.
        True makes control tokens of them, as the release does.

    Raises:
      FileNotFoundError: no such folder, or a folder without tokenizer files.
      ValueError: the files hold no chat template, or cannot be read.
    """
    folder = to_path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"tokenizer folder {folder} does not exist: give the folder that holds tokenizer.json")
    if is_url(folder):
        with local_copies(folder) as copy:
            return load_tokenizer(copy, control_tokens)
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise FileNotFoundError(f"no tokenizer in {folder}: expected one of {', '.join(_TOKENIZER_FILES)}")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # transformers would advise to install PyTorch
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "IProgress not found")  # in a notebook without widgets; bars are text there
        from transformers import AutoTokenizer, PreTrainedTokenizerFast  # slow import, needed only here

    # tokenizer.json is complete by itself; without another file AutoTokenizer does not know its class
    alone = not any((folder / name).is_file() for name in ("tokenizer_config.json", "config.json"))
    kind = PreTrainedTokenizerFast if alone and (folder / "tokenizer.json").is_file() else AutoTokenizer
    try:
        tokenizer = kind.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ValueError(f"the tokenizer in {folder} cannot be read ({error}): copy its files again") from error
    if not tokenizer.chat_template:
        tokenizer.chat_template = _template_beside(folder)
    tokenizer.split_special_tokens = not control_tokens
    return tokenizer


def _template_beside(folder: pathlib.Path) -> str:
    """The chat template in a file of its own, or of the processor, as in folders of several transformers versions."""
    jinja = folder / "chat_template.jinja"
    if jinja.is_file():
        return jinja.read_bytes().decode("utf-8-sig")
    for name in ("chat_template.json", "processor_config.json"):
        template = read_json(folder, name).get("chat_template") if (folder / name).is_file() else None
        if isinstance(template, str) and template:
            return template
    raise ValueError(
        f"the tokenizer in {folder} has no chat template: add chat_template.jinja or chat_template.json of its model"
    )


def token_id(tokenizer, token: str) -> int:
    """Id of a token by its string.

    Raises:
      ValueError: the vocabulary lacks the token.
    """
    index = tokenizer.get_vocab().get(token)
    if index is None:
        raise ValueError(f"the tokenizer has no token {token!r}: a Qwen2.5-VL chat vocabulary is needed")
    return int(index)


def stop_ids(tokenizer) -> tuple[int, ...]:
    """Ids that end a caption: <|im_end|>, then <|endoftext|>."""
    return token_id(tokenizer, END_OF_TURN), token_id(tokenizer, END_OF_TEXT)


def _encode(tokenizer, text: str, template: bool = False) -> list[int]:
    """Ids of a person's text, or of a template, whose control tokens are meant."""
    split = tokenizer.split_special_tokens and not template
    refuse_half_characters(text)
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=split)["input_ids"])


def refuse_half_characters(text: str) -> None:
    """Refuses what no tokenizer can read.

    Raises:
      ValueError: a lone surrogate; the message has the text.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        shown = text if len(text) <= 60 else f"{text[:57]}..."
        raise ValueError(f"the text {ascii(shown)} holds half of a character (a lone surrogate); correct it") from None


def _names_control(tokenizer, text: str) -> bool:
    """Whether a text holds the name of a control token, which is not meant as one."""
    if not tokenizer.split_special_tokens:
        return False
    return any(token.special and token.content in text for token in tokenizer.added_tokens_decoder.values())


def _chat_text(tokenizer, role: str, *parts: dict[str, Any], system: str = "") -> str:
    """One turn of a chat and the header of the answer.

    The role is "user", or "generate" for the decoder's condition (the release's name). Parts are {"type": "text",
    "text": ...} and {"type": "image"}; an image stays one <|image_pad|>. Without a system turn the chat template adds
    its own, if it has one.
    """
    before = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
    turn = {"role": role, "content": list(parts)}
    return tokenizer.apply_chat_template([*before, turn], tokenize=False, add_generation_prompt=True)


def caption_prompt_ids(
    tokenizer, prompt: str, image_tokens: Sequence[int], images_first: bool = False, system: str = ""
) -> list[int]:
    """The captioner's prompt, text before images as in the release, with every image expanded: token ids [T].

    Args:
      tokenizer: of `load_tokenizer`.
      prompt: text of the prompt.
      image_tokens: number of merged patches of each image, in order.
      images_first: images before the text, as in question benchmarks.
      system: text of the system turn; empty for that of the chat template.

    Raises:
      ValueError: the prompt text contains an image token that is meant as one, or a lone surrogate.
    """
    return turn_ids(tokenizer, [*image_tokens, prompt] if images_first else [prompt, *image_tokens], system)


def turn_ids(tokenizer, parts: Sequence[str | int], system: str = "") -> list[int]:
    """A user's turn of texts and images in any order, and the header of the answer: token ids [T].

    Args:
      tokenizer: of `load_tokenizer`.
      parts: texts, and the number of merged patches in place of each image.
      system: text of the system turn; empty for that of the chat template.

    Raises:
      ValueError: a text contains an image token that is meant as one, or a lone surrogate.
    """
    texts = [part for part in (*parts, system) if isinstance(part, str)]
    if any(IMAGE_PAD in text for text in texts) and not tokenizer.split_special_tokens:
        raise ValueError(f"the caption prompt must not contain {IMAGE_PAD}: images are added by the tokenizer")
    # names of control tokens in the texts are encoded apart from the template, whose control tokens are meant
    plain: dict[str, str] = {}

    def placed(text: str) -> str:
        if not _names_control(tokenizer, text):
            return text
        place = f"{_TEXT}{len(plain)}x"
        plain[place] = text
        return place

    counts = [part for part in parts if not isinstance(part, str)]
    said = [{"type": "text", "text": placed(part)} if isinstance(part, str) else {"type": "image"} for part in parts]
    head, *tails = _chat_text(tokenizer, "user", *said, system=placed(system)).split(IMAGE_PAD)
    text = head + "".join(IMAGE_PAD * n + tail for n, tail in zip(counts, tails, strict=True))
    pieces = re.split(f"({'|'.join(plain)})", text) if plain else [text]
    encoded = (
        _encode(tokenizer, plain[piece]) if piece in plain else _encode(tokenizer, piece, template=True)
        for piece in pieces
    )
    return [index for ids in encoded for index in ids]


def condition_template(tokenizer) -> tuple[list[int], list[int]]:
    """Ids before and after a caption in a turn of role "generate", the decoder's condition (demo.py of the release).

    For a caption without white space at its ends, `prefix + encode(caption) + suffix` equals the tokens of the complete
    templated text.
    """
    before, after = _chat_text(tokenizer, "generate", {"type": "text", "text": _SENTINEL}).split(_SENTINEL)
    return _encode(tokenizer, before, template=True), _encode(tokenizer, after, template=True)


def encode_caption(tokenizer, text: str) -> list[int]:
    """A caption as the captioner should write it: the stripped caption's ids, then <|im_end|>; [T]."""
    return [*_encode(tokenizer, text.strip()), token_id(tokenizer, END_OF_TURN)]


def unknown_words(tokenizer, texts: Iterable[str]) -> list[str]:
    """Words of texts that a vocabulary of words lacks, in order, each once; none of a vocabulary of bytes (Qwen's)."""
    found: dict[str, None] = {}
    if tokenizer.unk_token_id is None:
        return []
    for text in texts:
        for word in words_of(text):
            if word not in found and tokenizer.unk_token_id in _encode(tokenizer, word):
                found[word] = None
    return list(found)


def words_of(text: str) -> list[str]:
    """Words and signs of a text, in order; half a character is left out, since it is named where the text is used."""
    return re.findall(r"\w+|[^\w\s]+", text.encode("utf-8", "ignore").decode("utf-8"))


def unknown_note(tokenizer, texts: Iterable[str]) -> str:
    """A line that names the first words that a model does not know, or nothing."""
    return unknown_line(unknown_words(tokenizer, texts))


def unknown_line(words: Sequence[str]) -> str:
    """The line of `unknown_note` for these words."""
    if not words:
        return ""
    named = ", ".join(map(repr, words[:5])) + (", ..." if len(words) > 5 else "")
    count = "1 word" if len(words) == 1 else f"{len(words)} words"
    return f"the model does not know {count}: {named}"


def decode_caption(tokenizer, ids: Sequence[int]) -> str:
    """Text of generated ids [T] up to the first stop token, without special tokens."""
    stops = stop_ids(tokenizer)
    kept = itertools.takewhile(lambda index: index not in stops, map(int, ids))
    return tokenizer.decode(list(kept), skip_special_tokens=True).strip()


def write_word_tokenizer(folder: pathlib.Path, special: Sequence[str], words: Sequence[str]) -> None:
    """Writes tokenizer.json of a vocabulary of words: lower-cased, split at white space and punctuation.

    Args:
      folder: created if absent.
      special: tokens that texts cannot contain, with the first ids; `UNKNOWN` among them.
      words: with the ids after them.
    """
    from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = list(dict.fromkeys([*special, *words]))
    model = models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=UNKNOWN)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))


def write_scene_tokenizer(
    folder: str | pathlib.Path, words: Sequence[str], patch_size: int = 4, min_pixels: int = 64, max_pixels: int = 1024
) -> None:
    """Writes tokenizer.json, tokenizer_config.json and preprocessor_config.json of the built-in model.

    The tokenizer is word level: lower-cased, split at white space and punctuation, with <|unknown|> for unknown words.
    Ids are given to the special tokens, the roles, then `words` in order.

    Args:
      folder: created if absent.
      words: the vocabulary.
      patch_size: side of a vision patch in pixels; 2 x 2 patches merge into one image token.
      min_pixels, max_pixels: area limits of the resized image.
    """
    folder = to_path(folder)
    write_word_tokenizer(folder, SPECIAL_TOKENS, [*ROLES, *words])
    config = dict(
        tokenizer_class="PreTrainedTokenizerFast",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
        eos_token=END_OF_TURN,
        pad_token=END_OF_TEXT,
        unk_token=UNKNOWN,
        chat_template=_SCENE_TEMPLATE,
    )
    images = dict(
        image_processor_type="Qwen2VLImageProcessor",
        do_convert_rgb=True,
        do_resize=True,
        do_rescale=True,
        do_normalize=True,
        image_mean=[0.48145466, 0.4578275, 0.40821073],
        image_std=[0.26862954, 0.26130258, 0.27577711],
        rescale_factor=1 / 255,
        resample=3,
        merge_size=2,
        temporal_patch_size=2,
        patch_size=patch_size,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        size=dict(shortest_edge=min_pixels, longest_edge=max_pixels),
    )
    for name, content in (("tokenizer_config.json", config), ("preprocessor_config.json", images)):
        write_json(folder / name, content, indent=1)
