"""Rows a second of the data pipeline, as pretraining reads them, and of torch's DataLoader doing the same work.

    python -m benchmarks.data_rows [--images=256] [--json=FILE]
    python -m benchmarks.data_rows --folder=100000

The benchmark makes its own files: JPEGs of procedural images, with captions. Every side reads them in one shuffled
order: decode, resize the shorter side to `--size`, crop, encode the caption, stack. `torch` decodes as such scripts do;
`torch, draft` lets libjpeg reduce, as this pipeline does. Rows a second of the clock are those of the machine at that
moment. Rows a second a core are rows over seconds of processor of all processes that read, start not counted; they are
nearly the same on a busy machine.

The second form makes a folder of that many small files and opens it twice: seconds of the check, and without it.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import pathlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from uae_jax.data import tokenizer as tokens
from uae_jax.data.folder import FolderSource, open_folder
from uae_jax.data.formats import ReadOptions
from uae_jax.data.loader import Reading, RowBuilder, batch_spec, cores, make_loader
from uae_jax.data.qwen_inputs import load_image_processor
from uae_jax.data.scene_captions import WORDS

READS = ("pixels", "caption_ids", "caption_mask")  # of pretraining
CAPTION = "red circle , blue square , green cross"
QUALITY = 90


def picture(side: int, seed: int) -> np.ndarray:
    """A procedural image, uint8 [side, side, 3]: noise whose power falls with the frequency, as in photographs."""
    rng = np.random.default_rng(seed)
    across, down = np.fft.rfftfreq(side)[None], np.fft.fftfreq(side)[:, None]
    falling = 1 / np.maximum(np.hypot(across, down), 1 / side) ** 1.4
    layers = []
    for _ in range(3):
        waves = rng.standard_normal((2, *falling.shape)) * falling
        layers.append(np.fft.irfft2(waves[0] + 1j * waves[1], (side, side)))
    mixed = np.stack(layers, -1) @ np.array([[1, 0.8, 0.7], [0.2, -0.2, 0.1], [0.1, 0.1, -0.3]])
    return np.clip(128 + 50 * mixed / mixed.std(), 0, 255).astype(np.uint8)


def write_folder(folder: pathlib.Path, count: int, side: int, distinct: int = 32) -> None:
    """JPEGs with captions.jsonl; `distinct` different images, each file with a comment of its own."""
    images = [Image.fromarray(picture(side, seed)) for seed in range(min(distinct, count))]
    rows = []
    for number in range(count):
        name = f"{number:06d}.jpg"
        images[number % len(images)].save(folder / name, quality=QUALITY, comment=str(number).encode())
        rows.append(json.dumps({"file_name": name, "caption": CAPTION}))
    (folder / "captions.jsonl").write_text("\n".join(rows))


def row_builder(folder: pathlib.Path, size: int) -> RowBuilder:
    """Rows of `size` pixels with the tokenizer of the built-in scenes."""
    tokens.write_scene_tokenizer(folder, WORDS)
    tokenizer, processor = tokens.load_tokenizer(folder), load_image_processor(folder, window_size=16)
    return RowBuilder(tokenizer, processor, batch_spec(tokenizer, processor, size, "describe", 32), "describe")


class TorchRows:
    """What a torch data set does for the same rows.

    Args:
      source: for file names and captions.
      rows: for the tokenizer.
      size: of the images; draft: whether libjpeg reduces.
    """

    def __init__(self, source: FolderSource, rows: RowBuilder, size: int, draft: bool):
        self.source, self.rows, self.size, self.draft = source, rows, size, draft

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        records, number = self.source.records, self.source.indices[index]
        with Image.open(records.folder / records.name_of(number)) as image:
            if self.draft:
                image.draft("RGB", (self.size, self.size))
            image = image.convert("RGB")
        scale = self.size / min(image.size)
        width, height = (max(round(length * scale), self.size) for length in image.size)
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        image = image.crop((left, top, left + self.size, top + self.size))
        caption = self.rows.caption_fields(records.captions(number)[0])
        return {"pixels": np.array(image)} | {name: caption[name] for name in READS if name in caption}


def torch_batches(data: TorchRows, batch: int, workers: int) -> Iterator[Any]:
    """Batches without end of torch's DataLoader; each worker and the main process have one thread, as by default."""
    import torch

    loader = torch.utils.data.DataLoader(
        data, batch, shuffle=True, num_workers=workers, drop_last=True, persistent_workers=workers > 0
    )
    while True:
        yield from loader


def processor_seconds() -> float:
    """Seconds of processor of this process and of the processes that it started and that still run (Linux)."""
    ticks = 0
    for child in multiprocessing.active_children():
        with contextlib.suppress(OSError):
            fields = pathlib.Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def timed(batches: Iterator[Any], batch: int, count: int, warm: int) -> dict[str, float]:
    """Rows a second of the clock and of the processor, after `warm` batches."""
    for _ in range(warm):
        next(batches)
    clock, processor = time.perf_counter(), processor_seconds()
    for _ in range(count):
        next(batches)
    clock, processor = time.perf_counter() - clock, processor_seconds() - processor
    return {"rows_a_second": batch * count / clock, "rows_a_second_a_core": batch * count / processor}


def compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One object for each side and number of threads and workers."""
    found: list[dict[str, Any]] = []

    def measure(side: str, threads: int, workers: int, batches: Any) -> None:
        result = timed(batches, options.batch, options.batches, warm=2 + 2 * workers)
        getattr(batches, "close", lambda: None)()
        found.append({"side": side, "threads": threads, "workers": workers} | result)
        print(
            f"{side:22} {threads:>7} {workers:>7} {result['rows_a_second']:>13.1f} "
            f"{result['rows_a_second_a_core']:>20.1f}",
            flush=True,
        )

    with tempfile.TemporaryDirectory() as place:
        folder = pathlib.Path(place)
        (folder / "images").mkdir()
        write_folder(folder / "images", options.images, options.side)
        rows = row_builder(folder, options.size)
        size = sum(file.stat().st_size for file in (folder / "images").glob("*.jpg")) / options.images
        print(f"{options.images} JPEGs of {options.side} pixels, {size / 1e3:.0f} kB, to {options.size} pixels")
        print(f"{'side':22} {'threads':>7} {'workers':>7} {'rows a second':>13} {'rows a second a core':>20}")
        many = sorted({1, options.cores})
        for name, scaled in (("uae_jax", True), ("uae_jax, jpeg=full", False)):
            source = open_folder(folder / "images", ReadOptions(side=options.size, scaled=scaled)).source
            readings = [Reading(threads, 0) for threads in many] + [Reading(1, workers) for workers in many]
            for reading in readings:
                batches = make_loader(source, rows.only(READS), options.batch, reading=reading)
                measure(name, reading.threads, reading.workers, batches)
        for name, draft in (("torch, draft", True), ("torch", False)):
            data = TorchRows(source, rows, options.size, draft)
            for workers in (0, *many):
                measure(name, 1, workers, torch_batches(data, options.batch, workers))
    return found


def time_opening(count: int) -> list[dict[str, Any]]:
    """Seconds of opening a folder of so many small JPEGs for the first and the second time."""
    found = []
    with tempfile.TemporaryDirectory() as place:
        folder = pathlib.Path(place)
        write_folder(folder, count, 64)
        for when in ("first", "second"):
            begin = time.perf_counter()
            opened = open_folder(folder)
            found.append({"opening": when, "images": count, "seconds": time.perf_counter() - begin})
            print(f"{opened.lines[0]}: {when} opening {found[-1]['seconds']:.2f} s", flush=True)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256, help="files")
    parser.add_argument("--side", type=int, default=1024, help="of the files, in pixels")
    parser.add_argument("--size", type=int, default=512, help="of the rows, in pixels")
    parser.add_argument("--batch", type=int, default=16, help="rows of a batch")
    parser.add_argument("--batches", type=int, default=16, help="timed batches")
    parser.add_argument("--cores", type=int, default=cores(), help="the larger number of threads and of workers")
    parser.add_argument("--folder", type=int, default=0, help="open a folder of so many small files twice instead")
    parser.add_argument("--json", type=pathlib.Path, help="file for one JSON object a line")
    options = parser.parse_args(arguments)
    found = time_opening(options.folder) if options.folder else compare(options)
    if options.json:
        options.json.write_text("".join(json.dumps(row) + "\n" for row in found))


if __name__ == "__main__":
    main()
