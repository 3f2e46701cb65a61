"""Every form of the captioner's `config.json` that a transformers version writes gives one description."""

import copy
import json

import pytest
from transformers import Qwen2_5_VLConfig

from uae_jax.models.qwen2_5_vl import config as configs

TEXT = dict(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    rms_norm_eps=1e-6,
    rope_theta=5e5,
    hidden_act="silu",
    use_sliding_window=False,
    max_position_embeddings=128,
    bos_token_id=283,
    eos_token_id=285,
)
VISION = dict(
    depth=2,
    hidden_size=32,
    hidden_act="silu",
    intermediate_size=48,
    num_heads=2,
    out_hidden_size=32,
    patch_size=4,
    spatial_merge_size=2,
    temporal_patch_size=2,
    window_size=16,
    fullatt_block_indexes=[1],
)
TOKENS = dict(
    model_type="qwen2_5_vl", image_token_id=290, video_token_id=291, vision_start_token_id=286, vision_end_token_id=287
)
SECTION = dict(mrope_section=[1, 1, 2])
RENAMED = dict(SECTION, type="default", rope_type="default")  # what 4.48 and newer make of "mrope" on reading


def published(tied: bool) -> dict:
    """The hub's form: flat, `mrope`, old name of the channels."""
    return dict(
        TEXT,
        **TOKENS,
        tie_word_embeddings=tied,
        rope_scaling=dict(SECTION, type="mrope"),
        vision_config=dict(VISION, in_chans=3, spatial_patch_size=4, tokens_per_second=2),
    )


def saved_by_4_50(tied: bool) -> dict:
    """Flat; the rope type renamed."""
    return dict(
        published(tied),
        rope_scaling=RENAMED,
        transformers_version="4.50.0",
        torch_dtype="bfloat16",
        vision_config=dict(VISION, in_channels=3, in_chans=3, model_type="qwen2_5_vl", tokens_per_second=2),
    )


def saved_by_4_52(tied: bool) -> dict:
    """Flat and nested at once; a tied head is said in the text's part only, an untied one outside only."""
    text = dict(TEXT, model_type="qwen2_5_vl_text", rope_scaling=RENAMED, image_token_id=None, video_token_id=None)
    data = dict(
        TEXT,
        **TOKENS,
        rope_scaling=RENAMED,
        text_config=text,
        transformers_version="4.52.4",
        vision_config=dict(VISION, in_channels=3, model_type="qwen2_5_vl", initializer_range=0.02),
    )
    (text if tied else data)["tie_word_embeddings"] = tied
    return data


def saved_by_4_57(tied: bool) -> dict:
    """As 4.52, with the kind of each layer."""
    data = copy.deepcopy(saved_by_4_52(tied))
    data["text_config"] |= dict(layer_types=["full_attention"] * 2, sliding_window=None)
    return data | dict(transformers_version="4.57.1", dtype="bfloat16")


def nested_only(tied: bool) -> dict:
    """`text_config` with `rope_scaling`, nothing flat."""
    data = {name: value for name, value in saved_by_4_52(tied).items() if name not in TEXT and name != "rope_scaling"}
    return data | dict(tie_word_embeddings=tied)


def saved_by_5(tied: bool) -> dict:
    """Nested, `rope_parameters` with its base."""
    text = {name: value for name, value in TEXT.items() if name != "rope_theta"}
    rope = dict(SECTION, rope_type="default", type="mrope", rope_theta=5e5)
    vision = dict(
        VISION, in_channels=3, model_type="qwen2_5_vl_vision", rope_parameters=dict(rope_type="axial", rope_theta=1e4)
    )
    return dict(
        TOKENS,
        text_config=dict(
            text,
            model_type="qwen2_5_vl_text",
            rope_parameters=rope,
            pad_token_id=None,
            layer_types=["full_attention"] * 2,
        ),
        vision_config=vision,
        tie_word_embeddings=tied,
    )


FORMS = (published, saved_by_4_50, saved_by_4_52, saved_by_4_57, nested_only, saved_by_5)


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def tied(request):
    return request.param


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_one_description(form, tied):
    found = configs.from_json(form(tied))
    assert found == configs.from_json(published(tied))
    assert found.text.tied == tied and found.text.mrope_section == (1, 1, 2) and found.text.rope_theta == 5e5
    assert found.text.norm_epsilon == 1e-6 and found.vision.channels == 3 and found.stop_token_ids == (285,)


@pytest.mark.parametrize("form", FORMS)
def test_transformers_of_today_reads_each_form_alike(form, tied, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(form(tied)))
    theirs, ours = Qwen2_5_VLConfig.from_pretrained(tmp_path), configs.from_folder(tmp_path)
    assert theirs.tie_word_embeddings == ours.text.tied
    assert tuple(theirs.text_config.rope_parameters["mrope_section"]) == ours.text.mrope_section
    assert theirs.text_config.rope_parameters["rope_theta"] == ours.text.rope_theta
    assert theirs.text_config.rms_norm_eps == ours.text.norm_epsilon
    assert theirs.vision_config.window_size == ours.vision.window_size
    theirs.save_pretrained(tmp_path / "again")
    assert configs.from_folder(tmp_path / "again") == ours


@pytest.mark.parametrize("form", FORMS)
def test_settings_that_a_file_leaves_out_are_those_of_transformers(form, tied, tmp_path):
    data = form(tied)
    for part in (data, data.get("text_config", {})):
        for name in ("rms_norm_eps", "rope_theta", "tie_word_embeddings"):
            part.pop(name, None)
        (part.get("rope_parameters") or {}).pop("rope_theta", None)
    (tmp_path / "config.json").write_text(json.dumps(data))
    theirs, ours = Qwen2_5_VLConfig.from_pretrained(tmp_path), configs.from_folder(tmp_path)
    assert ours.text.norm_epsilon == theirs.text_config.rms_norm_eps
    assert ours.text.rope_theta == theirs.text_config.rope_parameters["rope_theta"]
    assert ours.text.tied == theirs.tie_word_embeddings


@pytest.mark.parametrize("form", FORMS)
def test_another_kind_of_rotation_is_refused_in_every_form(form):
    data = form(True)
    for part in (data, data.get("text_config", {})):
        for name in ("rope_scaling", "rope_parameters"):
            if name in part:
                part[name] = dict(part[name], type="yarn", rope_type="yarn", factor=2.0)
    with pytest.raises(ValueError, match="rope_type is 'yarn'"):
        configs.from_json(data)
