"""A run on scenes of emoji: its pictures, captions and scores of facts go through the same loader, steps and
evaluator.
"""

import emoji_pieces
import numpy as np
import pytest
from stage_pieces import changed, make_run

from configs import presets
from uae_jax.data.emoji import EmojiSource, split_of
from uae_jax.data.loader import make_loader
from uae_jax.data.tokenizer import load_tokenizer, write_scene_tokenizer
from uae_jax.settings import frozen
from uae_jax.stages.data import open_sources
from uae_jax.stages.run_config import RunConfig

STAGES = ("pretrain", "cold_start", "gen_for_und", "und_for_gen")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        return emoji_pieces.write_emoji(tmp_path_factory.mktemp("emoji"), patch)


@pytest.fixture(scope="module")
def emoji_run(config, folder, tmp_path_factory):
    values = changed(
        config, data=dict(source="emoji", folder=str(folder), max_caption=32, negative_prompt="", mistakes=0.1)
    )
    return make_run(values, tmp_path_factory.mktemp("run"))


def test_the_preset_is_a_whole_configuration():
    settings = frozen(RunConfig, presets.preset("emoji", STAGES).to_dict())
    assert (
        settings.data.source == "emoji" and settings.data.image_size == 64 and settings.evaluation.geneval_per_tag == 0
    )


def test_sources_are_split_and_the_rl_stages_see_other_captions(emoji_run):
    assert isinstance(emoji_run.source, EmojiSource) and emoji_run.source.captions == "full"
    assert emoji_run.source_of("gen_for_und").captions == "short" and emoji_run.source_of("pretrain").captions == "full"
    assert (
        emoji_run.source_of("gen_for_und").mistakes
        == 0
        < emoji_run.config.data.mistakes
        == emoji_run.source_of("pretrain").mistakes
    )
    train, heldout = open_sources(emoji_run.config.data, 0, 6)
    assert {split_of(example.scene) for example in heldout} == {"test"}
    assert {split_of(train[index].scene) for index in range(6)} == {"train"}


def test_missing_emoji_are_one_clear_error(emoji_run, tmp_path):
    settings = frozen(RunConfig, changed(presets.preset("emoji", STAGES).to_dict(), data=dict(folder=str(tmp_path))))
    with pytest.raises(FileNotFoundError, match="python -m uae_jax.fetch_emoji"):
        open_sources(settings.data, 0, 1)


def test_every_word_of_a_caption_has_a_token(emoji_run, tmp_path):
    emoji = emoji_run.source.emoji
    write_scene_tokenizer(tmp_path, emoji.words)
    tokenizer = load_tokenizer(tmp_path)
    unknown = tokenizer.get_vocab()["<|unknown|>"]
    for index in range(50):
        assert unknown not in tokenizer(emoji_run.source_of("gen_for_und")[index].caption)["input_ids"]


def test_batches_have_the_pictures_of_the_source_and_repeat(emoji_run):
    batch = next(make_loader(emoji_run.source, emoji_run.rows, 8, 0))
    side = emoji_run.config.data.image_size
    assert batch["pixels"].shape == (8, side, side, 3) and not batch["caption_truncated"].any()
    np.testing.assert_array_equal(batch["pixels"], next(make_loader(emoji_run.source, emoji_run.rows, 8, 0))["pixels"])


def test_scores_of_true_captions_and_original_pictures_are_full(emoji_run):
    examples = emoji_run.evaluator.examples
    pixels = np.stack([example.image for example in examples]).astype(np.float32) / 127.5 - 1
    scores = emoji_run.evaluator._facts(examples, [example.caption for example in examples], pixels)
    assert {f"fact_recall_{kind}" for kind in ("background", "position", "size", "name")} < scores.keys()
    assert all((values == 1).all() for values in scores.values())
    noise = np.random.default_rng(0).uniform(-1, 1, pixels.shape).astype(np.float32)
    assert emoji_run.evaluator._facts(examples, [""] * len(examples), noise)["scene_accuracy"].mean() < 0.7
    assert emoji_run.evaluator._geneval({}) == {}  # its prompts ask for shapes
