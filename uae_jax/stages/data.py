"""The images of a run: the training source, those held out for scores, and the rows of a batch."""

import contextlib
import dataclasses
import functools
import json
import math
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import jax

from uae_jax.data.emoji import EmojiSet, EmojiSource
from uae_jax.data.folder import FolderSource, Limits, OpenedFolder, open_folder
from uae_jax.data.formats import ReadOptions
from uae_jax.data.loader import BatchSpec, RowBuilder, batch_spec, check_max_prompt
from uae_jax.data.mixture import Mixture
from uae_jax.data.qwen_inputs import ImageProcessor
from uae_jax.data.sources import Example, SceneSource, Source, TfdsSource
from uae_jax.files.json_files import write_json
from uae_jax.stages.run_config import DataConfig, RunConfig
from uae_jax.training import processes

CAPTIONS_LOOKED_UP = 256  # for words that the model does not know


@dataclasses.dataclass(frozen=True)
class OpenedData:
    """The data of a run.

    Attributes:
      train: the training source.
      heldout: images that it does not contain.
      folders: what was opened of folders, those of training first.
      trained_folders: how many of them are trained on.
    """

    train: Source
    heldout: list[Example]
    folders: tuple[OpenedFolder, ...] = ()
    trained_folders: int = 0

    @property
    def lines(self) -> list[str]:
        """What to tell of the folders: format, images, and what was left out."""
        return [line for folder in self.folders for line in folder.lines]

    def records(self) -> list[dict[str, Any]]:
        """The counts of every folder that was checked, for `summary.json`."""
        return [folder.inspection.record() for folder in self.folders if folder.inspection]


def open_sources(config: DataConfig, seed: int, heldout: int, *, check: bool = True) -> tuple[Source, list[Example]]:
    """The training source and the held-out images of `open_data`."""
    data = open_data(config, seed, heldout, check=check)
    return data.train, data.heldout


def open_data(config: DataConfig, seed: int, heldout: int, *, check: bool = True) -> OpenedData:
    """The training source, and images that it does not contain.

    Args:
      config: where images come from.
      seed: of built-in sources.
      heldout: how many images are held out.
      check: also read every image of a folder once; without, no held-out image of a folder is read either.

    Raises:
      ValueError, FileNotFoundError: an unknown source, or one that cannot be read; see `data.sources`, `data.folder`.
    """
    if config.source in ("scenes", "emoji"):
        kind = SceneSource
        if config.source == "emoji":
            kind = functools.partial(EmojiSource, emoji=EmojiSet(config.folder))
        train = kind("train", seed, config.image_size, config.detail, mistakes=config.mistakes)
        test = kind("test", 0, config.image_size, "full")
        return OpenedData(train, [test[index] for index in range(heldout)])
    if config.source == "folder":
        return _open_folders(config, heldout, check)
    keys = dict(image_key=config.image_key, caption_key=config.caption_key)
    train = TfdsSource(config.name, config.split, config.data_dir or None, **keys)
    test = TfdsSource(config.name, config.heldout_split, config.data_dir or None, **keys)
    return OpenedData(train, [test[index] for index in range(min(heldout, len(test)))])


def _open_folders(config: DataConfig, heldout: int, check: bool) -> OpenedData:
    """One folder or a mixture of them, and a folder of its own for scores or the last images of each."""
    parts = config.mixture_parts() or [(config.folder, 1.0)]
    if not parts[0][0]:
        raise ValueError("config.data.folder is empty; give a folder of images (docs/data.md), or data.source='scenes'")
    keys, choice = (config.image_key, config.caption_key), config.caption_choice
    options = ReadOptions(*keys, choice, config.split, config.image_size, config.jpeg == "scaled")
    limits = Limits(config.min_side, config.max_aspect, config.bad_images)
    opening = functools.partial(open_folder, options=options, limits=limits, name=config.format, check=check)
    names = [folder for folder, _ in parts] + ([config.heldout_folder] if config.heldout_folder else [])

    def open_all() -> list[OpenedFolder]:
        return [opening(folder) for folder in names]

    opened = processes.first_alone(open_all, "folders checked") if check else open_all()
    folders, weights = opened[: len(parts)], [weight for _, weight in parts]
    sources, last = [folder.source for folder in folders], []
    if config.heldout_folder:
        test = opened[-1]
        last = [test.source.parted(max(len(test.source) - heldout, 0))[0]]
    else:
        sources, last = _held_out(sources, weights, heldout, names)
    train = sources[0] if len(sources) == 1 else Mixture(sources, weights)
    examples = [source[index] for source in last for index in range(len(source))][:heldout] if check else []
    return OpenedData(train, examples, tuple(opened), len(parts))


def _held_out(
    sources: list[FolderSource], weights: list[float], heldout: int, names: list[str]
) -> tuple[list[FolderSource], list[FolderSource]]:
    """Each source without its last images, and these: by weight, and at most a tenth of a source or one image."""
    kept, last = [], []
    for source, weight, name in zip(sources, weights, names):
        wanted = math.ceil(heldout * weight / sum(weights))
        count = min(wanted, max(1, len(source) // 10))
        if count >= len(source):
            raise ValueError(
                f"{name} has a single image that can be used, and it is held out for the scores: nothing is left to "
                "train on; add images, or set config.data.heldout_folder to a folder of others"
            )
        first, rest = source.parted(count)
        kept.append(first)
        last.append(rest)
    return kept, last


def check_same_images(workdir: pathlib.Path, data: OpenedData) -> None:
    """Notes the images of a run on folders in `data.json`, or compares with those with which it began.

    Images of other contents under the old names are told: the run continues on them.

    Raises:
      ValueError: they are others: the position in the data, which a checkpoint keeps, would mean another image.
    """
    folders = data.folders[: data.trained_folders]
    if not folders:
        return
    path = workdir / "data.json"
    now = [
        {"images": len(folder.source), "digest": folder.source.digest(), "contents": folder.contents}
        for folder in folders
    ]
    if path.exists():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            counts = [sum(folder["images"] for folder in part) for part in (before, now)]
            named = [[(folder["images"], folder["digest"]) for folder in part] for part in (before, now)]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path} is damaged ({error}); delete it, if the images are those with which the run began"
            ) from error
        if named[0] != named[1]:
            raise ValueError(
                f"the images are not those with which the run in {workdir} began ({counts[0]} then, {counts[1]} now, "
                "or other names): it cannot continue at the same image; restore them, or use a new --workdir"
            )
        others = [
            folder.source.records.folder
            for folder, old in zip(folders, before)
            if old.get("contents", folder.contents) != folder.contents
        ]
        if others and jax.process_index() == 0:
            print(
                f"note: images in {', '.join(map(str, others))} have the names of those with which the run began, and "
                "other contents; the run continues on the new ones",
                file=sys.stderr,
            )
    if jax.process_index() == 0:
        write_json(path, now)


def few_images(config: RunConfig, train: Source) -> Iterator[str]:
    """A line for each stage whose batch is larger than the training data: it then holds an image twice."""
    for stage in config.distinct_stages():
        size = config.stage(stage).batch_size
        if len(train) < size:
            yield (
                f"{stage}: there are {len(train)} training images, fewer than a batch of {size}, which then holds an "
                f"image more than once; set config.{stage}.batch_size to {len(train)} or less, or add images"
            )


def unknown_captions(config: RunConfig, data: OpenedData, rows: RowBuilder) -> Iterator[str]:
    """A line for each training folder whose first captions have words that the model's vocabulary lacks."""
    if not any(config.needs_captions(stage) for stage in config.distinct_stages()):
        return
    for folder in data.folders[: data.trained_folders]:
        source, texts = folder.source, []
        for record in source.indices[:CAPTIONS_LOOKED_UP]:
            with contextlib.suppress(ValueError, OSError):  # of a folder that was not checked yet
                texts += source.captions(record)
        if note := rows.unknown(texts):
            yield f"{source.records.folder}, captions of the first {CAPTIONS_LOOKED_UP} images: {note}"


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
