"""The built-in unified model from nothing, in two steps a phase: a run, `infer` and transformers open its folder."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import JanusForConditionalGeneration

import uae_jax
from configs import bootstrap as config_file
from uae_jax.methods.method import build_step, start_of
from uae_jax.models.janus import vq as tokens
from uae_jax.models.janus.config import VQConfig
from uae_jax.stages import kinds
from uae_jax.stages.bootstrap import scene_stream, vq
from uae_jax.stages.bootstrap.run import bootstrap
from uae_jax.stages.weights import ModelConfig
from uae_jax.training.metrics import read_lines
from uae_jax.training.optimizer import OptimizerConfig, make_optimizer


def small_config():
    config = config_file.get_config("unified")
    for name in config.phases:
        config[name].steps, config[name].batch_size, config[name].optimizer.warmup_steps = 2, 2, 0
    config.vq.model.update(dict(codes=16, latent=32, multipliers=(1, 1, 1, 1)))
    config.network.text.update(dict(width=32, layers=1, heads=2, key_heads=2, mlp_width=32, mrope_section=(8, 0, 0)))
    config.network.vision.update(dict(hidden_size=24, intermediate_size=24, num_hidden_layers=1))
    config.save_every = 0
    return config


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("bootstrap")
    return bootstrap(small_config().to_dict(), workdir), workdir


@pytest.mark.slow
def test_both_phases_are_trained_once(made, monkeypatch):
    folder, workdir = made
    stages = [line["stage"] for line in read_lines(workdir / "metrics.jsonl")]
    assert list(dict.fromkeys(stages)) == ["bootstrap_vq", "bootstrap_network"]
    monkeypatch.setattr(scene_stream, "stream", lambda *_: pytest.fail("a finished phase asked for data"))
    assert bootstrap(small_config().to_dict(), workdir) == folder


@pytest.mark.slow
def test_the_folder_is_one_network_with_its_encoders(made):
    folder, _ = made
    assert {path.name for path in folder.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json", "clip"}
    assert not (folder / "llm").exists()
    system = kinds.load_system(ModelConfig(folder=str(folder)), image_size=32)
    assert set(system.encoders) == {"clip", "dinov2"} and kinds.kind_of(folder) is kinds.UNIFIED
    assert "small" not in system.tokenizer.unknown(["small zebra"]) and "zebra" in system.tokenizer.unknown(["zebra"])
    prompt, caption = system.tokenizer.drawing_template(), system.tokenizer.encode_caption("small red circle")
    assert [*prompt[0], *caption[:-1], *prompt[1]] == system.tokenizer.drawing_ids("small red circle")
    model = uae_jax.load(folder, system_prompt="describe", prompt="describe", max_new_tokens=4)
    assert model.generate(["small red circle"])[0].size == (32, 32)
    theirs = JanusForConditionalGeneration.from_pretrained(folder)
    assert sum(p.numel() for p in theirs.parameters()) > 0


def test_phases_of_two_models_are_refused(tmp_path):
    config = small_config()
    config.phases = ("vae", "network")
    with pytest.raises(ValueError, match="make a model of their own"):
        bootstrap(config.to_dict(), tmp_path)


@pytest.mark.slow
def test_the_loss_of_a_tokenizer_reaches_every_part_of_it():
    sizes = VQConfig(codes=8, latent=32, base=32, multipliers=(1, 1), layers=1, grid=2)
    params, images = tokens.init_params(sizes, jax.random.key(0)), jnp.asarray(_images(2, 4))
    loss = vq.algorithm(sizes).loss
    gradients = jax.jit(jax.grad(lambda p: loss(p, {}, {"samples": {"pixels": images}}, None)[0]))(params)
    for name in ("encoder", "quant", "codebook", "post_quant", "decoder"):
        assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradients[name])) > 0, name


def _images(count: int, side: int) -> np.ndarray:
    """Images of blocks of two pixels, black or white in each channel."""
    small = np.random.default_rng(0).choice([-0.8, 0.8], (count, side // 2, side // 2, 3))
    return small.repeat(2, 1).repeat(2, 2).astype(np.float32)


@pytest.mark.slow
def test_a_tokenizer_learns_to_rebuild_images_with_many_codes():
    sizes = VQConfig(codes=16, latent=32, base=32, multipliers=(1, 1), layers=1, grid=4)
    learner, optimizer = vq.algorithm(sizes), make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=0), 60)
    images = jnp.asarray(_images(16, 8))
    state = start_of(tokens.init_params(sizes, jax.random.key(0)), optimizer, learner.settings)
    step, seen = build_step(learner, optimizer), []
    for _ in range(60):
        state, metrics = step(state, {}, {"pixels": images}, jax.random.key(1))
        seen.append({name: float(value) for name, value in metrics.items()})
    assert seen[-1]["squared_error"] < 0.7 * seen[0]["squared_error"]
    assert seen[-1]["perplexity"] > 5
    again = tokens.decode(sizes, state.params, tokens.encode(sizes, state.params, images))
    assert float(jnp.mean(jnp.square(again - images))) == pytest.approx(seen[-1]["squared_error"], rel=0.3)
