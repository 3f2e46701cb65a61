"""`convert check` and `convert export` of a Janus folder, in transformers' layout and with the official pickle."""

import json

import janus_pieces as pieces
import numpy as np
import pytest
import torch
from transformers import JanusForConditionalGeneration

from uae_jax import convert
from uae_jax.hf.safetensors import TensorFolder, write_tensors
from uae_jax.models.janus import config as configs
from uae_jax.models.janus.config import SIZES
from uae_jax.stages.folders.parts import Part, find_parts, part_config, published_settings


@pytest.fixture(scope="module")
def theirs():
    return pieces.build()


@pytest.fixture
def folder(theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "janus")
    return tmp_path / "janus"


@pytest.fixture
def official(folder, theirs):
    """The same sizes, with the weights as the official release has them."""
    (folder / "model.safetensors").unlink()
    state = pieces.official_state(theirs.state_dict())
    torch.save({name: tensor.to(torch.bfloat16) for name, tensor in state.items()}, folder / "pytorch_model.bin")
    (folder / "tokenizer.json").write_text(json.dumps(pieces.tokenizer_json()))
    return folder


def check(*arguments) -> int:
    try:
        convert.main(["check", *map(str, arguments)])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_a_whole_folder_is_known_by_its_config(folder, capsys):
    assert find_parts(folder).parts == (Part("janus", folder),)
    assert check(folder) == 0
    text = capsys.readouterr().out
    assert "282 of 282" in text and "1.2 M" in text and "float32" in text


def test_the_official_pickle_is_checked_in_the_same_way(official, capsys):
    assert check(official) == 0
    text = capsys.readouterr().out
    assert "282 of 282" in text and "bfloat16" in text


def test_what_is_wrong_is_named(folder, capsys):
    stored = TensorFolder(folder)
    tensors = {name: np.array(stored.read(name)) for name in stored.names()}
    tensors["model.surprise"] = tensors.pop("model.aligner.fc1.bias")
    tensors["lm_head.weight"][3, 4] = np.nan
    write_tensors(folder, tensors)
    assert check(folder) == 1
    text = capsys.readouterr().out
    assert "misses model.aligner.fc1.bias" in text and "has model.surprise" in text
    assert "lm_head.weight has 1 of 7,680 numbers that are NaN" in text


def test_a_tokenizer_of_another_model_is_named(official, capsys):
    (official / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}, "added_tokens": []}))
    assert check(official) == 1
    assert "tokenizer.json has no token" in capsys.readouterr().out


@pytest.mark.parametrize("layout", ["transformers", "official"])
def test_an_export_opens_in_transformers(request, theirs, layout, tmp_path):
    source = request.getfixturevalue("folder" if layout == "transformers" else "official")
    convert.main(["export", str(source), str(tmp_path / "out"), "--dtype", "float32"])
    again = JanusForConditionalGeneration.from_pretrained(tmp_path / "out")
    state = {name: tensor.float() for name, tensor in again.state_dict().items()}
    assert len(TensorFolder(tmp_path / "out").names()) == 282
    for name, tensor in theirs.state_dict().items():
        stored = tensor if layout == "transformers" else tensor.to(torch.bfloat16).float()
        assert torch.equal(state[name], stored), name
    assert not list((tmp_path / "out").glob("*.bin")) and (tmp_path / "out" / "generation_config.json").exists()
    assert configs.from_folder(tmp_path / "out") == configs.from_folder(source)


@pytest.mark.parametrize("size", SIZES)
def test_an_export_of_the_official_folder_has_the_settings_of_transformers(tmp_path, size):
    (tmp_path / "config.json").write_text(json.dumps(pieces.OFFICIAL_CONFIGS[size]))
    ids = dict(bos=100000, eos=100001, pad=100002, image=100581, begin_image=100003, end_image=100593)
    (tmp_path / "tokenizer.json").write_text(json.dumps(pieces.tokenizer_json(ids)))
    written = published_settings(Part("janus", tmp_path))
    assert written["model_type"] == "janus" and configs.from_json(written) == SIZES[size]
    assert part_config(Part("janus", tmp_path)) == SIZES[size]


def test_an_adapter_alone_is_not_exported(tmp_path):
    write_tensors(tmp_path / "adapter", {"base_model.model.layers.0.self_attn.q_proj.lora_A.weight": np.ones((2, 4))})
    with pytest.raises(SystemExit) as end:
        convert.main(["export", str(tmp_path / "adapter"), str(tmp_path / "out")])
    assert "is no model" in str(end.value.code) and not (tmp_path / "out").exists()
