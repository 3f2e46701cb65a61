"""A folder is checked once: what was found lies beside the data, holds for unchanged files, and tells the same."""

import io
import json
import os
import shutil
import tarfile
import threading

import photographs
import pyarrow as pa
import pytest
from photographs import WRITERS, noise
from PIL import Image
from pyarrow import parquet

from uae_jax.data import kept, verdicts
from uae_jax.data.folder import Limits, open_folder
from uae_jax.data.formats import ReadOptions, webdataset
from uae_jax.files.whole import write_bytes


@pytest.fixture
def looks(monkeypatch):
    """The names of the records that are read by the check, in order; empty it between two openings."""
    seen, look = [], verdicts.look

    def counted(records, index):
        seen.append(records.name_of(index))
        return look(records, index)

    monkeypatch.setattr(verdicts, "look", counted)
    return seen


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """The user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture
def folder(tmp_path):
    """Three good images, two copies of the first, one that is cut short, one that is small."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(3):
        Image.fromarray(noise(40, 30 + number, number)).save(folder / f"{number}.jpg")
    shutil.copy(folder / "0.jpg", folder / "copy.jpg")
    (folder / "cut.jpg").write_bytes((folder / "1.jpg").read_bytes()[:-200])
    Image.fromarray(noise(7, 9)).save(folder / "little.png")
    return folder


def again(folder, looks, **how):
    """A second opening: what was found, and which files were read."""
    looks.clear()
    opened = open_folder(folder, **how)
    return opened, sorted(looks)


def kept_file(folder):
    return kept.places(folder, verdicts.NAME)[0]


def test_the_second_opening_reads_no_image_and_tells_the_same(folder, looks):
    first = open_folder(folder)
    assert len(looks) == 6
    second, read = again(folder, looks)
    assert not read and second.lines == first.lines and second.inspection == first.inspection
    assert list(second.source.indices) == list(first.source.indices) == [0, 1, 2]
    assert "1 broken (cut.jpg), 1 below 8 pixels (little.png), 1 of the same bytes" in second.lines[1]


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_is_checked_once(tmp_path, looks, name):
    photos = photographs.photographs()
    names = list(photos)
    photos[names[-1]] = photos[names[0]]  # a copy
    WRITERS[name][1](tmp_path / "set", photos)
    first = open_folder(tmp_path / "set")
    assert len(looks) == 12 and first.inspection.left_out == 1
    second, read = again(tmp_path / "set", looks)
    # rows of a parquet file may name images elsewhere, so that its own size and time say too little
    assert (len(read) == 12 if name == "parquet" else not read) and second.lines == first.lines
    assert second.inspection == first.inspection
    assert second.source.more_captions == first.source.more_captions


def test_limits_are_those_of_the_run_and_not_of_the_check(folder, looks):
    open_folder(folder)
    opened, read = again(folder, looks, limits=Limits(min_side=1))
    assert not read and opened.inspection.record()["left_out"]["small"] == 0
    with pytest.raises(ValueError, match="3 of 6 images cannot be used: 1 broken"):
        open_folder(folder, limits=Limits(bad_images="refuse"))


def test_changed_new_and_vanished_files(folder, looks):
    open_folder(folder)
    (folder / "1.jpg").write_bytes(b"no image any more")
    stamp = os.stat(folder / "2.jpg")
    os.utime(folder / "2.jpg", ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
    Image.fromarray(noise(50, 50, 9)).save(folder / "new.png")
    (folder / "0.jpg").unlink()
    opened, read = again(folder, looks)
    assert read == ["1.jpg", "2.jpg", "new.png"]
    assert "2 broken (1.jpg, cut.jpg)" in opened.lines[1]
    assert [opened.source[index].id for index in range(len(opened.source))] == ["2.jpg", "copy.jpg", "new.png"]
    assert "0.jpg" not in json.loads(kept_file(folder).read_bytes().split(b"\n")[1])["files"]
    assert not again(folder, looks)[1]


def test_a_file_of_the_same_size_and_another_time_is_read_again(folder, looks):
    open_folder(folder)
    content = bytearray((folder / "0.jpg").read_bytes())
    (folder / "0.jpg").write_bytes(bytes(len(content)))
    opened, read = again(folder, looks)
    assert read == ["0.jpg"] and "2 broken (0.jpg, cut.jpg)" in opened.lines[1]
    assert opened.inspection.record()["left_out"]["duplicate"] == 0  # its copy is the only one now


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: content.replace(b"40,30", b"40,31"),
        lambda content: content.replace(b"Pillow", b"pillow"),
        lambda content: b"",
        lambda content: b"\xff" + content,
        lambda content: b"[]\n" + content.split(b"\n")[1],
    ],
)
def test_a_damaged_or_foreign_file_is_passed_over_and_written_again(folder, looks, damage):
    first = open_folder(folder)
    whole = kept_file(folder).read_bytes()
    assert damage(whole) != whole
    kept_file(folder).write_bytes(damage(whole))
    second, read = again(folder, looks)
    assert len(read) == 6 and second.lines == first.lines
    assert not again(folder, looks)[1]


def refuse(monkeypatch, *folders):
    """These folders cannot be written."""

    def write(path, data):
        if any(folder in path.parents for folder in folders):
            raise PermissionError(13, "Permission denied")
        write_bytes(path, data)

    monkeypatch.setattr(kept, "write_bytes", write)


def test_a_folder_that_cannot_be_written_is_kept_in_the_cache(folder, cache, looks, monkeypatch):
    refuse(monkeypatch, folder)
    first = open_folder(folder)
    assert not kept_file(folder).exists() and len(list(cache.rglob("*_checked"))) == 1
    second, read = again(folder, looks)
    assert not read and second.lines == first.lines
    # what lies in the folder is older, and does not hide what lies in the cache
    Image.fromarray(noise(50, 50, 9)).save(folder / "1.jpg")
    assert again(folder, looks)[1] == ["1.jpg"] and not again(folder, looks)[1]


def test_without_any_place_the_check_goes_on_with_one_note(folder, cache, looks, monkeypatch):
    refuse(monkeypatch, folder, cache)
    first = open_folder(folder)
    assert len(first.lines) == 3 and "is done again at every start, for it cannot be kept" in first.lines[2]
    assert "Permission denied" in first.lines[2] and len(again(folder, looks)[1]) == 6


def test_a_check_that_is_stopped_goes_on_where_it_was(folder, looks, monkeypatch):
    look = verdicts.look

    def stopped(records, index):
        if records.name_of(index) == "copy.jpg":
            raise KeyboardInterrupt
        return look(records, index)

    with monkeypatch.context() as patch:
        patch.setattr(verdicts, "look", stopped)
        with pytest.raises(KeyboardInterrupt):
            open_folder(folder)
    assert again(folder, looks)[1] == ["copy.jpg", "cut.jpg", "little.png"]


def test_an_error_that_may_pass_is_told_and_not_kept(folder, looks, monkeypatch):
    read = type(open_folder(folder).source.records).encoded
    kept_file(folder).unlink()

    def failing(self, index):
        if index == 1:
            raise OSError(5, "Input/output error")
        return read(self, index)

    with monkeypatch.context() as patch:
        patch.setattr("uae_jax.data.formats.records.FileRecords.encoded", failing)
        assert "2 broken (1.jpg, cut.jpg)" in open_folder(folder).lines[1]
    opened, names = again(folder, looks)
    assert names == ["1.jpg"] and "1 broken (cut.jpg)" in opened.lines[1]


def test_a_message_names_the_folder_where_it_lies_now(folder, tmp_path, looks):
    open_folder(folder)
    moved = folder.rename(tmp_path / "moved")
    opened, read = again(moved, looks)
    assert not read and opened.inspection.bad["broken"][0][1].startswith(f"{moved / 'cut.jpg'} is not a readable image")


def test_a_table_that_names_images_elsewhere_is_checked_again(tmp_path, looks):
    for number in range(2):
        Image.fromarray(noise(30, 30, number)).save(tmp_path / f"{number}.png")
    (tmp_path / "set").mkdir()
    images = pa.array([{"bytes": None, "path": f"../{number}.png"} for number in range(2)])
    parquet.write_table(pa.table({"image": images}), tmp_path / "set" / "a.parquet")
    assert open_folder(tmp_path / "set").inspection.left_out == 0
    (tmp_path / "1.png").write_bytes(b"nothing")
    opened, read = again(tmp_path / "set", looks)
    assert len(read) == 2 and "1 broken (a.parquet row 1)" in opened.lines[1]


def test_captions_of_containers_are_part_of_the_verdict(tmp_path, looks):
    photographs.write_webdataset(tmp_path, photographs.photographs())
    open_folder(tmp_path)
    assert len(again(tmp_path, looks, options=ReadOptions(caption_key="text"))[1]) == 12
    assert not again(tmp_path, looks)[1] and not again(tmp_path, looks, options=ReadOptions(caption_key="text"))[1]


def test_the_index_of_shards_is_made_once(tmp_path, monkeypatch):
    photographs.write_webdataset(tmp_path, photographs.photographs())
    first = open_folder(tmp_path, check=False).source
    indexed, keys = [], webdataset._keys
    monkeypatch.setattr(webdataset, "_keys", lambda shard: indexed.append(shard.name) or keys(shard))
    second = open_folder(tmp_path, check=False).source
    assert not indexed and second.records.samples == first.records.samples
    shutil.copy(tmp_path / "00000.tar", tmp_path / "00002.tar")
    (tmp_path / "00000.tar").write_bytes((tmp_path / "00001.tar").read_bytes())
    third = open_folder(tmp_path, check=False).source
    assert indexed == ["00000.tar", "00002.tar"] and len(third) == 5 + 5 + 7
    assert third.captions(0) == second.captions(7)


@pytest.mark.parametrize("name", ["é", "a" * 120, "d/a"])
def test_a_shard_written_again_with_equal_size_and_time_is_indexed_again(tmp_path, name):
    def write(texts):
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            for number, text in enumerate(texts):
                photographs.add_member(tar, f"{name}{number}.txt", text)
                photographs.add_member(tar, f"{name}{number}.png", content.getvalue())
        os.utime(tmp_path / "a.tar", ns=(10**18, 10**18))

    content = io.BytesIO()
    Image.fromarray(noise(9, 9)).save(content, "PNG")
    write([b"a" * 900, b"b", b"c"])
    size, before = (tmp_path / "a.tar").stat().st_size, open_folder(tmp_path, check=False).source
    assert before.captions(1) == ("b",)
    write([b"a", b"b", b"c" * 900])
    assert (tmp_path / "a.tar").stat().st_size == size
    with pytest.raises(ValueError, match="a.tar is another file than when it was indexed.*delete .*uae_jax_index"):
        before.captions(0)  # of an opened one
    after = open_folder(tmp_path, check=False).source
    assert [after.captions(index)[0][:1] for index in range(3)] == ["a", "b", "c"]
    assert [len(after.captions(index)[0]) for index in range(3)] == [1, 1, 900]


def test_several_writers_leave_a_whole_file(tmp_path):
    contents = [bytes([65 + number]) * 200_000 for number in range(4)]
    write_bytes(tmp_path / "a", contents[0])
    errors, seen = [], set()

    def write(content):
        try:
            for _ in range(30):
                write_bytes(tmp_path / "a", content)
                seen.add((tmp_path / "a").read_bytes())
        except OSError as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and seen <= set(contents) and [file.name for file in tmp_path.iterdir()] == ["a"]
