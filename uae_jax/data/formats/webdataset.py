"""Webdataset: tar shards whose members belong together by their key, such as 000.jpg, 000.txt and 000.json."""

import json
import os
import pathlib
import tarfile
from collections.abc import Iterator
from typing import Any

from uae_jax.data.formats.listing import Listing
from uae_jax.data.formats.records import CAPTION_FIELDS, ImageRecords, ReadOptions, caption_texts, field_captions
from uae_jax.data.images import is_image_name
from uae_jax.data.kept import keep, places, read_kept, stamps
from uae_jax.files.paths import read_range

TEXTS = ("txt", "caption", "captions", "text")
# where a member's content lies: shard, offset and size in bytes
Place = tuple[int, int, int]
# key and {ending: (offset, size)} of a sample in its shard
Keys = tuple[str, dict[str, tuple[int, int]]]
INDEX, INDEX_VERSION = "index", "1"
HEADER, NAME_LIMIT = 512, 100  # bytes of a tar header before each content, and of the name in it


class Webdataset(ImageRecords):
    """The samples of all shards of a folder, found by an index of offsets and read one by one.

    The key of a member is its path up to the first point of its name. Captions are the text members, and the caption
    fields of the JSON member.

    Raises:
      FileNotFoundError: no shards.
      ValueError: a shard that was cut short or compressed, a key without an image or with two.
    """

    name = "webdataset"
    title = "a folder of webdataset shards"
    captions_at_hand = False

    def __init__(self, listing: Listing, options: ReadOptions):
        super().__init__(listing.folder, options)
        self.shards = self.of_split(shard_files(listing))
        if not self.shards:
            raise FileNotFoundError(f"{listing.folder} has no tar shards")
        self.names = [listing.below(shard) for shard in self.shards]
        self.samples: list[tuple[str, Place, list[tuple[str, Place]]]] = []
        for number, (shard, keys) in enumerate(zip(self.shards, _indexed(listing.folder, self.names))):
            for key, members in keys:
                images = [end for end in members if "." not in end and is_image_name(f"a.{end}")]
                if len(images) != 1:
                    what = f"the images {', '.join(images)}" if images else f"no image, only {', '.join(members)}"
                    raise ValueError(f"{shard} key {key} has {what}: a sample has one image; write the shard again")
                found: dict[str, Place] = {end: (number, *place) for end, place in members.items()}
                name = f"{self.names[number]} key {key}"
                texts = [(end, place) for end, place in found.items() if end in (*TEXTS, "json")]
                self.samples.append((name, found[images[0]], texts))
        if not self.samples:
            raise ValueError(f"{self.shards[0]} holds no samples")

    @staticmethod
    def found(listing: Listing) -> list[str]:
        """What in the folder is of this format: one shard."""
        return [listing.below(file) for file in shard_files(listing)[:1]]

    def __len__(self) -> int:
        return len(self.samples)

    def name_of(self, index: int) -> str:
        """Shard and key."""
        return self.samples[index][0]

    def file_of(self, index: int) -> str:
        """The shard with the sample."""
        return self.names[self.samples[index][1][0]]

    def _content(self, index: int, place: Place) -> bytes:
        number, offset, size = place
        found = read_range(self.shards[number], offset - HEADER, HEADER + size)
        head, content = found[:HEADER], found[HEADER:]
        key = self.samples[index][0].removeprefix(f"{self.names[number]} key ")
        if len(content) < size or not _is_head_of(head, key, size):
            raise ValueError(
                f"{self.shards[number]} is another file than when it was indexed, of the same size and time, or it "
                f"changes while it is read: delete {', '.join(map(str, places(self.folder, INDEX)))}, and start again"
            )
        return content

    def encoded(self, index: int) -> bytes:
        """The content of the image member."""
        return self._content(index, self.samples[index][1])

    def captions(self, index: int) -> tuple[str, ...]:
        """The text members, then the fields of the JSON member."""
        found, where = [], str(self.folder / self.name_of(index))
        for end, place in self.samples[index][2]:
            content = self._content(index, place)
            if end == "json":
                found += field_captions(_json_object(content, where), self.options.caption_fields, where)
            else:
                found += caption_texts(content, f"{where} ({end})")
        return tuple(dict.fromkeys(found))

    def remedy(self, index: int) -> str:
        """The members that may hold a caption."""
        names = " or ".join(CAPTION_FIELDS[::2])
        return f"add a txt member to {self.folder / self.name_of(index)}, or a {names} to its json"


def shard_files(listing: Listing) -> list[pathlib.Path]:
    """The tar files of a folder, compressed ones too, which are refused with a remedy."""
    return [file for file in listing.files if file.name.lower().endswith((".tar", ".tar.gz", ".tgz"))]


def _json_object(content: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{where} has a json member that is not JSON ({error}): write the shard again") from error
    return value if isinstance(value, dict) else {}


def _indexed(folder: pathlib.Path, shards: list[str]) -> list[list[Keys]]:
    """The keys of each shard: those that are kept beside the data where the shard is the same, else as `_keys`."""
    contents = read_kept(folder, INDEX, INDEX_VERSION)
    now = stamps(folder, dict.fromkeys([*shards, *(shard for content in contents for shard in content)]))
    known = {}
    for content in contents:
        known |= {shard: entry for shard, entry in content.items() if now.get(shard) == tuple(entry[:2])}
    known = {shard: entry for shard, entry in known.items() if _holds(folder / shard, entry[2])}
    new = [shard for shard in shards if shard not in known]
    # a shard that is gone since it was listed is named by the error of opening it
    known |= {shard: [*now.get(shard, (0, 0)), [*_keys(folder / shard)]] for shard in new}
    if new:
        keep(folder, INDEX, INDEX_VERSION, known)
    return [known[shard][2] for shard in shards]


def _holds(shard: pathlib.Path, keys: list[Keys]) -> bool:
    """Whether the first and the last member of an index lie in the shard where it says.

    A shard may be written again with equal size and time: by `rsync --times`, or from an archive.
    """
    if not keys:
        return False
    ends = [(keys[at][0], *list(keys[at][1].values())[at]) for at in (0, -1)]
    try:
        return all(_is_head_of(read_range(shard, offset - HEADER, HEADER), key, size) for key, offset, size in ends)
    except OSError:
        return False


def _is_head_of(head: bytes, key: str, size: int) -> bool:
    """Whether a tar header belongs to a member of this key and size."""
    try:
        member = tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.TarError:
        return False
    # a long name, or one beyond ASCII, stands in a record before the header
    elsewhere = len(os.fsencode(member.name)) >= NAME_LIMIT or not key.isascii()
    return member.size == size and (elsewhere or _key_of(member.name.removeprefix("./"))[0] == key)


def _key_of(name: str) -> tuple[str, str]:
    """Key and ending of a member: its path up to the first point of its name, and the rest."""
    folder, _, file = name.rpartition("/")
    stem, _, end = file.partition(".")
    return f"{folder}/{stem}" if folder else stem, end


def _keys(shard: pathlib.Path) -> Iterator[Keys]:
    """(key, {ending: (offset, size)}) of the consecutive members of each key.

    Raises:
      ValueError: two members of one name, of which one would be lost.
    """
    key, members = "", {}
    for name, place in _members(shard):
        own, end = _key_of(name)
        if own != key and members:
            yield key, members
            members = {}
        key = own
        if end.lower() in members:
            raise ValueError(f"{shard} key {key} has two members that end in {end.lower()}: write the shard again")
        members[end.lower()] = place
    if members:
        yield key, members


def _members(shard: pathlib.Path) -> Iterator[tuple[str, tuple[int, int]]]:
    """(name, (offset, size)) of the files in a shard, without hidden ones.

    Raises:
      ValueError: the shard is compressed, damaged or cut short; the message names the last whole member.
    """
    if shard.suffix.lower() != ".tar":
        raise ValueError(f"{shard} is compressed, and cannot be read at random: unpack it with gunzip")
    last = "its beginning"
    try:
        size = shard.stat().st_size
        with shard.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.offset_data + member.size > size:
                    break
                last = f"member {member.name}"
                if member.isfile() and not pathlib.PurePosixPath(member.name).name.startswith("."):
                    yield member.name.removeprefix("./"), (member.offset_data, member.size)
            end = tar.offset
        whole = read_range(shard, end, 512) == bytes(512)
    except tarfile.TarError:
        whole = False
    if not whole:
        raise ValueError(f"{shard} is cut short or damaged after {last}: copy the shard again, or remove it")
