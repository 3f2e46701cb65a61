"""Every arm is a configuration that a run accepts, and differs from its reference in what it says."""

import dataclasses

import pytest

from configs import ablations, presets
from uae_jax.settings import as_dict, differences, frozen
from uae_jax.stages.bootstrap.run import PHASES
from uae_jax.stages.checks import check_batch
from uae_jax.stages.run_config import RunConfig


@pytest.mark.parametrize("name", ablations.ARMS)
def test_an_arm_is_a_valid_configuration(name):
    arm, config = ablations.ARMS[name], ablations.get_config(name)
    if arm.bootstraps:
        assert config.start == "builtin" and set(config.phases) <= set(PHASES) == {*PHASES}
        return
    settings = frozen(RunConfig, config.to_dict())
    assert settings.stages == arm.stages
    for stage in arm.stages:
        check_batch(settings, stage, 1)
    # what an arm changes reaches the method that it runs
    plain = frozen(RunConfig, presets.preset("tiny", arm.stages).to_dict())
    rows = [
        row for stage in arm.stages for row in differences(as_dict(plain.stage(stage)), as_dict(settings.stage(stage)))
    ]
    for other in settings.stage("und_for_gen").methods.keys() - {settings.stage("und_for_gen").method}:
        assert not [row for row in rows if row.startswith(f"{other}.")]
    for field in arm.start:
        assert getattr(settings.model, field.removeprefix("model.")) == ""


@pytest.mark.parametrize("name", ablations.ARMS)
def test_an_arm_starts_from_earlier_ones_and_compares_with_one_that_exists(name):
    arm, names = ablations.ARMS[name], list(ablations.ARMS)
    assert all(names.index(other) < names.index(name) for other in arm.start.values())
    assert ablations.TOPICS[arm.topic].reference in names


def test_groups_keep_the_number_of_drawings():
    base = presets.preset("tiny", ("gen_for_und",))
    for stage, prefix in (("gen_for_und", ""), ("und_for_gen", "gen_")):
        total = base[stage].group_size * base[stage].batch_size
        for size in (2, 4, 8, 16):
            config = ablations.get_config(f"{prefix}group_size_{size}")[stage]
            assert config.group_size == size and total - size < config.group_size * config.batch_size <= total


def test_turns_have_the_steps_of_the_whole():
    base, turns = ablations.get_config("gen_nft"), ablations.get_config("alternating")
    for stage in ("gen_for_und", "und_for_gen"):
        assert turns.rounds * turns[stage].steps == base[stage].steps // 2 * 2
    order = [stage for _, stage in frozen(RunConfig, turns.to_dict()).order()]
    assert order == ["gen_for_und", "und_for_gen"] * 2


def test_only_the_caption_reward_draws_nothing():
    config = ablations.get_config("caption_similarity").gen_for_und.reward
    assert (config.names, config.pixel_weight, config.caption_weight) == ((), 0.0, 1.0)
    assert ablations.get_config("reward_clip_pixels").gen_for_und.reward.pixel_weight == 0.5


@pytest.mark.parametrize("name", [None, "group_size_3"])
def test_an_arm_must_be_named(name):
    with pytest.raises(ValueError, match="needs an arm after a colon"):
        ablations.get_config(name)


def test_every_topic_has_an_arm_beside_its_reference():
    for name, topic in ablations.TOPICS.items():
        assert [arm for arm in ablations.ARMS if ablations.ARMS[arm].topic == name and arm != topic.reference]
        assert topic.scores in ("und", "gen", "both") and dataclasses.asdict(topic)["question"].endswith(
            ("?", "decoder.", "gen_for_und.")
        )
