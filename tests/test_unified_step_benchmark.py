"""The benchmark of whole steps: both sides agree on a small model, and its calls run."""

import dataclasses
import json
import sys

import jax
import numpy as np
import pytest

from benchmarks import inference_scaling, unified_step
from benchmarks.inference_scaling import Case, cases, line, measure
from benchmarks.jax_side import JaxSide, make_inputs, open_system
from benchmarks.machine_rates import machine_rates
from benchmarks.mini_checkpoint import SMALL, write_checkpoint
from benchmarks.step_settings import PHASES, PREFILL, STAGES, Inputs, Settings
from benchmarks.torch_side import TorchSide

SIZES = Settings(images=2, group=2, tokens=5, steps=2, window=1, image_size=64, lora_rank=4)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A checkpoint and inputs that were written and read back."""
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder, SMALL)
    make_inputs(folder, SIZES).save(folder / "place")
    return folder, Inputs.load(folder / "place")


@pytest.mark.slow
def test_both_sides_compute_the_same(prepared):
    folder, inputs = prepared
    ours, theirs = (
        JaxSide(folder, inputs, "inference").checks(),
        TorchSide(folder, inputs, "inference", compiled=False).checks(),
    )
    np.testing.assert_array_equal(ours["greedy_ids"], theirs["greedy_ids"])
    assert (
        ours["greedy_ids"].shape == (SIZES.images, SIZES.tokens) and len(set(ours["greedy_ids"].ravel().tolist())) > 2
    )
    np.testing.assert_allclose(ours["latents"], theirs["latents"], atol=1e-4 * np.abs(theirs["latents"]).max())
    np.testing.assert_allclose(ours["rewards"], theirs["rewards"], atol=1e-3)


@pytest.mark.parametrize("stage", STAGES)
def test_the_state_lies_where_a_step_puts_it_so_that_the_second_call_compiles_nothing(prepared, stage):
    side = JaxSide(*prepared, stage)
    assert all(
        isinstance(leaf.sharding, jax.sharding.NamedSharding) and leaf.committed for leaf in jax.tree.leaves(side.state)
    )


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_phases_of_a_step_update_the_adapter(prepared, stage):
    folder, inputs = prepared
    side = JaxSide(folder, inputs, stage)
    calls = side.phases()
    assert set(calls) == {*PHASES, PREFILL}
    for call in calls.values():
        call()
    assert int(side.state.updates) == 1 and int(side.state.skipped) == 0


@pytest.mark.parametrize("stage", STAGES)
def test_the_other_side_takes_the_same_step(prepared, stage):
    folder, inputs = prepared
    side = TorchSide(folder, inputs, stage, compiled=False)
    before = [parameter.clone() for parameter in side.model.trained]
    side.step()()
    assert any(not bool((old == new).all()) for old, new in zip(before, side.model.trained))
    assert tuple(side.phases()) == PHASES


@pytest.mark.slow
def test_bfloat16_is_close_on_both_sides(prepared):
    folder, inputs = prepared
    exact = TorchSide(folder, inputs, "inference", compiled=False).checks()
    half = Inputs(dataclasses.replace(SIZES, dtype="bfloat16"), inputs.arrays)
    side = JaxSide(folder, half, "inference")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(side.parts["language"])} == {"bfloat16"}
    for found in (side.checks(), TorchSide(folder, half, "inference", compiled=False).checks()):
        assert found["greedy_ids"].shape == exact["greedy_ids"].shape
        gap = np.abs(found["latents"].astype(np.float32) - exact["latents"]).max() / np.abs(exact["latents"]).max()
        assert 1e-5 < gap < unified_step.TOLERANCE["bfloat16"]["latents"]
        np.testing.assert_allclose(found["rewards"], exact["rewards"], atol=0.05)


@pytest.mark.slow
def test_shares_come_from_the_work_of_the_phases(prepared):
    folder, inputs = prepared
    once = JaxSide(folder, inputs, "gen_for_und").work()
    longer = dataclasses.replace(SIZES, steps=2 * SIZES.steps, tokens=2 * SIZES.tokens - 1)
    twice = JaxSide(folder, Inputs(longer, inputs.arrays), "gen_for_und").work()
    assert twice["denoising_flops"] == 2 * once["denoising_flops"] > 0
    assert (
        twice["decoding_bytes"]
        >= 2 * once["decoding_bytes"]
        > 2 * (SIZES.tokens - 1) * 4 * SMALL.vocabulary * SMALL.width
    )
    rates = machine_rates("float32")
    assert 1e8 < rates["matrix_rate"] < 1e15 and 1e7 < rates["copy_bandwidth"] < 1e13
    row = {"denoising": 2.0, "sampling": 3.0, PREFILL: 1.0}
    assert unified_step.shares(
        row, {"denoising_flops": 4.0, "decoding_bytes": 6.0}, {"matrix_rate": 8.0, "copy_bandwidth": 12.0}
    ) == {"denoising_share": 0.25, "decoding_share": 0.25}
    assert unified_step.shares(row, {}, rates) == {}


def test_sizes_are_checked():
    with pytest.raises(SystemExit, match="guidance_scale is 1.0"):
        unified_step.read_options(["--guidance_scale=1"])


@pytest.mark.slow
def test_memory_of_inference_grows_linearly_with_the_caption(prepared):
    system = open_system(prepared[0], 64)
    settings = dict(steps=2, guidance_scale=5.0, repeats=0)
    first, second, fourth = (
        measure(system, Case("captions", 64, tokens, group=8, batch=1), **settings)["temporary_bytes"]
        for tokens in (256, 512, 1024)
    )
    text = system.model.captioner.text
    cache = 8 * 2 * 4 * text.layers * text.key_heads * text.head_width  # of one token of all rows
    assert abs((fourth - second) - 2 * (second - first)) < 0.1 * (fourth - second)
    assert cache < (fourth - second) / 512 < 2 * cache


@pytest.mark.slow
def test_every_case_of_inference_runs_once(prepared):
    assert len(set(cases())) == len(list(cases())) and {case.kind for case in cases()} == {"captions", "pictures"}
    found = measure(
        open_system(prepared[0], 64), Case("pictures", 64, 5, group=2, batch=1), steps=2, guidance_scale=5.0, repeats=1
    )
    assert found["seconds"] > 0 and len(line(found).split("|")) == 11


@pytest.mark.slow
def test_a_picture_that_the_decoder_cannot_draw_costs_no_other_case(prepared, monkeypatch, tmp_path, capsys):
    sizes = Case("pictures", 64, 5, batch=1), Case("pictures", 1024, 5, batch=1), Case("pictures", 64, 5, batch=2)
    monkeypatch.setattr(inference_scaling, "cases", lambda: iter(sizes))
    monkeypatch.setattr(
        sys, "argv", ["inference_scaling", f"--checkpoint={prepared[0]}", "--repeats=0", f"--json={tmp_path / 'rows'}"]
    )
    inference_scaling.main()
    assert [json.loads(row)["batch"] for row in (tmp_path / "rows").read_text().splitlines()] == [1, 2]
    said = capsys.readouterr()
    assert said.out.count("| pictures | 64 |") == 2 and "pictures of 1024" in said.err
