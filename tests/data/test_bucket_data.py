"""Data folders in a bucket: every format gives the batches of the local folder, and mistakes are one line each."""

import dataclasses
import io
import json
import multiprocessing
import sys
import tarfile

import fsspec
import numpy as np
import pytest
from buckets import StoreFiles, served
from photographs import WRITERS, add_member

from uae_jax.data import kept, loader, precomputed
from uae_jax.data.folder import open_folder
from uae_jax.data.images import find_images
from uae_jax.data.verdicts import verdicts_on
from uae_jax.files import buckets
from uae_jax.files.json_files import read_json, read_records, write_json
from uae_jax.files.paths import problem, to_path


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with served("set", "empty") as found:
        yield found


class Registering:
    """A source whose arrival in another process makes the bucket known there, as an installed gcsfs would."""

    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        return self.source[index]

    def __setstate__(self, state):
        fsspec.register_implementation("gcs", StoreFiles, clobber=True)
        vars(self).update(state)


def batches_of(source, rows, count=3, **reading):
    data = loader.make_loader(source, rows, 4, seed=3, reading=loader.Reading(**reading))
    return [next(data) for _ in range(count)]


def assert_equal(ours, theirs):
    for batch, other in zip(ours, theirs, strict=True):
        assert batch.keys() == other.keys()
        assert all(np.array_equal(batch[name], other[name]) for name in batch)


@pytest.mark.parametrize("name", WRITERS)
def test_a_bucket_gives_the_batches_of_the_local_folder(store, folders, rows, name):
    store.upload_folder(folders[name], "set", "photos/v1")
    ours, theirs = open_folder("gs://set/photos/v1"), open_folder(folders[name])
    assert ours.lines[0] == theirs.lines[0].replace(str(folders[name]), "gs://set/photos/v1")
    assert (ours.contents, ours.source.digest()) == (theirs.contents, theirs.source.digest())
    assert_equal(batches_of(ours.source, rows), batches_of(theirs.source, rows))


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "array_record"])
def test_so_does_one_of_amazon(store, folders, rows, name):
    store.upload_folder(folders[name], "set", name)
    assert_equal(
        batches_of(open_folder(f"s3://set/{name}").source, rows, 1),
        batches_of(open_folder(folders[name]).source, rows, 1),
    )


def test_array_record_of_amazon_is_refused_with_what_helps(store, folders):
    store.upload_folder(folders["array_record"], "set", "records")
    with pytest.raises(ValueError, match="of gs:// alone; mount the bucket, or copy it"):
        open_folder("s3://set/records")


@pytest.mark.parametrize(
    "name", ["captions", *(pytest.param(name, marks=pytest.mark.slow) for name in ("webdataset", "parquet"))]
)
def test_worker_processes_read_a_bucket(store, folders, rows, name):
    store.upload_folder(folders[name], "set", name)
    source = Registering(open_folder(f"gs://set/{name}").source)
    theirs = batches_of(open_folder(folders[name]).source, rows, 2)
    assert_equal(batches_of(source, rows, 2, threads=2, workers=1), theirs)


def test_what_was_checked_is_kept_beside_the_data_and_no_image_is_read_again(store, folders):
    store.upload_folder(folders["captions"], "set", "a")
    first = open_folder("gs://set/a")
    assert any(name.startswith("a/.uae_jax_checked") for name in store.names("set"))
    store.forget()
    again = open_folder("gs://set/a")
    assert again.contents == first.contents
    assert not [name for name in store.read if name.endswith((".jpg", ".png"))]
    # a listing of all and the file of captions, not a question for every image
    assert sum(store.requests.values()) < 12
    name = next(name for name in store.names("set", "a/") if name.endswith("coffee.jpg"))
    store.put("set", name, store.objects["set", name.replace("coffee", "chelsea").replace(".jpg", ".png")][0])
    assert open_folder("gs://set/a").contents != first.contents  # of another version, and told by that


def test_a_bucket_that_cannot_be_written_has_its_verdicts_in_the_cache(store, folders, tmp_path):
    store.upload_folder(folders["images"], "set", "a")
    store.refused = {"write"}
    assert len(open_folder("gs://set/a").lines) == 1
    assert [*(tmp_path / "cache" / "uae_jax").iterdir()] and not [n for n in store.names("set") if ".uae_jax" in n]
    store.forget()
    open_folder("gs://set/a")
    assert not store.read


def test_a_sample_of_a_shard_is_one_request_for_its_bytes(store, folders):
    store.upload_folder(folders["webdataset"], "set", "shards")
    records = open_folder("gs://set/shards").source.records
    verdicts_on(records)
    store.forget()
    size = len(records.encoded(3))
    assert sum(store.read.values()) == size + 512 and sum(store.requests.values()) == 1


def test_row_groups_of_parquet_are_read_alone(store, photos, folders):
    store.upload_folder(folders["parquet"], "set", "table")
    records = open_folder("gs://set/table").source.records
    store.forget()
    copy = type(records).__new__(type(records))
    copy.__setstate__(records.__getstate__())  # as in another process, which has no row group yet
    assert copy.encoded(1) == records.encoded(1)
    whole = sum(len(data) for data in store.contents("set", "table/").values())
    assert 0 < sum(store.read.values()) < whole / 2


def test_a_truncated_shard_is_named_by_its_url(store, photos):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for name, data in list(photos.items())[:3]:
            add_member(tar, name, data)
    store.put("set", "shards/0.tar", content.getvalue()[:-20000])
    with pytest.raises(ValueError, match="gs://set/shards/0.tar is cut short or damaged after"):
        open_folder("gs://set/shards")


def test_mistakes_are_one_line_with_what_helps(store, folders, monkeypatch):
    with pytest.raises(FileNotFoundError, match="the data folder gs://set/none does not exist"):
        open_folder("gs://set/none")
    assert "the bucket gs://nowhere does not exist, or this account does not see it" in problem(
        to_path("gs://nowhere/a")
    )
    store.refused = {"write"}
    told = problem(to_path("gs://set/run"), write=True)
    assert "no permission (Forbidden" in told and "gcloud auth application-default login" in told and "\n" not in told
    assert problem(to_path("gs://set/run")) == ""
    store.refused = {"list", "about", "read"}
    with pytest.raises(PermissionError, match="no permission"):
        open_folder("gs://set/run")
    for name in ("http://host/a", "abfs://a/b"):
        with pytest.raises(ValueError, match="gs:// and s3:// can; copy the files, or mount"):
            open_folder(name)
    with pytest.raises(ValueError, match="names no bucket"):
        open_folder("gs://")


@pytest.mark.parametrize(("url", "package"), [("gs://set/a", "gcsfs"), ("s3://set/a", "s3fs")])
def test_a_package_that_is_not_there_is_named_with_its_extra(url, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    buckets._file_system.cache_clear()
    with pytest.raises(
        ImportError, match=rf"needs {package}, which is not installed: pip install 'uae_jax\[buckets\]'"
    ):
        open_folder(url)
    assert "uae_jax[buckets]" in problem(to_path(url))


def test_paths_of_a_bucket_do_what_local_ones_do(store, tmp_path):
    for top in (tmp_path / "top", to_path("gs://set/top")):
        write_json(top / "a" / "b.json", {"c": 1})
        (top / "a" / "lines.jsonl").write_text('{"x": 1}\n{"x": 2}\n{"x"')
        (top / "d.txt").write_text("ä")
        assert read_json(top / "a", "b.json") == {"c": 1}
        assert read_records(top / "a" / "lines.jsonl") == [{"x": 1}, {"x": 2}]
        assert (top / "d.txt").read_text() == "ä" and (top / "d.txt").stat().st_size == 2
        assert sorted(path.name for path in top.iterdir()) == ["a", "d.txt"]
        assert [path.name for path in sorted(top.glob("*/*.json*"))] == ["b.json", "lines.jsonl"]
        assert sorted(path.name for path in top.rglob("*.json")) == ["b.json"]
        assert (top / "a").is_dir() and not (top / "a").is_file() and not (top / "a" / "none").exists()
        assert (top / "a" / "b.json").is_file() and not (top / "a" / "b.json").is_dir()
        with pytest.raises(FileNotFoundError, match="No such file"):
            (top / "none").read_bytes()
        with pytest.raises(FileNotFoundError):
            (top / "none").unlink()
        (top / "none").unlink(missing_ok=True)
        with (top / "once").open("x", encoding="utf-8") as file:
            file.write("first")
        with pytest.raises(FileExistsError), (top / "once").open("x", encoding="utf-8") as file:
            file.write("second")
        assert (top / "once").read_text() == "first"
        with pytest.raises(ZeroDivisionError), (top / "half").open("wb") as file:
            file.write(b"half")
            raise ZeroDivisionError
        with pytest.raises(ZeroDivisionError), (top / "half.txt").open("w") as file:
            file.write("half")
            raise ZeroDivisionError
        (top / "a").rename(top / "moved")
        assert sorted(path.name for path in top.iterdir() if path.is_dir()) == ["moved"]
        assert top.parent / "top" == top and str(top / "moved").startswith(str(top))
    assert not [path for path in to_path("gs://set/top").iterdir() if path.name.startswith("half")]
    with pytest.raises(io.UnsupportedOperation, match="an object of a bucket cannot grow"):
        (to_path("gs://set/top") / "d.txt").open("a")


def test_precomputed_inputs_are_written_and_read_in_a_bucket(store):
    kinds = {"latents": precomputed.Kind((2, 3), "float32")}
    folder, manifest = to_path("gs://set/inputs"), precomputed.Manifest({}, ("latents",), kinds, 5, 3)
    for shard in range(manifest.count):
        examples = ({"latents": np.full((2, 3), number, np.float32)} for number in manifest.records(shard))
        precomputed.write_shard(folder / manifest.name(shard), examples)
    sizes = tuple((folder / manifest.name(shard)).stat().st_size for shard in range(manifest.count))
    manifest = dataclasses.replace(manifest, shards=sizes)
    precomputed.write_manifest(folder, manifest)
    assert precomputed.shard_problem(folder, precomputed.read_manifest("gs://set/inputs")) == ""
    stored = precomputed.StoredExamples(folder, manifest)
    assert [stored[number]["latents"][0, 0] for number in range(5)] == [0, 1, 2, 3, 4]
    del store.objects["set", "inputs/" + manifest.name(1)]
    assert precomputed.shard_problem(folder, manifest).startswith("gs://set/inputs/inputs-00001.array_record is not")


def test_images_are_found_by_pattern_and_folder(store, folders):
    store.upload_folder(folders["images"], "set", "a")
    found = [str(path) for path in find_images(["gs://set/a/c*.jpg", "gs://set/a/brick.jpg"])]
    assert found[-1] == "gs://set/a/brick.jpg" and "gs://set/a/coffee.jpg" in found
    assert len(find_images("gs://set/a")) == 12


def test_kept_files_have_one_place_a_folder(store):
    place, cache = kept.places(to_path("gs://set/a"), "x")
    assert str(place) == "gs://set/a/.uae_jax_x" and cache != kept.places(to_path("gs://set/b"), "x")[1]
    assert kept.places(to_path("gs://set/a/"), "x")[1] == cache


def _create(name, queue):
    fsspec.register_implementation("gcs", StoreFiles, clobber=True)
    try:
        to_path(name).create(b"mine")
        queue.put(True)
    except FileExistsError:
        queue.put(False)


@pytest.mark.slow
def test_of_several_processes_one_creates_an_object(store):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=_create, args=("gs://set/lock", queue)) for _ in range(3)]
    for worker in workers:
        worker.start()
    assert sorted(queue.get(timeout=60) for _ in workers) == [False, False, True]
    for worker in workers:
        worker.join()
    assert json.dumps(store.contents("set")["lock"].decode()) == '"mine"'
