"""Generation for understanding: the captioner learns, by GRPO, what the decoder can rebuild.

Source: arXiv 2509.09666, section 3; GRPO, arXiv 2402.03300. For each of B images, G captions are sampled. The frozen
decoder generates an image from each. The reward is the similarity of that image and the original. The decoder is part
of the environment: no gradient passes through it. Departures, and choices where the paper is silent:

1. The decoder reads the caption encoded by the reference model, so that training the captioner does not move the
   decoder's input. `condition="policy"` encodes it by the trained captioner, as the released inference does;
   `condition="caption_states"` takes the states with which the captioner wrote it, as version 5 describes.
2. The reconstructions of one image start from one noise, so that the advantage measures the caption alone.
3. Old log-probabilities are computed again by the function that the loss uses, where a rollout has several updates.
   With one update, the ratio is exactly 1.
4. `objective="supervised"` is the control: cross-entropy of the data set's captions, without rollouts.

Shape letters: B images, G captions of an image, T caption tokens.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from uae_jax import trees
from uae_jax.methods.caption_method import CaptionMethod, CaptionSettings, Prompted
from uae_jax.methods.gathered import gathered_decoder
from uae_jax.methods.method import Loss
from uae_jax.methods.rollout_captions import captions_first, write_captions
from uae_jax.methods.stage_settings import DecodedRollouts, UpdateSettings, rollout_denoising
from uae_jax.methods.token_loss import TokenLoss, token_loss
from uae_jax.models import condition, uae
from uae_jax.models.language import model as lm
from uae_jax.models.language.generate import Completion
from uae_jax.models.qwen2_5_vl import model as qwen
from uae_jax.nn.constrain import constrain_rows
from uae_jax.rewards import caption_similarity
from uae_jax.rewards.similarity import term_metrics
from uae_jax.rl.losses import gap_metrics
from uae_jax.rollouts.captioning import (
    CAPTION_FIELDS,
    IMAGE_FIELDS,
    PROMPT_FIELDS,
    caption_metrics,
    encode_batch_images,
)
from uae_jax.rollouts.reconstruction import caption_context, draw_from, initial_noise
from uae_jax.settings import changed


@dataclasses.dataclass(frozen=True)
class GenForUndConfig(TokenLoss, UpdateSettings, CaptionSettings, DecodedRollouts):
    """Settings of GRPO on captions."""

    batch_size: int = changed(DecodedRollouts, "batch_size", 64)


@dataclasses.dataclass(frozen=True)
class GenForUnd(CaptionMethod):
    """The method; a `methods.method.Method`.

    Raises:
      ValueError: a reward with a caption weight, and no caption scorer.
    """

    Settings: ClassVar[type] = GenForUndConfig

    settings: GenForUndConfig

    def __post_init__(self) -> None:
        if self.settings.reward.caption_weight and self.system.scorer is None:
            raise ValueError(
                "gen_for_und.reward.caption_weight needs model.caption_scorer, a folder that configs/bootstrap.py "
                "makes with --config.phases=\"('caption_scorer',)\" --config.start=builtin"
            )

    @staticmethod
    def reads(settings: GenForUndConfig) -> tuple[str, ...]:
        """What the captioner sees, and images for the rewards; the supervised control captions instead of these."""
        seen = (*IMAGE_FIELDS, *PROMPT_FIELDS)
        return (*seen, *CAPTION_FIELDS) if settings.objective == "supervised" else (*seen, "pixels")

    def read_prompts(
        self, parts: Mapping, batch: Mapping, image_embeds: Float[Array, "b e d"], *, policy: bool
    ) -> Prompted:
        """See `CaptionMethod.read_prompts`."""
        captioner = self.system.model.captioner
        params, adapter = uae.captioner_weights(parts, policy=policy)
        return captioner, params, adapter, qwen.prompt_prefix(captioner, params, adapter, batch, image_embeds)

    def prepared(self, frozen: Mapping) -> Mapping:
        """See `gathered`."""
        return gathered_decoder(self.settings, frozen)

    def captions_first(self, params: Mapping, frozen: Mapping, batch: Mapping, key: Array) -> dict[str, Completion]:
        """See `rollout_captions`; the supervised control writes none."""
        if self.settings.objective == "supervised":
            return {}
        return captions_first(self.settings, self.system, params, frozen, batch, key)

    def rollout(self, params: Mapping, frozen: Mapping, batch: Mapping, key: Array) -> dict:
        """Captions, reconstructions, rewards, and the log-probabilities that the loss compares with.

        Args:
          params: trained parts of the model; frozen: the other parts.
          batch: B images with prompts (`data.loader`).
          key: of this step.

        Returns:
          `samples` with leading axis B, and `metrics`; without a sampler for the supervised control.
        """
        if self.settings.objective == "supervised":
            return {"samples": batch}
        parts, group = jax.lax.stop_gradient({**frozen, **params}), self.settings.group_size
        images = encode_batch_images(self.system.model, parts, batch)
        completion = self.write_captions(parts, batch, images, key)
        pixels = self.reconstruct(parts, batch, images, completion, key)
        reward, terms = self.rewards(parts, batch["pixels"], pixels, completion)
        samples, metrics = self.kept(parts, batch, images, completion)
        metrics |= term_metrics(terms) | caption_metrics(completion, group)
        return {"samples": constrain_rows(samples | {"reward": reward}), "metrics": metrics}

    def kept(
        self, parts: Mapping, batch: Mapping, image_embeds: Float[Array, "b p d"], completion: Completion
    ) -> tuple[dict[str, Array], dict]:
        """What the loss needs of sampled captions, leaves `[B, ...]`, and the gap of a replay to sampling."""
        shape, metrics = (len(image_embeds), self.settings.group_size, -1), {}
        samples = {
            **{name: batch[name] for name in PROMPT_FIELDS},
            "image_embeds": image_embeds,
            "tokens": completion.tokens.reshape(shape),
            "mask": completion.mask.reshape(shape),
        }
        samples |= self.compared(parts, samples)
        sampled = completion.log_probs.reshape(shape)
        if self.replay:
            metrics = gap_metrics("log_prob_gap", samples["old"], sampled, samples["mask"])
        else:
            samples["sampled_log_prob"] = sampled
        return samples, metrics

    def loss(self, params: Mapping, frozen: Mapping, rollout: Mapping, key: Array) -> Loss:
        """The clipped token loss of a rollout; sum, count and metrics as `token_loss`.

        Where the rollout was not replayed, `log_prob_gap` compares with the log-probabilities of sampling.
        """
        if self.settings.objective == "supervised":
            return self.supervised_loss({**frozen, **params}, rollout["samples"])
        settings, samples = self.settings, constrain_rows(rollout["samples"])
        scores = self.score_captions({**frozen, **params}, samples, trained=True)
        total, count, metrics = token_loss(
            settings,
            scores.log_probs,
            samples.get("old"),
            samples.get("reference"),
            samples["advantage"],
            samples["mask"],
            entropy=scores.entropy,
            max_tokens=settings.max_new_tokens,
        )
        if "sampled_log_prob" in samples:
            gap = gap_metrics("log_prob_gap", scores.log_probs, samples["sampled_log_prob"], samples["mask"])
            metrics = {**metrics, **gap}
        return total, count, metrics

    def supervised_loss(self, parts: Mapping, batch: Mapping) -> Loss:
        """Cross-entropy of the data set's captions, a mean over tokens."""
        images = encode_batch_images(self.system.model, parts, batch)
        tokens, mask = batch["caption_ids"], batch["caption_mask"]
        prompts = self.read_prompts(parts, batch, images, policy=True)
        said = lm.completion_log_probs(*prompts, tokens, mask, chunk=self.settings.score_chunk)
        return -jnp.sum(said.log_probs), jnp.sum(mask, dtype=jnp.float32), {}

    def write_captions(
        self, parts: Mapping, batch: Mapping, image_embeds: Float[Array, "b p d"], key: Array
    ) -> Completion:
        """G sampled captions of each image, rows of a group together: `[B * G, T]`; keys by global sample id."""
        return write_captions(self.settings, self.system, parts, batch, key, image_embeds)

    def reconstruct(
        self, parts: Mapping, batch: Mapping, image_embeds: Float[Array, "b p d"], completion: Completion, key: Array
    ) -> Float[Array, "n H W 3"]:
        """The decoder's images `[B * G, H, W, 3]` of sampled captions."""
        settings, model = self.settings, self.system.model
        how = rollout_denoising(model, settings, self.sampler, settings.guidance_scale)
        noise_key = trees.name_key(key, "noise")
        noise = initial_noise(model, noise_key, batch["sample_id"], settings.group_size, shared=settings.shared_noise)
        said = completion.tokens, completion.mask
        lengths = condition.caption_lengths(completion.mask, completion.finished)
        contexts = caption_context(model, parts, how, batch, *said, lengths, image_embeds)
        return draw_from(model, parts, how, contexts, noise)

    def rewards(
        self, parts: Mapping, original: Float[Array, "b H W 3"], pixels: Float[Array, "n H W 3"], completion: Completion
    ) -> tuple[Float[Array, "b g"], dict]:
        """Rewards `[B, G]` of reconstructions `[B * G, H, W, 3]`, and their terms; see `similarity.mixed_reward`."""
        settings, said = self.settings, None
        if settings.reward.caption_weight and self.system.scorer is not None:
            lengths = condition.caption_lengths(completion.mask, completion.finished)
            params = parts["encoders"][caption_similarity.PART]
            said = caption_similarity.caption_reward(
                self.system.scorer, params, original, completion.tokens, lengths, settings.group_size
            )
        unfinished = ~completion.finished.reshape(-1, settings.group_size)
        return self.mixed(parts, original, pixels, unfinished, said)

    def compared(self, parts: Mapping, samples: Mapping) -> dict[str, Float[Array, "b g t"]]:
        """What the loss compares with, `[B, G, T]`: `reference` for the KL, and `old` where it is replayed."""
        found = {}
        if self.settings.kl_weight:
            found["reference"] = self.score_captions(parts, samples, trained=False).log_probs
        if self.replay:
            found["old"] = self.score_captions(parts, samples, trained=True).log_probs
        return found
