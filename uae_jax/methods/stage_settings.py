"""Settings that stages share, and what follows from them: how rollouts are sampled and what is trained."""

import dataclasses
from collections.abc import Iterator

from uae_jax.diffusion.schedule import KINDS
from uae_jax.models.uae import UAE
from uae_jax.rewards.similarity import RewardConfig
from uae_jax.rollouts.conditions import CONDITIONS
from uae_jax.rollouts.reconstruction import Denoising, noise_levels
from uae_jax.settings import Settings, setting
from uae_jax.training.optimizer import OptimizerConfig
from uae_jax.training.step import OldPolicy


@dataclasses.dataclass(frozen=True)
class SamplerConfig(Settings):
    """Noise levels of every sampler."""

    shift: float = setting(3.0, "static shift of the noise levels", above=0, source="SD3, arXiv 2403.03206, eq. 23")
    schedule: str = setting(
        "diffusers",
        "kind of schedule: that of diffusers' pipeline of this decoder, or one of diffusion.schedule",
        choices=KINDS,
    )


@dataclasses.dataclass(frozen=True)
class UpdateSettings(Settings):
    """How the samples of a rollout become updates."""

    updates_per_rollout: int = setting(1, "optimizer updates of one rollout or batch", low=1)
    ema_decay: float = setting(
        0.0, "ceiling of the moving average, which replaces the weights at the end; 0 for none", low=0, high=1
    )


@dataclasses.dataclass(frozen=True)
class StageSettings(Settings):
    """What every stage has."""

    steps: int = setting(1_000, "train steps", low=1)
    batch_size: int = setting(32, "images a step", low=1)
    micro_batches: int = setting(
        1, "parts of an update whose gradients are summed; memory, not results", low=1, free=True
    )
    optimizer: OptimizerConfig = OptimizerConfig()

    @property
    def samples_per_image(self) -> int:
        """Samples of a rollout that belong to one image and stay in one update; settings of another number override it.

        A row that holds an image with all its captions is one sample.
        """
        return 1

    @property
    def rollout_parts(self) -> int:
        """Parts of a rollout that are made one after the other."""
        return 1

    @property
    def old_policy(self) -> OldPolicy | None:
        """How the policy of the rollouts follows the trained one; None where that one makes them."""
        return None

    @property
    def total_updates(self) -> int:
        """Optimizer updates of the stage."""
        return self.steps * getattr(self, "updates_per_rollout", 1)


@dataclasses.dataclass(frozen=True)
class SupervisedSettings(UpdateSettings, StageSettings):
    """What the stages share that learn without rewards."""


@dataclasses.dataclass(frozen=True)
class RolloutSettings(StageSettings):
    """What the stages share that learn from rewards."""

    group_size: int = setting(8, "samples of an image whose rewards are compared", low=2)
    rollout_parts: int = setting(
        1, "parts of a rollout that are sampled one after the other; memory, not results", low=1, free=True
    )
    temperature: float = setting(1.0, "of caption sampling; 0 is greedy", low=0)
    max_new_tokens: int = setting(512, "longest caption", unit="tokens", low=1)
    vae_chunk: int = setting(0, "images decoded at once; 0 for all; memory, not results", low=0, free=True)
    gather_weights: bool = setting(
        False,
        "gather a sharded language model once a rollout instead of once a token; costs a copy on every device",
        free=True,
    )
    train: str = setting("lora", "what is trained: an adapter, or a full fine-tuned copy", choices=("lora", "full"))
    lora_rank: int = setting(32, "rank of a new adapter", low=1, source="released UAE code")
    reward: RewardConfig = RewardConfig()

    def problems(self) -> Iterator[str]:
        """The mistakes of ranges, and a reward that compares with images of another part."""
        yield from super().problems()
        if self.reward.contrast and self.rollout_parts > 1:
            yield (
                f"rollout_parts is {self.rollout_parts}; reward.contrast compares with all images of a batch: "
                "set one of them to 1 and 0"
            )
        if self.batch_size % self.rollout_parts:
            yield f"rollout_parts is {self.rollout_parts}; it must divide batch_size, which is {self.batch_size}"

    @property
    def draws(self) -> bool:
        """Whether a step draws images; controls without rewards do not."""
        return True

    @property
    def captions_per_image(self) -> int:
        """Captions that a rollout writes of an image."""
        return self.group_size

    def trained_part(self, base: str) -> str:
        """Name of what is trained of a part: its adapter, or its fully fine-tuned copy."""
        return f"{base}_lora" if self.train == "lora" else f"{base}_policy"


@dataclasses.dataclass(frozen=True)
class DecodedRollouts(RolloutSettings):
    """What the stages share whose images a diffusion decoder generates from captions of another model."""

    sampler_steps: int = setting(10, "denoising steps of a rollout", low=1, source="released UAE code")
    condition: str = setting(
        "reference",
        "what the decoder reads: the caption alone, encoded by the reference or by the policy, or the caption's own "
        "states after the image",
        choices=CONDITIONS,
    )
    rollout_weights: str = setting(
        "model",
        "the captioner's kernels while it samples: as the model has them, or rounded to 8 bits, half the bytes that a "
        "token reads; captions are scored by the model itself, and log_prob_gap says how far the two are apart",
        choices=("model", "int8"),
    )
    gather_decoder: bool = setting(
        False,
        "gather what is frozen of the sharded transformer once a step instead of once an evaluation; costs a copy on "
        "every device",
        free=True,
    )
    rollout_slots: int = setting(
        0,
        "captions that one device samples at once, of all parts of a rollout together: one that ends makes room for "
        "the next, and no part waits for its longest; 0 for all of a part; the same captions, on one device",
        low=0,
        free=True,
    )
    rollout_ways: int = setting(
        0,
        "devices that share one gathered copy of the captioner while it samples, each reading its part for the rows of "
        "all; 0 for a copy on every device",
        low=0,
        free=True,
    )


def denoising(
    model: UAE,
    sampler: SamplerConfig,
    steps: int,
    guidance_scale: float,
    *,
    condition: str = "reference",
    vae_chunk: int = 0,
) -> Denoising:
    """The deterministic sampler of a stage or of an evaluation."""
    sigmas = noise_levels(model, steps, sampler.shift, sampler.schedule)
    return Denoising(sigmas, guidance_scale, condition, vae_chunk)


def rollout_denoising(
    model: UAE, settings: DecodedRollouts, sampler: SamplerConfig, guidance_scale: float
) -> Denoising:
    """The sampler of a stage's rollouts."""
    return denoising(
        model,
        sampler,
        settings.sampler_steps,
        guidance_scale,
        condition=settings.condition,
        vae_chunk=settings.vae_chunk,
    )
