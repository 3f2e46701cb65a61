"""Copies of files of model folders, and replacement of a folder once the new folder is complete."""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator

from uae_jax.files import paths
from uae_jax.files.paths import files_in, is_url, problem, remove_folder, to_path
from uae_jax.hf.file_sets import index_of
from uae_jax.stages.folders.parts import Part, find_parts, part_tensors

COMPLETE = ".complete"  # in a folder of a bucket that is written as a whole and not yet in its place
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
    """Whether a file holds tensors or is an index of files of tensors."""
    return path.name.endswith(_WEIGHTS)


def small_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files of a folder without hidden files and weights: configuration, tokenizer, licence and others."""
    return [
        file
        for file in sorted(folder.iterdir())
        if file.is_file() and not file.name.startswith(".") and not is_weight_file(file)
    ]


def used_files(part: Part) -> list[pathlib.Path]:
    """The small files of a part, and the weights that the loader opens, with their index."""
    weights = sorted(set(part_tensors(part).files.values()))
    if part.folder.is_file():
        return weights
    index = index_of(part.folder)
    return [*small_files(part.folder), *weights, *([index] if index else [])]


def copy_file(source: pathlib.Path, folder: pathlib.Path, *, link: bool = False) -> None:
    """Copies a file into a folder, which is created if absent.

    Args:
      source: a file, or a link to a file as in the hub's cache.
      folder: the target folder.
      link: make a hard link instead of a copy, if both are on one disk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / source.name
    if is_url(source) or is_url(target):
        paths.copy_file(source, target)
        return
    if link:
        with contextlib.suppress(OSError):  # another disk, or a disk without hard links
            os.link(source.resolve(), target)
            return
    shutil.copy2(source, target)


def copy_again(fresh: pathlib.Path, older: pathlib.Path) -> Callable[[str, str], None]:
    """A copy function for `shutil.copytree` into `fresh`, which is to replace `older`.

    A file that `older` has from the same source, by size and time, gets a second name instead of a second copy.
    """

    def copy(source: str, target: str) -> None:
        again = older / pathlib.Path(target).relative_to(fresh)
        with contextlib.suppress(OSError):  # absent, or a disk without hard links
            here, there = pathlib.Path(source).stat(), again.lstat()
            if (here.st_size, here.st_mtime_ns) == (there.st_size, there.st_mtime_ns) and again.is_file():
                os.link(again, target)
                return
        shutil.copy2(source, target)

    return copy


@contextlib.contextmanager
def replaced(out: str | pathlib.Path, *, overwrite: bool, sources: list[pathlib.Path]) -> Iterator[pathlib.Path]:
    """A temporary sibling folder that replaces `out` at the end, or is deleted after an error.

    Args:
      out: the folder to create, absent or empty.
      overwrite: replace a model folder at `out`.
      sources: folders to read, which must not be replaced.

    Raises:
      FileNotFoundError: the parent folder of `out` does not exist.
      ValueError: `out` is not empty, not a model folder, or holds a source.
    """
    out = to_path(out).absolute()
    step_back(out)
    check_target(out, overwrite=overwrite, sources=sources)
    fresh = begin(out)
    try:
        yield fresh
        take_place(fresh, out)
    finally:
        remove_folder(fresh)


def begin(out: pathlib.Path) -> pathlib.Path:
    """The folder beside `out`, empty, in which its successor is written."""
    step_back(out)
    fresh = _successor(out)
    remove_folder(fresh)
    fresh.mkdir(parents=True)
    return fresh


def take_place(fresh: pathlib.Path, out: pathlib.Path) -> None:
    """Renames a complete folder to `out`; the older one steps aside first and is deleted last.

    After a kill between the two renames `step_back` brings the older folder back. A bucket renames nothing: the store
    copies every file, and after a kill in between `step_back` copies them again.
    """
    if is_url(out):
        (fresh / COMPLETE).write_bytes(b"")
        _copied_over(fresh, out)
        return
    old = _aside(out)
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    fresh.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def step_back(out: pathlib.Path) -> None:
    """Gives a folder its name again that `take_place` put aside and did not replace; ends its copies in a bucket."""
    if is_url(out):
        if (_successor(out) / COMPLETE).is_file():
            _copied_over(_successor(out), out)
        return
    if not out.exists() and _aside(out).is_dir():
        _aside(out).rename(out)


def _copied_over(fresh: pathlib.Path, out: pathlib.Path) -> None:
    """Makes `out` a copy of a complete folder of its bucket, which is deleted then."""
    names = [name for name in files_in(fresh) if name != COMPLETE]
    for name in set(files_in(out)) - set(names):
        (out / name).unlink()
    for name in names:
        paths.copy_file(fresh / name, out / name)
    (fresh / COMPLETE).unlink()  # first: what is left of the folder must not be taken for a whole one
    remove_folder(fresh)


def _successor(out: pathlib.Path) -> pathlib.Path:
    return out.with_name(f".{out.name}.tmp")


def copy_folder_again(source: pathlib.Path, fresh: pathlib.Path, older: pathlib.Path, skip: str) -> None:
    """Copies a folder into `fresh`, which is to replace `older`, without the folders of the name `skip`.

    Args:
      source: a folder of a model folder.
      fresh: the target, which need not exist and may hold other files.
      older: what the target will replace; files that it has already are not copied (`copy_again`).
      skip: a name.
    """
    if not is_url(source) and not is_url(fresh):
        copy = copy_again(fresh, older)
        shutil.copytree(source, fresh, ignore=shutil.ignore_patterns(skip), copy_function=copy, dirs_exist_ok=True)
        return
    for name in files_in(source):
        if skip not in name.split("/"):
            paths.copy_file(source / name, fresh / name)


def _aside(out: pathlib.Path) -> pathlib.Path:
    return out.with_name(f".{out.name}.old")


def check_target(out: pathlib.Path, *, overwrite: bool, sources: list[pathlib.Path]) -> None:
    """Raises the errors of `replaced`, before anything is read."""
    if found := problem(out, write=True):
        raise OSError(found)
    if not is_url(out) and not out.parent.is_dir():
        raise FileNotFoundError(f"the folder {out.parent} does not exist; make it first")
    if not out.exists() or out.is_dir() and not any(out.iterdir()):
        return
    if not out.is_dir():
        raise ValueError(f"{out} is a file; give the name of a new folder")
    if not overwrite:
        raise ValueError(f"{out} is not empty; give the name of a new folder, or --overwrite to replace it")
    for source in sources:
        if out.resolve() in (source.resolve(), *source.resolve().parents):
            raise ValueError(f"{out} holds the source {source}; give the name of a new folder")
    try:
        model = find_parts(out).path == out
    except (ValueError, FileNotFoundError):
        model = False
    if not model:
        raise ValueError(
            f"{out} is not a model folder, so --overwrite does not delete it; give the name of a new folder"
        )
