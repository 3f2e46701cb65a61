"""Folders as transformers 5 writes them, and the tied head of an older one."""

import json
import shutil

import numpy as np
import pytest

from uae_jax.data.qwen_inputs import load_image_processor
from uae_jax.data.tokenizer import caption_prompt_ids, load_tokenizer
from uae_jax.files.json_files import read_json
from uae_jax.hf.safetensors import TensorFolder, write_tensors
from uae_jax.models.encoders.preprocess import Preprocess
from uae_jax.models.qwen2_5_vl import config as configs
from uae_jax.models.qwen2_5_vl import weights
from uae_jax.stages.folders.assemble import _bound_images
from uae_jax.stages.folders.check import check_folder
from uae_jax.stages.folders.parts import find_parts
from uae_jax.stages.weights import BUILTIN

PROCESSOR = BUILTIN / "llm_processor"


@pytest.fixture
def newer(tmp_path):
    """Tokenizer, template and processor in the files of transformers 5, and nothing else."""
    settings = read_json(PROCESSOR, "preprocessor_config.json")
    (tmp_path / "processor_config.json").write_text(
        json.dumps({"image_processor": settings, "processor_class": "Qwen2_5_VLProcessor"})
    )
    shutil.copy(PROCESSOR / "tokenizer.json", tmp_path)
    (tmp_path / "chat_template.jinja").write_text(read_json(PROCESSOR, "tokenizer_config.json")["chat_template"])
    return tmp_path


def test_the_nested_image_processor_is_read(newer):
    assert load_image_processor(newer, 16) == load_image_processor(PROCESSOR, 16)
    (newer / "processor_config.json").write_text(
        json.dumps({"image_processor": read_json(BUILTIN / "clip", "preprocessor_config.json")})
    )
    assert Preprocess.from_folder(newer) == Preprocess.from_folder(BUILTIN / "clip")


def test_the_tokenizer_and_its_template_are_read_without_other_files(newer):
    ours, usual = load_tokenizer(newer), load_tokenizer(PROCESSOR)
    assert caption_prompt_ids(ours, "red circle", [3]) == caption_prompt_ids(usual, "red circle", [3])
    (newer / "chat_template.jinja").rename(newer / "other")
    content = read_json(newer, "processor_config.json") | {"chat_template": usual.chat_template}
    (newer / "processor_config.json").write_text(json.dumps(content))
    assert load_tokenizer(newer).chat_template == usual.chat_template


def test_the_bound_of_images_is_lowered_in_the_nested_settings(newer, tmp_path):
    fresh = tmp_path / "fresh"
    shutil.copytree(newer, fresh / "llm_processor", ignore=lambda *_: ["fresh"])
    path = fresh / "llm_processor" / "processor_config.json"
    stored = json.loads(path.read_text())
    stored["image_processor"] |= {"max_pixels": 10**6}
    path.write_text(json.dumps(stored))
    assert "lowered from 1000000" in _bound_images(fresh)[0]
    assert load_image_processor(fresh / "llm_processor", 16).max_pixels == 65536


@pytest.fixture
def captioner(tmp_path):
    return shutil.copytree(BUILTIN / "llm", tmp_path / "llm")


def change(folder, head=None, inner=None, **outer):
    stored = read_json(folder) | outer
    if inner is not None:
        text = {name: value for name, value in stored.items() if name in configs._IN_TEXT}
        stored["text_config"] = text | {"tie_word_embeddings": inner}
    (folder / "config.json").write_text(json.dumps(stored))
    if head is not None:
        source = TensorFolder(folder)
        tensors = {name: np.array(source.read(name)) for name in source.names()}
        write_tensors(folder, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + np.float32(head)})


def problems(folder):
    return [problem for row in check_folder(find_parts(folder)) for problem in row.problems]


def test_the_outer_flag_of_the_tied_head_wins(captioner):
    change(captioner, head=1, inner=True, tie_word_embeddings=False)
    config, params = weights.load(captioner)
    assert not config.text.tied and problems(captioner) == []
    kernel, table = params["language"]["head"]["kernel"], params["language"]["embedding"]["table"]
    np.testing.assert_array_equal(kernel.T, table + np.float32(1))


@pytest.mark.parametrize(
    "read", [weights.load, lambda folder: weights.load_language(folder, configs.from_folder(folder))]
)
def test_a_head_that_would_be_ignored_is_an_error(captioner, read):
    change(captioner, head=1, tie_word_embeddings=True)
    message = "lm_head.weight with other numbers than model.embed_tokens.weight, but tie_word_embeddings is true"
    with pytest.raises(ValueError, match=message):
        read(captioner)
    assert message in problems(captioner)[0]


def test_a_copy_of_the_table_as_head_is_no_error(captioner):
    change(captioner, head=0, tie_word_embeddings=True)
    assert weights.load(captioner)[0].text.tied and problems(captioner) == []
