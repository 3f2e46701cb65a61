"""One autoregressive model both ways, trained by reconstruction: it captions an image, and draws its captions.

Source: Unified-GRPO of one network, arXiv 2509.09666, table 1 (Janus-Pro); its settings are not published. GRPO,
arXiv 2402.03300. Of each of B images, the language model writes G captions. Of each caption it draws K images, token by
token, with guidance. The reward is the similarity of a drawing and the original. It trains both streams of tokens of
the same weights; towers, aligners, image tokens' embedding and head, and the image tokenizer stay frozen. Choices where
the paper is silent:

1. A caption is worth the mean reward of its K drawings, and is compared with the G captions of its image. A drawing is
   compared with the K drawings of its caption. With K = 1 it takes its caption's advantage (T2I-R1, arXiv 2505.00703).
2. Each stream is a mean of its own, with its own weight, clip range and KL. One mean over all tokens would give the
   images nearly everything: 576 tokens against a hundred.
3. Image tokens are scored under the guided distribution, from which they are sampled. `score="conditional"` takes the
   caption's half alone, as the peers do, at half the cost; ratio and KL are then those of another distribution.
4. Drawing number k of every caption of an image reads the same random numbers, so that captions are compared by what
   they say.
5. Old log-probabilities are computed again by the function that the loss uses, where a rollout has several updates.
   In the first update of a rollout, the ratio is exactly 1.
6. `objective="supervised"` is the control: cross-entropy of the data set's captions, and of the tokens of its images.

Shape letters: B images, G captions of an image, K drawings of a caption, T caption tokens, C image tokens, S tokens of
the prompt for a drawing.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from uae_jax import trees
from uae_jax.methods.caption_method import CaptionMethod, CaptionSettings, Prompted
from uae_jax.methods.method import Loss, Streams
from uae_jax.methods.stage_settings import UpdateSettings
from uae_jax.methods.token_loss import TokenLoss, token_loss
from uae_jax.models.condition import caption_lengths
from uae_jax.models.janus import drawing, vq
from uae_jax.models.janus import model as janus
from uae_jax.models.janus.unified import Unified
from uae_jax.models.language import model as lm
from uae_jax.models.language.generate import Completion
from uae_jax.models.language.sampling import SamplingConfig
from uae_jax.nn.constrain import constrain_rows
from uae_jax.rewards.similarity import term_metrics
from uae_jax.rl.advantages import nested_advantages
from uae_jax.rl.losses import gap_metrics
from uae_jax.rollouts.captioning import CAPTION_FIELDS, caption_metrics
from uae_jax.rollouts.reconstruction import sample_keys, shuffled
from uae_jax.rollouts.unified import DrawingConfig, pixels, sample_captions, sample_drawings, weights
from uae_jax.settings import changed, setting

PROMPT_FIELDS = ("prompt_ids", "prompt_mask")
SCORES = ("guided", "conditional")


@dataclasses.dataclass(frozen=True)
class StreamConfig(TokenLoss):
    """Settings of one stream of tokens."""

    weight: float = setting(1.0, "of the stream's loss in the sum of both", low=0)
    kl_weight: float = changed(TokenLoss, "kl_weight", 0.01, source="T2I-R1, arXiv 2505.00703")


@dataclasses.dataclass(frozen=True)
class ImageStreamConfig(StreamConfig):
    """Settings of the image tokens."""

    # a guided logit is 5 c - 4 u: it moves several times as far as the model's own
    clip_low: float = changed(StreamConfig, "clip_low", 0.01)
    clip_high: float = changed(StreamConfig, "clip_high", 0.01)


@dataclasses.dataclass(frozen=True)
class UnifiedArConfig(UpdateSettings, CaptionSettings):
    """Settings of the stage; `caption` and `image` are those of the two streams."""

    group_size: int = changed(CaptionSettings, "group_size", 4)
    images_per_caption: int = setting(3, "drawings of a caption; with 1 a drawing takes its caption's advantage", low=1)
    image_temperature: float = setting(1.0, "of image tokens", above=0)
    score: str = setting("guided", "which log-probabilities of image tokens are trained", choices=SCORES)
    shuffled_rewards: bool = setting(False, "control: the rewards of an image are shuffled, and say nothing")
    caption: StreamConfig = StreamConfig()
    image: ImageStreamConfig = ImageStreamConfig()
    caption_dropout: float = setting(
        0.1, "share of the control's drawings without a caption, which guidance needs", low=0, high=1
    )

    def problems(self) -> Iterator[str]:
        """The mistakes of ranges, streams without a weight, and a reward for captions alone."""
        yield from super().problems()
        if not self.caption.weight and not self.image.weight:
            yield "caption.weight and image.weight are 0: nothing is trained; give one of them a weight"
        if self.reward.caption_weight:
            yield "reward.caption_weight is set, but unified_ar has no caption scorer; only gen_for_und can use it"


@dataclasses.dataclass(frozen=True)
class UnifiedAr(CaptionMethod):
    """The method; a `methods.method.Method` with two streams in place of one loss."""

    Settings: ClassVar[type] = UnifiedArConfig
    network: ClassVar[type] = Unified

    settings: UnifiedArConfig

    @staticmethod
    def reads(settings: UnifiedArConfig) -> tuple[str, ...]:
        """Images, which are seen and drawn, and the caption prompt; the control also reads captions."""
        seen = ("pixels", *PROMPT_FIELDS)
        return (*seen, *CAPTION_FIELDS) if settings.objective == "supervised" else seen

    @property
    def streams(self) -> Streams:
        """The losses of both streams with their weights; a stream of weight 0 is not computed."""
        settings = self.settings
        control = settings.objective == "supervised"
        listed = {
            "caption": (settings.caption.weight, self.supervised_caption_loss if control else self.caption_loss),
            "image": (settings.image.weight, self.supervised_image_loss if control else self.image_loss),
        }
        return {name: found for name, found in listed.items() if found[0]}

    @property
    def plain(self) -> "UnifiedAr":
        """The method whose scores are those of the model itself: without guidance, at temperature 1."""
        changes = dict(guidance_scale=1.0, temperature=1.0, image_temperature=1.0)
        return dataclasses.replace(self, settings=dataclasses.replace(self.settings, **changes))

    @property
    def how(self) -> DrawingConfig:
        """How images are drawn."""
        settings = self.settings
        return DrawingConfig(settings.guidance_scale, SamplingConfig(settings.image_temperature), settings.vae_chunk)

    def advantages(self, reward: Float[Array, "b g k"]) -> tuple[dict[str, Array], Any]:
        """`caption_advantage` `[B, G]` and `image_advantage` `[B, G, K]`, with metrics."""
        of_captions, of_images, metrics = nested_advantages(reward, scale=self.settings.advantage_scale)
        metrics = {"reward" if name == "reward_mean" else name: pair for name, pair in metrics.items()}
        return {"caption_advantage": of_captions, "image_advantage": of_images}, metrics

    def rollout(self, params: Mapping, frozen: Mapping, batch: Mapping, key: Array) -> dict:
        """Captions, drawings, rewards, and the log-probabilities that the losses compare with.

        Args:
          params: trained parts of the model; frozen: the other parts.
          batch: B images with prompts (`data.janus_rows`).
          key: of this step.

        Returns:
          `samples` with leading axis B, and `metrics`.
        """
        parts = jax.lax.stop_gradient({**frozen, **params})
        settings, network, group = self.settings, self.system.model.network, self.settings.group_size
        images = janus.encode_images(network, weights(parts, policy=False)[0], batch["pixels"])
        prompts = {name: batch[name] for name in PROMPT_FIELDS} | {"image_embeds": images}
        if settings.objective == "supervised":
            return {"samples": self.supervised_samples(parts, batch, key) | prompts}
        completion = self.write_captions(parts, batch, images, key)
        ids, mask = self.system.model.drawing_prompts(
            completion.tokens, caption_lengths(completion.mask, completion.finished)
        )
        drawn = self.draw(parts, ids, mask, batch["sample_id"], key)
        reward, terms = self.rewards(parts, batch["pixels"], drawn.tokens, completion)
        if settings.shuffled_rewards:
            reward = shuffled(reward, reward.shape[-1], batch["sample_id"], key)

        def grouped(leaf: Array) -> Array:
            return leaf.reshape(len(images), group, -1, *leaf.shape[1:])

        samples = prompts | {
            "reward": reward.reshape(len(images), group, -1),
            "tokens": grouped(completion.tokens)[:, :, 0],
            "mask": grouped(completion.mask)[:, :, 0],
            "drawing_ids": grouped(ids)[:, :, 0],
            "drawing_mask": grouped(mask)[:, :, 0],
            "image_tokens": grouped(drawn.tokens),
        }
        samples |= self.compared(parts, samples)
        if not self.replay:
            samples["sampled"] = grouped(completion.log_probs)[:, :, 0]
            samples["image_sampled"] = grouped(drawn.log_probs)
        metrics = term_metrics(terms) | caption_metrics(completion, group)
        return {"samples": constrain_rows(samples), "metrics": metrics}

    def write_captions(
        self, parts: Mapping, batch: Mapping, image_embeds: Float[Array, "b p d"], key: Array
    ) -> Completion:
        """G sampled captions of each image, rows of a group together: `[B * G, T]`; keys by global sample id."""
        settings = self.settings
        return sample_captions(
            self.system.model.network,
            parts,
            batch,
            key,
            image_embeds,
            max_new_tokens=settings.max_new_tokens,
            gather_weights=settings.gather_weights,
            sampling=SamplingConfig(settings.temperature),
            group=settings.group_size,
        )

    def draw(self, parts: Mapping, ids: Array, mask: Array, sample_id: Array, key: Array) -> drawing.Drawing:
        """K drawings of each caption `[B * G * K, C]`, those of a caption together; they share its prompt's states."""
        settings, captions = self.settings, jnp.arange(self.settings.group_size)
        numbers = jnp.repeat(sample_id, settings.group_size)
        if not settings.shared_noise:
            numbers = numbers * settings.group_size + jnp.tile(captions, len(sample_id))
        return sample_drawings(
            self.system.model.network,
            parts,
            self.how,
            ids,
            mask,
            numbers,
            key,
            group=settings.images_per_caption,
            gather_weights=settings.gather_weights,
        )

    def rewards(
        self, parts: Mapping, original: Float[Array, "b H W 3"], tokens: Array, completion: Completion
    ) -> tuple[Float[Array, "b gk"], dict]:
        """Rewards `[B, G * K]` of drawings by their tokens, and their terms; see `similarity.mixed_reward`."""
        unfinished = jnp.repeat(~completion.finished, self.settings.images_per_caption).reshape(len(original), -1)
        return self.mixed(parts, original, pixels(self.system.model.network, parts, self.how, tokens), unfinished)

    def compared(self, parts: Mapping, samples: Mapping) -> dict[str, Array]:
        """What the losses compare with: `reference` and `image_reference` for the KL, `old` and `image_old` where they
        are replayed.
        """
        settings, found = self.settings, {}
        for stream, prefix, score in (
            (settings.caption, "", self.score_captions),
            (settings.image, "image_", self.score_images),
        ):
            if stream.weight and stream.kl_weight:
                found[f"{prefix}reference"] = score(parts, samples, trained=False).log_probs
            if stream.weight and self.replay:
                found[f"{prefix}old"] = score(parts, samples, trained=True).log_probs
        return found

    def read_prompts(
        self, parts: Mapping, batch: Mapping, image_embeds: Float[Array, "b e d"], *, policy: bool
    ) -> Prompted:
        """See `CaptionMethod.read_prompts`."""
        network, (params, adapter) = self.system.model.network, weights(parts, policy=policy)
        return network, params, adapter, janus.prompt_prefix(network, params, adapter, batch, image_embeds)

    def score_images(self, parts: Mapping, samples: Mapping, *, trained: bool) -> lm.TokenScores:
        """Log-probabilities `[B, G, K, C]` of image tokens under the policy or the reference."""
        settings, network = self.settings, self.system.model.network
        params, adapter = weights(parts, policy=trained)
        ids, mask = (samples[name].reshape(-1, samples[name].shape[-1]) for name in ("drawing_ids", "drawing_mask"))
        tokens = samples["image_tokens"]
        guided = settings.score == "guided" and settings.guidance_scale != 1
        found = drawing.drawing_log_probs(
            network,
            params,
            adapter,
            drawing.drawing_prefix(network, params, adapter, ids, mask, guided=guided),
            tokens.reshape(-1, tokens.shape[-1]),
            guidance_scale=settings.guidance_scale,
            temperature=settings.image_temperature,
            group=tokens.shape[2],
            chunk=settings.score_chunk,
            with_entropy=trained,
        )
        return jax.tree.map(lambda leaf: leaf.reshape(tokens.shape), found)

    def caption_loss(self, params: Mapping, frozen: Mapping, rollout: Mapping, key: Array) -> Loss:
        """The clipped loss of the captions; sum, count and metrics as `token_loss`.

        Where the rollout was not replayed, `log_prob_gap` compares with the log-probabilities of sampling.
        """
        samples = constrain_rows(rollout["samples"])
        scores = self.score_captions({**frozen, **params}, samples, trained=True)
        return self.stream_loss(self.settings.caption, scores, rollout, "", samples["mask"])

    def image_loss(self, params: Mapping, frozen: Mapping, rollout: Mapping, key: Array) -> Loss:
        """The clipped loss of the image tokens, all of which count."""
        samples = constrain_rows(rollout["samples"])
        scores = self.score_images({**frozen, **params}, samples, trained=True)
        every = jnp.ones(samples["image_tokens"].shape, bool)
        return self.stream_loss(self.settings.image, scores, rollout, "image_", every)

    def stream_loss(
        self, stream: StreamConfig, scores: lm.TokenScores, rollout: Mapping, prefix: str, mask: Array
    ) -> Loss:
        """The clipped loss of one stream, whose fields among the samples begin with a prefix.

        The samples of a rollout's first update were made by its policy: old and new are one value there, and not two
        with the rounding of two programs between them.
        """
        samples = rollout["samples"]
        old = samples.get(f"{prefix}old")
        if old is not None:
            old = jnp.where(rollout["update"] == 0, jax.lax.stop_gradient(scores.log_probs), old)
        total, count, metrics = token_loss(
            stream,
            scores.log_probs,
            old,
            samples.get(f"{prefix}reference"),
            samples["image_advantage" if prefix else "caption_advantage"],
            mask,
            entropy=scores.entropy,
            max_tokens=mask.shape[-1],
        )
        if (sampled := samples.get(f"{prefix}sampled")) is not None:
            metrics = {**metrics, **gap_metrics("log_prob_gap", scores.log_probs, sampled, mask)}
        return total, count, metrics

    def supervised_samples(self, parts: Mapping, batch: Mapping, key: Array) -> dict:
        """The data set's captions, the prompts of their drawings, some of them emptied, and the tokens of its images.

        The drawing of a caption is the image itself: G and K are 1.
        """
        network, ids, mask = self.system.model.network, batch["caption_ids"], batch["caption_mask"]
        lengths = jnp.sum(mask, -1, dtype=jnp.int32) - 1
        prompts, seen = self.system.model.drawing_prompts(ids, lengths)
        keys = sample_keys(trees.name_key(key, "drop"), batch["sample_id"])
        dropped = jax.vmap(lambda key: jax.random.bernoulli(key, self.settings.caption_dropout))(keys)
        prompts = jnp.where(dropped[:, None], drawing.unconditional(network, prompts, seen), prompts)
        return {
            "tokens": ids[:, None],
            "mask": mask[:, None],
            "drawing_ids": prompts[:, None],
            "drawing_mask": seen[:, None],
            "image_tokens": vq.encode(network.vq, parts["vq"], batch["pixels"])[:, None, None],
        }

    def supervised_caption_loss(self, params: Mapping, frozen: Mapping, rollout: Mapping, key: Array) -> Loss:
        """Cross-entropy of the data set's captions, a mean over tokens."""
        scores = self.plain.score_captions({**frozen, **params}, rollout["samples"], trained=True)
        return -jnp.sum(scores.log_probs), jnp.sum(rollout["samples"]["mask"], dtype=jnp.float32), {}

    def supervised_image_loss(self, params: Mapping, frozen: Mapping, rollout: Mapping, key: Array) -> Loss:
        """Cross-entropy of the tokens of the data set's images without guidance, a mean over tokens."""
        scores = self.plain.score_images({**frozen, **params}, rollout["samples"], trained=True)
        return -jnp.sum(scores.log_probs), jnp.float32(scores.log_probs.size), {}
