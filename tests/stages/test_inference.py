"""The engine: few compiled programs for pictures of many sizes, and results that do not depend on batch or padding."""

import numpy as np
import pytest

from uae_jax.data import scenes
from uae_jax.stages import inference
from uae_jax.stages.inference import Inference, InferenceConfig, Row, batches, image_room
from uae_jax.stages.weights import ModelConfig

SETTINGS = dict(size=16, steps=2, guidance_scale=1.0, temperature=0.7, top_p=0.9, max_new_tokens=8, prompt="describe")
SIZES = ((32, 32), (16, 16), (24, 32), (8, 24), (64, 64), (8, 32), (16, 24))


@pytest.fixture(scope="module")
def pictures():
    """Pictures of 2 to 16 image tokens; the processor's largest has 16."""
    large = [scenes.draw(scenes.scene_at("test", index), 64) for index in range(len(SIZES))]
    return [picture[:height, :width] for picture, (height, width) in zip(large, SIZES)]


def loaded(model_folder, **changes):
    return Inference(ModelConfig(folder=str(model_folder)), InferenceConfig(**SETTINGS | changes))


@pytest.fixture(scope="module")
def engine(model_folder):
    return loaded(model_folder, batch_size=2)


def rows(engine, pictures):
    return [Row(index, index, engine.image_fields(picture)) for index, picture in enumerate(pictures)]


def captions(engine, pictures):
    return {row.index: caption for row, caption in engine.captions(rows(engine, pictures))}


def test_rooms_are_few_and_large_enough():
    assert {image_room(tokens, 83) for tokens in range(1, 84)} == {83, 42, 21, 11}
    assert all(tokens <= image_room(tokens, 83) for tokens in range(1, 400))
    assert image_room(84, 83) == 166 and image_room(42, 83) == 42 and image_room(43, 83) == 83
    assert {image_room(tokens, 1) for tokens in (1, 2, 3)} == {1, 2, 4}


def test_batches_are_filled_by_kind_and_end_with_what_is_left():
    listed = [Row(index, index, {}) for index in range(7)]
    found = [[row.index for row in group] for group in batches(listed, 2, lambda row: row.index % 3)]
    assert found == [[0, 3], [1, 4], [2, 5], [6]]


def test_batches_are_given_before_the_rest_is_read():
    read = []

    def reader():
        for index in range(4):
            read.append(index)
            yield Row(index, index, {})

    assert next(batches(reader(), 2, lambda row: 0))[-1].index == 1 and read == [0, 1]


def test_mixed_sizes_compile_one_program_a_room_and_padding_changes_no_caption(
    engine, model_folder, pictures, monkeypatch
):
    said = captions(engine, pictures)
    assert len(set(said.values())) > 4  # pictures and keys matter
    rooms = {len(row.fields["patches"]) for row in rows(engine, pictures)}
    assert engine._write._cache_size() == len(rooms) == 3
    assert [list(captions(engine, pictures[:count])) for count in (1, 3)] == [[0], [0, 2, 1]]
    assert engine._write._cache_size() == 3
    monkeypatch.setattr(inference, "image_room", lambda tokens, largest: 40)
    assert captions(loaded(model_folder, batch_size=len(pictures)), pictures) == said  # another room, another batch


def test_a_strip_has_a_room_of_its_own(engine):
    fields = engine.image_fields(np.zeros((8, 200, 3), np.uint8))
    tokens = (fields["patch_images"] >= 0).sum() // 4
    assert engine.largest == 16 < tokens and len(fields["patches"]) == 4 * image_room(tokens, 16)


def test_reconstructions_come_batch_by_batch(engine, pictures):
    """What is drawn of the first batch is there before the third picture is read."""
    read = []

    def reader():
        for row in rows(engine, pictures[:1] * 5):
            read.append(row.index)
            yield row

    results = engine.reconstructions(reader())
    row, caption, drawn = next(results)
    assert row.index == 0 and read == [0, 1] and drawn.shape == (16, 16, 3) and drawn.dtype == np.uint8
    rest = list(results)
    assert [row.index for row, _, _ in rest] == [1, 2, 3, 4]
    alone = {
        row.index: drawn
        for row, drawn in engine.drawings(Row(4, 4, engine.text_fields(said)) for row, said, _ in rest[-1:])
    }
    np.testing.assert_array_equal(alone[4], rest[-1][2])
