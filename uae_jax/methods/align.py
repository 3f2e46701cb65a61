"""Alignment of a new projector: the projector alone learns, by the loss of pretraining.

A captioner that was not made for this decoder has no projector. Its random output would first move the transformer
away from what it knows. Source: UniWorld-V1 (arXiv 2506.03147), whose first stage trains the projector alone
(`only_tune_mlp2`) at a rate of 1e-3. Choices where the source is silent:

1. A thousand steps, with the batch, the noise levels and the caption dropout of `pretrain`.
2. A run that pretrains begins with this stage where `convert import` has made a new projector (`after_import`).
"""

import dataclasses
from typing import ClassVar

from uae_jax.methods.pretrain import Pretrain, PretrainConfig
from uae_jax.settings import changed, setting
from uae_jax.training.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class AlignConfig(PretrainConfig):
    """Settings of the alignment."""

    steps: int = changed(PretrainConfig, "steps", 1_000)
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-3, warmup_steps=50)
    after_import: bool = setting(
        True, "whether a run that pretrains begins with this stage where the projector is new (convert import)"
    )


@dataclasses.dataclass(frozen=True)
class Align(Pretrain):
    """The method; a `methods.method.Method`."""

    Settings: ClassVar[type] = AlignConfig

    @staticmethod
    def trains(settings: PretrainConfig) -> tuple[str, ...]:
        """The projector."""
        return ("projector",)
