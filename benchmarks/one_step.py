"""One step of `gen_for_und` of a full-size preset on a small host: from a folder of weights to its export.

    python -m benchmarks.one_step DIR [--size=full|mini] [--keep=WORKDIR]

DIR is a folder of `benchmarks.mini_checkpoint`; it is made if absent (full: 13 GB on disk). The run trains adapters
of the captioner in bfloat16 on 64-pixel images: one image, a group of 2, 8 tokens, one denoising step, one score before
and after. It is a process of its own, by `uae_jax.main`. What is printed: exit code, seconds, the most memory that the
process held (resident, pages of mapped files included), and the bytes of the export.
"""

import argparse
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

import numpy as np
from PIL import Image

from benchmarks import mini_checkpoint

IMAGES, SIDE = 3, 64
SETTINGS = {
    "stages": "('gen_for_und',)",
    "data.source": "folder",
    "data.image_size": SIDE,
    "data.max_caption": 8,
    "data.caption_prompt": "describe",
    "data.max_prompt": 0,
    "model.dtype": "bfloat16",
    "model.frozen_dtype": "bfloat16",
    "mesh.fsdp": 1,
    "gen_for_und.sampler_steps": 1,
    "gen_for_und.steps": 1,
    "gen_for_und.batch_size": 1,
    "gen_for_und.group_size": 2,
    "gen_for_und.max_new_tokens": 8,
    "gen_for_und.micro_batches": 1,
    "gen_for_und.rollout_parts": 1,
    "gen_for_und.gather_weights": False,
    "evaluation.images": 1,
    "evaluation.images_during": 1,
    "evaluation.sampler_steps": 1,
    "loop.eval_every": 0,
    "loop.save_every": 0,
    "loop.export_dtype": "bfloat16",
}
PRESETS = {"full": "qwen2_5_vl_3b_sd3_5_medium@1x24GB", "mini": "qwen2_5_vl_3b_sd3_5_medium@1x24GB"}


def write_images(folder: pathlib.Path) -> None:
    """A few images of noise."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(IMAGES):
        Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(folder / f"{number}.png")


def command(folder: pathlib.Path, images: pathlib.Path, workdir: pathlib.Path, size: str) -> list[str]:
    """The run's command line."""
    settings = {**SETTINGS, "model.folder": folder, "data.folder": images}
    return [
        *(sys.executable, "-m", "uae_jax.main", f"--config=gen_for_und:{PRESETS[size]}", f"--workdir={workdir}"),
        *(f"--config.{name}={value}" for name, value in settings.items()),
    ]


def total_bytes(folder: pathlib.Path) -> int:
    """Bytes of all files of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path, help="folder of weights; made if absent")
    parser.add_argument("--size", choices=tuple(PRESETS), default="full")
    parser.add_argument("--keep", type=pathlib.Path, help="workdir that stays; else a temporary one")
    options = parser.parse_args()
    if not options.folder.exists():
        begin = time.perf_counter()
        mini_checkpoint.write_checkpoint(options.folder, mini_checkpoint.SIZES[options.size])
        print(f"{options.folder}: {total_bytes(options.folder) / 1e9:.2f} GB, {time.perf_counter() - begin:.0f} s")
    with tempfile.TemporaryDirectory() as place:
        workdir = options.keep or pathlib.Path(place) / "run"
        images = pathlib.Path(place) / "images"
        write_images(images)
        begin = time.perf_counter()
        done = subprocess.run(command(options.folder, images, workdir, options.size))
        seconds = time.perf_counter() - begin
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20  # of kilobytes
        export = workdir / "export"
        size = total_bytes(export) / 1e9 if export.is_dir() else 0.0
        print(f"exit {done.returncode}, {seconds:.0f} s, peak {peak:.2f} GiB, export {size:.2f} GB")
        sys.exit(done.returncode)


if __name__ == "__main__":
    main()
