"""Understanding for generation without log-probabilities: DiffusionNFT (arXiv 2509.16117, section 3.2) as the
alternative to Flow-GRPO.

The captioner, frozen, writes one caption of each of B images; the transformer draws it G times with the deterministic
sampler; the reward is the similarity of drawing and image. The drawings themselves then are the data of flow matching:
towards those better than their group, away from those worse. The gradient is that of a regression at noise levels of
its own choosing: it holds what distinguishes a drawing from the others, and none of the white noise that Flow-GRPO's
  stochastic steps add, so fewer drawings
are needed. Shape letters: K noise levels of a drawing.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from uae_jax import trees
from uae_jax.diffusion import flow
from uae_jax.diffusion.sampler import sample
from uae_jax.models import uae
from uae_jax.models.qwen2_5_vl.sampling import SamplingConfig
from uae_jax.nn.constrain import constrain_rows
from uae_jax.rl.advantages import check_group_size
from uae_jax.rl.captioning import caption_metrics, drawn_captions, sample_captions
from uae_jax.rl.losses import nft_loss
from uae_jax.rl.reconstruction import Denoising, decode, encode_condition, initial_noise, predictor, sample_keys
from uae_jax.rl.rewards import Encoder, RewardConfig, reward_advantages
from uae_jax.rl.step_sums import sum_over_steps


@dataclasses.dataclass(frozen=True)
class NftPolicy:
    """Everything of the stage that is not an array.

    Attributes:
      model, denoising, encoders, reward, stops, group_size, temperature, max_new_tokens, data_captions,
        advantage_scale, gather_weights: as in `flow_policy.FlowPolicy`.
      noise_levels: K, noised copies of each drawing in the loss.
      time_scheme, time_shift: density of their levels (`diffusion.flow.sample_sigmas`).
      strength: b of the implicit policies v_old +- b (v - v_old); see `losses.nft_loss`.
      advantage_bound: an advantage of this size counts as certainly good.
      kl_weight: of the mean squared difference of policy's and reference's velocities.
      replay: keep the rollout policy's velocities; not needed when each rollout has one update.

    Raises:
      ValueError: a group of one, a share outside [0, 1], guidance, or a number that is not positive.
    """

    model: uae.UAE
    denoising: Denoising
    encoders: tuple[Encoder, ...]
    reward: RewardConfig
    stops: tuple[int, ...]
    group_size: int
    temperature: float
    max_new_tokens: int
    data_captions: float = 0.0
    advantage_scale: str = "group"
    noise_levels: int = 2
    time_scheme: str = "uniform"
    time_shift: float = 3.0
    strength: float = 1.0
    advantage_bound: float = 5.0
    kl_weight: float = 1e-4
    replay: bool = False
    gather_weights: bool = False

    def __post_init__(self):
        check_group_size(self.group_size)
        if not 0 <= self.data_captions <= 1:
            raise ValueError(f"data_captions is {self.data_captions}; it is a share, from 0 to 1")
        if self.denoising.guidance_scale != 1:
            raise ValueError("method 'nft' trains the unguided velocity; set und_for_gen.guidance_scale to 1")
        if min(self.noise_levels, self.strength, self.advantage_bound) <= 0:
            raise ValueError("noise_levels, strength and advantage_bound of method 'nft' must be positive")


def rollout(policy: NftPolicy, params: Mapping, frozen: Mapping, batch: Mapping, key: Array) -> dict:
    """Captions, deterministic drawings, rewards and advantages.

    Args:
      policy: the stage.
      params: trainable parts of the model.
      frozen: the other parts.
      batch: B images with prompts (`data.loader`).
      key: of this step.

    Returns:
      `samples` with leading axis B * G, and `metrics`.
    """
    parts, group, how = jax.lax.stop_gradient({**frozen, **params}), policy.group_size, policy.denoising
    completion = sample_captions(
        policy.model,
        parts,
        batch,
        key,
        max_new_tokens=policy.max_new_tokens,
        stops=policy.stops,
        sampling=SamplingConfig(policy.temperature),
        gather_weights=policy.gather_weights,
    )
    context, _ = encode_condition(
        policy.model, parts, how, *drawn_captions(policy.data_captions, completion, batch, key)
    )
    context = constrain_rows(jax.tree.map(lambda leaf: jnp.repeat(leaf, group, axis=0), context))
    noise = initial_noise(policy.model, trees.name_key(key, "noise"), batch["sample_id"], group, shared=False)
    latents = sample(predictor(policy.model, parts, how, context, None), noise, jnp.asarray(how.sigmas))
    pixels = decode(policy.model, parts, how, latents)
    advantage, metrics = reward_advantages(
        policy.reward, policy.encoders, parts["encoders"], batch["pixels"], pixels, group, policy.advantage_scale
    )
    samples = {
        "latents": latents,
        "context": context[0],
        "context_mask": context[1],
        "advantage": advantage.reshape(-1),
        **noised(policy, latents, sample_keys(trees.name_key(key, "levels"), batch["sample_id"], group)),
    }
    if policy.replay:
        samples["old_velocity"] = velocities(policy, parts, samples)
    if policy.kl_weight:
        samples["reference"] = velocities(policy, parts, samples, trained=False)
    return {"samples": constrain_rows(samples), "metrics": metrics | caption_metrics(completion, 1)}


def noised(policy: NftPolicy, latents: Array, keys: Array) -> dict[str, Array]:
    """K noise levels `[N, K]` and noises `[N, K, h, w, C]` for drawings `[N, h, w, C]`, from one key a drawing."""

    def level(number: Array) -> tuple[Array, Array]:
        own = jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)
        named = {name: jax.vmap(lambda key: trees.name_key(key, name))(own) for name in ("sigma", "noise")}
        return flow.sample_sigmas(named["sigma"], policy.time_scheme, policy.time_shift), uae.initial_noise(
            policy.model, named["noise"]
        )

    sigma, noise = jax.vmap(level, out_axes=1)(jnp.arange(policy.noise_levels))
    return {"sigma": sigma, "noise": noise.astype(latents.dtype)}


def velocities(policy: NftPolicy, parts: Mapping, samples: Mapping, *, trained: bool = True) -> Array:
    """Velocities `[N, K, h, w, C]` of the noised drawings by the policy or by the reference."""

    def at(levels: tuple[Array, Array]) -> Array:
        sigma, noise = levels
        return uae.velocity(
            policy.model,
            parts,
            flow.corrupt(samples["latents"], noise, sigma),
            sigma,
            (samples["context"], samples["context_mask"]),
            policy=trained,
        )

    return jax.lax.map(at, (samples["sigma"].T, samples["noise"].swapaxes(0, 1))).swapaxes(0, 1)


def loss(
    policy: NftPolicy, params: Mapping, frozen: Mapping, rollout: Mapping, key: Array
) -> tuple[Array, Array, dict]:
    """The contrastive flow-matching loss over K levels of each drawing; sum, count and metrics as `losses.nft_loss`."""
    del key
    samples = constrain_rows(rollout["samples"])
    of_level = {
        name: samples[name].swapaxes(0, 1)
        for name in ("sigma", "noise", "old_velocity", "reference")
        if name in samples
    }

    def level_loss(params: Mapping, level: Mapping) -> tuple[Array, tuple[Array, dict]]:
        noisy = flow.corrupt(samples["latents"], level["noise"], level["sigma"])
        velocity = uae.velocity(
            policy.model,
            {**frozen, **params},
            noisy,
            level["sigma"],
            (samples["context"], samples["context_mask"]),
            policy=True,
        )
        total, count, metrics = nft_loss(
            velocity,
            level.get("old_velocity"),
            flow.velocity_target(samples["latents"], level["noise"]),
            level["sigma"],
            samples["advantage"],
            strength=policy.strength,
            advantage_bound=policy.advantage_bound,
            reference=level.get("reference"),
            kl_weight=policy.kl_weight,
        )
        return total, (count, metrics)

    total, (count, metrics) = sum_over_steps(level_loss, params, of_level)
    return total, count.sum(), jax.tree.map(jnp.sum, metrics)
