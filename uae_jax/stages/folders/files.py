"""Copying the files of model folders, and replacing a folder only when the new one is complete."""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator

from uae_jax.stages.folders.parts import Part, find_parts, part_tensors

_WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".msgpack",
    ".h5",
    ".gguf",
    ".onnx",
    ".index.json",
    ".index.fp16.json",
)


def is_weight_file(path: pathlib.Path) -> bool:
    """Whether a file holds tensors or is an index of such files."""
    return path.name.endswith(_WEIGHTS)


def small_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Configuration, tokenizer, licence and other files of a folder, without hidden ones and without weights."""
    return [
        file
        for file in sorted(folder.iterdir())
        if file.is_file() and not file.name.startswith(".") and not is_weight_file(file)
    ]


def used_files(part: Part) -> list[pathlib.Path]:
    """The files of a part that are read: the small ones, and of the weights those that the loader opens, with their
    index.
    """
    weights = sorted(set(part_tensors(part).files.values()))
    if part.folder.is_file():
        return weights
    indexes = sorted(part.folder.glob("*.safetensors.index.json"))[:1]
    return [*small_files(part.folder), *weights, *indexes]


def copy_file(source: pathlib.Path, folder: pathlib.Path, *, link: bool = False) -> None:
    """A file into a folder, which is made if absent.

    Args:
      source: a file, or a link to one as in the hub's cache.
      folder: where to.
      link: a hard link instead of a copy, where both are on one disk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / source.name
    if link:
        with contextlib.suppress(OSError):  # another disk, or one without links: a copy is as good
            os.link(source.resolve(), target)
            return
    shutil.copy2(source, target)


@contextlib.contextmanager
def replaced(out: str | pathlib.Path, *, overwrite: bool, sources: list[pathlib.Path]) -> Iterator[pathlib.Path]:
    """A temporary sibling folder that takes the place of `out` at the end, and vanishes when anything goes wrong.

    Args:
      out: the folder to make; it must be absent or empty.
      overwrite: replace it when it is a model folder.
      sources: folders that are read, and may not be replaced.

    Raises:
      FileNotFoundError: the folder that `out` is to be in does not exist.
      ValueError: `out` is not empty, not a model folder, or holds a source.
    """
    out = pathlib.Path(out).absolute()
    check_target(out, overwrite=overwrite, sources=sources)
    fresh = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    try:
        yield fresh
        if out.exists():
            shutil.rmtree(out)
        fresh.rename(out)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def check_target(out: pathlib.Path, *, overwrite: bool, sources: list[pathlib.Path]) -> None:
    """Raises what `replaced` raises, before anything is read."""
    if not out.parent.is_dir():
        raise FileNotFoundError(f"the folder {out.parent} does not exist; make it first")
    if not out.exists() or out.is_dir() and not any(out.iterdir()):
        return
    if not out.is_dir():
        raise ValueError(f"{out} is a file; give the name of a new folder")
    if not overwrite:
        raise ValueError(f"{out} is not empty; give the name of a new folder, or --overwrite to replace it")
    for source in sources:
        if out.resolve() in (source.resolve(), *source.resolve().parents):
            raise ValueError(f"{out} holds what is read from {source}; give the name of a new folder")
    try:
        model = find_parts(out).path == out
    except (ValueError, FileNotFoundError):
        model = False
    if not model:
        raise ValueError(
            f"{out} is not a model folder, so --overwrite does not delete it; give the name of a new folder"
        )
