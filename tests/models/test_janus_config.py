"""Janus's settings: the published files of both layouts, ids of special tokens by string, and what is refused."""

import json

import pytest
from janus_pieces import OFFICIAL_CONFIGS, tokenizer_json

from uae_jax.models.janus import config as configs
from uae_jax.models.janus.config import SIZES, JanusConfig, from_folder, special_ids, to_json

IDS = dict(bos=100000, eos=100001, pad=100002, image=100581, begin_image=100003, end_image=100593)


def write(folder, config, ids=IDS):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if ids is not None:
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(ids)))
    return folder


@pytest.mark.parametrize("size", OFFICIAL_CONFIGS)
def test_official_files_give_the_published_sizes(tmp_path, size):
    assert from_folder(write(tmp_path, OFFICIAL_CONFIGS[size])) == SIZES[size]


@pytest.mark.parametrize("size", OFFICIAL_CONFIGS)
def test_the_files_of_transformers_give_the_same_and_are_written_back(tmp_path, size):
    stored = to_json(SIZES[size])
    assert from_folder(write(tmp_path, stored, ids=None)) == SIZES[size]
    # older files have the flat rope_theta, and not the flag of tied embeddings
    stored["text_config"] |= {"rope_theta": 10000.0, "rope_scaling": None, "head_dim": 128, "mlp_bias": False}
    del stored["text_config"]["rope_parameters"], stored["tie_word_embeddings"]
    assert from_folder(write(tmp_path, stored, ids=None)) == SIZES[size]


def test_ids_are_looked_up_by_their_strings(tmp_path):
    # Janus-1.3B: the sizes of the 1B, other ids
    ids = IDS | dict(pad=100015, begin_image=100016)
    folder = write(tmp_path, OFFICIAL_CONFIGS["janus_pro_1b"], ids)
    config = from_folder(folder)
    assert special_ids(folder) == ids
    assert (config.text, config.vision, config.vq) == (JanusConfig().text, JanusConfig().vision, JanusConfig().vq)
    assert (config.pad_token_id, config.stop_token_ids, config.image_token_id) == (100015, (100001,), 100581)


@pytest.mark.parametrize("name", IDS)
def test_a_missing_token_is_named(tmp_path, name):
    ids = {other: value for other, value in IDS.items() if other != name}
    with pytest.raises(ValueError, match="tokenizer.json has no token") as stop:
        from_folder(write(tmp_path, OFFICIAL_CONFIGS["janus_pro_1b"], ids))
    assert configs.TOKENS[name] in str(stop.value)


def test_ids_of_two_models_are_refused_and_the_official_file_needs_a_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="image_token_id is 100581, and tokenizer.json has 77"):
        from_folder(write(tmp_path, to_json(JanusConfig()), IDS | {"image": 77}))
    with pytest.raises(ValueError, match="special tokens are in tokenizer.json"):
        from_folder(write(tmp_path / "official", OFFICIAL_CONFIGS["janus_pro_1b"], None))


REFUSED = [
    ("", "model_type", "qwen2_5_vl", "expected 'janus' or 'multi_modality'"),
    ("", "surprise", 3, "surprise=3"),
    ("", "image_token_id", 102400, "image_token_id"),
    ("", "image_token_id", None, "image_token_id is missing"),
    ("text_config", "model_type", "mistral", "model_type"),
    ("text_config", "hidden_act", "gelu", "hidden_act"),
    ("text_config", "attention_bias", True, "attention_bias"),
    ("text_config", "hidden_size", 2047, "hidden_size"),
    ("text_config", "hidden_size", -2048, "hidden_size"),
    ("text_config", "num_hidden_layers", "24", "num_hidden_layers"),
    ("text_config", "rope_parameters", {"rope_type": "llama3", "factor": 8}, "rope"),
    ("text_config", "head_dim", 64, "head_dim"),
    ("text_config", "rms_norm_eps", "small", "rms_norm_eps"),
    ("vision_config", "use_qk_norm", True, "use_qk_norm"),
    ("vision_config", "attention_bias", False, "attention_bias"),
    ("vision_config", "depth", 3, "depth"),
    ("vision_config", "hidden_act", "quick_gelu", "hidden_act"),
    ("vision_config", "num_image_tokens", 575, "num_image_tokens"),
    ("vision_config", "projection_dim", 1024, "projection_dim"),
    ("vision_config", "patch_size", 24, "vision_config reads"),
    ("vq_config", "double_latent", True, "double_latent"),
    ("vq_config", "channel_multiplier", [1, 2], "both must agree"),
    ("vq_config", "base_channels", 100, "multiple of 32"),
    ("vq_config", "num_patches", 32, "num_patches"),
    ("vq_config", "image_token_embed_dim", 8, "image_token_embed_dim"),
    ("vq_config", "num_embeddings", 1e9, "num_embeddings"),
]


@pytest.mark.parametrize("section, field, value, message", REFUSED, ids=lambda value: str(value)[:20])
def test_unsupported_settings_are_named(tmp_path, section, field, value, message):
    stored = to_json(JanusConfig())
    (stored[section] if section else stored)[field] = value
    if field == "num_image_tokens":
        value = stored[section]
    with pytest.raises(ValueError, match=message) as stop:
        from_folder(write(tmp_path, stored, ids=None))
    assert str(tmp_path) in str(stop.value)


@pytest.mark.parametrize(
    "section, field, value",
    [
        ("vision_config", "select_layer", -2),
        ("vision_config", "model_name", "siglip_so400m_patch14_384"),
        ("aligner_config", "depth", 3),
        ("gen_aligner_config", "projector_type", "linear"),
        ("gen_head_config", "image_token_size", 8192),
        ("gen_vision_config", "n_embed", 16),
    ],
)
def test_other_parts_of_the_official_file_are_named(tmp_path, section, field, value):
    stored = json.loads(json.dumps(OFFICIAL_CONFIGS["janus_pro_1b"]))
    stored[section]["params"][field] = value
    with pytest.raises(ValueError, match="is .*; only|is .*, and the rest"):
        from_folder(write(tmp_path, stored))


def test_precision_recomputation_and_scale_are_set_and_checked():
    config = JanusConfig().using(dtype="bfloat16", remat="full", lora_alpha=32)
    assert (config.text.dtype, config.text.remat, config.text.lora_alpha) == ("bfloat16", "full", 32.0)
    assert hash(config) != hash(JanusConfig()) and config.vq == JanusConfig().vq
    with pytest.raises(ValueError, match="dtype"):
        config.using(dtype="float16")
