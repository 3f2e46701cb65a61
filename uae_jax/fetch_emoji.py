"""Fetches the emoji data set: pinned packages of the npm registry, checked by their checksums.

    python -m uae_jax.fetch_emoji --folder=data/emoji

The `npm` command fetches the packages from its registry into FOLDER/packages. Packages that are there already are not
fetched again. Without npm, put the files that the message names into that folder by hand.
"""

import argparse
import pathlib
import shutil
import subprocess
import tempfile

from uae_jax.command_line import in_range, run_command
from uae_jax.data.emoji import INDEX_FILE, EmojiSet
from uae_jax.data.emoji_files import ARCHIVES, Archive, check_archive, write_folder

PACKAGES = "packages"
COUNT = 128


def fetch(archive: Archive, folder: pathlib.Path) -> None:
    """Fetches an archive into `folder` unless it is there; the file gets its name only if its checksum is right.

    Raises:
      FileNotFoundError: npm is not installed.
      ConnectionError: npm cannot fetch the package.
      ValueError: the checksum is wrong.
    """
    path = folder / archive.file
    if path.is_file():
        check_archive(path, archive)
        print(f"{archive.file}: there", flush=True)
        return
    npm = shutil.which("npm")
    if npm is None:
        raise FileNotFoundError(f"npm is not installed: install Node.js, or put {archive.file} into {folder} by hand")
    print(f"{archive.file}: fetching {archive.megabytes} MB", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as part:
        command = [
            npm,
            "pack",
            f"{archive.package}@{archive.version}",
            f"--pack-destination={part}",
            "--loglevel=error",
            "--fetch-retries=2",
            "--fetch-retry-mintimeout=2000",
            "--fetch-retry-maxtimeout=8000",
        ]
        done = subprocess.run(command, capture_output=True, text=True, cwd=part)
        files = list(pathlib.Path(part).glob("*.tgz"))
        if done.returncode or len(files) != 1:
            raise ConnectionError(
                f"npm cannot fetch {archive.package}@{archive.version} ({_reason(done.stderr)}): the same "
                "command tries again"
            )
        check_archive(files[0], archive)
        files[0].replace(path)


def _reason(text: str) -> str:
    """The first three lines of npm's error as one line."""
    lines = [line.removeprefix("npm error").strip() for line in text.splitlines() if line.startswith("npm error")]
    return "; ".join([line for line in lines if line][:3]) or "it said nothing"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument("--folder", type=pathlib.Path, required=True, help="folder for images and emoji.json")
    parser.add_argument("--count", default=COUNT, help="number of emoji", **in_range(int, low=1))
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Fetches the packages and writes the chosen emoji; does nothing for a complete folder.

    Raises:
      ValueError: the folder holds another number of emoji, or a checksum is wrong.
      OSError: npm is missing or cannot fetch.
    """
    if (options.folder / INDEX_FILE).is_file():
        there = len(EmojiSet(options.folder).names)
        if there != options.count:
            raise ValueError(
                f"{options.folder} holds {there} emoji, not {options.count}: choose another folder, or remove it"
            )
        print(f"{options.folder} holds {there} emoji already")
        return
    for archive in ARCHIVES:
        fetch(archive, options.folder / PACKAGES)
    names = write_folder(options.folder, options.folder / PACKAGES, options.count)
    print(f"{len(names)} emoji are in {options.folder}, from {names[0]} to {names[-1]}")


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    run_command("uae_jax.fetch_emoji", __doc__, add_arguments, arguments)


if __name__ == "__main__":
    main()
