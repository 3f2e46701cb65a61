"""Joint update: one rollout teaches captioner and decoder, by one reward.

Source: arXiv 2509.09666, abstract (both halves by one objective); PromptRL, arXiv 2602.01382 (one rollout for prompts
and images). The captioner writes C captions of each image, and the decoder draws each of them M times. The reward of a
drawing is its similarity to the image. The captioner learns by the loss of `gen_for_und`, the decoder by that of
`flow_grpo`, in one compiled step. Departures from PromptRL, which gives both one advantage:

1. The starting noises of an image are crossed with its captions: drawing m of every caption begins at noise m. What
   differs between the mean rewards of two captions is then not the noise.
2. The captioner's advantage is the mean reward of a caption's drawings less that of the image's; the decoder's is a
   drawing's reward less the mean of its caption's, or of its own starting noise with `flow_grpo.one_replay`. Neither is
   paid for what the other one did.
3. A penalty for a caption without an end is the captioner's alone, since it is the same for all its drawings.

`flow_grpo` has the settings of the decoder's half. The rates of both are those of the optimizer with its factors, such
as `optimizer.multipliers=(('language_lora', 0.2),)`.

Shape letters: B images, C captions of an image, r rows of a caption (see `flow_grpo`), M drawings of a caption.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from uae_jax import trees
from uae_jax.diffusion.sampler import window_start
from uae_jax.methods.flow_grpo import FlowGrpo
from uae_jax.methods.gen_for_und import GenForUnd, GenForUndConfig
from uae_jax.methods.method import Loss
from uae_jax.methods.stage_settings import DecodedRollouts
from uae_jax.methods.und_for_gen import DecoderMethod, DecoderMethodSettings, UndForGenConfig
from uae_jax.models import condition
from uae_jax.nn.constrain import constrain_rows
from uae_jax.rewards.similarity import term_metrics
from uae_jax.rl.advantages import group_advantages
from uae_jax.rl.losses import Metrics, gap_metrics
from uae_jax.rollouts.captioning import IMAGE_FIELDS, PROMPT_FIELDS, caption_metrics, encode_batch_images
from uae_jax.rollouts.reconstruction import caption_context, initial_noise, sample_keys
from uae_jax.settings import Settings, changed, setting

DECODER = "flow_grpo"
# sums of whose losses grow with the number of captions alone, so that both halves of an update have fixed shares
AGGREGATIONS = ("grpo", "dr_grpo", "gspo")


@dataclasses.dataclass(frozen=True)
class CaptionerHalf(Settings):
    """The captioner's loss; see `gen_for_und`."""

    aggregation: str = changed(GenForUndConfig, "aggregation", "grpo", choices=AGGREGATIONS)
    clip_low: float = changed(GenForUndConfig, "clip_low", 0.2, source="arXiv 2402.03300")
    clip_high: float = changed(GenForUndConfig, "clip_high", 0.2, source="arXiv 2402.03300")
    kl_weight: float = changed(GenForUndConfig, "kl_weight", 0.02)
    kl_estimator: str = changed(GenForUndConfig, "kl_estimator", "k3", source="arXiv 2402.03300")
    advantage_scale: str = changed(GenForUndConfig, "advantage_scale", "group", source="arXiv 2402.03300")
    score_chunk: int = changed(GenForUndConfig, "score_chunk", GenForUndConfig.score_chunk)


@dataclasses.dataclass(frozen=True)
class JointConfig(DecoderMethodSettings):
    """Settings of the joint update; those of the decoder's half are in the section `flow_grpo`."""

    captions: int = setting(4, "captions of an image, each of which is drawn group_size times", low=2)
    captioner_weight: float = setting(1.0, "weight of the captioner's loss beside the decoder's", above=0)
    captioner: CaptionerHalf = CaptionerHalf()
    writes_captions: ClassVar[bool] = True

    def stage_problems(self, stage: UndForGenConfig) -> Iterator[str]:
        """What the decoder's half refuses, captions of the data set, and captions that do not vary."""
        flow = stage.methods[DECODER]
        yield from (f"{DECODER}: {problem}" for problem in flow.stage_problems(stage))
        if flow.dense_rewards:
            yield f"{DECODER}.dense_rewards pays steps, of which the captioner has none; set it to False"
        if stage.data_captions:
            yield f"captions are all the captioner's own; data_captions is {stage.data_captions}, set it to 0"
        if not stage.temperature:
            yield "captions of one image must differ; temperature is 0, set it above 0"
        if self.shuffled_rewards:
            yield "shuffled_rewards is on; it is a control of the decoder's methods alone, set it to False"
        if stage.reward.caption_weight:
            yield "captioner is paid for drawings; reward.caption_weight belongs to gen_for_und, set it to 0"

    def rows_of(self, group_size: int) -> int:
        """A row is an image with all its captions and drawings."""
        return 1


@dataclasses.dataclass(frozen=True)
class Joint(DecoderMethod):
    """The method; a `methods.method.Method`."""

    Settings: ClassVar[type] = JointConfig

    @staticmethod
    def trains(settings: UndForGenConfig) -> tuple[str, ...]:
        """The language model and the transformer."""
        return settings.trained_part("language"), settings.trained_part("transformer")

    @staticmethod
    def reads(settings: UndForGenConfig) -> tuple[str, ...]:
        """What the captioner sees, and images for the rewards."""
        return (*IMAGE_FIELDS, *PROMPT_FIELDS, "pixels")

    @property
    def decoder(self) -> FlowGrpo:
        """The decoder's half, for which each caption is an image of its own."""
        stage, own = self.settings, self.own
        flow = dataclasses.replace(stage.methods[DECODER], updates_per_rollout=own.updates_per_rollout)
        reward = dataclasses.replace(stage.reward, overlong_penalty=0.0)  # the captioner's
        methods = {**stage.methods, DECODER: flow}
        settings = dataclasses.replace(stage, method=DECODER, methods=methods, reward=reward)
        return FlowGrpo(settings, self.sampler, self.system)

    @property
    def captioner(self) -> GenForUnd:
        """The captioner's half."""
        stage, own = self.settings, self.own
        shared: dict[str, Any] = {
            field.name: getattr(stage, field.name) for field in dataclasses.fields(DecodedRollouts)
        }
        half = {field.name: getattr(own.captioner, field.name) for field in dataclasses.fields(CaptionerHalf)}
        more = {"group_size": own.captions, "updates_per_rollout": own.updates_per_rollout}
        return GenForUnd(GenForUndConfig(**shared | half | more), self.sampler, self.system)

    @property
    def denoising(self) -> Any:
        """The sampler of the decoder's rollouts."""
        return self.decoder.denoising

    def rollout(self, params: Mapping, frozen: Mapping, batch: Mapping, key: Array) -> dict:
        """Captions, their drawings, rewards, and what both losses compare with.

        Args:
          params: trained parts of the model; frozen: the other parts.
          batch: B images with prompts (`data.loader`).
          key: of this step.

        Returns:
          `samples` with leading axis B, `captions` and `drawings` among them, `shared` and `metrics`.
        """
        parts, model = jax.lax.stop_gradient({**frozen, **params}), self.system.model
        captioner, decoder, ids = self.captioner, self.decoder, batch["sample_id"]
        images = encode_batch_images(model, parts, batch)
        said = captioner.write_captions(parts, batch, images, key)
        captions, metrics = captioner.kept(parts, batch, images, said)
        lengths = condition.caption_lengths(said.mask, said.finished)
        how = decoder.denoising
        context, negative = caption_context(model, parts, how, batch, said.tokens, said.mask, lengths, images)
        rows = decoder.settings.samples_per_image
        every = constrain_rows(jax.tree.map(lambda leaf: leaf.repeat(rows, axis=0), context))
        flow, count = decoder.own, self.own.captions
        start = window_start(trees.name_key(key, "window"), flow.window_low, flow.window_high, flow.window)
        keys = sample_keys(trees.name_key(key, "steps"), ids, count * self.settings.group_size)
        drawn, final, indices = decoder.play(parts, every, negative, self.crossed_noise(ids, key), start, keys)
        shared = {"sigma_indices": indices, "negative": negative}
        of_rows = {"context": every[0], "context_mask": every[1]}
        drawn |= decoder.compared(parts, drawn | of_rows, shared)
        metrics = {f"caption_{name}": value for name, value in metrics.items()}
        if self.replay:
            metrics |= gap_metrics("log_prob_gap", drawn["old_log_prob"], drawn["sampled_log_prob"])
        drawn |= {"context": context[0], "context_mask": context[1]}
        unfinished = ~said.finished.repeat(self.settings.group_size)
        reward, terms = self.mixed(
            parts, batch["pixels"], final, count * self.settings.group_size, unfinished.reshape(len(ids), -1)
        )
        samples = {
            "captions": captions,
            "drawings": jax.tree.map(lambda leaf: leaf.reshape(len(ids), -1, *leaf.shape[1:]), drawn),
            "reward": reward.reshape(len(ids), count, -1),
        }
        metrics |= term_metrics(terms) | caption_metrics(said, count)
        return {"samples": constrain_rows(samples), "shared": shared, "metrics": metrics}

    def crossed_noise(self, sample_ids: Array, key: Array) -> Float[Array, "rows h w c"]:
        """Initial latents `[B * C * r, h, w, C]`: those of an image are the same for each of its captions."""
        flow, rows = self.decoder.own, self.decoder.settings.samples_per_image
        one = rows == 1 or (flow.shared_noise and not flow.one_replay)
        noise = initial_noise(self.system.model, trees.name_key(key, "noise"), sample_ids, rows, shared=one)
        noise = noise.reshape(len(sample_ids), 1, rows, *noise.shape[1:])
        return noise.repeat(self.own.captions, axis=1).reshape(-1, *noise.shape[3:])

    def advantages(self, reward: Float[Array, "b c m"]) -> tuple[dict[str, Array], Metrics]:
        """Both advantages of the rewards `[B, C, M]` of a whole batch.

        Returns:
          `caption_advantage` `[B, C]`, of mean rewards of captions; `advantage` `[B, rows of an image, drawings of a
          row]`, of drawings of one caption; and their metrics.
        """
        decoder = self.decoder.settings
        captions, found = group_advantages(reward.mean(-1), scale=self.own.captioner.advantage_scale)
        compared = reward.reshape(-1, decoder.compared_samples)
        drawings, metrics = group_advantages(compared, scale=decoder.advantage_scale)
        rows = self.own.captions * decoder.samples_per_image
        metrics = {"reward" if name == "reward_mean" else name: pair for name, pair in metrics.items()}
        more = {f"caption_{name}": found[name] for name in ("reward_std", "zero_std_fraction")}
        return {
            "caption_advantage": captions,
            "advantage": drawings.reshape(len(reward), rows, -1),
        }, metrics | more

    def loss(self, params: Mapping, frozen: Mapping, rollout: Mapping, key: Array) -> Loss:
        """The mean of the decoder's loss and the weighted mean of the captioner's; the count is of images.

        Metrics are those of both halves, the captioner's with `caption_` before their names.
        """
        samples, shared = constrain_rows(rollout["samples"]), rollout["shared"]
        captions = samples["captions"] | {"advantage": samples["caption_advantage"]}
        said, captions_count, told = self.captioner.loss(params, frozen, {"samples": captions, "shared": {}}, key)
        drawings = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), samples["drawings"])
        rows = self.decoder.settings.samples_per_image
        for name in ("context", "context_mask"):
            drawings[name] = drawings[name].repeat(rows, axis=0)
        advantage = samples["advantage"].reshape(len(drawings["latents"]), -1)
        drawings["advantage"] = advantage if self.decoder.own.one_replay else advantage[:, 0]
        drawn, drawings_count, metrics = self.decoder.loss(params, frozen, {"samples": drawings, "shared": shared}, key)
        images = jnp.float32(len(samples["advantage"]))
        total = images * (drawn / drawings_count + self.own.captioner_weight * said / captions_count)
        return total, images, dict(metrics) | {f"caption_{name}": value for name, value in told.items()}
