"""Names of array_record files, which their library opens itself, on disk or in Google's store."""

import os
import pathlib

from uae_jax.files.paths import is_url


def record_file(path: pathlib.Path) -> str:
    """The name by which the library opens a file.

    Raises:
      ValueError: it lies in a bucket of another kind, which the library does not know.
    """
    name = os.fspath(path)
    if is_url(path) and not name.startswith("gs://"):
        raise ValueError(
            f"{path} cannot be read: array_record opens files on disk and of gs:// alone; mount the bucket, or copy it"
        )
    return name
