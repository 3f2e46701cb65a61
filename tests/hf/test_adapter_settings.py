"""Settings of adapters and models are read by what is understood; all else that is not usual is refused by name."""

import dataclasses
import json

import numpy as np
import pytest
from peft import LoraConfig

from uae_jax.diffusion.schedule import ScheduleConfig
from uae_jax.files.json_files import read_json
from uae_jax.hf.adapter_settings import read_settings
from uae_jax.hf.safetensors import TensorFolder, write_tensors
from uae_jax.models.encoders.config import CLIPConfig, Dinov2Config
from uae_jax.models.encoders.preprocess import Preprocess, clip_preprocessor
from uae_jax.models.qwen2_5_vl import config as qwen
from uae_jax.models.sd3.config import TransformerConfig, VAEConfig
from uae_jax.stages.weights import BUILTIN


@pytest.fixture
def adapter(tmp_path):
    write_tensors(tmp_path, {"base_model.model.a.lora_A.weight": np.ones((1, 1), np.float32)}, stem="adapter_model")

    def settings(**change):
        stored = LoraConfig(target_modules=["a"]).to_dict() | {"target_modules": ["a"], **change}
        (tmp_path / "adapter_config.json").write_text(json.dumps(stored))
        return read_settings(TensorFolder(tmp_path))

    return settings


def test_all_usual_settings_of_peft_are_read(adapter):
    """Also of a later peft, whose new settings are off."""
    assert adapter(of_tomorrow=None, use_tomorrow=False, tomorrow={})["r"] == 8


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "mica", "tomorrow"])
def test_starts_that_move_the_base_weights_are_refused_with_the_remedy(adapter, start):
    with pytest.raises(ValueError, match=f"init_lora_weights='{start}'.*path_initial_model_for_weight_conversion"):
        adapter(init_lora_weights=start)


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal", "eva"])
def test_starts_of_the_factors_alone_are_read(adapter, start):
    assert adapter(init_lora_weights=start)["init_lora_weights"] == start


# settings that say which modules are adapted, where the adapter is from, or how it was trained
HARMLESS = set(
    """
    task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode r target_modules
    exclude_modules lora_alpha lora_dropout use_rslora init_lora_weights layers_to_transform layers_pattern rank_pattern
    megatron_core eva_config qalora_group_size runtime_config ensure_weight_tying
    """.split()
)


@pytest.mark.parametrize("name", sorted({field.name for field in dataclasses.fields(LoraConfig)} - HARMLESS) + ["new"])
def test_every_other_setting_of_peft_is_refused_by_name(adapter, name):
    with pytest.raises(ValueError, match=f"{name}="):
        adapter(**{name: {"a": 3}})


@pytest.mark.parametrize("alpha", [0, -1, float("nan"), float("inf"), "8", True, [8]])
def test_a_scale_that_is_no_positive_number_is_refused(adapter, alpha):
    with pytest.raises(ValueError, match="lora_alpha="):
        adapter(lora_alpha=alpha)


READERS = {
    "dit": TransformerConfig.from_folder,
    "SD3/vae": VAEConfig.from_folder,
    "SD3/scheduler": ScheduleConfig.from_folder,
    "llm": qwen.from_folder,
    "clip": CLIPConfig.from_folder,
    "dinov2": Dinov2Config.from_folder,
}


@pytest.mark.parametrize("part", READERS)
def test_settings_of_models_that_are_not_known_are_refused_by_name(tmp_path, part):
    name = "scheduler_config.json" if part.endswith("scheduler") else "config.json"
    stored = read_json(BUILTIN / part, name)
    for quiet in ({"of_tomorrow": False}, {"of_tomorrow": None}, {"_note": "x"}):
        (tmp_path / name).write_text(json.dumps(stored | quiet))
        READERS[part](tmp_path)
    (tmp_path / name).write_text(json.dumps(stored | {"of_tomorrow": 0.5}))
    with pytest.raises(ValueError, match="of_tomorrow=0.5"):
        READERS[part](tmp_path)
    (tmp_path / name).write_text("[3]")
    with pytest.raises(ValueError, match="not a JSON object"):
        READERS[part](tmp_path)


@pytest.mark.parametrize("section", ["vision_config", "rope_scaling"])
def test_sections_of_the_captioner_are_read_by_what_is_known(section):
    stored = read_json(BUILTIN / "llm")
    changed = stored | {section: stored[section] | {"mrope_interleaved": True}}
    with pytest.raises(ValueError, match="mrope_interleaved=True"):
        qwen.from_json(changed)


def test_a_layer_norm_that_is_left_out_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(read_json(BUILTIN / "dinov2") | {"apply_layernorm": False}))
    with pytest.raises(ValueError, match="apply_layernorm=False"):
        Dinov2Config.from_folder(tmp_path)


@pytest.mark.parametrize("change", [{"do_rescale": False}, {"rescale_factor": 1.0}, {"do_pad": True}, {"do_flip": 1}])
def test_steps_of_an_image_processor_that_are_not_done_are_refused(change):
    (name,) = change
    with pytest.raises(ValueError, match=f"{name}="):
        Preprocess.from_dict(clip_preprocessor(32) | change)
