"""What a run is expected to do, before its first step."""

import dataclasses

import pytest

from configs import presets
from uae_jax.files.json_files import write_json
from uae_jax.settings import frozen
from uae_jax.stages.bootstrap.settings import BootstrapConfig
from uae_jax.stages.run_config import RunConfig
from uae_jax.stages.workload import expected_trainings, expected_work, passes
from uae_jax.training.progress import COMPILE, EXPORT, SCORES, SCORES_DURING

STAGES = ("pretrain", "cold_start", "gen_for_und", "und_for_gen")


@pytest.fixture
def config():
    return frozen(RunConfig, presets.preset("tiny", STAGES).to_dict())


def test_every_stage_has_passes_and_drawing_more_costs_more(config):
    counted = {stage: passes(config.stage(stage)) for stage in STAGES}
    assert counted["pretrain"] == 64 * 3 and counted["cold_start"] == 16 * 6 * 3
    assert counted["gen_for_und"] == 16 * 8 * (6 + 3) and counted["und_for_gen"] == 16 * 3
    drawn = dataclasses.replace(config.stage("und_for_gen"), method="flow_grpo")
    assert passes(drawn) == 16 * 12 * (6 + 3)


def test_a_new_run_is_estimated_as_a_whole_once_one_stage_is_measured(config, tmp_path):
    estimate = expected_work(config, tmp_path)
    assert estimate.words() == ""
    estimate.step("pretrain", 1.0)
    estimate.took(COMPILE, 20.0)
    estimate.took(SCORES, 10.0)
    estimate.took(SCORES_DURING, 2.0)
    estimate.took(EXPORT, 0.0)
    steps = {stage: config.stage(stage).steps * passes(config.stage(stage)) / (64 * 3) for stage in STAGES[1:]}
    # five passes of scores, four compilations; 2 and 24 passes in the middle of the last two stages
    assert estimate.left() == pytest.approx(29 + sum(steps.values()) + 3 * 20 + 4 * 10 + 25 * 2)


def test_what_is_finished_counts_nothing(config, tmp_path):
    for stage in STAGES[:2]:
        folder, steps = tmp_path / "checkpoints" / stage, config.stage(stage).steps
        (folder / str(steps)).mkdir(parents=True)
        write_json(folder / "finished.json", {"name": stage, "steps": steps, "guard": None})
    estimate = expected_work(config, tmp_path)
    assert set(estimate.work) == set(STAGES[2:])
    estimate.step("gen_for_und", 1.0)
    assert estimate.left() == pytest.approx(59 + 500 * 3 / (8 * 9))


def test_a_continued_run_expects_no_scores_from_before_it_again(config, tmp_path):
    estimate = expected_work(config, tmp_path)
    estimate.step("pretrain", 1.0)
    estimate.took(SCORES, 10.0)
    (tmp_path / "checkpoints" / "pretrain" / "0").mkdir(parents=True)
    continued = expected_work(config, tmp_path)
    continued.step("pretrain", 1.0)
    continued.took(SCORES, 10.0)
    assert continued.left() == pytest.approx(estimate.left() - 10)


def test_a_bootstrap_is_estimated_by_the_trainings_that_are_left():
    config = BootstrapConfig()
    estimate = expected_trainings(config, ("captioner", "decoder"))
    assert estimate.words() == ""
    estimate.step("bootstrap_captioner", 1.0)
    assert estimate.left() == pytest.approx(config.captioner.steps - 1 + config.decoder.steps * 64 / 40)
