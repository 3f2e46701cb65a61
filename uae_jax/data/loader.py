"""From a source to batches of fixed shapes: a Grain pipeline whose position is a small dict.

The stream of samples is global and does not depend on the number of processes. Global batch s holds samples s * B to
(s + 1) * B - 1; process p of n gets the p-th of n equal slices. So a run can continue with another number of processes,
with the same random keys, which are folded from `sample_id`. Threads and worker processes change the speed alone.
"""

import collections
import concurrent.futures
import copy
import dataclasses
import functools
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, Protocol

import grain
import numpy as np
from absl import flags
from PIL import Image

from uae_jax.data import tokenizer as tokenizers
from uae_jax.data.images import square_image
from uae_jax.data.qwen_inputs import Fields, ImageProcessor, pad_to, prompt_fields
from uae_jax.data.sources import Example

MOST_THREADS = 32  # more of them wait for each other
ROWS_AHEAD = 4  # of each thread, and of each worker process
BATCHES_AHEAD = 2
PATIENCE = 2.0  # seconds that a reader has to answer before it is closed; a source may never answer


@dataclasses.dataclass(frozen=True)
class BatchSpec:
    """Fixed shapes of a batch: square `image_size` in pixels, `max_patches` P, `max_prompt` Tp, `max_caption` Tc."""

    image_size: int
    max_patches: int
    max_prompt: int
    max_caption: int


def batch_spec(
    tokenizer,
    processor: ImageProcessor,
    image_size: int,
    prompt: str,
    max_caption: int,
    multiple: int = 1,
    system: str = "",
) -> BatchSpec:
    """The smallest spec for one square image per row; the prompt's length is rounded up to `multiple`.

    Raises:
      ValueError: `max_caption` below 2 (one word and the end), or `image_size` below 8.
    """
    if max_caption < 2 or image_size < 8:
        raise ValueError(f"need max_caption >= 2 and image_size >= 8, got {max_caption} and {image_size}")
    grid = processor.grid_of(image_size, image_size)
    length = len(tokenizers.caption_prompt_ids(tokenizer, prompt, [processor.image_tokens(grid)], system=system))
    return BatchSpec(image_size, grid[0] * grid[1], -(-length // multiple) * multiple, max_caption)


def check_max_prompt(given: int, needed: int, image_size: int) -> None:
    """Raises ValueError if the caption prompt with an image of `image_size` pixels needs more than `given` tokens."""
    if given < needed:
        raise ValueError(
            f"config.data.max_prompt is {given}, but the caption prompt with its image of {image_size} pixels "
            f"needs {needed} tokens; set max_prompt to 0 (the needed length), or lower max_pixels in the model's "
            "llm_processor/preprocessor_config.json"
        )


def batch_shapes(
    spec: BatchSpec, batch_size: int, processor: ImageProcessor
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of every field of a batch of `batch_size` rows, for compiling without data."""
    patches, prompt, side = spec.max_patches, spec.max_prompt, spec.image_size
    rows = {
        "sample_id": ((), np.int32),
        "pixels": ((side, side, 3), np.uint8),
        "patches": ((patches, processor.patch_width), np.float32),
        "patch_positions": ((patches, 2), np.int32),
        "patch_windows": ((patches,), np.int32),
        "patch_images": ((patches,), np.int32),
        "prompt_ids": ((prompt,), np.int32),
        "prompt_mask": ((prompt,), np.bool_),
        "prompt_positions": ((prompt, 3), np.int32),
        "prompt_next": ((), np.int32),
        "caption_ids": ((spec.max_caption,), np.int32),
        "caption_mask": ((spec.max_caption,), np.bool_),
        "caption_truncated": ((), np.bool_),
    }
    return {name: ((batch_size, *shape), np.dtype(dtype)) for name, (shape, dtype) in rows.items()}


def to_signed(image: np.ndarray) -> np.ndarray:
    """uint8 0..255 to float32 in [-1, 1], the VAE's input."""
    return image.astype(np.float32) / np.float32(127.5) - np.float32(1)


def from_signed(pixels: np.ndarray) -> np.ndarray:
    """float in [-1, 1], clipped, to uint8 0..255; the inverse of `to_signed`."""
    return np.rint((np.clip(np.asarray(pixels, np.float32), -1, 1) + 1) * 127.5).astype(np.uint8)


class RowBuilder:
    """Turns an example into the fields of one row (see `batch_shapes`), all of them or those of `only`.

    Captioner, VAE and reward get the same square crop; "pixels" are 0..255, and become floats on the device
    (`nn.images.signed`). A caption longer than `max_caption` is truncated before its end token, and marked in
    "caption_truncated".

    Args:
      tokenizer: of `tokenizer.load_tokenizer`.
      processor: of the images.
      spec: shapes of the row.
      prompt: text of the caption prompt.
      system: text of its system turn, see `tokenizer.caption_prompt_ids`.

    Raises:
      ValueError: the spec is too small for an image or the prompt.
    """

    def __init__(self, tokenizer, processor: ImageProcessor, spec: BatchSpec, prompt: str, system: str = ""):
        self.tokenizer, self.processor, self.spec = tokenizer, processor, spec
        image = processor(np.zeros((spec.image_size, spec.image_size, 3), np.uint8))
        ids = tokenizers.caption_prompt_ids(tokenizer, prompt, [processor.image_tokens(image[1])], system=system)
        image_pad = tokenizers.token_id(tokenizer, tokenizers.IMAGE_PAD)
        check_max_prompt(spec.max_prompt, len(ids), spec.image_size)
        # every image is a square of one size, so all fields except the patches are the same in every row
        self.constant = prompt_fields(ids, [image], processor, image_pad, spec.max_patches, spec.max_prompt)
        self.wanted = frozenset(batch_shapes(spec, 1, processor))

    def only(self, names: Collection[str]) -> "RowBuilder":
        """One that builds these fields alone, and the sample's number."""
        other = copy.copy(self)
        other.wanted = frozenset(names)
        other.constant = {name: value for name, value in self.constant.items() if name in other.wanted}
        return other

    def image_fields(self, image: Image.Image | np.ndarray) -> Fields:
        """Pixels, patches and prompt of one image, without a caption."""
        square = square_image(image, self.spec.image_size)
        found = {"pixels": square, **self.constant} if "pixels" in self.wanted else dict(self.constant)
        if "patches" in self.wanted:
            found["patches"] = pad_to(self.processor(square)[0], self.spec.max_patches)
        return found

    def encode(self, text: str) -> list[int]:
        """A caption's ids with the end token."""
        return tokenizers.encode_caption(self.tokenizer, text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a caption's ids up to the end token."""
        return tokenizers.decode_caption(self.tokenizer, ids)

    def unknown(self, texts: Iterable[str]) -> str:
        """A line that names the words of texts that the vocabulary lacks, or nothing."""
        return tokenizers.unknown_note(self.tokenizer, texts)

    def caption_fields(self, text: str) -> Fields:
        """A caption's ids [Tc] with the end token, mask [Tc], and whether the caption was truncated.

        An empty text, for an image without a caption, has the end alone.
        """
        ids, limit = self.encode(text), self.spec.max_caption
        kept = ids if len(ids) <= limit else [*ids[: limit - 1], ids[-1]]
        return {
            "caption_ids": pad_to(np.array(kept, np.int32), limit),
            "caption_mask": np.arange(limit) < len(kept),
            "caption_truncated": np.bool_(len(ids) > limit),
        }

    def __call__(self, sample_id: int, example: Example) -> Fields:
        """All fields of one row; the error of a bad example has the example's name."""
        try:
            caption = self.caption_fields(example.caption or "")
            return {
                "sample_id": np.int32(sample_id % 2**31),
                **self.image_fields(example.image),
                **{name: value for name, value in caption.items() if name in self.wanted},
            }
        except ValueError as error:
            raise ValueError(f"example {example.id}: {error}") from error


@dataclasses.dataclass(frozen=True)
class Reading:
    """How rows are read in parallel; the batches are the same for any number.

    Attributes:
      threads: in each process that reads; 0 shares the cores among these processes.
      workers: processes that read beside this one; 0 reads in this process alone.
    """

    threads: int = 0
    workers: int = 0

    @property
    def own_threads(self) -> int:
        """Threads of each process that reads, at least one."""
        return self.threads or max(1, min(cores(), MOST_THREADS) // max(1, self.workers))


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Batches(Iterator[dict[str, np.ndarray]]):
    """The batches of one process in order; the position is {"next_index": number of the next batch}.

    Args:
      samples: rows by number, the same on every process.
      batch_size: rows of the global batch.
      reading: threads and worker processes.
      slice_: (i, n) for the i-th of n equal slices of each global batch.
    """

    def __init__(self, samples: grain.MapDataset, batch_size: int, reading: Reading, slice_: tuple[int, int] = (0, 1)):
        self.samples, self.reading = samples, reading
        self.batch_size, self.slice = batch_size, slice_
        self.position = 0
        self.reader: grain.DatasetIterator | None = None
        self.ahead: collections.deque[concurrent.futures.Future] = collections.deque()

    def _open(self) -> grain.DatasetIterator:
        """Batches from the position on, whose rows are read ahead in parallel."""
        index, count = self.slice
        size = self.batch_size // count
        place = functools.partial(_sample_of, self.samples, size, count, index)
        rows = grain.MapDataset.range(self.position * size, len(self.samples) // self.batch_size * size).map(place)
        if not flags.FLAGS.is_parsed():  # Grain's worker processes look at its own
            flags.FLAGS.mark_as_parsed()
        threads = self.reading.own_threads
        ahead = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads * ROWS_AHEAD)
        workers = grain.MultiprocessingOptions(num_workers=self.reading.workers, per_worker_buffer_size=ROWS_AHEAD)
        return iter(rows.to_iter_dataset(ahead).mp_prefetch(workers).batch(size, drop_remainder=True))

    def __next__(self) -> dict[str, np.ndarray]:
        if self.reader is None:
            self.reader, self.stacking = self._open(), concurrent.futures.ThreadPoolExecutor(1)
        try:
            while len(self.ahead) <= BATCHES_AHEAD:
                self.ahead.append(self.stacking.submit(next, self.reader))
            batch = self.ahead.popleft().result()
        except BaseException:  # what was read ahead is not at the position any more
            self.close()
            raise
        self.position += 1
        return batch

    def get_state(self) -> dict[str, int]:
        """The position; batches that are read ahead do not count."""
        return {"next_index": self.position}

    def set_state(self, state: dict[str, int]) -> None:
        """Continues at a position of `get_state`."""
        self.close()
        self.position = int(state["next_index"])

    def close(self) -> None:
        """Ends threads and worker processes; the next batch starts them anew."""
        if self.reader is not None:
            self.stacking.shutdown(wait=False, cancel_futures=True)
            # a reader that is closed while a batch is asked of it never answers; the interpreter would wait for it
            asked = [batch for batch in self.ahead if not batch.cancelled()]
            concurrent.futures.wait(asked, timeout=PATIENCE)
            self.reader.close()
            self.reader = None
            self.ahead.clear()


def _sample_of(samples: Any, size: int, count: int, index: int, row: int) -> Fields:
    """Row number `row` of a process: the i-th of n equal slices of each global batch of n * size samples."""
    batch, place = divmod(row, size)
    return samples[(batch * count + index) * size + place]


class Items(Protocol):
    """What a loader reads: a `Source`, or another sequence whose items `rows` understands."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


def make_loader(
    source: Items,
    rows: Callable[[int, Any], Fields],
    batch_size: int,
    seed: int = 0,
    *,
    process_index: int = 0,
    process_count: int = 1,
    shuffle: bool = True,
    repeat: bool = True,
    reading: Reading | None = None,
) -> Batches:
    """An iterator over this process's slices of the global batches, as dicts of numpy arrays.

    `get_state()` returns the position, a dict for JSON; `set_state()` continues exactly there. Prefetched batches do
    not count.

    Args:
      source: see `sources`, or `precomputed.PrecomputedSource`.
      rows: makes a row of a sample's number and an item, as `RowBuilder` does.
      batch_size: rows of the global batch B; each process gets B / process_count.
      seed: of the shuffle, which differs between epochs.
      process_index, process_count: of this process.
      shuffle, repeat: both False reads a source once, in order, without the last incomplete batch.
      reading: threads and worker processes.

    Raises:
      ValueError: an empty source, a batch that does not divide among the processes, or a batch larger than a source
        that is not repeated.
    """
    if len(source) == 0:
        raise ValueError("the data source is empty: there is nothing to load")
    if batch_size < 1 or batch_size % process_count or not 0 <= process_index < process_count:
        raise ValueError(
            f"a global batch of {batch_size} does not divide among {process_count} processes "
            f"(this is number {process_index}): choose a multiple"
        )
    if not repeat and len(source) < batch_size:
        raise ValueError(f"the source has {len(source)} examples, fewer than one batch of {batch_size}")
    data = grain.MapDataset.source(source)
    if shuffle:
        data = data.shuffle(seed=seed)
    if repeat:
        data = data.repeat()
    return Batches(data.map_with_index(rows), batch_size, reading or Reading(), (process_index, process_count))
