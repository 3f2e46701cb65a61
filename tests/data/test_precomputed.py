"""Shards of precomputed arrays: what is written is read, by number, and what is damaged is named."""

import contextlib
import json

import ml_dtypes
import numpy as np
import photographs
import pytest

from uae_jax.data import loader as ld
from uae_jax.data import precomputed as pre
from uae_jax.data import sources
from uae_jax.data import tokenizer as tok
from uae_jax.data.folder import open_folder
from uae_jax.data.formats.tf_example import bytes_features, bytes_message
from uae_jax.data.mixture import Mixture
from uae_jax.data.qwen_inputs import load_image_processor
from uae_jax.data.scene_captions import WORDS

KINDS = {
    "caption_ids": pre.Kind((None,), "int32"),
    "latent_mean": pre.Kind((2, 2, 3), "float32"),
    "text_states": pre.Kind((None, 5), "bfloat16"),
}
ROOM = {"caption_ids": 12, "text_states": 14}


def arrays_of(number: int) -> dict[str, np.ndarray]:
    """The arrays of an example, of other lengths than its neighbours'."""
    rng, tokens = np.random.default_rng(number), 2 + number % 5
    return {
        "caption_ids": rng.integers(0, 99, tokens).astype(np.int32),
        "latent_mean": rng.standard_normal((2, 2, 3)).astype(np.float32),
        "text_states": rng.standard_normal((tokens + 3, 5)).astype(ml_dtypes.bfloat16),
    }


def write(folder, examples=11, shard=4) -> pre.Manifest:
    """A complete folder of `arrays_of`."""
    folder.mkdir()
    manifest = pre.Manifest({"data": {}}, ("latents", "states"), KINDS, examples, shard)
    for number in range(manifest.count):
        pre.write_shard(folder / manifest.name(number), map(arrays_of, manifest.records(number)))
    sizes = tuple((folder / manifest.name(number)).stat().st_size for number in range(manifest.count))
    manifest = pre.Manifest({"data": {}}, manifest.parts, KINDS, examples, shard, sizes)
    pre.write_manifest(folder, manifest)
    return manifest


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    tok.write_scene_tokenizer(folder, WORDS)
    tokenizer, processor = tok.load_tokenizer(folder), load_image_processor(folder, window_size=16)
    return ld.RowBuilder(tokenizer, processor, ld.batch_spec(tokenizer, processor, 32, "describe", 12), "describe")


@pytest.mark.parametrize("size", [0, 1, 127, 128, 20_000])
def test_messages_are_read_as_they_were_written(size):
    features = {"a": bytes(range(256)) * (size // 256) + bytes(size % 256), "name of another": b"\0"}
    assert bytes_features(bytes_message(features)) == {name: [value] for name, value in features.items()}
    assert bytes_message({"image": features["a"], "caption": b"x"}) == photographs.tf_example(
        {"image": [features["a"]], "caption": [b"x"]}
    )


def test_every_record_is_read_by_its_number(tmp_path):
    manifest = write(tmp_path / "inputs")
    assert manifest.count == 3 and [manifest.size(shard) for shard in range(3)] == [4, 4, 3]
    assert pre.read_manifest(tmp_path / "inputs") == manifest and not pre.shard_problem(tmp_path / "inputs", manifest)
    stored = pre.StoredExamples(tmp_path / "inputs", manifest)
    for number in (10, 0, 4, 3, 7):
        found, wanted = stored[number], arrays_of(number)
        assert found.keys() == wanted.keys()
        for name, array in wanted.items():
            assert found[name].dtype == array.dtype
            np.testing.assert_array_equal(found[name], array)


def test_bytes_do_not_depend_on_when_a_shard_is_written_and_a_kill_leaves_none(tmp_path):
    write(tmp_path / "one")
    write(tmp_path / "two")
    names = [path.name for path in sorted((tmp_path / "one").iterdir())]
    assert len(names) == 4
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in names)

    def killed():
        yield arrays_of(0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pre.write_shard(tmp_path / "three" / "inputs-00000.array_record", killed())
    assert list((tmp_path / "three").iterdir()) == []


def test_a_full_disk_is_one_line_with_the_shard(tmp_path, monkeypatch):
    monkeypatch.setattr(pre, "replacing", lambda path: contextlib.nullcontext("/dev/full"))
    path = tmp_path / "inputs-00000.array_record"
    with pytest.raises(OSError, match=f"{path} cannot be written .*No space left on device.*; see to room and rights"):
        pre.write_shard(path, (arrays_of(number) for number in range(4000)))


def test_what_is_not_whole_is_named(tmp_path):
    folder = tmp_path / "inputs"
    with pytest.raises(FileNotFoundError, match="inputs holds no precomputed inputs, for it has no precomputed.json"):
        pre.read_manifest(folder)
    manifest = write(folder)
    middle = folder / manifest.name(1)
    whole = middle.read_bytes()
    middle.write_bytes(whole[:-100])
    assert pre.shard_problem(folder, manifest).startswith(f"{middle} is damaged: it has ")
    assert "delete it and run its command again" in pre.shard_problem(folder, manifest)
    assert pre.records_in(middle) in (0, 4)
    middle.unlink()
    assert pre.shard_problem(folder, manifest).startswith(f"{middle} is not there; run its command again")
    assert pre.records_in(middle) == 0
    unfinished = pre.Manifest({}, manifest.parts, KINDS, 11, 4)
    assert "is not complete: it has 2 of 3 shards; run its command again" in pre.shard_problem(folder, unfinished)
    # a bit that flips inside a record keeps the size: reading it names the file
    at = whole.find(arrays_of(5)["latent_mean"].tobytes())
    middle.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    assert at > 0 and not pre.shard_problem(folder, manifest)
    stored = pre.StoredExamples(folder, manifest)
    stored[4], stored[6]
    with pytest.raises(ValueError, match=f"{middle} is damaged at record 1 .*: delete the file and run .* again"):
        stored[5]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda content: "{", "precomputed.json cannot be used"),
        (lambda content: "[]", "precomputed.json cannot be used"),
        (lambda content: json.dumps(content | {"version": 2}), "it is of version 2, and this is 1"),
        (lambda content: json.dumps(content | {"shards": [3]}), "its counts do not fit each other"),
        (lambda content: json.dumps(content | {"arrays": [1]}), "precomputed.json cannot be used"),
    ],
)
def test_a_damaged_manifest_is_named(tmp_path, change, message):
    write(tmp_path / "inputs")
    path = tmp_path / "inputs" / pre.FILE
    path.write_text(change(json.loads(path.read_text())))
    with pytest.raises(ValueError, match=message):
        pre.read_manifest(tmp_path / "inputs")


def test_rows_have_full_lengths_masks_and_nothing_else(tmp_path, rows):
    stored = pre.StoredExamples(tmp_path / "inputs", write(tmp_path / "inputs"))
    source = sources.SceneSource(length=11)
    wanted = frozenset(("caption_ids", "caption_mask", "text_states", "text_mask"))
    built = pre.PrecomputedRows(rows.only(()), wanted, ROOM)
    row = built(2**31 + 3, pre.PrecomputedSource(source, stored, None, whole=False)[6])
    assert row.keys() == {"sample_id", *wanted} and row["sample_id"] == 3
    lengths = {"caption": 3, "text": 6}
    for (name, length), array in zip(lengths.items(), ("caption_ids", "text_states")):
        assert len(row[array]) == ROOM[array] and row[f"{name}_mask"].tolist() == [True] * length + [False] * (
            ROOM[array] - length
        )
        np.testing.assert_array_equal(row[array][:length], arrays_of(6)[array])
        assert not np.asarray(row[array][length:], np.float32).any()
    # with pixels the example is read too
    built = pre.PrecomputedRows(rows.only(("pixels",)), frozenset(("latent_mean",)), ROOM)
    row = built(0, pre.PrecomputedSource(source, stored, None, whole=True)[6])
    assert row.keys() == {"sample_id", "pixels", "latent_mean"}
    np.testing.assert_array_equal(row["pixels"], source[6].image)


def test_the_first_examples_of_a_run_are_those_that_its_loader_reads(rows):
    source, seed = sources.SceneSource(length=40), 7
    numbers = pre.first_read(source, seed, 24)
    assert len(set(numbers)) == 24
    batches = ld.make_loader(source, rows.only(("pixels",)), 8, seed)
    read = np.concatenate([next(batches)["pixels"] for _ in range(3)])
    np.testing.assert_array_equal(read, [source[number].image for number in numbers])
    batches.close()
    assert sorted(pre.first_read(source, seed, 100)) == list(range(40))


def test_examples_that_were_not_counted_are_named(tmp_path):
    stored = pre.StoredExamples(tmp_path / "inputs", write(tmp_path / "inputs"))
    source = sources.SceneSource(length=40)
    numbers = pre.first_read(source, 7, 11)
    found = pre.PrecomputedSource(source, stored, numbers, whole=False)
    for record, number in enumerate(numbers):
        np.testing.assert_array_equal(found[number].arrays["latent_mean"], arrays_of(record)["latent_mean"])
    missing = next(number for number in range(40) if number not in numbers)
    with pytest.raises(ValueError, match=f"example {missing} is not in .*, which holds the first 11"):
        found[missing]


def test_a_mixture_stores_each_example_once(tmp_path):
    photographs.write_captions(tmp_path / "a", photographs.photographs(5))
    photographs.write_webdataset(tmp_path / "b", photographs.photographs(3))
    parts = [open_folder(tmp_path / name).source for name in "ab"]
    mixture = Mixture(parts, [3, 1])
    distinct = pre.Distinct(mixture)
    assert len(distinct) == 8 < len(mixture)
    for index in range(len(mixture)):
        assert distinct[distinct.number(index)].id == mixture[index].id
    assert [distinct[number].id for number in range(8)] == [part[at].id for part in parts for at in range(len(part))]
    assert set(pre.first_read(mixture, 0, len(mixture))) == set(range(8))


@pytest.mark.slow
def test_worker_processes_read_the_same_batches(tmp_path, rows):
    stored = pre.StoredExamples(tmp_path / "inputs", write(tmp_path / "inputs"))
    source = pre.PrecomputedSource(sources.SceneSource(length=11), stored, None, whole=False)
    built = pre.PrecomputedRows(rows.only(()), frozenset(("latent_mean", "text_states", "text_mask")), ROOM)
    found = []
    for reading in (ld.Reading(threads=2), ld.Reading(workers=2)):
        batches = ld.make_loader(source, built, 4, 3, reading=reading)
        found.append([next(batches) for _ in range(5)])
        batches.close()
    for one, other in zip(*found):
        assert one.keys() == other.keys() and one["text_states"].dtype == ml_dtypes.bfloat16
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def test_shards_are_a_quarter_of_a_gibibyte_and_not_too_many():
    assert pre.shard_examples_of(2**20, 10**4, 1) == 256
    assert pre.shard_examples_of(1.5e6, 700_000, 128) == 1408  # 498 shards of 2.1 GB
    assert pre.shard_examples_of(1e12, 3, 8) == 8


def test_examples_are_spread_from_the_first_to_the_last():
    assert pre.spread(100, 4) == [0, 25, 50, 75] and pre.spread(2, 4) == [0, 0, 1, 1]
