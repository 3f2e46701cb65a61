"""The unified model against its baselines: the jobs of each arm, and tables over seeds."""

import json
import pathlib
import shlex
import sys

import pytest

from benchmarks import unified_claim
from configs import unified_ar
from configs.presets import merged
from uae_jax.settings import frozen
from uae_jax.stages.run_config import RunConfig

STUB = shlex.join([sys.executable, str(pathlib.Path(__file__).with_name("stub_unified_claim.py"))])
SETTINGS = json.loads(unified_claim.SETTINGS.read_text())


@pytest.fixture
def run(tmp_path):
    """Runs the command here with the stub, and returns its exit code."""
    return lambda *words: unified_claim.main([f"--workdir={tmp_path}", f"--command={STUB}", *words])


def rows(text):
    """Cells of both tables by the first one: the scores, and the differences."""
    parts = text.split("| reconstruction less")
    lines = [[line for line in part.splitlines() if line.startswith("| ")] for part in parts]
    cells = [[[cell.strip() for cell in line.split("|")[1:-1]] for line in part] for part in lines]
    return [{row[0]: row[1:] for row in part} for part in cells]


def test_every_arm_is_trained_once_and_scored_at_its_own_guidance(run, tmp_path, capsys):
    assert run("--seeds=1,2") == 0
    calls = [line.split(" ", 1) for line in (tmp_path / "calls.txt").read_text().splitlines()]
    names = ["none_scores", *(f"{arm}{what}" for arm in list(SETTINGS["arms"])[1:] for what in ("", "_scores"))]
    assert [name for name, _ in calls] == [f"seed_{seed}/{name}" for seed in (1, 2) for name in names]
    words = dict(calls)
    assert "--checkpoint=unified" in words["seed_1/none_scores"].split()
    assert f"--checkpoint={tmp_path}/seed_1/shuffled" in words["seed_1/shuffled_scores"].split()
    assert "--config.unified_ar.shuffled_rewards=True" in words["seed_1/shuffled"].split()
    scores, less = rows(capsys.readouterr().out)
    assert scores["no training"][:2] == ["2", "0.402 [0.395, 0.408]"]
    assert scores["reconstruction"][1].startswith("0.90") and scores["reconstruction"][5].startswith("0.90")
    assert less["shuffled rewards"][0] == "**0.400 [0.400, 0.400]**"
    assert run("--seeds=1,2") == 0 and len((tmp_path / "calls.txt").read_text().splitlines()) == len(calls)


def test_a_page_gets_the_tables_of_what_is_done(run, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("by hand\n")
    assert run("--seeds=3", "--arms=none,unified_ar") == 0
    assert run("--seeds=3", "--tables_only", f"--docs={page}") == 0
    text = page.read_text()
    assert (
        text.startswith("by hand") and "| shuffled rewards | 0 |" in text and "| reconstruction | 1 | 0.903 |" in text
    )


def test_an_unknown_arm_is_refused(run, capsys):
    with pytest.raises(SystemExit):
        run("--arms=magic")
    assert "there is no arm 'magic'; choose from none, unified_ar" in capsys.readouterr().err


def test_the_settings_are_those_of_the_program():
    base = unified_ar.get_config().to_dict()
    assert set(SETTINGS["arms"]) == set(unified_claim.NAMES) and len(SETTINGS["seeds"]) == 3
    for arm, changes in SETTINGS["arms"].items():
        others = SETTINGS["others"].get(arm, {})
        config = frozen(RunConfig, merged(base, {"unified_ar": changes or {}, **others}))
        # supervision is told whole captions: short ones would teach it to leave facts out
        assert config.data.rl_detail == ("full" if arm == "supervised" else "short")
