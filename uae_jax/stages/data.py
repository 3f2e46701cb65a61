"""The images of a run: the training source, those held out for scores, and the rows of a batch."""

import dataclasses
import functools
from typing import Any

from uae_jax.data.emoji import EmojiSet, EmojiSource
from uae_jax.data.loader import BatchSpec, RowBuilder, batch_spec, check_max_prompt
from uae_jax.data.qwen_inputs import ImageProcessor
from uae_jax.data.sources import Example, FolderSource, SceneSource, Source, TfdsSource
from uae_jax.stages.run_config import DataConfig


def open_sources(config: DataConfig, seed: int, heldout: int, *, check: bool = True) -> tuple[Source, list[Example]]:
    """The training source, and images that it does not contain.

    Args:
      config: where images come from.
      seed: of built-in sources.
      heldout: how many images are held out.
      check: also decode every image of a folder once.

    Raises:
      ValueError, FileNotFoundError: an unknown source, or one that cannot be read; see `data.sources`.
    """
    if config.source in ("scenes", "emoji"):
        kind = SceneSource
        if config.source == "emoji":
            kind = functools.partial(EmojiSource, emoji=EmojiSet(config.folder))
        train = kind("train", seed, config.image_size, config.detail, mistakes=config.mistakes)
        test = kind("test", 0, config.image_size, "full")
        return train, [test[index] for index in range(heldout)]
    if config.source == "folder":
        return _open_folder(config, heldout, check)
    keys = dict(image_key=config.image_key, caption_key=config.caption_key)
    train = TfdsSource(config.name, config.split, config.data_dir or None, **keys)
    test = TfdsSource(config.name, config.heldout_split, config.data_dir or None, **keys)
    return train, [test[index] for index in range(min(heldout, len(test)))]


def _open_folder(config: DataConfig, heldout: int, check: bool) -> tuple[Source, list[Example]]:
    if not config.folder:
        raise ValueError(
            "config.data.folder is empty; give a folder with images and captions.jsonl, or data.source='scenes'"
        )
    train = FolderSource(config.folder, check)
    if config.heldout_folder:
        test = FolderSource(config.heldout_folder, check)
        return train, [test[index] for index in range(min(heldout, len(test)))]
    kept = min(heldout, max(1, len(train) // 10))
    examples = [train[index] for index in range(len(train) - kept, len(train))]
    train.rows = train.rows[: len(train.rows) - kept]
    return train, examples


def spec_of(config: DataConfig, tokenizer: Any, processor: ImageProcessor) -> BatchSpec:
    """Fixed shapes of a batch.

    Raises:
      ValueError: `max_prompt` has no room for the caption prompt with its image.
    """
    spec = batch_spec(
        tokenizer,
        processor,
        config.image_size,
        config.caption_prompt,
        config.max_caption,
        system=config.caption_system,
    )
    if not config.max_prompt:
        return spec
    check_max_prompt(config.max_prompt, spec.max_prompt, config.image_size)
    return dataclasses.replace(spec, max_prompt=config.max_prompt)


def row_builder(config: DataConfig, tokenizer: Any, processor: ImageProcessor) -> RowBuilder:
    """Turns examples into rows of a batch."""
    spec = spec_of(config, tokenizer, processor)
    return RowBuilder(tokenizer, processor, spec, config.caption_prompt, config.caption_system)
