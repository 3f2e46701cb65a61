"""The benchmark of whole steps: both sides agree on a small model, and its calls run."""

import numpy as np
import pytest

from benchmarks import unified_step
from benchmarks.jax_side import JaxSide, make_inputs
from benchmarks.mini_checkpoint import SMALL, write_checkpoint
from benchmarks.step_settings import PHASES, STAGES, Inputs, Settings
from benchmarks.torch_side import TorchSide

SIZES = Settings(images=2, group=2, tokens=5, steps=2, window=1, image_size=64, lora_rank=4)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A checkpoint and inputs that were written and read back."""
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder, SMALL)
    make_inputs(folder, SIZES).save(folder / "place")
    return folder, Inputs.load(folder / "place")


def test_both_sides_compute_the_same(prepared):
    folder, inputs = prepared
    ours, theirs = JaxSide(folder, inputs, "inference").checks(), TorchSide(folder, inputs, "inference", compiled=False).checks()
    np.testing.assert_array_equal(ours["greedy_ids"], theirs["greedy_ids"])
    assert ours["greedy_ids"].shape == (SIZES.images, SIZES.tokens) and len(set(ours["greedy_ids"].ravel().tolist())) > 2
    np.testing.assert_allclose(ours["latents"], theirs["latents"], atol=1e-4 * np.abs(theirs["latents"]).max())
    np.testing.assert_allclose(ours["rewards"], theirs["rewards"], atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_phases_of_a_step_update_the_adapter(prepared, stage):
    folder, inputs = prepared
    side = JaxSide(folder, inputs, stage)
    calls = side.phases()
    assert tuple(calls) == PHASES
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


def test_sizes_are_checked():
    with pytest.raises(SystemExit, match="guidance_scale is 1.0"):
        unified_step.read_options(["--guidance_scale=1"])
