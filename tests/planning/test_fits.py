"""What fits my card: the table, the flags that need less memory, and the presets for one card."""

import pathlib
import re

import pytest

from configs import presets
from uae_jax import plan as plan_command
from uae_jax.planning.chips import CHIPS, GIB, USABLE
from uae_jax.planning.fits import Fit, chosen_chips, fit_table, fits_of, machine_of
from uae_jax.planning.remedies import smaller
from uae_jax.settings import frozen
from uae_jax.stages.run_config import RunConfig

STAGES = ("pretrain", "cold_start", "gen_for_und", "und_for_gen")
MEDIUM = "qwen2_5_vl_3b_sd3_5_medium"
PAGE = pathlib.Path(__file__).parents[2] / "docs" / "cards.md"


def values(name):
    return presets.preset(name, STAGES).to_dict()


@pytest.mark.parametrize(
    "name, machine",
    [("a@1x24GB", (1, "")), ("a@8xH200", (8, "")), ("a@v5e-8", (8, "v5e")), ("a@v5p-64", (64, "v5p"))],
)
def test_a_preset_names_its_machine(name, machine):
    assert machine_of(name) == machine


def test_a_preset_without_a_machine_is_refused():
    with pytest.raises(ValueError, match="names no machine; give one such as tiny@1x80GB"):
        machine_of("tiny")


@pytest.mark.parametrize("machine, card", [("1x24GB", "RTX4090"), ("1x48GB", "L40S"), ("1x80GB", "A100-80")])
def test_the_medium_preset_of_a_card_fits_it(machine, card):
    found = fits_of(f"{MEDIUM}@{machine}", values(f"{MEDIUM}@{machine}"))
    assert {fit.stage for fit in found} >= {"gen_for_und", "und_for_gen"}
    assert [fit.stage for fit in found if not fit.fits(CHIPS[card])] == []


def test_the_effective_batch_is_the_same_on_every_machine():
    """Accumulation, not smaller batches: what a step learns from does not depend on the card."""
    for stage in STAGES[2:]:
        sizes = {
            (config := frozen(RunConfig, values(name)).stage(stage)).batch_size * config.group_size
            for name in presets.PRESETS
            if name.startswith(f"{MEDIUM}@1x") or name in (f"{MEDIUM}@8xH200", f"{MEDIUM}@v5e-8")
        }
        assert len(sizes) == 1, (stage, sizes)


def test_the_table_has_a_share_where_a_stage_fits_and_nothing_elsewhere():
    cards = chosen_chips(["RTX4090", "H100"])
    fit = Fit("a@1x24GB", "gen_for_und", 1, "", 64, 4, 30 * GIB)
    table = fit_table([fit], cards).splitlines()
    assert table[0].endswith("| RTX4090 (24) | H100 (79) |")
    assert table[2] == "| `a@1x24GB` | gen_for_und | 64 | 4 | 30.0 | - | - | 38 % |"
    slice_ = Fit("a@v5e-8", "pretrain", 8, "v5e", 64, 8, 8 * GIB)
    assert "| 8.0 | 50 % of v5e | - | - |" in fit_table([slice_], cards)
    assert not Fit("a@v5e-8", "pretrain", 8, "v5e", 64, 8, 1 * GIB).fits(CHIPS["H100"])
    assert Fit("a@v5e-8", "pretrain", 8, "v5e", 64, 8, 1 * GIB).fits(CHIPS["v5e"])
    with pytest.raises(ValueError, match="--fits names 'GTX480'; known are v4"):
        chosen_chips(["GTX480"])


def test_flags_that_need_less_memory_are_of_the_settings_and_keep_the_batch():
    config = frozen(RunConfig, values(f"{MEDIUM}@1x80GB"))
    found = smaller("gen_for_und", config.stage("gen_for_und"))
    assert found[0] == "--config.gen_for_und.micro_batches=16"
    assert "--config.gen_for_und.rollout_parts=8" in found and "--config.gen_for_und.gather_weights=False" in found
    assert not any("batch_size" in flag or "group_size" in flag for flag in found)
    # each of them, alone, is a valid configuration
    for flag in found:
        field, _, value = flag.removeprefix("--config.").partition("=")
        changed, mistakes = plan_command.apply_overrides(values(f"{MEDIUM}@1x80GB"), [(field, value)])
        assert not mistakes and frozen(RunConfig, changed)


def test_a_plan_that_does_not_fit_says_what_to_change(capsys):
    flags = ["--config=pretrain:qwen2_5_vl_3b_sd3_5_large", "--topology=gpu:1xRTX4090"]
    with pytest.raises(SystemExit) as end:
        plan_command.main([*flags, "--config.mesh.fsdp=1"])
    said = capsys.readouterr().out
    assert end.value.code == 3 and "pretrain does not fit" in said
    assert "--config.pretrain.micro_batches=2" in said and "--fits lists what fits" in said


def test_a_plan_without_a_topology_says_what_is_needed():
    with pytest.raises(SystemExit, match="--topology is not given; a plan needs --config and --topology, or --fits"):
        plan_command.main(["--config=unified_grpo"])


def rows(text):
    """(preset, stage): GiB of the rows of a table."""
    found = re.findall(r"^\| `(\S+@\S+)` \| (\w+) \| \d+ \| \d+ \| ([\d.]+) \|", text, re.MULTILINE)
    return {(preset, stage): float(peak) for preset, stage, peak in found}


def test_the_page_s_table_is_the_command_s():
    """Two presets are estimated again; the slow test has all of them."""
    told = rows(PAGE.read_text())
    names = {name for name in presets.PRESETS if "@" in name}
    assert {preset for preset, _ in told} == names
    for name in (f"{MEDIUM}@1x24GB", f"{MEDIUM}@v5e-8"):
        for fit in fits_of(name, values(name)):
            assert told[name, fit.stage] == pytest.approx(fit.peak / GIB, abs=0.06)


@pytest.mark.slow
def test_the_whole_table_is_the_command_s(capsys):
    plan_command.main(["--fits"])
    assert rows(capsys.readouterr().out) == rows(PAGE.read_text())


def test_every_one_card_preset_fits_the_card_that_it_is_named_after():
    room = {"1x24GB": CHIPS["RTX4090"], "1x48GB": CHIPS["L40S"], "1x80GB": CHIPS["H100"], "v5e-8": CHIPS["v5e"]}
    for (preset, stage), peak in rows(PAGE.read_text()).items():
        if chip := room.get(preset.partition("@")[2]):
            assert peak <= USABLE * chip.memory / GIB, (preset, stage)
