"""The built-in model is made from nothing by one command; here with one step a phase and smaller parts."""

import pytest

from configs import bootstrap as config_file
from uae_jax.stages.bootstrap import scene_stream
from uae_jax.stages.bootstrap.run import bootstrap
from uae_jax.stages.weights import ModelConfig, load_system


def small_config():
    config = config_file.get_config()
    for name in (*config.phases, "mistakes"):
        config[name].steps, config[name].batch_size, config[name].optimizer.warmup_steps = 1, 2, 0
    config.vae.model.block_out_channels, config.vae.model.norm_num_groups = (4, 8), 4
    config.clip.vision.num_hidden_layers = config.clip.text.num_hidden_layers = config.dinov2.model.num_hidden_layers = 1
    config.captioner.text.layers, config.captioner.vision.depth = 1, 2
    config.captioner.vision.full_attention_blocks = (1,)
    config.decoder.model.num_layers, config.decoder.model.sample_size = 2, 16
    config.save_every = 0
    return config


@pytest.mark.slow
def test_bootstrap_makes_a_folder_that_loads_and_does_not_repeat_finished_phases(tmp_path, monkeypatch):
    folder = bootstrap(small_config(), tmp_path)
    system = load_system(ModelConfig(folder=str(folder)), image_size=32)
    assert set(system.encoders) == {"clip", "dinov2"}
    assert system.parts["pooled"].shape == (system.model.transformer.pooled_projection_dim,)
    monkeypatch.setattr(scene_stream, "stream", lambda *_: pytest.fail("a finished phase asked for data"))
    assert bootstrap(small_config(), tmp_path) == folder


def test_only_the_tiny_preset_is_known():
    with pytest.raises(ValueError, match="unknown preset 'large'"):
        config_file.get_config("large")
