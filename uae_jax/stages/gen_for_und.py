"""Generation for understanding: settings and the compiled step; the method is `rl.caption_policy`."""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from jax import Array

from uae_jax import trees
from uae_jax.models.qwen2_5_vl.model import ADAPTER_PATTERN
from uae_jax.nn.lora import init_lora
from uae_jax.rl import caption_policy
from uae_jax.rl.caption_policy import CaptionPolicy
from uae_jax.rl.rewards import RewardConfig
from uae_jax.training.optimizer import OptimizerConfig
from uae_jax.training.step import Algorithm, make_train_step, supervised

TRAIN = ("lora", "full")


@dataclasses.dataclass(frozen=True)
class GenForUndConfig:
    """Settings of the stage.

    Attributes:
      steps, batch_size: train steps, and images in each.
      micro_batches, updates_per_rollout: see `training.step`; with several updates the old log-probabilities are
        replayed.
      group_size: captions of an image, at least 2.
      temperature, max_new_tokens: of caption sampling.
      sampler_steps, guidance_scale: of the drawings.
      shared_noise: one noise for the drawings of a group.
      condition_model: `reference` encodes captions with the adapter off; `policy` with it on, as the release does.
      aggregation, clip_low, clip_high, dual_clip (0 for none), kl_weight, kl_estimator: see
        `rl.losses.token_grpo_loss`.
      advantage_scale: `group`, `batch` or `none`.
      vae_chunk: pictures decoded at once; 0 for all.
      score_chunk: caption positions whose logits exist at once, or as many logits of all positions and a part of the
        vocabulary.
      gather_weights: with parameters cut over fsdp, gather the language model once a rollout instead of once a token;
        costs one copy of it on every device.
      train: `lora` or `full`; lora_rank: rank of a new adapter.
      reward: the similarity.
      objective: `grpo`, or `supervised` for the control: cross-entropy of the data set's captions, without rollouts.
      optimizer: see `training.optimizer`.
      ema_decay: ceiling of the moving average, which replaces the weights at the end; 0 for none.

    Raises:
      ValueError: an unknown choice.
    """

    steps: int
    batch_size: int
    optimizer: OptimizerConfig
    micro_batches: int = 1
    updates_per_rollout: int = 1
    group_size: int = 8
    temperature: float = 1.0
    max_new_tokens: int = 512
    sampler_steps: int = 10
    guidance_scale: float = 5.0
    shared_noise: bool = True
    condition_model: str = "reference"
    aggregation: str = "grpo"
    dual_clip: float = 0.0
    kl_estimator: str = "k3"
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_weight: float = 0.02
    advantage_scale: str = "group"
    vae_chunk: int = 0
    score_chunk: int = 64
    gather_weights: bool = False
    train: str = "lora"
    lora_rank: int = 32
    reward: RewardConfig = RewardConfig()
    objective: str = "grpo"
    ema_decay: float = 0.0

    def __post_init__(self):
        check_choices("gen_for_und", self.train, self.condition_model)


def check_choices(stage: str, train: str, condition_model: str) -> None:
    """Checks what the two RL stages share.

    Raises:
      ValueError: `train` is not `lora` or `full`, or `condition_model` not `reference` or `policy`.
    """
    if train not in TRAIN:
        raise ValueError(f"{stage}.train is {train!r}; choose lora or full")
    if condition_model not in ("reference", "policy"):
        raise ValueError(f"{stage}.condition_model is {condition_model!r}; choose reference or policy")


def check_start(parts: Mapping, stage: str, train: str) -> None:
    """Checks that a model as it was read can be trained as an RL stage's settings say.

    Args:
      parts: the model's dictionary.
      stage: `gen_for_und` or `und_for_gen`; train: of its settings.

    Raises:
      ValueError: the model has an adapter that a whole copy would leave out, or a whole copy that an adapter would.
    """
    name, adapter = ("language", "llm_lora") if stage == "gen_for_und" else ("transformer", "dit_lora")
    if train == "full" and f"{name}_lora" in parts:
        raise ValueError(
            f"config.{stage}.train is 'full', but the model's folder has an adapter, {adapter}, which a whole copy "
            "would leave out; add it to "
            f"the weights by --config.model.merge_adapters=True, or train it on by --config.{stage}.train=lora"
        )
    if train == "lora" and f"{name}_policy" in parts:
        raise ValueError(
            f"config.{stage}.train is 'lora', but the model's folder has a {name} model that was trained whole, llm "
            "beside llm_reference; train "
            f"it on by --config.{stage}.train=full, or remove llm_reference, so that llm is the reference too"
        )


def trainable_copy(parts: Mapping, name: str, train: str, rank: int, pattern: str, key: Array) -> dict:
    """The adapter or full copy that an RL stage trains: the one there is, or a new one equal to the base, in float32.

    Args:
      parts: the model's dictionary.
      name: `language` or `transformer`.
      train: `lora` or `full`.
      rank, pattern, key: of a new adapter.
    """
    part = f"{name}_{'lora' if train == 'lora' else 'policy'}"
    if part in parts:
        return {part: parts[part]}
    if train == "full":
        return {part: jax.tree.map(lambda leaf: leaf.astype(jnp.float32), parts[name])}
    return {part: init_lora(trees.name_key(key, part), parts[name], pattern, rank)}


def trainable(parts: Mapping, config: GenForUndConfig, key: Array) -> dict:
    """The captioner's adapter (or a whole copy of its language model)."""
    return trainable_copy(parts, "language", config.train, config.lora_rank, ADAPTER_PATTERN, key)


def algorithm(policy: CaptionPolicy) -> Algorithm:
    """Rollout and loss of `rl.caption_policy`."""
    if policy.objective == "supervised":
        return supervised(functools.partial(caption_policy.supervised_loss, policy))
    return Algorithm(functools.partial(caption_policy.rollout, policy), functools.partial(caption_policy.loss, policy))


def make_step(policy: CaptionPolicy, config: GenForUndConfig, optimizer: optax.GradientTransformation, shardings=None):
    """The compiled `train_step(state, frozen, batch, key)` of this stage."""
    step = make_train_step(
        algorithm(policy),
        optimizer,
        updates_per_rollout=config.updates_per_rollout,
        micro_batches=config.micro_batches,
        ema_decay=config.ema_decay or None,
    )
    return jax.jit(step, donate_argnames="state", out_shardings=shardings)
