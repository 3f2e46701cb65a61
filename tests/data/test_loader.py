import json
import subprocess
import sys
import threading

import jax
import numpy as np
import photographs
import pytest

from uae_jax.data import loader as ld
from uae_jax.data import qwen_inputs, scene_captions, scene_checker, sources
from uae_jax.data import tokenizer as tok
from uae_jax.data.folder import open_folder
from uae_jax.nn.images import signed


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tok.write_scene_tokenizer(folder, scene_captions.WORDS)
    tokenizer = tok.load_tokenizer(folder)
    processor = qwen_inputs.load_image_processor(folder, window_size=16)
    spec = ld.batch_spec(tokenizer, processor, 32, scene_captions.CAPTION_PROMPT, 32, multiple=16)
    return tokenizer, processor, spec, ld.RowBuilder(tokenizer, processor, spec, scene_captions.CAPTION_PROMPT)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def test_shapes_are_fixed_and_announced(parts):
    _, processor, spec, rows = parts
    assert spec == ld.BatchSpec(32, 64, 32, 32)
    batch = next(ld.make_loader(sources.SceneSource(), rows, 4))
    announced = ld.batch_shapes(spec, 4, processor)
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == announced


def test_fields_agree_with_the_source(parts):
    tokenizer, processor, spec, rows = parts
    source = sources.SceneSource(captions="full")
    batch = next(ld.make_loader(source, rows, 6, shuffle=False))
    np.testing.assert_array_equal(batch["sample_id"], range(6))
    pad = tok.token_id(tokenizer, "<|image_pad|>")
    assert ((batch["prompt_ids"] == pad).sum(1) == 16).all()
    assert (batch["prompt_mask"].sum(1) == 24).all() and not batch["prompt_ids"][:, 24:].any()
    for i in range(6):
        example = source[i]
        assert scene_checker.read_picture(batch["pixels"][i]) == example.scene
        np.testing.assert_array_equal(batch["patches"][i], processor(example.image)[0])
        ids = batch["caption_ids"][i][batch["caption_mask"][i]]
        assert tok.decode_caption(tokenizer, ids) == example.caption
        assert ids[-1] == tok.stop_ids(tokenizer)[0]


def test_long_captions_are_cut_marked_and_keep_their_end(parts):
    tokenizer, processor, _, _ = parts
    rows = ld.RowBuilder(tokenizer, processor, ld.BatchSpec(32, 64, 24, 5), "describe")
    fields = rows.caption_fields("red circle , blue square , green cross")
    assert fields["caption_truncated"] and fields["caption_mask"].all()
    assert tok.decode_caption(tokenizer, fields["caption_ids"]) == "red circle , blue"
    assert fields["caption_ids"][-1] == tok.stop_ids(tokenizer)[0]
    assert not rows.caption_fields("red circle , blue")["caption_truncated"]


def test_shapes_that_are_too_small_fail_at_once(parts):
    tokenizer, processor, _, _ = parts
    with pytest.raises(ValueError, match="64 patches, max_patches is 63"):
        ld.RowBuilder(tokenizer, processor, ld.BatchSpec(32, 63, 24, 5), "describe")
    with pytest.raises(ValueError, match="max_prompt is 23, .* needs 24 tokens; set max_prompt to 0"):
        ld.RowBuilder(tokenizer, processor, ld.BatchSpec(32, 64, 23, 5), "describe")


def test_same_global_batches_for_any_number_of_processes(parts):
    rows = parts[-1]
    source = sources.SceneSource(length=10)
    whole = take(ld.make_loader(source, rows, 8, seed=5), 4)
    for count in (2, 4):
        slices = [
            take(ld.make_loader(source, rows, 8, seed=5, process_index=p, process_count=count), 4) for p in range(count)
        ]
        for step, batch in enumerate(whole):
            joined = {k: np.concatenate([s[step][k] for s in slices]) for k in batch}
            assert_equal(joined, batch)
    np.testing.assert_array_equal(np.concatenate([b["sample_id"] for b in whole]), range(32))


@pytest.mark.parametrize("consumed", [0, 1, 5])
def test_resume_is_exact_and_the_state_is_json(parts, consumed):
    rows = parts[-1]
    source = sources.SceneSource(length=7, captions="mixed")
    first = ld.make_loader(source, rows, 3, seed=2)
    take(first, consumed)
    state = json.loads(json.dumps(first.get_state()))
    expected = take(first, 4)
    second = ld.make_loader(source, rows, 3, seed=2, reading=ld.Reading(threads=4))
    second.set_state(state)
    for ours, theirs in zip(take(second, 4), expected):
        assert_equal(ours, theirs)
    first.set_state(state)  # also one that has read ahead
    for ours, theirs in zip(take(first, 4), expected):
        assert_equal(ours, theirs)


@pytest.mark.parametrize(
    "name, workers",
    [
        ("parquet", 2),
        *(
            pytest.param(name, workers, marks=pytest.mark.slow)  # seconds for every process
            for name, workers in (("captions", 1), ("captions", 3), ("webdataset", 2), ("array_record", 2))
        ),
    ],
)
def test_worker_processes_give_the_same_batches_from_any_position(parts, tmp_path, name, workers):
    photographs.WRITERS[name][1](tmp_path, photographs.photographs())
    source = open_folder(tmp_path).source
    arguments = dict(batch_size=4, seed=2, process_index=1, process_count=2)
    expected = take(ld.make_loader(source, parts[-1], **arguments), 6)
    loader = ld.make_loader(source, parts[-1], **arguments, reading=ld.Reading(1, workers))
    loader.set_state({"next_index": 1})
    for ours, theirs in zip(take(loader, 3), expected[1:]):
        assert_equal(ours, theirs)
    assert loader.get_state() == {"next_index": 4}
    if workers == 3:
        loader.close()  # new processes go on where these were
        assert_equal(next(loader), expected[4])
    loader.close()


def test_an_error_of_a_row_is_raised_and_names_the_example(parts, tmp_path):
    photographs.write_images(tmp_path, photographs.photographs(4))
    source = open_folder(tmp_path).source
    (tmp_path / "camera.jpg").write_bytes(b"gone bad after the check")
    loader = ld.make_loader(source, parts[-1], 4, shuffle=False)
    for _ in range(2):
        with pytest.raises(ValueError, match="camera.jpg is not a readable image"):
            next(loader)
    photographs.write_images(tmp_path, photographs.photographs(4))
    assert next(loader)["sample_id"].tolist() == [0, 1, 2, 3]


def test_the_threads_are_those_of_the_setting_or_share_the_cores(monkeypatch):
    monkeypatch.setattr(ld, "cores", lambda: 12)
    assert [ld.Reading(0, workers).own_threads for workers in (0, 4, 5, 50)] == [12, 3, 2, 1]
    assert ld.Reading(7, 4).own_threads == 7
    monkeypatch.setattr(ld, "cores", lambda: 200)
    assert ld.Reading().own_threads == ld.MOST_THREADS


def test_so_many_rows_are_read_at_once_as_there_are_threads(parts):
    together = threading.Barrier(3, timeout=60)

    class Slow(sources.SceneSource):
        def __getitem__(self, index):
            together.wait()  # goes on when three rows are being read
            return super().__getitem__(index)

    loader = ld.make_loader(Slow(length=6), parts[-1], 3, shuffle=False, reading=ld.Reading(threads=3))
    assert next(loader)["sample_id"].tolist() == [0, 1, 2]
    together.abort()


def test_only_the_fields_that_are_read_are_built(parts, monkeypatch):
    rows = parts[-1]
    whole = next(ld.make_loader(sources.SceneSource(), rows, 4))
    monkeypatch.setattr(qwen_inputs.ImageProcessor, "__call__", None)
    some = ("pixels", "caption_ids", "prompt_next")
    batch = next(ld.make_loader(sources.SceneSource(), rows.only(some), 4))
    assert batch.keys() == {"sample_id", *some}
    assert_equal(batch, {name: whole[name] for name in batch})


def test_pixels_are_bytes_that_the_device_turns_into_the_numbers_of_the_host():
    values = np.arange(256, dtype=np.uint8)
    found = np.asarray(jax.jit(signed)(values))
    np.testing.assert_allclose(found, ld.to_signed(values), rtol=0, atol=2**-23)  # half of the rounding at 1
    assert found.dtype == np.float32 and found[[0, -1]].tolist() == [-1, 1]
    floats = ld.to_signed(values)
    assert signed(floats) is floats


def test_every_epoch_holds_every_example_in_another_order(parts):
    rows = parts[-1]
    source = sources.SceneSource(length=12)
    batches = take(ld.make_loader(source, rows, 12, seed=1), 2)
    images = [sorted(map(bytes, b["pixels"])) for b in batches]
    assert images[0] == images[1]
    assert (batches[0]["pixels"] != batches[1]["pixels"]).any()


def test_reading_once_in_order_ends(parts):
    rows = parts[-1]
    batches = list(ld.make_loader(sources.SceneSource(length=11), rows, 4, shuffle=False, repeat=False))
    assert np.concatenate([b["sample_id"] for b in batches]).tolist() == list(range(8))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(batch_size=5, process_count=2), "does not divide"),
        (dict(batch_size=4, process_index=2, process_count=2), "does not divide"),
        (dict(batch_size=8, repeat=False), "fewer than one batch"),
    ],
)
def test_impossible_loaders_are_refused(parts, arguments, message):
    with pytest.raises(ValueError, match=message):
        ld.make_loader(sources.SceneSource(length=6), parts[-1], **arguments)
    with pytest.raises(ValueError, match="empty"):
        ld.make_loader(sources.SceneSource(length=0), parts[-1], 2)


def test_square_image_crops_the_centre():
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 200
    np.testing.assert_array_equal(ld.square_image(wide, 10), np.full((10, 10, 3), 200, np.uint8))
    assert ld.square_image(np.zeros((1, 500, 3), np.uint8), 16).shape == (16, 16, 3)
    values = np.arange(256, dtype=np.uint8)
    assert ld.to_signed(values)[[0, -1]].tolist() == [-1, 1]
    np.testing.assert_array_equal(ld.from_signed(ld.to_signed(values)), values)


def test_a_bad_example_is_named(parts):
    bad = sources.Example(np.zeros((4, 4, 2), np.uint8), "red circle", "photo 17")
    with pytest.raises(ValueError, match="example photo 17: an image must be uint8"):
        parts[-1](0, bad)


def test_a_process_ends_after_a_reader_with_workers_is_closed(tmp_path):
    """Closed while a batch is asked of it, a reader never answered, and the interpreter waited for it."""
    (tmp_path / "rows.py").write_text(
        "import grain, numpy as np\n"
        "from uae_jax.data.loader import Batches, Reading\n"
        "class Rows:\n"
        "    __len__ = lambda self: 4096\n"
        "    __getitem__ = lambda self, index: {'x': np.zeros(100)}\n"
        "if __name__ == '__main__':\n"
        "    for _ in range(3):\n"
        "        batches = Batches(grain.MapDataset.source(Rows()), 16, Reading(2, 2))\n"
        "        next(batches), next(batches), batches.close()\n"
    )
    subprocess.run([sys.executable, tmp_path / "rows.py"], check=True, timeout=60)
