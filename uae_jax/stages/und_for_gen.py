"""Understanding for generation: settings and the compiled step; the methods are `rl.flow_policy` and
`rl.nft_policy`.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import optax
from jax import Array

from uae_jax.models.sd3.transformer import ATTENTION_ADAPTER
from uae_jax.rl import flow_policy, nft_policy
from uae_jax.rl.flow_policy import FlowPolicy
from uae_jax.rl.nft_policy import NftPolicy
from uae_jax.rl.rewards import RewardConfig
from uae_jax.stages.gen_for_und import check_choices, trainable_copy
from uae_jax.training.optimizer import OptimizerConfig
from uae_jax.training.step import Algorithm, make_train_step

METHODS = {"flow_grpo": (FlowPolicy, flow_policy), "nft": (NftPolicy, nft_policy)}


@dataclasses.dataclass(frozen=True)
class UndForGenConfig:
    """Settings of the stage.

    Attributes:
      steps, batch_size: train steps, and images in each.
      method: `flow_grpo` (`rl.flow_policy`) or `nft` (`rl.nft_policy`).
      micro_batches, updates_per_rollout: see `training.step`.
      group_size: drawings of a caption, at least 2.
      temperature, max_new_tokens: of the frozen captioner.
      sampler_steps, guidance_scale: of the rollouts.
      data_captions: share of the images whose caption is the data set's own instead of the captioner's.
      shared_noise: one initial noise for the drawings of a group.
      step_rule, noise_level, window, window_low, window_high: see `rl.flow_policy.FlowPolicy`.
      clip_range, kl_weight, kl_kind, guard: see `rl.losses.flow_grpo_loss`.
      noise_levels, time_scheme, time_shift, strength, advantage_bound: of `nft`, see `rl.nft_policy.NftPolicy`; the
        settings between `step_rule` and `guard`, and `shared_noise`, are of `flow_grpo`, but `kl_weight` is of both.
      advantage_scale: `group`, `batch` or `none`.
      condition_model: `reference` encodes captions with the adapter off; `policy` with it on, as the release does.
      vae_chunk: pictures decoded at once; 0 for all.
      gather_weights: with parameters cut over fsdp, gather the language model once a rollout instead of once a token;
        costs one copy of it on every device.
      train: `lora` or `full`; lora_rank: rank of a new adapter.
      reward: the similarity.
      optimizer: see `training.optimizer`.
      ema_decay: ceiling of the moving average, which replaces the weights at the end; 0 for none.

    Raises:
      ValueError: an unknown choice, or a reward of captions.
    """

    steps: int
    batch_size: int
    optimizer: OptimizerConfig
    method: str = "flow_grpo"
    micro_batches: int = 1
    updates_per_rollout: int = 2
    group_size: int = 24
    temperature: float = 0.7
    max_new_tokens: int = 512
    data_captions: float = 0.0
    shared_noise: bool = False
    sampler_steps: int = 10
    guidance_scale: float = 1.0
    step_rule: str = "sde"
    noise_level: float = 0.7
    window: int = 3
    window_low: int = 0
    window_high: int = 5
    clip_range: float = 1e-5
    kl_weight: float = 0.04
    kl_kind: str = "gaussian_nodt"
    guard: bool = False
    noise_levels: int = 2
    time_scheme: str = "uniform"
    time_shift: float = 3.0
    strength: float = 1.0
    advantage_bound: float = 5.0
    advantage_scale: str = "batch"
    condition_model: str = "reference"
    vae_chunk: int = 0
    gather_weights: bool = False
    train: str = "lora"
    lora_rank: int = 32
    reward: RewardConfig = RewardConfig()
    ema_decay: float = 0.9

    def __post_init__(self):
        check_choices("und_for_gen", self.train, self.condition_model)
        if self.method not in METHODS:
            raise ValueError(f"und_for_gen.method is {self.method!r}; choose one of {', '.join(METHODS)}")
        self.reward.check_drawings_alone("und_for_gen")


def trainable(parts: Mapping, config: UndForGenConfig, key: Array) -> dict:
    """The transformer's adapter (or a whole copy of it)."""
    return trainable_copy(parts, "transformer", config.train, config.lora_rank, ATTENTION_ADAPTER, key)


def algorithm(policy: FlowPolicy | NftPolicy) -> Algorithm:
    """Rollout and loss of the policy's method."""
    module = next(module for kind, module in METHODS.values() if isinstance(policy, kind))
    return Algorithm(functools.partial(module.rollout, policy), functools.partial(module.loss, policy))


def make_step(
    policy: FlowPolicy | NftPolicy, config: UndForGenConfig, optimizer: optax.GradientTransformation, shardings=None
):
    """The compiled `train_step(state, frozen, batch, key)` of this stage."""
    step = make_train_step(
        algorithm(policy),
        optimizer,
        updates_per_rollout=config.updates_per_rollout,
        micro_batches=config.micro_batches,
        group_size=config.group_size,
        ema_decay=config.ema_decay or None,
    )
    return jax.jit(step, donate_argnames="state", out_shardings=shardings)
