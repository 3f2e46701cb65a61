"""The same photographs in each format of a data folder, and the rows that are made of them."""

import photographs
import pytest
from photographs import WRITERS

from uae_jax.data import loader, qwen_inputs, scene_captions
from uae_jax.data import tokenizer as tok


@pytest.fixture(scope="module")
def photos():
    return photographs.photographs()


@pytest.fixture(scope="module")
def folders(photos, tmp_path_factory):
    """{writer: folder} with the same photographs in each format."""
    found = {}
    for name, (_, write) in WRITERS.items():
        found[name] = tmp_path_factory.mktemp(name) / "set"
        write(found[name], photos)
    return found


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tok.write_scene_tokenizer(folder, scene_captions.WORDS)
    tokenizer = tok.load_tokenizer(folder)
    processor = qwen_inputs.load_image_processor(folder, window_size=16)
    spec = loader.batch_spec(tokenizer, processor, 32, "describe", 32)
    return loader.RowBuilder(tokenizer, processor, spec, "describe")
