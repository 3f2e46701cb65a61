"""The benchmark of a step of one network: both sides compute the same, and its table has every piece."""

import json

import pytest

from benchmarks import janus_step
from benchmarks.janus_settings import SIZES, Settings

SMALL = Settings(images=2, group=2, drawings=2, tokens=6, guidance=2.0, lora_rank=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("janus")
    janus_step.write_model(place, SIZES["small"], SMALL.lora_rank)
    return place


@pytest.mark.slow
def test_both_sides_compute_the_same(folder):
    found = janus_step.compare(folder, SIZES["small"], SMALL)
    assert found["greedy captions"] == found["greedy drawings"] == 0
    assert found.keys() > {"caption_loss", "image_loss", "caption_grad_norm", "image_grad_norm"}


@pytest.mark.slow
def test_another_step_is_not_the_same(folder, monkeypatch):
    opened = janus_step.open_torch

    def other(*arguments):
        side = opened(*arguments)
        side.settings = Settings(**{**vars(SMALL), "kl_weight": 1.0})
        return side

    monkeypatch.setattr(janus_step, "open_torch", other)
    with pytest.raises(ValueError, match="the sides differ in .*caption_grad_norm"):
        janus_step.compare(folder, SIZES["small"], SMALL)


@pytest.mark.slow
def test_both_sides_are_timed_in_every_piece(folder):
    rows = {side: janus_step.measured(side, folder, SIZES["small"], SMALL, 1) for side in ("jax", "torch")}
    text = janus_step.table(json.loads(json.dumps(rows)))
    assert all(f"| {name} |" in text for name in ("captions", "drawings", "reward", "reference", "update", "total"))
