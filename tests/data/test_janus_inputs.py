"""Janus's prompts and images: ids as transformers' processor makes them, spaces that survive, one crop."""

import io
import json

import janus_pieces as pieces
import numpy as np
import pytest
from PIL import Image
from transformers import JanusImageProcessorPil, JanusProcessor, PreTrainedTokenizerFast

from uae_jax.data.images import square_image
from uae_jax.data.janus_inputs import (
    SYSTEM,
    JanusTokenizer,
    check_image_settings,
    padded_ids,
    padded_square,
    question_fields,
    signed,
)
from uae_jax.models.janus.config import TOKENS, special_ids

CELLS, QUESTION = 16, "What is in the picture?\nSay it  briefly."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("tokenizer")
    pieces.write_tokenizer(place)
    return place


@pytest.fixture(scope="module")
def tokenizer(folder):
    return JanusTokenizer(folder, special_ids(folder), CELLS)


@pytest.fixture(scope="module")
def processor(folder):
    """That of transformers, on the same file."""
    inner = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        bos_token=TOKENS["bos"],
        pad_token=TOKENS["pad"],
        extra_special_tokens=dict(
            image_token=TOKENS["image"], boi_token=TOKENS["begin_image"], eoi_token=TOKENS["end_image"]
        ),
    )
    images = JanusImageProcessorPil(size=dict(height=32, width=32), image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return JanusProcessor(images, inner, use_default_system_prompt=True, num_image_tokens=CELLS)


def test_a_question_is_that_of_transformers_after_the_first_token(tokenizer, processor):
    text = f"<|User|>: {TOKENS['image']}\n{QUESTION}\n\n<|Assistant|>:"
    theirs = processor(text=[text], images=[Image.new("RGB", (32, 32))])["input_ids"][0]
    ours = tokenizer.question_ids(QUESTION)
    assert ours == [tokenizer.ids["bos"], *map(int, theirs)]
    assert ours.count(tokenizer.ids["image"]) == CELLS
    at = ours.index(tokenizer.ids["begin_image"])
    assert ours[at + CELLS + 1] == tokenizer.ids["end_image"]


def test_a_drawing_prompt_is_that_of_transformers_without_a_system_turn(tokenizer, processor):
    theirs = processor(text=["<|User|>: a red  cat\n\n<|Assistant|>:"], generation_mode="image")["input_ids"][0]
    ours = tokenizer.drawing_ids("  a red  cat ")
    assert ours == [tokenizer.ids["bos"], *map(int, theirs)] and ours[-1] == tokenizer.ids["begin_image"]


@pytest.mark.trap(52)
@pytest.mark.parametrize("text", ["a red cat", "Two  spaces, 3 dogs.\nAnd a line", "größer als 日本 🙂", "x"])
def test_captions_survive_decoding_and_encoding(tokenizer, text):
    ids = tokenizer.encode_caption(text)
    assert ids[-1] == tokenizer.ids["eos"]
    said = tokenizer.decode_caption([*ids, 7, 8])  # nothing after the end counts
    assert said == text and tokenizer.encode_caption(said) == ids
    before, after = tokenizer.drawing_template()
    assert [*before, *ids[:-1], *after] == tokenizer.drawing_ids(text)


def test_names_of_control_tokens_in_texts_are_text_unless_they_are_meant(tokenizer, folder):
    text = f"a sign that says {TOKENS['eos']}<|User|>"
    ids = tokenizer.drawing_ids(text)
    assert tokenizer.ids["eos"] not in ids
    assert tokenizer.decode_caption(ids[1:-1]).count(TOKENS["eos"]) == 1
    meant = JanusTokenizer(folder, special_ids(folder), CELLS, control_tokens=True)
    assert tokenizer.ids["eos"] in meant.drawing_ids(text)
    assert tokenizer.question_ids(f"what is {TOKENS['image']}?").count(tokenizer.ids["image"]) == CELLS
    with pytest.raises(ValueError, match="must not contain <image_placeholder>"):
        meant.question_ids(f"what is {TOKENS['image']}?")


def test_bad_texts_and_files_are_named(tokenizer, folder, tmp_path):
    with pytest.raises(ValueError, match="half of a character"):
        tokenizer.drawing_ids("a \ud83d cat")
    with pytest.raises(FileNotFoundError, match="tokenizer.json does not exist"):
        JanusTokenizer(tmp_path, {}, CELLS)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json cannot be read"):
        JanusTokenizer(tmp_path, {}, CELLS)


@pytest.mark.trap(44)
def test_prompts_are_padded_on_the_right_and_the_first_token_stays(tokenizer):
    ids = tokenizer.drawing_ids("a cat")
    fields = padded_ids(ids, 40)
    assert fields["prompt_ids"][: len(ids)].tolist() == ids and fields["prompt_mask"].sum() == len(ids)
    assert fields["prompt_ids"][0] == tokenizer.ids["bos"] and fields["prompt_mask"][0]
    with pytest.raises(ValueError, match="there is room for 3"):
        padded_ids(ids, 3)


def picture(width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("size", [(64, 64), (32, 32), (64, 32), (16, 64), (640, 10)])
def test_images_are_those_of_transformers_where_no_side_is_rounded(processor, size):
    theirs = processor.image_processor([picture(*size)])["pixel_values"][0].transpose(1, 2, 0)
    ours = padded_square(picture(*size), 32)
    assert ours.shape == (32, 32, 3) and ours.dtype == np.float32
    assert np.abs(ours - theirs).max() <= 2 / 255 + 1e-6  # both round to 8 bits in other steps


def test_the_shorter_side_is_rounded_down_and_centred_on_grey():
    ours = padded_square(Image.new("RGB", (100, 61), "white"), 32)  # 19.52 rows, of which transformers makes 20
    rows = (ours == 1).all((1, 2))
    assert rows.sum() == 19 and rows[6:25].all()
    np.testing.assert_allclose(ours[~rows], 127 / 127.5 - 1, atol=1e-6)
    thin = padded_square(Image.new("RGB", (1000, 10), "white"), 32)
    assert (thin == 1).all((1, 2)).sum() == 14


def test_settings_of_other_images_are_refused(processor, tmp_path):
    check_image_settings(tmp_path, 32)
    processor.image_processor.save_pretrained(tmp_path)
    check_image_settings(tmp_path, 32)  # as transformers writes it
    official = dict(
        background_color=[127] * 3,
        do_normalize=True,
        image_mean=[0.5] * 3,
        image_processor_type="VLMImageProcessor",
        image_size=32,
        image_std=[0.5] * 3,
        min_size=14,
        processor_class="VLChatProcessor",
        rescale_factor=1 / 255,
    )
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(official))
    check_image_settings(tmp_path, 32)
    for change in ({"image_size": 384}, {"image_mean": [0.48, 0.46, 0.41]}, {"do_normalize": False}, {"crop": 3}):
        file.write_text(json.dumps(official | change))
        with pytest.raises(ValueError, match=f"preprocessor_config.json: {next(iter(change))}="):
            check_image_settings(tmp_path, 32)


@pytest.mark.trap(56)
def test_a_square_crop_is_seen_as_it_is_drawn():
    """The captioner's picture and the target of the drawing are one crop where the source is cropped first."""
    crop = square_image(picture(100, 61), 32)
    np.testing.assert_array_equal(padded_square(crop, 32), signed(crop))
    assert np.abs(padded_square(picture(100, 61), 32) - signed(crop)).max() > 0.1  # uncropped, it would be another one


def test_fields_of_a_question_are_the_models_inputs(tokenizer):
    buffer = io.BytesIO()
    picture(50, 40).save(buffer, "PNG")
    fields = question_fields(tokenizer, Image.open(buffer), 32, QUESTION, SYSTEM, 256)
    assert {name: value.shape for name, value in fields.items()} == {
        "prompt_ids": (256,),
        "prompt_mask": (256,),
        "pixels": (32, 32, 3),
    }
    assert (
        len(tokenizer) > 300 and tokenizer.question_ids(QUESTION, system="")[1] != tokenizer.question_ids(QUESTION)[1]
    )
