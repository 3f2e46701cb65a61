"""Methods that are no part of the package, as a stranger would write them."""

import dataclasses

import jax
import jax.numpy as jnp

from uae_jax import trees
from uae_jax.diffusion import flow
from uae_jax.diffusion.sampler import sample
from uae_jax.methods.stage_settings import SupervisedSettings
from uae_jax.methods.und_for_gen import DecoderMethod, DecoderMethodSettings
from uae_jax.models import uae
from uae_jax.rollouts.reconstruction import initial_noise, predictor
from uae_jax.settings import changed, setting
from uae_jax.training.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class BrightnessConfig(SupervisedSettings):
    """Settings of the stage."""

    steps: int = changed(SupervisedSettings, "steps", 3)
    batch_size: int = changed(SupervisedSettings, "batch_size", 4)
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-2)
    target: float = setting(1.0, "what the mean brightness, 0 to 1, is multiplied by", above=0)


@dataclasses.dataclass(frozen=True)
class Brightness:
    """The projector's last bias learns the brightness of the images."""

    Settings = BrightnessConfig
    reinforcement = False
    kl_bound = "kl"

    settings: BrightnessConfig
    sampler: object
    system: object

    @staticmethod
    def trains(settings):
        """The projector."""
        return ("projector",)

    @staticmethod
    def needs_captions(settings):
        """No: it looks at images alone."""
        return False

    @staticmethod
    def reads(settings):
        """Images."""
        return ("pixels",)

    def rollout(self, params, frozen, batch, key):
        """The images, and nothing that is sampled."""
        brightness = (batch["pixels"].mean((1, 2, 3)) + 1) / 2
        return {"samples": {"brightness": brightness}, "metrics": {"brightness": brightness.mean()}}

    def loss(self, params, frozen, rollout, key):
        """Squared error of the bias."""
        wanted = self.settings.target * rollout["samples"]["brightness"]
        error = jnp.square(params["projector"]["second"]["bias"][None] - wanted[:, None]).mean(-1)
        return error.sum(), jnp.float32(len(error)), {}


@dataclasses.dataclass(frozen=True)
class WeightedFlowConfig(DecoderMethodSettings):
    """Settings of the method."""

    sharpness: float = setting(2.0, "weights are the exponential of so many advantages", low=0)
    advantage_scale: str = setting("group", "what advantages are divided by", choices=("group", "batch"))


@dataclasses.dataclass(frozen=True)
class WeightedFlow(DecoderMethod):
    """Flow matching on the transformer's own images, the better the more."""

    Settings = WeightedFlowConfig

    def rollout(self, params, frozen, batch, key):
        """Captions, images and their rewards."""
        parts, model, how = {**frozen, **params}, self.system.model, self.denoising
        context, _, metrics = self.contexts(parts, batch, key)
        group = self.settings.group_size
        noise = initial_noise(model, trees.name_key(key, "noise"), batch["sample_id"], group, shared=False)
        latents = sample(predictor(model, parts, how, context, None), noise, jnp.asarray(how.sigmas))
        reward, terms = self.rewards(parts, batch["pixels"], latents)
        samples = {"latents": latents, "noise": noise, "reward": reward}
        return {"samples": samples | {"context": context[0], "mask": context[1]}, "metrics": metrics | terms}

    def loss(self, params, frozen, rollout, key):
        """The weighted squared error of velocities at the middle of the path."""
        samples = rollout["samples"]
        sigma = jnp.full(len(samples["latents"]), 0.5)
        noisy = flow.corrupt(samples["latents"], samples["noise"], sigma)
        context = samples["context"], samples["mask"]
        velocity = uae.velocity(self.system.model, {**frozen, **params}, noisy, sigma, context, policy=True)
        error = jnp.square(velocity - flow.velocity_target(samples["latents"], samples["noise"])).mean((1, 2, 3))
        weight = jax.nn.softmax(self.own.sharpness * samples["advantage"])
        return jnp.sum(weight * error), jnp.float32(1), {"weight_max": weight.max()}
