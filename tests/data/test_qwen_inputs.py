import json

import numpy as np
import pytest
from PIL import Image

from uae_jax.data import qwen_inputs as qi

PAD = 9


def noise(height, width, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def settings(patch):
    small = patch == 4
    return dict(
        patch_size=patch,
        merge_size=2,
        temporal_patch_size=2,
        min_pixels=64 if small else 3136,
        max_pixels=1024 if small else 65536,
    )


@pytest.fixture(scope="module")
def library():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return {patch: Qwen2VLImageProcessorPil(**settings(patch)) for patch in (4, 14)}


def assert_same(library, image, patch):
    ours, grid = qi.ImageProcessor(**settings(patch), window_size=8 * patch)(image)
    theirs = library[patch](images=[image], return_tensors="np")
    assert tuple(theirs["image_grid_thw"][0]) == (1, *grid)
    assert ours.shape == theirs["pixel_values"].shape and ours.dtype == np.float32
    assert np.abs(ours - theirs["pixel_values"]).max() <= 1e-6


@pytest.mark.parametrize("patch", [4, 14])
@pytest.mark.parametrize(
    "height, width",
    [(32, 32), (1, 1), (7, 13), (5, 900), (640, 4), (33, 31), (100, 57), (224, 224), (513, 300), (28, 29), (42, 14)],
)
def test_processor_equals_the_library(library, patch, height, width):
    assert_same(library, Image.fromarray(noise(height, width)), patch)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK", "transparent palette", "exif"])
def test_processor_equals_the_library_in_every_mode(library, mode, tmp_path):
    image = Image.fromarray(noise(61, 47, 4), "RGBA")
    if mode == "transparent palette":
        image = image.convert("RGB").quantize(16)
        image.info["transparency"] = 3
    elif mode == "exif":
        exif = Image.Exif()
        exif[0x0112] = 6
        image.convert("RGB").save(tmp_path / "turned.jpg", exif=exif)
        image = Image.open(tmp_path / "turned.jpg")
    elif mode != "RGBA":
        image = image.convert("RGB").convert(mode)
    assert_same(library, image, 14)


def test_arrays_and_images_agree():
    processor = qi.ImageProcessor()
    array = noise(70, 90)
    np.testing.assert_array_equal(processor(array)[0], processor(Image.fromarray(array))[0])
    gray = noise(70, 90, 1)
    np.testing.assert_array_equal(processor(gray)[0], processor(np.stack([gray] * 3, -1))[0])


@pytest.mark.parametrize(
    "image, message",
    [
        (np.zeros((1, 201, 3), np.uint8), "aspect ratio above 200"),
        (np.zeros((0, 5, 3), np.uint8), "no content"),
        (np.zeros((5, 5, 2), np.uint8), "must be uint8"),
        (np.zeros((5, 5, 3), np.float32), "must be uint8"),
    ],
)
def test_bad_images_are_refused(image, message):
    with pytest.raises(ValueError, match=message):
        qi.ImageProcessor()(image)


def test_settings_are_read_from_the_file(tmp_path):
    path = tmp_path / "preprocessor_config.json"
    with pytest.raises(FileNotFoundError, match="preprocessor_config.json"):
        qi.load_image_processor(tmp_path, 112)
    path.write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        qi.load_image_processor(tmp_path, 112)
    path.write_text(
        json.dumps(dict(patch_size=7, size=dict(shortest_edge=100, longest_edge=999), image_mean=[0, 0, 0]))
    )
    processor = qi.load_image_processor(tmp_path, 56)
    assert processor == qi.ImageProcessor(
        patch_size=7, min_pixels=100, max_pixels=999, image_mean=(0, 0, 0), window_size=56
    )
    assert hash(processor)
    path.write_text(json.dumps(dict(do_normalize=False)))
    with pytest.raises(ValueError, match="do_normalize"):
        qi.load_image_processor(tmp_path, 112)
    path.write_text(json.dumps(dict(image_processor_type="CLIPImageProcessor")))
    with pytest.raises(ValueError, match="CLIPImageProcessor"):
        qi.load_image_processor(tmp_path, 112)
    with pytest.raises(ValueError, match="window of 14"):
        qi.ImageProcessor(window_size=14)


@pytest.mark.parametrize("grids", [[(8, 8)], [(4, 6), (10, 18)], [(2, 2), (16, 34), (8, 8)]])
@pytest.mark.parametrize("window", [56, 112])
def test_layout_equals_the_library(grids, window):
    import torch
    from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

    thw = torch.tensor([(1, *grid) for grid in grids])
    positions, windows, images = qi.patch_layout(grids, 2, window, 14)
    np.testing.assert_array_equal(positions, get_vision_position_ids(thw, 2).numpy())
    np.testing.assert_array_equal(images, np.repeat(range(len(grids)), [r * c for r, c in grids]))
    index, bounds = get_vision_window_index(thw, 2, window, 14)
    bounds = torch.unique_consecutive(bounds).numpy() // 4
    theirs = {frozenset(index[a:b].tolist()) for a, b in zip(bounds, bounds[1:])}
    merged = windows.reshape(-1, 4)
    assert (merged == merged[:, :1]).all()
    ours = {frozenset(np.flatnonzero(merged[:, 0] == w).tolist()) for w in np.unique(windows)}
    assert ours == theirs


@pytest.fixture(scope="module")
def rope_model():
    from transformers import Qwen2_5_VLConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

    return Qwen2_5_VLModel(
        Qwen2_5_VLConfig(
            text_config=dict(
                vocab_size=16,
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=1,
                intermediate_size=16,
                max_position_embeddings=64,
                rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 1, 1]),
            ),
            vision_config=dict(
                depth=1,
                hidden_size=16,
                num_heads=2,
                intermediate_size=16,
                out_hidden_size=16,
                spatial_merge_size=2,
                patch_size=14,
            ),
        )
    )


@pytest.mark.parametrize("grids", [[], [(4, 4)], [(4, 10)], [(12, 2), (6, 8)], [(2, 2), (2, 2), (8, 4)]])
def test_mrope_positions_equal_the_library(rope_model, grids):
    import torch

    ids = [1, 2, 3]
    for rows, columns in grids:
        ids += [4] + [PAD] * (rows * columns // 4) + [5]
    ids += [6, 7]
    tensor = torch.tensor([ids])
    theirs, delta = rope_model.get_rope_index(
        tensor, (tensor == PAD).int(), image_grid_thw=torch.tensor([(1, *g) for g in grids]) if grids else None
    )
    positions, following = qi.mrope_positions(ids, grids, PAD, 2)
    np.testing.assert_array_equal(positions, theirs[:, 0].T.numpy())
    assert following == int(delta) + len(ids)


def test_image_tokens_must_match_the_patches():
    with pytest.raises(ValueError, match="3 image tokens but its images have 4"):
        qi.mrope_positions([1, PAD, PAD, PAD, 2], [(4, 4)], PAD, 2)
    with pytest.raises(ValueError, match="interrupted"):
        qi.mrope_positions([PAD, PAD, 1, PAD, PAD], [(4, 4)], PAD, 2)


def test_a_row_is_padded_to_the_right_and_never_cut():
    processor = qi.ImageProcessor(**settings(4), window_size=16)
    images = [processor(noise(32, 32)), processor(noise(16, 24))]
    ids = [1, *[PAD] * 16, 2, *[PAD] * 6, 3]
    row = qi.prompt_fields(ids, images, processor, PAD, max_patches=100, max_prompt=40)
    assert row["patches"].shape == (100, 96) and not row["patches"][88:].any()
    np.testing.assert_array_equal(row["patches"][:64], images[0][0])
    assert (row["patch_images"][:64] == 0).all() and (row["patch_images"][64:88] == 1).all()
    assert (row["patch_images"][88:] == -1).all() and (row["patch_windows"][88:] == -1).all()
    assert not set(row["patch_windows"][:64]) & set(row["patch_windows"][64:88])
    assert row["prompt_mask"].sum() == len(ids) and (row["prompt_ids"][: len(ids)] == ids).all()
    assert row["prompt_next"] == 1 + 4 + 1 + 3 + 1
    with pytest.raises(ValueError, match="88 patches, max_patches is 80"):
        qi.prompt_fields(ids, images, processor, PAD, 80, 40)
    with pytest.raises(ValueError, match="25 tokens, max_prompt is 20"):
        qi.prompt_fields(ids, images, processor, PAD, 100, 20)
    text = qi.prompt_fields([1, 2], [], processor, PAD, 4, 3)
    assert text["patches"].shape == (4, 96) and text["prompt_next"] == 2
