"""Claims about finished runs hold or fail as the numbers say."""

import json

import pytest

from benchmarks import seeds


def score(value, half=0.01):
    return {"value": value, "n": 8, "low": value - half, "high": value + half}


def write_run(folder, recall=(0.5, 0.95), drawn=0.7, cold_reward=0.6, cold_precision=0.98, seed=0):
    """A workdir with four stages; the scores that are given change in the stage whose claim they are."""
    scores = {name: 0.5 for name in seeds.SCORES} | {
        "caption_tokens": 8.0,
        "fact_recall": recall[0],
        "fact_precision": 0.98,
    }
    after = {
        "pretrain": {"true_caption_scene_accuracy": 0.6},
        "cold_start": {"fact_precision": cold_precision, "true_caption_reward": cold_reward},
        "gen_for_und": {
            "fact_recall": recall[1],
            "fact_precision": 0.97,
            "caption_tokens": 16.0,
            "unified_score": 0.6,
            "heldout_score": 0.6,
            "scene_accuracy": 0.6,
        },
        "und_for_gen": {
            "scene_accuracy": 0.7,
            "unified_score": 0.7,
            "heldout_score": 0.7,
            "true_caption_scene_accuracy": drawn,
        },
    }
    stages = []
    for name, changes in after.items():
        before, scores = scores, scores | changes
        stages.append(
            {
                "name": name,
                "before": {k: score(v) for k, v in before.items()},
                "after": {k: score(v) for k, v in scores.items()},
            }
        )
    folder.mkdir()
    (folder / "summary.json").write_text(
        json.dumps({"seed": seed, "seconds": 60.0, "device": "1 x cpu", "stages": stages})
    )
    return folder


def test_a_good_run_holds_every_claim(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("# Results\n\nBy hand.\n")
    assert seeds.main([str(write_run(tmp_path / "a")), str(write_run(tmp_path / "b", seed=1)), f"--docs={page}"]) == 0
    text = page.read_text()
    assert "**no:**" not in text and text.startswith("# Results\n\nBy hand.\n") and text.count("### Scores, seed") == 2
    assert "| 0.500 [0.490, 0.510] to 0.950 [0.940, 0.960] |" in text
    assert len([line for line in text.splitlines() if line.startswith("| gen_for_und |")]) == 6


@pytest.mark.parametrize(
    "changes, failing",
    [
        (dict(recall=(0.65, 0.95)), "fact_recall"),
        (dict(recall=(0.5, 0.89)), "fact_recall"),
        (dict(drawn=0.61), "true_caption_scene_accuracy"),
        (dict(cold_reward=0.51), "true_caption_reward"),
        (dict(cold_precision=0.9), "every other score"),
    ],
)
def test_a_claim_that_fails_is_named(tmp_path, capsys, changes, failing):
    assert seeds.main([str(write_run(tmp_path / "run", **changes))]) == 1
    wrong = [line.split("|")[2].strip() for line in capsys.readouterr().out.splitlines() if "**no:**" in line]
    assert wrong == [failing]


def test_overlapping_intervals_are_not_a_rise():
    claim = seeds.Claim("und_for_gen", "geneval", rise=0.05)
    assert claim.holds(score(0.2), score(0.26)) and not claim.holds(score(0.2, 0.04), score(0.26, 0.04))


def test_an_unfinished_run_is_refused(tmp_path, capsys):
    assert seeds.main([str(tmp_path)]) == 2
    assert "give workdirs of finished runs" in capsys.readouterr().err
