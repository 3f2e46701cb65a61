"""A run whose first RL stage trips its guard: the stage ends with its good checkpoint, and the next one starts from
there.
"""

import json

import jax
import numpy as np
import pytest
from stage_pieces import changed

from uae_jax import sharding
from uae_jax.stages import run as run_module
from uae_jax.training.checkpoint import Checkpoints
from uae_jax.training.metrics import read_lines


@pytest.mark.slow
def test_a_tripped_stage_hands_its_good_checkpoint_to_the_next(config, tmp_path, monkeypatch):
    make_mesh, results, starts = sharding.make_mesh, {}, {}
    monkeypatch.setattr(sharding, "make_mesh", lambda mesh, devices=None: make_mesh(mesh, devices or jax.devices()[:1]))

    class Watched(run_module.Run):
        def train_stage(self, name, *arguments):
            starts[name] = jax.tree.map(np.array, self.parts["language_lora"])
            results[name] = super().train_stage(name, *arguments)
            return results[name]

    monkeypatch.setattr(run_module, "Run", Watched)
    # the policy is the reference until its first update: the mean KL of steps 1 and 2 is the first above 0, at step 2
    short = changed(
        config,
        stages=("gen_for_und", "und_for_gen"),
        loop=dict(save_every=1, eval_every=0),
        evaluation=dict(geneval_per_tag=0),
        guard=dict(window=2, kl=1e-9, reward_fall=0.0, truncated=0.0, flow_kl=0.0),
    )
    summary = run_module.run(short, tmp_path / "run")
    tripped, last = summary["stages"]
    assert (
        tripped["guard"]["what"],
        tripped["guard"]["step"],
        tripped["guard"]["restored_step"],
        tripped["steps"],
    ) == ("kl", 2, 1, 1)
    assert last["guard"] is None and last["steps"] == 2 and last["before"] == tripped["after"]
    events = [line for line in read_lines(tmp_path / "run" / "metrics.jsonl") if "guard" in line]
    assert [(event["stage"], event["guard"]) for event in events] == [("gen_for_und", tripped["guard"])]
    assert "was stopped by the guard" in (tmp_path / "run" / "report.html").read_text()

    restored = results["gen_for_und"].state
    assert int(restored.step) == 1
    with Checkpoints(tmp_path / "run" / "checkpoints" / "gen_for_und") as checkpoints:
        kept = checkpoints.restore(restored, 1).state
    jax.tree.map(np.testing.assert_array_equal, starts["und_for_gen"], kept.params["language_lora"])
    assert (
        max(np.abs(a - b).max() for a, b in zip(*(jax.tree.leaves(starts[name]) for name in starts), strict=True)) > 0
    )
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary


@pytest.mark.parametrize("wrong", [dict(kl=-1.0), dict(margin=2.0), dict(gradient_ratio=0.0)])
def test_wrong_bounds_are_refused_before_anything_is_written(config, tmp_path, wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"^config.guard.{name} is "):
        run_module.run(changed(config, guard=wrong), tmp_path / "new")
    assert not (tmp_path / "new").exists()
