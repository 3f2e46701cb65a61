"""The command that runs the ablations: order, stopping, failures, and the page it writes."""

import json
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import pytest

from benchmarks import ablation_tables, ablations
from benchmarks.documents import marks
from configs import ablations as configs

ROOT = pathlib.Path(ablations.__file__).parents[1]
STUB = shlex.join([sys.executable, str(pathlib.Path(__file__).with_name("stub_main.py"))])


@pytest.fixture
def run(tmp_path):
    """Runs the command here with the stub, and returns its exit code."""
    return lambda *arguments: ablations.main([f"--workdir={tmp_path}", f"--command={STUB}", *arguments])


def calls(workdir) -> list[str]:
    return [
        f"{pathlib.Path(line.split()[0]).parent.name} {line.split()[0][-1]}"
        for line in (workdir / "calls.txt").read_text().splitlines()
    ]


def test_arms_run_after_what_they_start_from_and_seed_by_seed(run, tmp_path):
    assert run("--arms=caption_similarity", "--seeds=0,1") == 0
    chain = ["base_pretrain", "base_cold_start", "base_gen_for_und", "caption_scorer", "caption_similarity"]
    assert calls(tmp_path) == [f"{name} {seed}" for seed in (0, 1) for name in chain]
    last = (tmp_path / "calls.txt").read_text().splitlines()[-1]
    assert f"--config.model.folder={tmp_path}/base_cold_start/seed_1" in last
    assert f"--config.model.caption_scorer={tmp_path}/caption_scorer/seed_1" in last
    page = (tmp_path / "results.md").read_text()
    assert "Missing" not in page and "similarity of caption and picture, no drawing" in page


def test_finished_arms_are_read_back_and_equal_ones_run_once(run, tmp_path, capsys):
    assert run("--arms=group_size_8,group_size_4", "--seeds=0") == 0
    once = calls(tmp_path)
    assert once == [f"{name} 0" for name in ("base_pretrain", "base_cold_start", "base_gen_for_und", "group_size_4")]
    assert run("--arms=group_size_8,group_size_4", "--seeds=0") == 0
    assert calls(tmp_path) == once and capsys.readouterr().out.count("done before") == 4
    assert "| 8 (the recipe) | 1 | 0.500 [0.400, 0.600] |" in (tmp_path / "results.md").read_text()


def test_a_failed_arm_is_told_and_the_others_go_on(run, tmp_path, capsys):
    (tmp_path / "base_cold_start.broken").touch()
    assert run("--arms=group_size_4,without_cold_start", "--seeds=0") == 1
    errors = capsys.readouterr().err
    assert "base_cold_start: failed: error: the folder is broken" in errors
    assert (
        "group_size_4: failed: skipped, because it starts from base_cold_start" in errors and "3 of 5 failed" in errors
    )
    assert "without_cold_start 0" in calls(tmp_path)
    page = (tmp_path / "results.md").read_text()
    assert "Missing: `base_gen_for_und` seed 0, `group_size_4` seed 0." in page and "no cold start | 1 |" in page
    (tmp_path / "base_cold_start.broken").unlink()
    assert run("--arms=group_size_4,without_cold_start", "--seeds=0") == 0


@pytest.mark.parametrize("signum, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_it_stops_inside_an_arm_and_continues_there(tmp_path, signum, code):
    (tmp_path / "base_cold_start.slow").touch()
    command = [
        sys.executable,
        "-m",
        "benchmarks.ablations",
        f"--workdir={tmp_path}",
        f"--command={STUB}",
        "--arms=base_cold_start",
        "--seeds=0",
    ]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while not (tmp_path / "base_cold_start" / "seed_0" / "waiting").exists() and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signum)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code and err.splitlines()[-1] == "stopped; the same command continues"
    assert (tmp_path / "base_cold_start" / "seed_0" / "half").exists()
    assert "Missing: `base_cold_start` seed 0." in (tmp_path / "results.md").read_text() and "1 runs missing" in out
    assert ablations.main(command[3:]) == 0
    assert calls(tmp_path) == ["base_pretrain 0", "base_cold_start 0", "base_cold_start 0"]


def test_other_settings_are_not_mixed_with_old_results(run, tmp_path, capsys):
    assert run("--arms=base_pretrain", "--seeds=0") == 0
    assert run("--arms=base_pretrain", "--seeds=0", "--set=evaluation.images=7", "--set=decoder.steps=1") == 1
    assert "was made with other settings (changes was [] and is ['evaluation.images=7'])" in capsys.readouterr().err


def test_changes_reach_the_arms_that_have_the_field(tmp_path):
    both = ("gen_for_und.steps=2", "decoder.steps=3")
    assert ablations.Job("kl_0", 0, tmp_path, both).overrides() == ["gen_for_und.steps=2"]
    assert ablations.Job("decoder_long", 0, tmp_path, both).overrides() == ["decoder.steps=3"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--arms=kl_7"], "there is no arm 'kl_7'"),
        (["--seeds=a"], "invalid literal"),
        (["--set=x"], "needs FIELD=VALUE"),
    ],
)
def test_wrong_arguments_end_with_one_line(run, capsys, arguments, message):
    assert run(*arguments) == 1
    assert message in capsys.readouterr().err


def test_the_list_names_every_arm_and_its_command(run, tmp_path, capsys):
    assert run("--list", "--seeds=0") == 0
    out = capsys.readouterr().out
    assert (
        all(out.count(f"\n{name} ") or out.startswith(name) for name in configs.ARMS)
        and not (tmp_path / "calls.txt").exists()
    )
    assert "group_size_8" in out and "= base_gen_for_und" in out and "ablations.py:kl_0 " in out


def result(value: float) -> ablation_tables.Result:
    def scores(number):
        return {
            name: {"value": number, "n": 9, "low": number - 0.05, "high": number + 0.05}
            for name in (
                "reward",
                "heldout_score",
                "scene_accuracy",
                "caption_tokens",
                "fact_recall",
                "fact_precision",
                *(f"fact_recall_{kind}" for kind in ablation_tables.KINDS),
            )
        }

    return ablation_tables.Result(scores(0.1), scores(value), 12.0)


def test_cells_have_the_interval_of_one_seed_and_the_range_of_several():
    one, other = result(0.5).after["reward"], result(0.7).after["reward"]
    assert ablation_tables.cell([one]) == "0.500 [0.450, 0.550]"
    assert ablation_tables.cell([one, other]) == "0.600 (0.500 to 0.700)"
    assert ablation_tables.cell([]) == ""
    assert ablation_tables.cell([{"value": 17.25, "low": 16.0, "high": 18.0}]) == "17.2 [16.0, 18.0]"


def test_a_table_has_the_start_the_reference_and_the_arms():
    results = {name: {} for name in configs.ARMS} | {
        "base_gen_for_und": {0: result(0.6), 1: result(0.8)},
        "kl_0": {0: result(0.5)},
    }
    rows = ablation_tables.topic_rows("kl", list(configs.ARMS), ablations.same_as)
    assert list(rows.values()) == ["0.02 (the recipe)", "0", "0.1"]
    lines = ablation_tables.topic_section("kl", results, rows, (0, 1), "images/kl.png")
    table = [line for line in lines if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    assert [line.split(" | ")[0] for line in table[2:]] == ["| before", "| 0.02 (the recipe)", "| 0", "| 0.1"]
    assert "0.700 (0.600 to 0.800)" in table[3] and "0.50 / 0.50 / 0.50 / 0.50 / 0.50" in table[4]
    assert lines[-2] == "Missing: `kl_0` seed 1, `kl_0.1` seed 0, `kl_0.1` seed 1."
    figure = ablation_tables.plot("kl", results, rows)
    assert [axes.get_title() for axes in figure.axes] == list(ablation_tables.PANELS["und"])
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == ["0.02 (the recipe)", "0"]


def test_text_by_hand_stays_and_the_block_is_replaced(tmp_path):
    page = tmp_path / "docs" / "results.md"
    page.parent.mkdir()
    page.write_text("# Results\n\nBy hand.\n")
    ablation_tables.write_page(page, tmp_path, ["kl_0"], (0,))
    first = page.read_text()
    assert first.startswith("# Results\n\nBy hand.\n\n" + marks("ablations")[0]) and first.count("### KL weight") == 1
    page.write_text(first + "\nAfter it.\n")
    ablation_tables.write_page(page, tmp_path, ["kl_0"], (0,))
    assert page.read_text() == first + "\nAfter it.\n"
    page.write_text(first.replace(marks("ablations")[1], ""))
    with pytest.raises(ValueError, match="without the other"):
        ablation_tables.write_page(page, tmp_path, ["kl_0"], (0,))


def test_plots_are_small(run, tmp_path):
    assert run("--arms=kl_0,kl_0.1", "--seeds=0,1", f"--docs={tmp_path}/page/results.md") == 0
    picture = tmp_path / "page" / "images" / "ablations_kl.png"
    assert "![KL weight](images/ablations_kl.png)" in (tmp_path / "page" / "results.md").read_text()
    assert 1000 < picture.stat().st_size < 60_000
    assert json.loads((tmp_path / "kl_0" / "seed_1" / "arm.json").read_text())["finished"]
