"""Understanding for generation: the stage in which the decoder learns from the captioner, by one of several methods.

Source: arXiv 2509.09666, section 3. The frozen captioner writes one caption of each of B images. The transformer
generates G images from it. The reward is the similarity of a generated image and the original. The methods differ in
how the transformer learns from these rewards: `flow_grpo`, `diffusion_nft`.

1. A share of the captions may be the data set's own (`data_captions`); the paper has none.
2. The captions are encoded by the reference model; `condition` has the other ways.

Shape letters: B images, G generated images of an image, N = B * G.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from uae_jax.methods.gathered import gathered_decoder
from uae_jax.methods.method import STAGES, Described
from uae_jax.methods.rollout_captions import captions_first, write_captions
from uae_jax.methods.stage_settings import DecodedRollouts, SamplerConfig, UpdateSettings, rollout_denoising
from uae_jax.models.decoder import Context
from uae_jax.models.language.generate import Completion
from uae_jax.nn.constrain import constrain_rows, ways
from uae_jax.rewards.similarity import chosen_encoders, mixed_reward, term_metrics
from uae_jax.rl.losses import Metrics
from uae_jax.rollouts.captioning import (
    CAPTION_FIELDS,
    IMAGE_FIELDS,
    PROMPT_FIELDS,
    caption_metrics,
    drawn_captions,
)
from uae_jax.rollouts.reconstruction import Denoising, caption_context, decode, shuffled
from uae_jax.settings import changed, sections, setting
from uae_jax.training.optimizer import OptimizerConfig
from uae_jax.training.step import OldPolicy

STAGE = "und_for_gen"


def _method_sections() -> dict[str, type]:
    return {name: method.Settings for name, method in STAGES[STAGE].methods.items()}


@dataclasses.dataclass(frozen=True)
class DecoderMethodSettings(UpdateSettings):
    """What every method of the stage has."""

    ema_decay: float = changed(UpdateSettings, "ema_decay", 0.9, source="arXiv 2505.05470")
    gradient_noise: bool = setting(
        False,
        "log the cosine of the gradients of an update's two halves, and the noise scale that follows",
        source="arXiv 1812.06162",
    )

    shuffled_rewards: bool = setting(
        False, "control: the rewards that are compared with each other are shuffled, and say nothing"
    )

    def rows_of(self, group_size: int) -> int:
        """Rows of a rollout that belong to one image; a row may hold several drawings."""
        return group_size

    def compared_of(self, group_size: int) -> int:
        """Drawings whose rewards are compared with each other, of the `group_size` of an image."""
        return group_size

    @property
    def old_policy(self) -> OldPolicy | None:
        """How the policy of the rollouts follows the trained one; None where that one makes them."""
        return None


@dataclasses.dataclass(frozen=True)
class UndForGenConfig(DecodedRollouts):
    """Settings of the stage; those of each method stand in a section of the method's name."""

    # flow_grpo: 48 groups of 24, learning rate 3e-4
    batch_size: int = changed(DecodedRollouts, "batch_size", 48, source="arXiv 2505.05470")
    group_size: int = changed(DecodedRollouts, "group_size", 24, source="arXiv 2505.05470")
    temperature: float = changed(DecodedRollouts, "temperature", 0.7)
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=3e-4)
    method: str = setting("flow_grpo", "how the transformer learns; its settings are in the section of that name")
    data_captions: float = setting(
        0.0, "share of the images whose caption is the data set's own instead of the captioner's", low=0, high=1
    )
    methods: dict[str, Any] = sections(_method_sections)

    def problems(self) -> Iterator[str]:
        """The mistakes of ranges, an unknown method, and what the chosen method refuses of the stage's settings."""
        yield from super().problems()
        if self.method not in self.methods:
            yield f"method is {self.method!r}; choose one of {', '.join(self.methods)}"
        if not getattr(self.methods.get(self.method), "writes_captions", False):
            yield from self.reward.caption_terms(STAGE)
        check = getattr(self.methods.get(self.method), "stage_problems", None)
        yield from (f"{self.method}.{problem}" for problem in (check(self) if check else ()))

    @property
    def own(self) -> Any:
        """The settings of the chosen method."""
        return self.methods[self.method]

    @property
    def samples_per_image(self) -> int:
        """Rows of a group, which stay in one update."""
        return self.own.rows_of(self.group_size)

    @property
    def draws(self) -> bool:
        """Not where the image itself is the only sample."""
        return self.samples_per_image > 1

    @property
    def captions_per_image(self) -> int:
        """One, unless the method draws several captions of an image."""
        return getattr(self.own, "captions", 1)

    @property
    def compared_samples(self) -> int:
        """Drawings whose rewards are compared with each other."""
        return self.own.compared_of(self.group_size)

    @property
    def gradient_noise(self) -> bool:
        """Of the chosen method."""
        return self.own.gradient_noise

    @property
    def updates_per_rollout(self) -> int:
        """Of the chosen method."""
        return self.own.updates_per_rollout

    @property
    def advantage_scale(self) -> str:
        """Of the chosen method."""
        return self.own.advantage_scale

    @property
    def old_policy(self) -> OldPolicy | None:
        """Of the chosen method."""
        return self.own.old_policy

    @property
    def guidance_scale(self) -> float:
        """Of the chosen method's rollouts; 1 where it has none."""
        return getattr(self.own, "guidance_scale", 1.0)

    @property
    def ema_decay(self) -> float:
        """Of the chosen method."""
        return self.own.ema_decay


@dataclasses.dataclass(frozen=True)
class DecoderMethod:
    """What the methods of the stage share; they add `rollout` and `loss`."""

    reinforcement: ClassVar[bool] = True
    kl_bound: ClassVar[str] = "flow_kl"  # a mean over latent values, not over tokens

    settings: UndForGenConfig
    sampler: SamplerConfig
    system: Described

    @staticmethod
    def trains(settings: UndForGenConfig) -> tuple[str, ...]:
        """The transformer: its adapter, or a fully fine-tuned copy."""
        return (settings.trained_part("transformer"),)

    @staticmethod
    def needs_captions(settings: UndForGenConfig) -> bool:
        """Only where a share of the captions is the data set's own."""
        return settings.data_captions > 0

    @staticmethod
    def reads(settings: UndForGenConfig) -> tuple[str, ...]:
        """What the captioner sees, images for the rewards, and captions where a share of them is the data set's own."""
        return (*IMAGE_FIELDS, *PROMPT_FIELDS, "pixels", *(CAPTION_FIELDS if settings.data_captions else ()))

    @property
    def own(self) -> Any:
        """The method's settings."""
        return self.settings.own

    @property
    def replay(self) -> bool:
        """Whether the rollout is scored again for what its policy did: the policy of an update may be another one."""
        return self.own.updates_per_rollout > 1 or self.own.old_policy is not None

    @property
    def denoising(self) -> Denoising:
        """The sampler of rollouts."""
        return rollout_denoising(self.system.model, self.settings, self.sampler, self.settings.guidance_scale)

    def prepared(self, frozen: Mapping) -> Mapping:
        """See `gathered`."""
        return gathered_decoder(self.settings, frozen)

    def captions_first(self, params: Mapping, frozen: Mapping, batch: Mapping, key: Array) -> dict[str, Completion]:
        """See `rollout_captions`."""
        return captions_first(self.settings, self.system, params, frozen, batch, key)

    def contexts(self, parts: Mapping, batch: Mapping, key: Array) -> tuple[Context, Context | None, Metrics]:
        """What the decoder reads.

        Args:
          parts: the model.
          batch: B images with prompts (`data.loader`).
          key: of the step.

        Returns:
          (`[N, S, Dc]`, mask `[N, S]`), one for each row of the rollout, those of the negative prompt `[1, S, Dc]` or
          None, and metrics of the captions.
        """
        settings, model = self.settings, self.system.model
        completion = write_captions(settings, self.system, parts, batch, key)
        tokens, lengths = drawn_captions(settings.data_captions, completion, batch, key)
        ended = completion.finished if not settings.data_captions else jnp.ones_like(completion.finished)
        mask = jnp.arange(tokens.shape[1]) < (lengths + ended)[:, None]
        positive, negative = caption_context(model, parts, self.denoising, batch, tokens, mask, lengths)
        rows = settings.samples_per_image
        positive = constrain_rows(jax.tree.map(lambda leaf: leaf.repeat(rows, axis=0), positive))
        return positive, negative, caption_metrics(completion, 1)

    def keep_contexts(self, rollout: dict[str, Any], context: Context) -> dict[str, Any]:
        """The rollout with the context of its images: once an image on one device, else with each sample.

        G copies of a context are gigabytes where one device has all samples. Over several devices a sample keeps its
        own: reading that of an image would gather the contexts of all of them.
        """
        fields = {"context": context[0], "context_mask": context[1]}
        if ways("batch") > 1:
            return rollout | {"samples": constrain_rows(rollout["samples"] | fields)}
        return rollout | {"images": {name: leaf[:: self.settings.samples_per_image] for name, leaf in fields.items()}}

    @staticmethod
    def with_contexts(rollout: Mapping) -> dict[str, Array]:
        """The samples of a slice of a rollout, each with the context of its image."""
        samples, images = dict(rollout["samples"]), rollout["shared"].get("images", {})
        return samples | {name: leaf[samples["image"]] for name, leaf in images.items()}

    def rewards(
        self, parts: Mapping, original: Float[Array, "b H W 3"], latents: Float[Array, "n h w c"]
    ) -> tuple[Float[Array, " n"], dict]:
        """Rewards `[N]` of generated latents `[N, h, w, C]`, and their metrics."""
        total, terms = self.mixed(parts, original, latents, self.settings.group_size)
        return total.reshape(-1), term_metrics(terms)

    def paid(self, reward: Float[Array, " n"], sample_ids: Array, key: Array) -> Float[Array, " n"]:
        """The rewards that drawings are paid: their own, or in the control those of each other in random order.

        The order follows from the step's key and the image's sample id.
        """
        if not self.own.shuffled_rewards:
            return reward
        return shuffled(reward, self.settings.compared_samples, sample_ids, key)

    def mixed(
        self,
        parts: Mapping,
        original: Float[Array, "b H W 3"],
        latents: Float[Array, "n h w c"],
        group: int,
        unfinished: Bool[Array, "b g"] | None = None,
    ) -> tuple[Float[Array, "b g"], dict]:
        """Rewards `[B, G]` of the latents of G drawings of an image, and their terms; see `similarity.mixed_reward`."""
        reward, pixels = self.settings.reward, decode(self.system.model, parts, self.denoising, latents)
        encoders = chosen_encoders(reward, self.system.encoders)
        return mixed_reward(reward, encoders, parts["encoders"], original, pixels, group, unfinished=unfinished)
