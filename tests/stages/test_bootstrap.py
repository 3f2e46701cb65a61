"""The built-in model is made from nothing by one command; here with one step a phase and smaller parts."""

import json

import emoji_pieces
import jax
import numpy as np
import pytest

from configs import bootstrap as config_file
from configs import presets
from uae_jax.data import scene_checker, scenes
from uae_jax.data.tokenizer import decode_caption, load_tokenizer, write_scene_tokenizer
from uae_jax.hf.safetensors import TensorFolder
from uae_jax.settings import as_dict
from uae_jax.stages.bootstrap import decoder, scene_stream
from uae_jax.stages.bootstrap import run as bootstrap_run
from uae_jax.stages.bootstrap.run import bootstrap
from uae_jax.stages.run import run
from uae_jax.stages.weights import BUILTIN, ModelConfig, load_system
from uae_jax.training.optimizer import OptimizerConfig
from uae_jax.training.step import TrainState


def small_config(preset="tiny"):
    config = config_file.get_config(preset)
    for name in (*config.phases, "mistakes"):
        config[name].steps, config[name].batch_size, config[name].optimizer.warmup_steps = 1, 2, 0
    config.vae.model.block_out_channels, config.vae.model.norm_num_groups = (4, 8), 4
    config.clip.vision.num_hidden_layers = config.clip.text.num_hidden_layers = (
        config.dinov2.model.num_hidden_layers
    ) = 1
    config.captioner.text.layers, config.captioner.vision.depth = 1, 2
    config.captioner.vision.full_attention_blocks = (1,)
    config.decoder.model.num_layers, config.decoder.model.sample_size = 2, config.side // 2
    config.save_every = 0
    return config


@pytest.mark.slow
def test_bootstrap_makes_a_folder_that_loads_and_does_not_repeat_finished_phases(tmp_path, monkeypatch):
    folder = bootstrap(small_config().to_dict(), tmp_path)
    system = load_system(ModelConfig(folder=str(folder)), image_size=32)
    assert set(system.encoders) == {"clip", "dinov2"}
    assert system.parts["pooled"].shape == (system.model.transformer.pooled_projection_dim,)
    monkeypatch.setattr(scene_stream, "stream", lambda *_: pytest.fail("a finished phase asked for data"))
    assert bootstrap(small_config().to_dict(), tmp_path) == folder


@pytest.mark.slow
def test_bootstrap_learns_from_emoji(tmp_path, monkeypatch):
    config = small_config("emoji")
    config.data.folder = str(emoji_pieces.write_emoji(tmp_path / "emoji", monkeypatch))
    folder = bootstrap(config, tmp_path / "run")
    system = load_system(ModelConfig(folder=str(folder)), image_size=64)
    assert "dog" in system.tokenizer.get_vocab() and "octopus" not in system.tokenizer.get_vocab()
    assert system.tokenizer("red apple")["input_ids"] == [
        system.tokenizer.get_vocab()[word] for word in ("red", "apple")
    ]
    values = presets.preset("emoji", ("pretrain",)).to_dict()
    values["model"]["folder"], values["data"]["folder"] = str(folder), config.data.folder
    values["evaluation"] |= dict(images=2, batch_size=2, sampler_steps=2, samples=1)
    values["pretrain"] |= dict(steps=1, batch_size=8, optimizer=as_dict(OptimizerConfig(learning_rate=1e-4)))
    after = run(values, tmp_path / "emoji_run")["stages"][0]["after"]
    assert after["fact_recall"]["n"] == after["scene_accuracy"]["n"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("name, part", [("captioner", "llm"), ("vae", "SD3/vae")])
def test_a_part_alone_is_made_beside_copies_of_the_others(tmp_path, name, part):
    config = small_config()
    config.start, config.phases = "builtin", (name,)
    if name == "captioner":  # its embeddings go into the projector that is kept
        config.captioner.text.width = config.captioner.vision.out_width = 128
    model = bootstrap(config, tmp_path)
    steps = [json.loads(line)["stage"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [f"bootstrap_{name}"]
    copied = {path.relative_to(BUILTIN) for path in BUILTIN.rglob("*") if path.is_file()}
    same = {path for path in copied if part not in path.as_posix() and path.parts[0] != "llm_processor"}
    assert all((model / path).read_bytes() == (BUILTIN / path).read_bytes() for path in same)
    made, builtin = TensorFolder(model / part), TensorFolder(BUILTIN / part)
    assert made.names() != builtin.names()  # smaller than the built-in one
    if name == "captioner":
        for tensor in ("projector.0.weight", "projector.2.bias"):
            np.testing.assert_array_equal(made.read(tensor), builtin.read(tensor))
    assert bootstrap(config, tmp_path) == model


@pytest.mark.slow
@pytest.mark.parametrize("preset, side", [("tiny", 32), ("emoji", 64)])
def test_the_parts_of_a_preset_fit_together(preset, side, tmp_path, monkeypatch):
    """Every phase at its own size, its loss traced on a batch and not computed; what the phases write is a whole
    model.
    """
    config = config_file.get_config(preset)
    config.phases = (*config.phases, "caption_scorer")
    for name in (*config.phases, "mistakes"):
        config[name].batch_size = 2
    if preset == "emoji":
        config.data.folder = str(emoji_pieces.write_emoji(tmp_path / "emoji", monkeypatch))
    traced = []

    def train(run, name, learner, params, frozen, data, *, steps):
        key = jax.random.key(0)
        total, count, _ = jax.eval_shape(
            lambda *trees: learner.loss(*trees[:2], learner.rollout(*trees, key), key), params, frozen, next(data)
        )
        traced.append((name, total.shape, count.shape))
        return TrainState(0, 0, 0, params, None, params)

    monkeypatch.setattr(bootstrap_run, "train", train)
    monkeypatch.setattr(bootstrap_run.vae, "fit_latent_scale", lambda config, *_: config)
    folder = bootstrap(config, tmp_path / "run")
    assert traced == [
        (name, (), ()) for name in ("vae", "clip", "dinov2", "captioner", "decoder", "mistakes", "caption_scorer")
    ]
    system = load_system(ModelConfig(folder=str(folder)), image_size=side)
    assert system.model.vae.downsampling * system.model.transformer.sample_size == side


@pytest.fixture(params=["scenes", "emoji"])
def world(request, tmp_path, monkeypatch):
    data = config_file.get_config().data
    data.source = request.param
    if request.param == "emoji":
        data.folder = str(emoji_pieces.write_emoji(tmp_path, monkeypatch))
    return scene_stream.open_world(data)


def test_a_world_tells_what_stands_in_each_cell(world):
    for index in range(40):
        scene = world.scene_at("train", index, 3)
        seen, classes = scene_stream.cell_attributes(scene), scene_stream.cell_classes(scene)
        assert (seen["cell"][:, 0] > 0).sum() == (classes[:4] > 0).sum() == len(scene.objects)
        assert (seen["cell"].max(0) < world.attribute_classes).all() and classes[:4].max() < world.object_classes
        assert world.backgrounds[seen["background"]] == scene.background == world.backgrounds[classes[4]]
        noun, values = next(iter(world.values.items()))
        for item in scene.objects:
            cell = 2 * item.row + item.column
            assert values[seen["cell"][cell, 0] - 1] == getattr(item, noun)
            assert (classes[cell] - 1) // ((world.object_classes - 1) // len(values)) == seen["cell"][cell, 0] - 1


def test_the_decoder_reads_captions_with_mistakes_of_true_pictures(world, tmp_path):
    write_scene_tokenizer(tmp_path, world.words)
    tokenizer = load_tokenizer(tmp_path)
    settings = dict(seed=0, batch_size=16, side=64, length=28, pad=0, full_fraction=1.0)
    true, wrong = (next(decoder.stream(world, tokenizer, **settings, mistakes=mistakes)) for mistakes in (0.0, 1.0))
    np.testing.assert_array_equal(true["pixels"], wrong["pixels"])
    for index in range(16):
        scene, words = world.scene_at("train", index, 3), decode_caption(tokenizer, wrong["caption_ids"][index])
        said = scene_checker.parse_caption(words, scene_checker.grammar_of(scene))
        claimed = {dict(mention.claims)["position"]: dict(mention.claims) for mention in said.mentions}
        assert (
            not said.unparsed
            and said.backgrounds != (scene.background,)
            and claimed.keys() == {item.position for item in scene.objects}
        )
        assert all(
            claimed[item.position][name] != getattr(item, name) for item in scene.objects for name in scene.values
        )
        assert (
            scene_checker.caption_score(scene, decode_caption(tokenizer, true["caption_ids"][index])).fact_recall == 1
        )


def test_an_edit_changes_one_fact(world):
    rng = np.random.default_rng(0)
    for index in range(60):
        scene = world.scene_at("train", index, 3)
        other = scene_stream.edited(scene, rng)
        assert sum(a != b for a, b in zip(scenes.facts(scene), scenes.facts(other), strict=True)) == 1
        assert scene_stream.pixels_of(world, other, 64).shape == (64, 64, 3)


def test_other_worlds_and_missing_emoji_are_refused(tmp_path):
    data = config_file.get_config("emoji").data
    data.folder = str(tmp_path)
    with pytest.raises(FileNotFoundError, match="fetch the emoji"):
        scene_stream.open_world(data)
    data.source = "coco"
    with pytest.raises(ValueError, match="the bootstrap knows scenes and emoji"):
        scene_stream.open_world(data)


def test_only_known_presets_are_made():
    with pytest.raises(ValueError, match="unknown preset 'large'"):
        config_file.get_config("large")
