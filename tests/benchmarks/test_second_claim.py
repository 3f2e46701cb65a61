"""The experiment of the second claim: what starts from what, stopping and going on, and the tables over seeds."""

import json
import pathlib
import shlex
import sys

import pytest
from PIL import Image

from benchmarks import claim_tables, second_claim
from benchmarks.documents import marks
from configs import presets
from uae_jax.settings import frozen
from uae_jax.stages.run_config import RunConfig

STUB = shlex.join([sys.executable, str(pathlib.Path(__file__).with_name("stub_claim.py"))])
SETTINGS = json.loads(second_claim.SETTINGS.read_text())


@pytest.fixture
def run(tmp_path):
    """Runs the command here with the stub, and returns its exit code."""
    return lambda *words: second_claim.main([f"--workdir={tmp_path}", f"--command={STUB}", *words])


def calls(workdir):
    return [line.split()[0] for line in (workdir / "calls.txt").read_text().splitlines()]


def test_each_arm_starts_from_its_captioner_and_is_scored_once(run, tmp_path):
    assert run("--seeds=3", "--arms=none,flow_grpo") == 0
    assert calls(tmp_path)[0] == "model" and calls(tmp_path)[1:] == [
        f"seed_3/{name}"
        for name in (
            "before_none_scores",
            "before_flow_grpo",
            "before_flow_grpo_scores",
            "captioner",
            "after_none_scores",
            "after_flow_grpo",
            "after_flow_grpo_scores",
        )
    ]
    lines = dict(line.split(" ", 1) for line in (tmp_path / "calls.txt").read_text().splitlines())
    assert f"--config.model.folder={tmp_path}/model/model" in lines["seed_3/before_flow_grpo"]
    assert f"--checkpoint={tmp_path}/model/model" in lines["seed_3/before_none_scores"]
    assert f"--config.model.folder={tmp_path}/seed_3/captioner" in lines["seed_3/after_flow_grpo"]
    assert "--config.und_for_gen.flow_grpo.one_replay=True" in lines["seed_3/after_flow_grpo"]
    assert f"--checkpoint={tmp_path}/seed_3/captioner" in lines["seed_3/after_none_scores"]
    assert "--scene_seed=7001" in lines["seed_3/before_none_scores"]
    assert "merge_adapters" not in lines["seed_3/after_flow_grpo"]
    assert run("--seeds=3", "--arms=none,flow_grpo") == 0 and len(calls(tmp_path)) == 8  # all was done before


def test_an_arm_that_trains_the_captioner_too_takes_its_adapter_into_the_weights(run, tmp_path):
    assert run("--seeds=3", "--arms=joint") == 0
    lines = dict(line.split(" ", 1) for line in (tmp_path / "calls.txt").read_text().splitlines())
    assert "--config.model.merge_adapters=True" in lines["seed_3/after_joint"]
    assert "merge_adapters" not in lines["seed_3/before_joint"]


def test_other_settings_are_not_mixed_with_what_was_done(run, tmp_path, capsys):
    assert run("--seeds=3", "--arms=none") == 0
    other = tmp_path / "other.json"
    other.write_text(json.dumps(SETTINGS | {"scene_seed": 8}))
    assert run("--seeds=3", "--arms=none", f"--settings={other}") == 1
    assert "was made with other settings" in capsys.readouterr().out


def test_a_failed_arm_is_told_and_the_others_go_on(run, tmp_path, capsys):
    (tmp_path / "captioner.broken").touch()
    assert run("--seeds=3", "--arms=none,matching") == 1
    said = capsys.readouterr().out
    assert "seed 3 captioner: failed: error: the folder is broken" in said
    assert "after_matching: failed: skipped, because it starts from captioner" in said
    assert "seed_3/before_matching_scores" in calls(tmp_path)
    assert "| before gen_for_und | flow matching | 1 | 0.453" in said


def test_tables_have_paired_differences_over_seeds(run, tmp_path, capsys):
    assert run("--seeds=1,2,3", "--arms=none,flow_grpo,matching") == 0
    page, figure = tmp_path / "page.md", tmp_path / "images" / "claim.png"
    page.write_text("by hand\n")
    words = ("--tables_only", f"--log={page}", f"--docs={tmp_path / 'docs.md'}", f"--figure={figure}")
    assert run("--seeds=1,2,3", "--arms=none,flow_grpo,matching", *words) == 0
    text = page.read_text()
    assert text.startswith("by hand") and marks("second_claim")[0] in text
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    rows = {tuple(row[:3]): row[3:] for row in cells}
    assert rows["after gen_for_und", "Flow-GRPO", "3"][0] == "0.702 [0.700, 0.704]"
    # differences whose interval leaves zero out are bold
    assert rows["after gen_for_und", "Flow-GRPO", "no training"][0] == "**0.100 [0.100, 0.100]**"
    assert rows["after gen_for_und", "Flow-GRPO", "flow matching"][1] == "**0.050 [0.050, 0.050]**"
    assert rows["before gen_for_und", "flow matching", "no training"][1] == "**0.050 [0.050, 0.050]**"
    assert ["Flow-GRPO", *["**0.200 [0.200, 0.200]**"] * 3] in cells
    row = "| Flow-GRPO | 0.502 [0.500, 0.504] | 0.702 [0.700, 0.704] | 0.502 [0.500, 0.504] | 0.702 [0.700, 0.704] |"
    assert row in (tmp_path / "docs.md").read_text()
    with Image.open(figure) as picture:
        assert picture.width > 800


def test_a_difference_is_bold_where_its_interval_leaves_zero_out():
    assert claim_tables.difference([0.1, -0.1, 0.05]) == "0.017 [-0.242, 0.275]"
    assert claim_tables.difference([-0.1, -0.1, -0.1]) == "**-0.100 [-0.100, -0.100]**"
    # one seed has no interval, and none has nothing
    assert claim_tables.difference([0.1]) == "0.100" and claim_tables.difference([]) == ""


def test_the_settings_are_those_of_the_program():
    """Every field of the frozen settings exists, and every arm passes the checks of its configuration."""
    base = presets.preset(SETTINGS["preset"], ("und_for_gen",)).to_dict()
    for arm, changes in SETTINGS["arms"].items():
        if changes is None:
            continue
        stage = presets.merged(SETTINGS["decoder"], changes)
        config = frozen(RunConfig, presets.merged(presets.merged(base, SETTINGS["shared"]), {"und_for_gen": stage}))
        assert config.stage("und_for_gen").data_captions == 0 and not config.stage("und_for_gen").reward.contrast, arm
    assert set(SETTINGS["arms"]) == {"none", "flow_grpo", "shuffled", "matching", "joint"}
    real, control = (dict(SETTINGS["arms"][name]["flow_grpo"]) for name in ("flow_grpo", "shuffled"))
    assert control.pop("shuffled_rewards") is True and real == control
    assert len(SETTINGS["seeds"]) == 5


def test_an_unknown_arm_is_refused(run, capsys):
    assert run("--arms=magic") == 1
    assert "there is no arm 'magic'; choose from none, flow_grpo" in capsys.readouterr().err


@pytest.mark.slow
def test_the_programs_themselves(tmp_path):
    """Two real arms of one step each, with few texts."""
    few = presets.merged(SETTINGS, {"scoring": {"scenes": 2, "per_tag": 1}, "captioner": {"steps": 1, "batch_size": 2}})
    few = presets.merged(
        few, {"decoder": {"steps": 1, "batch_size": 4, "group_size": 4}, "shared": {"evaluation": {"images": 2}}}
    )
    settings = tmp_path / "few.json"
    settings.write_text(json.dumps(few))
    words = [f"--workdir={tmp_path / 'runs'}", f"--settings={settings}", "--seeds=1", "--arms=none,flow_grpo,joint"]
    assert second_claim.main(words) == 0
