"""Generation for understanding: the captioner learns what the decoder can rebuild (arXiv 2509.09666, section 3; GRPO,
2402.03300).

For each of B images, G captions are sampled; the frozen decoder draws each of them; the reward is the similarity of
drawing and image. The decoder is part of the environment: no gradient passes through it. Shape letters: T caption
tokens.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from uae_jax import trees
from uae_jax.models import condition, uae
from uae_jax.models.qwen2_5_vl import model as qwen
from uae_jax.models.qwen2_5_vl.generate import Completion
from uae_jax.models.qwen2_5_vl.sampling import SamplingConfig
from uae_jax.nn.constrain import constrain_rows
from uae_jax.rl import caption_similarity
from uae_jax.rl.advantages import check_group_size
from uae_jax.rl.caption_similarity import CaptionScorer
from uae_jax.rl.captioning import caption_metrics, encode_batch_images, sample_captions
from uae_jax.rl.losses import gap_metrics, token_grpo_loss
from uae_jax.rl.reconstruction import Denoising, draw, initial_noise
from uae_jax.rl.rewards import Encoder, RewardConfig, reward_advantages

OBJECTIVES = ("grpo", "supervised")
PROMPT_FIELDS = ("prompt_ids", "prompt_mask", "prompt_positions", "prompt_next")


@dataclasses.dataclass(frozen=True)
class CaptionPolicy:
    """Everything of the stage that is not an array.

    Attributes:
      model: the description of UAE.
      denoising: how the decoder draws during rollouts.
      encoders: the reward's image encoders.
      reward: which of them, with which weights.
      stops: ids that end a caption.
      group_size: G, at least 2.
      temperature: of sampling and of scoring.
      max_new_tokens: T.
      shared_noise: one noise for the whole group, so that the advantage measures the caption alone.
      advantage_scale: `group`, `batch` or `none`.
      aggregation, clip_low, clip_high, dual_clip (0 for none), kl_weight, kl_estimator: see `losses.token_grpo_loss`.
      score_chunk: caption positions whose logits `[N, score_chunk, V]` exist at once, or as many of all positions and a
        part of V.
      gather_weights: see `captioning.sample_captions`.
      replay: score the rollout again for the old log-probabilities; not needed when each rollout has one update.
      scorer: of captions without drawings, for a reward with a caption weight.
      objective: `grpo`, or `supervised` for the control: cross-entropy of the data set's captions instead of a reward.

    Raises:
      ValueError: a group of one, a temperature of 0, an unknown objective, a dual clip of 1 or less, or a caption
        weight without a scorer.
    """

    model: uae.UAE
    denoising: Denoising
    encoders: tuple[Encoder, ...]
    reward: RewardConfig
    stops: tuple[int, ...]
    group_size: int
    temperature: float
    max_new_tokens: int
    shared_noise: bool = True
    advantage_scale: str = "group"
    aggregation: str = "grpo"
    dual_clip: float = 0.0
    kl_estimator: str = "k3"
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_weight: float = 0.0
    score_chunk: int = qwen.SCORE_CHUNK
    replay: bool = False
    gather_weights: bool = False
    scorer: CaptionScorer | None = None
    objective: str = "grpo"

    def __post_init__(self):
        check_group_size(self.group_size)
        SamplingConfig(self.temperature).for_training()
        if self.objective not in OBJECTIVES:
            raise ValueError(f"gen_for_und.objective is {self.objective!r}; choose grpo or supervised")
        if self.dual_clip and self.dual_clip <= 1:
            raise ValueError(f"gen_for_und.dual_clip is {self.dual_clip}; it must be above 1, or 0 for none")
        if self.reward.caption_weight and self.scorer is None:
            raise ValueError(
                "gen_for_und.reward.caption_weight needs model.caption_scorer, a folder that configs/bootstrap.py "
                "makes with "
                "--config.phases=\"('caption_scorer',)\" --config.start=builtin"
            )


def write_captions(
    policy: CaptionPolicy, parts: Mapping, batch: Mapping, image_embeds: Array, key: Array
) -> Completion:
    """G sampled captions of each image, rows of a group together: `[B * G, T]`; keys by global sample id."""
    return sample_captions(
        policy.model,
        parts,
        batch,
        key,
        image_embeds,
        max_new_tokens=policy.max_new_tokens,
        stops=policy.stops,
        sampling=SamplingConfig(policy.temperature),
        group=policy.group_size,
        gather_weights=policy.gather_weights,
    )


def draw_captions(
    policy: CaptionPolicy, parts: Mapping, completion: Completion, sample_ids: Array, key: Array
) -> Array:
    """The decoder's pictures `[B * G, H, W, 3]` of sampled captions."""
    noise = initial_noise(
        policy.model, trees.name_key(key, "noise"), sample_ids, policy.group_size, shared=policy.shared_noise
    )
    lengths = condition.caption_lengths(completion.mask, completion.finished)
    return draw(policy.model, parts, policy.denoising, completion.tokens, lengths, noise)


def caption_similarities(policy: CaptionPolicy, parts: Mapping, completion: Completion, pixels: Array) -> Array | None:
    """Caption similarities `[B, G]` of sampled captions and pictures `[B, H, W, 3]`, or None where the reward has
    none.
    """
    if not policy.reward.caption_weight:
        return None
    lengths = condition.caption_lengths(completion.mask, completion.finished)
    params = parts["encoders"][caption_similarity.PART]
    return caption_similarity.caption_reward(
        policy.scorer, params, pixels, completion.tokens, lengths, policy.group_size
    )


def score_captions(policy: CaptionPolicy, parts: Mapping, samples: Mapping, *, trained: bool) -> qwen.TokenScores:
    """Log-probabilities `[B, G, T]` of a rollout's captions under the policy or the reference."""
    params, adapter = uae.captioner_weights(parts, policy=trained)
    prefix = qwen.prompt_prefix(policy.model.captioner, params, adapter, samples, samples["image_embeds"])
    return qwen.completion_log_probs(
        policy.model.captioner,
        params,
        adapter,
        prefix,
        samples["tokens"],
        samples["mask"],
        temperature=policy.temperature,
        chunk=policy.score_chunk,
        with_entropy=trained,
        frozen_head="language_policy" not in parts,
    )


def scored(policy: CaptionPolicy, parts: Mapping, samples: Mapping) -> dict[str, Array]:
    """The log-probabilities `[B, G, T]` that the loss compares with: `reference` for the KL, `old` where it is
    replayed.
    """
    found = {}
    if policy.kl_weight:
        found["reference"] = score_captions(policy, parts, samples, trained=False).log_probs
    if policy.replay:
        found["old"] = score_captions(policy, parts, samples, trained=True).log_probs
    return found


def rollout(policy: CaptionPolicy, params: Mapping, frozen: Mapping, batch: Mapping, key: Array) -> dict:
    """Captions, pictures, rewards, advantages, and reference log-probabilities.

    Args:
      policy: the stage.
      params: trainable parts of the model.
      frozen: the other parts.
      batch: B images with prompts (`data.loader`).
      key: of this step.

    Returns:
      `samples` with leading axis B, and `metrics`.
    """
    parts, group = jax.lax.stop_gradient({**frozen, **params}), policy.group_size
    images = encode_batch_images(policy.model, parts, batch)
    completion = write_captions(policy, parts, batch, images, key)
    pixels = draw_captions(policy, parts, completion, batch["sample_id"], key)
    advantage, metrics = reward_advantages(
        policy.reward,
        policy.encoders,
        parts["encoders"],
        batch["pixels"],
        pixels,
        group,
        policy.advantage_scale,
        caption_similarities(policy, parts, completion, batch["pixels"]),
        ~completion.finished.reshape(-1, group),
    )
    samples = {
        **{name: batch[name] for name in PROMPT_FIELDS},
        "image_embeds": images,
        "advantage": advantage,
        "tokens": completion.tokens.reshape(len(images), group, -1),
        "mask": completion.mask.reshape(len(images), group, -1),
    }
    samples |= scored(policy, parts, samples)
    sampled = completion.log_probs.reshape(samples["tokens"].shape)
    if policy.replay:
        metrics |= gap_metrics("log_prob_gap", samples["old"], sampled, samples["mask"])
    else:
        samples["sampled_log_prob"] = sampled
    return {"samples": constrain_rows(samples), "metrics": metrics | caption_metrics(completion, group)}


def loss(
    policy: CaptionPolicy, params: Mapping, frozen: Mapping, rollout: Mapping, key: Array
) -> tuple[Array, Array, dict]:
    """The clipped token loss of a rollout; sum, count and metrics as `losses.token_grpo_loss`.

    Where the rollout was not replayed, whose metrics then have it, the metrics say how far these log-probabilities are
    from those that the captions were sampled with.
    """
    del key
    samples = constrain_rows(rollout["samples"])
    scores = score_captions(policy, {**frozen, **params}, samples, trained=True)

    def flat(name: str) -> Array | None:
        return samples[name].reshape(-1, samples[name].shape[-1]) if name in samples else None

    mask = flat("mask")
    total, count, metrics = token_grpo_loss(
        scores.log_probs.reshape(mask.shape),
        flat("old"),
        flat("reference"),
        samples["advantage"].reshape(-1),
        mask,
        clip_low=policy.clip_low,
        clip_high=policy.clip_high,
        dual_clip=policy.dual_clip or None,
        kl_weight=policy.kl_weight,
        kl_estimator=policy.kl_estimator,
        aggregation=policy.aggregation,
        max_tokens=policy.max_new_tokens,
        entropy=jax.lax.stop_gradient(scores.entropy).reshape(mask.shape),
    )
    if "sampled_log_prob" in samples:
        metrics |= gap_metrics("log_prob_gap", scores.log_probs, samples["sampled_log_prob"], samples["mask"])
    return total, count, metrics


def supervised_loss(
    policy: CaptionPolicy, params: Mapping, frozen: Mapping, rollout: Mapping, key: Array
) -> tuple[Array, Array, dict]:
    """Cross-entropy of the data set's captions, a mean over tokens: what the same adapter learns when it is told the
    answers.

    Args:
      policy, params, frozen: as in `rollout`; rollout: with the batch (`data.loader`) under `samples`.
      key: not used.
    """
    del key
    batch, parts = rollout["samples"], {**frozen, **params}
    images = encode_batch_images(policy.model, parts, batch)
    weights, adapter = uae.captioner_weights(parts, policy=True)
    prefix = qwen.prompt_prefix(policy.model.captioner, weights, adapter, batch, images)
    said = qwen.completion_log_probs(
        policy.model.captioner,
        weights,
        adapter,
        prefix,
        batch["caption_ids"],
        batch["caption_mask"],
        chunk=policy.score_chunk,
    )
    return -jnp.sum(said.log_probs), jnp.sum(batch["caption_mask"], dtype=jnp.float32), {}
