"""DiffusionNFT: the transformer learns from its own images by contrastive flow matching, without log-probabilities.

Source: arXiv 2509.16117, section 3.2 and algorithm 1. Each caption gets G images by the deterministic sampler. These
images are then the data of flow matching: towards those better than their group, away from those worse. The gradient
holds what distinguishes an image from the others, and none of the white noise of Flow-GRPO's stochastic steps.
Departures:

1. `old_decay=0` makes rollouts by the present policy; the source has a moving average of it.
2. The KL is the mean squared difference of the policy's and the reference's velocities.
3. The noise levels are sampled by `time_scheme`, `levels` of them an image. With `stratified` each comes from its own
   part of that density; with `shared_levels` the drawings of a group have the same levels and noises.
4. `objective="awm"` is advantage-weighted matching (arXiv 2509.25050) of the same drawings, without its ratio.

Shape letters: N generated images, K noise levels of an image, `h w C` latents.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from uae_jax import trees
from uae_jax.diffusion import flow
from uae_jax.diffusion.sampler import sample
from uae_jax.methods.method import Loss
from uae_jax.methods.und_for_gen import DecoderMethod, DecoderMethodSettings
from uae_jax.models import uae
from uae_jax.nn.constrain import constrain_rows
from uae_jax.rl.advantages import SCALES
from uae_jax.rl.losses import awm_loss, nft_loss
from uae_jax.rl.step_sums import sum_over_steps
from uae_jax.rollouts.reconstruction import Context, initial_noise, predictor, sample_keys
from uae_jax.settings import setting
from uae_jax.training.step import OldPolicy


@dataclasses.dataclass(frozen=True)
class DiffusionNftConfig(DecoderMethodSettings):
    """Settings of DiffusionNFT; published values where a source is named."""

    levels: int = setting(10, "noise levels of each image in the loss", low=1, source="arXiv 2509.16117")
    time_scheme: str = setting("uniform", "density of these noise levels", choices=flow.SCHEMES)
    time_shift: float = setting(3.0, "shift of these noise levels", above=0)
    stratified: bool = setting(
        False, "one noise level from each of `levels` equally probable parts of that density", source="arXiv 2509.25050"
    )
    shared_levels: bool = setting(
        False,
        "the drawings of a group have the same noise levels and noises in the loss, whose differences then tell "
        "the drawings apart",
    )
    objective: str = setting("nft", "the loss: contrastive, or advantage-weighted matching", choices=("nft", "awm"))
    strength: float = setting(
        1.0,
        "b of the implicit policies v_old +- b (v - v_old), see losses.nft_loss",
        above=0,
        source="arXiv 2509.16117",
    )
    advantage_bound: float = setting(
        5.0, "an advantage of this size counts as certainly good", above=0, source="arXiv 2509.16117"
    )
    kl_weight: float = setting(
        1e-4, "weight of the squared difference to the reference's velocity", low=0, source="arXiv 2509.16117"
    )
    advantage_scale: str = setting("group", "what advantages are divided by", choices=SCALES)
    old_decay: float = setting(
        0.5,
        "ceiling of the decay of the moving average that makes rollouts; 0: the present policy makes them",
        low=0,
        high=1,
        source="arXiv 2509.16117",
    )
    old_decay_rate: float = setting(
        1e-3, "that decay is min(old_decay, old_decay_rate * step)", low=0, source="arXiv 2509.16117"
    )

    @property
    def old_policy(self) -> OldPolicy | None:
        """How the policy of the rollouts follows the trained one; None where that one makes them."""
        return OldPolicy(self.old_decay_rate, self.old_decay) if self.old_decay else None

    @property
    def kept_steps(self) -> int:
        """Latents that a rollout keeps of an image."""
        return self.levels


@dataclasses.dataclass(frozen=True)
class DiffusionNft(DecoderMethod):
    """The method; a `methods.method.Method`. It trains the unguided velocity, and samples without guidance."""

    Settings: ClassVar[type] = DiffusionNftConfig

    def rollout(self, params: Mapping, frozen: Mapping, batch: Mapping, key: Array) -> dict:
        """Captions, images of the deterministic sampler, and rewards.

        Args:
          params: trained parts of the model; frozen: the other parts.
          batch: B images with prompts (`data.loader`).
          key: of this step.

        Returns:
          `samples` with leading axis N, and `metrics`.
        """
        parts, model, how = jax.lax.stop_gradient({**frozen, **params}), self.system.model, self.denoising
        group, sample_ids = self.settings.group_size, batch["sample_id"]
        context, _, caption_metrics = self.contexts(parts, batch, key)
        noise = initial_noise(model, trees.name_key(key, "noise"), sample_ids, group, shared=False)
        latents = sample(predictor(model, parts, how, context, None), noise, jnp.asarray(how.sigmas))
        reward, metrics = self.rewards(parts, batch["pixels"], latents)
        samples = {"latents": latents, "reward": self.paid(reward, sample_ids, key)}
        levels_key = trees.name_key(key, "levels")
        samples |= self.noised(
            latents,
            sample_keys(levels_key, sample_ids).repeat(group, axis=0)
            if self.own.shared_levels
            else sample_keys(levels_key, sample_ids, group),
        )
        if self.replay:
            samples["old_velocity"] = self.velocities(parts, samples, context, trained=True)
        if self.own.kl_weight:
            samples["reference"] = self.velocities(parts, samples, context, trained=False)
        rollout = {"samples": constrain_rows(samples), "metrics": metrics | caption_metrics}
        return self.keep_contexts(rollout, context)

    def loss(self, params: Mapping, frozen: Mapping, rollout: Mapping, key: Array) -> Loss:
        """The contrastive flow-matching loss over K levels of each image; as `losses.nft_loss`."""
        samples, own = constrain_rows(self.with_contexts(rollout)), self.own
        fields = ("sigma", "noise", "old_velocity", "reference")
        by_level = {name: samples[name].swapaxes(0, 1) for name in fields if name in samples}

        def level_loss(params: Mapping, level: Mapping) -> tuple[Array, tuple[Array, dict]]:
            noisy = flow.corrupt(samples["latents"], level["noise"], level["sigma"])
            context = samples["context"], samples["context_mask"]
            velocity = uae.velocity(
                self.system.model, {**frozen, **params}, noisy, level["sigma"], context, policy=True
            )
            target = flow.velocity_target(samples["latents"], level["noise"])
            scored = velocity, level.get("old_velocity"), target, level["sigma"], samples["advantage"]
            shared = dict(
                advantage_bound=own.advantage_bound, reference=level.get("reference"), kl_weight=own.kl_weight
            )
            if own.objective == "awm":
                total, count, metrics = awm_loss(*scored, **shared)
            else:
                total, count, metrics = nft_loss(*scored, strength=own.strength, **shared)
            return total, (count, metrics)

        total, (count, metrics) = sum_over_steps(level_loss, params, by_level)
        return total, count.sum(), jax.tree.map(jnp.sum, metrics)

    def noised(self, latents: Float[Array, "n h w c"], keys: Array) -> dict[str, Array]:
        """K noise levels `[N, K]` and noises `[N, K, h, w, C]` for latents `[N, h, w, C]`, from one key an image."""
        model, own = self.system.model, self.own

        def level(number: Array) -> tuple[Array, Array]:
            own_keys = jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)
            named = {name: jax.vmap(lambda key: trees.name_key(key, name))(own_keys) for name in ("sigma", "noise")}
            stratum = (number, own.levels) if own.stratified else None
            sigma = flow.sample_sigmas(named["sigma"], own.time_scheme, own.time_shift, stratum)
            return sigma, uae.initial_noise(model, named["noise"])

        sigma, noise = jax.vmap(level, out_axes=1)(jnp.arange(own.levels))
        return {"sigma": sigma, "noise": noise.astype(latents.dtype)}

    def velocities(
        self, parts: Mapping, samples: Mapping, context: Context, *, trained: bool
    ) -> Float[Array, "n k h w c"]:
        """Velocities `[N, K, h, w, C]` of the noised latents by the policy or by the reference."""

        def at(levels: tuple[Array, Array]) -> Array:
            sigma, noise = levels
            noisy = flow.corrupt(samples["latents"], noise, sigma)
            return uae.velocity(self.system.model, parts, noisy, sigma, context, policy=trained)

        return jax.lax.map(at, (samples["sigma"].T, samples["noise"].swapaxes(0, 1))).swapaxes(0, 1)
