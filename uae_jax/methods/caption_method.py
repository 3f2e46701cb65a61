"""What the methods share that train captions by what is drawn of them, whichever model writes and draws.

Shape letters: B images, G captions of an image, K drawings of a caption, T caption tokens.
"""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from jaxtyping import Array, Bool, Float

from uae_jax.methods.method import Described
from uae_jax.methods.stage_settings import RolloutSettings, SamplerConfig
from uae_jax.models.language import model as lm
from uae_jax.models.language.config import CaptionerConfig
from uae_jax.rewards.similarity import chosen_encoders, mixed_reward
from uae_jax.rl.advantages import SCALES
from uae_jax.settings import changed, setting
from uae_jax.training.optimizer import OptimizerConfig

Prompted = tuple[CaptionerConfig, dict[str, Any], Any, lm.Prefix]


@dataclasses.dataclass(frozen=True)
class CaptionSettings(RolloutSettings):
    """Settings of rollouts whose captions are drawn, and of the scores of captions."""

    # TRL's rate for adapters
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-5, warmup_steps=10)
    temperature: float = changed(RolloutSettings, "temperature", 1.0, above=0, low=None)
    guidance_scale: float = setting(
        5.0,
        "of the images that are drawn of captions; 1 is without",
        low=0,
        source="released UAE code; Janus-Pro, arXiv 2501.17811",
    )
    shared_noise: bool = setting(
        True, "drawings of all captions of an image begin with the same noise, or read the same random numbers"
    )
    advantage_scale: str = setting("group", "what advantages are divided by", choices=SCALES, source="arXiv 2402.03300")
    score_chunk: int = setting(
        lm.SCORE_CHUNK, "positions whose logits exist at once; memory, not results", low=1, free=True
    )
    objective: str = setting(
        "grpo", "grpo, or the control: cross-entropy of the data set's examples", choices=("grpo", "supervised")
    )

    @property
    def draws(self) -> bool:
        """Not where captions are told."""
        return self.objective != "supervised"


@dataclasses.dataclass(frozen=True)
class CaptionMethod(abc.ABC):
    """What such methods share; they add `read_prompts`, `reads`, `rollout` and their losses."""

    reinforcement: ClassVar[bool] = True
    kl_bound: ClassVar[str] = "kl"

    settings: Any
    sampler: SamplerConfig
    system: Described

    @staticmethod
    def trains(settings: CaptionSettings) -> tuple[str, ...]:
        """The language model: its adapter, or a fully fine-tuned copy."""
        return (settings.trained_part("language"),)

    @staticmethod
    def needs_captions(settings: CaptionSettings) -> bool:
        """Only the supervised control: in GRPO captions are written, and rewards compare images."""
        return settings.objective == "supervised"

    @property
    def replay(self) -> bool:
        """Whether the rollout is scored again for the old log-probabilities."""
        return self.settings.updates_per_rollout > 1

    @abc.abstractmethod
    def read_prompts(
        self, parts: Mapping, batch: Mapping, image_embeds: Float[Array, "b e d"], *, policy: bool
    ) -> Prompted:
        """Caption prompts with their images, as the trained captioner or the reference reads them.

        Args:
          parts: the model; batch: B prompts; image_embeds: of their images.
          policy: the trained captioner, or the reference.

        Returns:
          The captioner's sizes, its parameters, its adapter or None, and the prefix: what `completion_log_probs` takes.
        """

    def score_captions(self, parts: Mapping, samples: Mapping, *, trained: bool) -> lm.TokenScores:
        """Log-probabilities `[B, G, T]` of a rollout's captions under the policy or the reference."""
        return lm.completion_log_probs(
            *self.read_prompts(parts, samples, samples["image_embeds"], policy=trained),
            samples["tokens"],
            samples["mask"],
            temperature=self.settings.temperature,
            chunk=self.settings.score_chunk,
            with_entropy=trained,
            frozen_head="language_policy" not in parts,
        )

    def mixed(
        self,
        parts: Mapping,
        original: Float[Array, "b H W 3"],
        pixels: Float[Array, "n H W 3"],
        unfinished: Bool[Array, "b gk"],
        said: Float[Array, "b gk"] | None = None,
    ) -> tuple[Float[Array, "b gk"], dict]:
        """Rewards `[B, G * K]` of drawings, and their terms.

        Args:
          parts: with the `encoders`.
          original: the images.
          pixels: the drawings, those of an image together.
          unfinished: drawings whose caption has no end.
          said: similarities of captions and images, where the reward has them.
        """
        reward = self.settings.reward
        encoders, count = chosen_encoders(reward, self.system.encoders), unfinished.shape[1]
        return mixed_reward(reward, encoders, parts["encoders"], original, pixels, count, said, unfinished)
