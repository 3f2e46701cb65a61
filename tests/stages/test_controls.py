"""The controls of gen_for_und: a reward of captions without images, and supervised training of the same adapter."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stage_pieces import changed, largest_gap, make_run, nudged, stage_of, varied

from configs import ablations
from configs import bootstrap as bootstrap_config
from uae_jax import sharding
from uae_jax.methods.gen_for_und import PROMPT_FIELDS
from uae_jax.methods.method import make_rollout
from uae_jax.rollouts.captioning import encode_batch_images
from uae_jax.settings import Mistakes
from uae_jax.stages import run as run_module
from uae_jax.stages.bootstrap.run import bootstrap
from uae_jax.training.metrics import read_lines
from uae_jax.training.step import step_key

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def scorer_folder(model_folder, tmp_path_factory):
    """A scorer after two steps, made beside the random model."""
    config = bootstrap_config.get_config()
    config.phases, config.start, config.side, config.save_every = ("caption_scorer",), str(model_folder), 16, 0
    config.caption_scorer.steps, config.caption_scorer.batch_size, config.caption_scorer.optimizer.warmup_steps = (
        2,
        4,
        0,
    )
    config.caption_scorer.text = dict(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=33
    )
    workdir = tmp_path_factory.mktemp("scorer")
    assert bootstrap(config, workdir) == workdir / "model"
    return workdir


@pytest.fixture(scope="module")
def judged(config, scorer_folder, tmp_path_factory):
    """A run whose reward looks at captions alone, and its gen_for_und stage."""
    reward = dict(names=(), weights=(), caption_weight=1.0)
    config = changed(
        config, model=dict(caption_scorer=str(scorer_folder)), gen_for_und=dict(reward=reward), stages=("gen_for_und",)
    )
    run = make_run(config, tmp_path_factory.mktemp("judged"))
    return run, stage_of(run, "gen_for_und")


def test_the_scorer_keeps_the_image_tower_of_the_reward(judged):
    run, _ = judged
    encoders = run.parts["encoders"]
    for ours, theirs in zip(
        jax.tree.leaves(encoders["caption_scorer"]["vision"]), jax.tree.leaves(encoders["clip"]["vision"]), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_a_caption_reward_does_not_look_at_reconstructions(judged):
    _, stage = judged
    key = step_key(stage.key, "rollout", 0)
    broken = stage.frozen | {
        "transformer": jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), stage.frozen["transformer"])
    }
    found = jax.jit(functools.partial(make_rollout, stage.method))(stage.trained, broken, stage.batch, key)
    assert np.isfinite(found["metrics"]["reward_caption"][0]) and "reward_clip" not in found["metrics"]
    advantage = np.asarray(found["samples"]["advantage"])
    assert np.isfinite(advantage).all() and np.abs(advantage).max() > 0.1


def test_a_caption_weight_needs_its_scorer_and_its_stage(config, judged, tmp_path):
    _, stage = judged
    with pytest.raises(ValueError, match="needs model.caption_scorer"):
        dataclasses.replace(stage.method, system=dataclasses.replace(stage.method.system, scorer=None))
    with pytest.raises(Mistakes, match="needs config.model.caption_scorer, a folder"):
        values = changed(config, stages=("gen_for_und",), gen_for_und=dict(reward=dict(caption_weight=1.0)))
        run_module.run(values, tmp_path / "new")
    with pytest.raises(ValueError, match="config.und_for_gen.reward.caption_weight is 1.0, but und_for_gen does not"):
        make_run(changed(config, und_for_gen=dict(reward=dict(caption_weight=1.0))), tmp_path)


def test_supervised_gradient_is_that_of_grpo_when_every_true_caption_is_worth_one(whole):
    stage = stage_of(whole, "gen_for_und", objective="supervised", aggregation="token_mean", kl_weight=0.0)
    grpo = varied(stage.method, objective="grpo")
    adapter = {"language_lora": nudged(stage.trained["language_lora"])}
    batch, parts = stage.batch, {**stage.frozen, **adapter}

    def told(params):
        return stage.method.loss(params, stage.frozen, {"samples": batch}, stage.key)[:2]

    def rewarded(params):
        samples = {
            **{name: batch[name] for name in PROMPT_FIELDS},
            "advantage": jnp.ones((len(batch["pixels"]), 1)),
            "image_embeds": encode_batch_images(stage.method.system.model, parts, batch),
            "tokens": batch["caption_ids"][:, None],
            "mask": batch["caption_mask"][:, None],
        }
        return grpo.loss(params, stage.frozen, {"samples": samples}, stage.key)[:2]

    (_, count), expected = jax.jit(jax.value_and_grad(rewarded, has_aux=True))(adapter)
    (_, tokens), gradient = jax.jit(jax.value_and_grad(told, has_aux=True))(adapter)
    assert float(tokens) == float(count) == np.asarray(batch["caption_mask"]).sum()
    assert largest_gap(gradient, expected) < 1e-4
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient)) > 1e-3


def test_supervised_training_lowers_its_loss_and_trains_the_adapter_alone(whole):
    stage = stage_of(whole, "gen_for_und", objective="supervised")
    state, losses = stage.state(), []
    with sharding.in_use(whole.mesh):
        step = stage.step(state)
        for number in range(5):
            state, metrics = step(state, stage.frozen, stage.batch, jax.random.key(number))
            losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] and set(state.params) == {"language_lora"}


@pytest.mark.slow
def test_an_arm_of_the_ablations_runs_to_its_end(config, scorer_folder, tmp_path, monkeypatch):
    values = ablations.get_config("caption_similarity").to_dict()
    values |= {name: config[name] for name in ("data", "evaluation", "sampler", "loop")}
    values["model"] |= dict(folder=config["model"]["folder"], caption_scorer=str(scorer_folder))
    small = ("steps", "batch_size", "group_size", "max_new_tokens", "sampler_steps", "lora_rank", "optimizer")
    values["gen_for_und"] |= {name: config["gen_for_und"][name] for name in small}
    values["gen_for_und"]["reward"] |= dict(overlong_penalty=0.0)
    make_mesh = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda mesh, devices=None: make_mesh(mesh, devices or jax.devices()[:1]))
    (stage,) = run_module.run(values, tmp_path / "run")["stages"]
    assert stage["name"] == "gen_for_und" and stage["steps"] == config["gen_for_und"]["steps"]
    kinds = ("background", "position", "size", "colour", "shape")
    assert {f"fact_recall_{kind}" for kind in kinds} <= stage["before"].keys() == stage["after"].keys()
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert all(line["reward"] == pytest.approx(line["reward_caption"]) for line in lines if "reward" in line)
