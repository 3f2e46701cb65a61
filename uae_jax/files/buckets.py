"""Paths in buckets: `gs://...` by gcsfs and `s3://...` by s3fs, through fsspec, with the methods of `pathlib.Path`.

An object is written whole or not at all, and its new contents are seen at once. Nothing can be appended to it, and a
folder is only the common beginning of names: it is there while an object in it is, and renaming it copies every object.
Orbax takes these paths as its own, for they are `etils.epath` paths.
"""

import abc
import contextlib
import dataclasses
import errno
import fnmatch
import functools
import hashlib
import io
import itertools
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import fsspec
from etils.epath.gpath import PosixGPath
from fsspec import config

from uae_jax.files.paths import PACKAGES

BLOCK = 2**24  # bytes of a request of a file that is read on and on
PROTOCOLS = {"gs": "gcs", "s3": "s3"}
LOGIN = {"gs": "gcloud auth application-default login", "s3": "aws configure"}


@functools.cache
def _file_system(scheme: str, process: int) -> fsspec.AbstractFileSystem:
    """fsspec's file system of a kind of URL, one a process.

    Listings are not kept: other processes write to the same folders.

    Raises:
      ImportError: its package is not installed.
      OSError: it cannot be used, such as without credentials.
    """
    del process  # a forked process has no threads of its parent's
    # Orbax asks for file systems of its own
    config.conf.setdefault(PROTOCOLS[scheme], {}).setdefault("use_listings_cache", False)
    try:
        return fsspec.filesystem(PROTOCOLS[scheme], use_listings_cache=False)
    except ImportError:
        package = PACKAGES[scheme]
        raise ImportError(
            f"{scheme}:// needs {package}, which is not installed: pip install 'uae_jax[buckets]'"
        ) from None
    except Exception as error:  # those of the cloud's libraries have no common base
        raise OSError(
            errno.EACCES, f"{scheme}:// cannot be used ({_reason(error)}); log in, as by `{LOGIN[scheme]}`"
        ) from error


@dataclasses.dataclass(frozen=True)
class Stat:
    """Size in bytes, time of the last change, and a number that is another for other contents of the same name.

    The other names are those of `etils.epath`.
    """

    st_size: int
    st_mtime: float
    version: int
    is_directory: bool = False
    mode: int | None = None

    @property
    def st_mtime_ns(self) -> int:
        """The version, where a local file has its time: size and time tell whether contents are the same."""
        return self.version

    @property
    def length(self) -> int:
        return self.st_size

    @property
    def mtime(self) -> int:
        return int(self.st_mtime)


class BucketPath(PosixGPath):
    """A file or folder of a bucket; made by `paths.to_path`."""

    @property
    def _fs(self) -> Any:
        return _file_system(str(self._uri_scheme), os.getpid())

    @property
    def _key(self) -> str:
        """Bucket and name, as fsspec has them."""
        return "/".join(self.parts[2:])

    @contextlib.contextmanager
    def _asked(self) -> Iterator[None]:
        """Errors of the store as those of a local file, with the URL and a remedy."""
        try:
            yield
        except FileNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self)) from error
        except (FileExistsError, IsADirectoryError, NotADirectoryError, ImportError):
            raise
        except Exception as error:  # those of the cloud's libraries have no common base
            if isinstance(error, OSError) and error.filename == str(self):
                raise
            scheme = str(self._uri_scheme)
            if _is_refusal(error):
                why = f"no permission ({_reason(error)}); give the account a role for it, or `{LOGIN[scheme]}`"
                raise PermissionError(errno.EACCES, why, str(self)) from error
            why = f"the store does not answer as it should ({_reason(error)}); try again, and see to the network"
            raise OSError(errno.EIO, why, str(self)) from error

    # what a path is

    def absolute(self) -> "BucketPath":
        """Itself: a URL has no working folder."""
        return self

    def resolve(self, strict: bool = False) -> "BucketPath":
        """Itself: there are no links."""
        return self

    def expanduser(self) -> "BucketPath":
        return self

    def is_symlink(self) -> bool:
        return False

    def _info(self) -> dict[str, Any] | None:
        """What the store knows of an object or folder; None where there is neither."""
        with self._asked():
            try:
                return self._fs.info(self._key)
            except FileNotFoundError:
                return None

    def exists(self) -> bool:
        return self._info() is not None

    def is_file(self) -> bool:
        return (self._info() or {}).get("type") == "file"

    def is_dir(self) -> bool:
        return (self._info() or {}).get("type") == "directory"

    def stat(self) -> Any:
        """Size and version; FileNotFoundError without such an object."""
        info = self._info()
        if info is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        return stat_of(info)

    # what is in a folder

    def iterdir(self) -> Iterator["BucketPath"]:
        with self._asked():
            names = self._fs.ls(self._key, detail=False)
        found = sorted({name.rstrip("/").rpartition("/")[2] for name in names if name.rstrip("/") != self._key})
        return (self / name for name in found)

    def below(self) -> dict[str, Stat]:
        """Every object of a folder, at any depth, by its name below the folder. One request brings a thousand."""
        try:
            with self._asked():
                found = self._fs.find(self._key, detail=True)
        except FileNotFoundError:
            return {}
        start = f"{self._key}/"
        return {
            name[len(start) :]: stat_of(info)
            for name, info in sorted(found.items())
            if name.startswith(start) and not name.endswith("/")
        }

    def glob(self, pattern: str) -> Iterator["BucketPath"]:
        """As of `pathlib`, without `**`."""
        found = [self]
        for part in pattern.split("/"):
            inside = [path for place in found for path in place._matches(part)]
            found = inside
        return iter(found)

    def _matches(self, part: str) -> list["BucketPath"]:
        if not any(letter in part for letter in "*?["):
            return [self / part] if (self / part).exists() else []
        try:
            return [path for path in self.iterdir() if fnmatch.fnmatchcase(path.name, part)]
        except (FileNotFoundError, NotADirectoryError):
            return []

    def rglob(self, pattern: str) -> Iterator["BucketPath"]:
        """The objects at any depth whose own name matches."""
        return (self / name for name in self.below() if fnmatch.fnmatchcase(name.rpartition("/")[2], pattern))

    # reading

    def read_bytes(self) -> bytes:
        with self._asked():
            return self._fs.cat_file(self._key)

    def read_text(self, encoding: str | None = None, errors: str | None = None) -> str:
        return self.read_bytes().decode(encoding or "utf-8", errors or "strict")

    def read_range(self, start: int, size: int) -> bytes:
        """`size` bytes from `start`, fewer at the end of the object, by one request."""
        with self._asked():
            return self._fs.cat_file(self._key, start=start, end=start + size) if size else b""

    def ranges(self) -> io.RawIOBase:
        """A file of which each read is one request, for readers that know what they need."""
        return _Ranges(self)

    def open(self, mode: str = "r", encoding: str | None = None, newline: str | None = None, **_: Any) -> Any:
        """A file to read by blocks, or to write; `a` is refused, since an object cannot grow.

        Raises:
          io.UnsupportedOperation: another mode.
        """
        if mode.replace("t", "") not in ("r", "rb", "w", "wb", "x", "xb"):
            raise io.UnsupportedOperation(f"{self} cannot be opened as {mode!r}: an object of a bucket cannot grow")
        encoding = encoding or "utf-8"
        if mode[0] != "r":
            exclusive = mode[0] == "x"
            return _Bytes(self, exclusive) if "b" in mode else _Text(self, exclusive, encoding)
        with self._asked():
            raw = self._fs.open(self._key, "rb", block_size=BLOCK, cache_type="readahead")
        return raw if "b" in mode else io.TextIOWrapper(raw, encoding=encoding, newline=newline)

    def download(self, target: pathlib.Path) -> None:
        """Copies the object into a local file."""
        with self._asked():
            self._fs.get_file(self._key, os.fspath(target))

    # writing

    def write_bytes(self, data: bytes) -> int:
        with self._asked():
            self._fs.pipe_file(self._key, bytes(data))
        return len(data)

    def write_text(
        self, data: str, encoding: str | None = None, errors: str | None = None, newline: str | None = None
    ) -> int:
        return self.write_bytes(data.encode(encoding or "utf-8", errors or "strict"))

    def create(self, data: bytes) -> None:
        """Writes an object that is not there yet; of several processes one succeeds.

        Raises:
          FileExistsError: it is there.
        """
        with self._asked():
            if self.exists():
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(self))
            self._fs.pipe_file(self._key, data, mode="create")

    def upload(self, source: pathlib.Path) -> None:
        """Copies a local file into the object."""
        with self._asked():
            self._fs.put_file(os.fspath(source), self._key)

    def touch(self, mode: int = 0o666, exist_ok: bool = True) -> None:
        self.write_bytes(b"")

    def mkdir(self, mode: int | None = None, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: a folder is there with its first object. FileExistsError where it is, unless `exist_ok`."""
        if not exist_ok and self.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(self))

    def chmod(self, mode: int) -> None:
        """Nothing: a bucket has rights of its own."""

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            with self._asked():
                self._fs.rm_file(self._key)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def rmdir(self) -> None:
        """Nothing: an empty folder is not there."""

    def rmtree(self, missing_ok: bool = False) -> None:
        try:
            with self._asked():
                self._fs.rm(self._key, recursive=True)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def copy(self, dst: Any, overwrite: bool = False) -> Any:
        """Copies an object within the store, without reading it here."""
        target = self._new(dst)
        if not overwrite and target.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        with self._asked():
            self._fs.cp_file(self._key, target._key)
        return target

    def rename(self, target: Any) -> Any:
        """Copies the object, or every object of the folder, and deletes the old ones: not at one instant."""
        goal = self._new(target)
        if self.is_dir():
            for name in self.below():
                (self / name).copy(goal / name, overwrite=True)
            self.rmtree()
        else:
            self.copy(goal, overwrite=True)
            self.unlink()
        return goal

    replace = rename


class _Ranges(io.RawIOBase):
    """An object to read at any place, without reading ahead."""

    def __init__(self, path: BucketPath):
        self._path, self._size, self._at = path, path.stat().st_size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(self._size - self._at, 0)
        data = self._path.read_range(self._at, left if size is None or size < 0 else min(size, left))
        self._at += len(data)
        return data

    def readall(self) -> bytes:
        return self.read()

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class _Draft(abc.ABC):
    """What becomes an object when it is closed, unless an error ends its block, or nobody closes it."""

    _path: BucketPath
    _exclusive: bool
    _failed = False

    def __exit__(self, kind: Any, *rest: Any) -> None:
        self._failed = kind is not None
        self.close()

    def __del__(self) -> None:  # noqa: B027 (it is empty on purpose)
        """Not that of files, which closes them."""

    @abc.abstractmethod
    def data(self) -> bytes:
        """The object's bytes."""

    def close(self) -> None:
        file: Any = super()
        if self.closed:  # pyright: ignore[reportAttributeAccessIssue]
            return
        data = self.data()
        file.close()  # first: it must not be written again where this fails
        if not self._failed:
            self._path.create(data) if self._exclusive else self._path.write_bytes(data)


class _Bytes(_Draft, io.BytesIO):
    def __init__(self, path: BucketPath, exclusive: bool):
        super().__init__()
        self._path, self._exclusive = path, exclusive

    def data(self) -> bytes:
        return self.getvalue()


class _Text(_Draft, io.StringIO):
    def __init__(self, path: BucketPath, exclusive: bool, encoding: str):
        super().__init__()
        self._path, self._exclusive, self._encoding = path, exclusive, encoding

    def data(self) -> bytes:
        return self.getvalue().encode(self._encoding)


def stat_of(info: dict[str, Any]) -> Stat:
    """Size and version of an object by what its store tells: GCS counts generations, S3 has a digest."""
    changed: Any = info.get("mtime") or info.get("LastModified") or info.get("created") or 0.0
    seconds = float(changed.timestamp()) if hasattr(changed, "timestamp") else float(changed)
    known = info.get("generation") or info.get("ETag") or seconds
    version = hashlib.blake2b(str(known).encode(), digest_size=7).digest()
    folder = info.get("type") == "directory"
    return Stat(int(info.get("size") or 0), seconds, int.from_bytes(version, "big"), folder)


def bucket_problem(path: Any, *, write: bool) -> str:
    """Why a folder of a bucket cannot be used, in one line; empty where it can.

    Args:
      path: a `BucketPath`; it need not exist, its bucket must.
      write: also write an object of a few bytes there, and delete it.
    """
    bucket = path
    while len(bucket.parts) > 3:
        bucket = bucket.parent
    try:
        if write:  # a role that may write need not be one that may look at the bucket itself
            probe = path / f".uae_jax_{os.getpid()}_{next(_probes)}"
            probe.write_bytes(b"written to learn whether it can be")
            probe.unlink()
        elif not path.exists() and not bucket.exists():
            raise FileNotFoundError
    except FileNotFoundError:
        return f"{path}: the bucket {bucket} does not exist, or this account does not see it; make it first"
    except ImportError as error:
        return f"{path}: {error}"
    except OSError as error:
        return f"{path}: {error.strerror or error}"
    return ""


_probes = itertools.count()


def _is_refusal(error: Exception) -> bool:
    code, kind = str(getattr(error, "code", "")), type(error).__name__
    refused = isinstance(error, PermissionError) or code in ("401", "403") or str(error).startswith("Forbidden")
    return refused or "Credentials" in kind or kind == "RefreshError"


def _reason(error: BaseException) -> str:
    """The words of an error in one line, at most 200 letters, or its kind."""
    return " ".join(str(error).split())[:200] or type(error).__name__
