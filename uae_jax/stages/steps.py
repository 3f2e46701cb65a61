"""The compiled train step of each stage from its settings, for runs with weights and for plans without."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

import jax
import optax

from uae_jax.diffusion.schedule import sigma_schedule
from uae_jax.models.uae import UAE
from uae_jax.rl.caption_policy import CaptionPolicy
from uae_jax.rl.caption_similarity import CaptionScorer
from uae_jax.rl.flow_policy import FlowPolicy
from uae_jax.rl.nft_policy import NftPolicy
from uae_jax.rl.reconstruction import Denoising
from uae_jax.rl.rewards import Encoder
from uae_jax.stages import cold_start, gen_for_und, pretrain, und_for_gen

STAGES = {
    "pretrain": (pretrain.PretrainConfig, pretrain.trainable),
    "cold_start": (cold_start.ColdStartConfig, cold_start.trainable),
    "gen_for_und": (gen_for_und.GenForUndConfig, gen_for_und.trainable),
    "und_for_gen": (und_for_gen.UndForGenConfig, und_for_gen.trainable),
}
RL_STAGES = ("gen_for_und", "und_for_gen")
# parts that may be held in bfloat16 while nothing trains them
HELD = ("vision", "language", "projector", "transformer")


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """Noise levels of every sampler: static shift and kind of schedule (`diffusion.schedule`)."""

    shift: float = 3.0
    schedule: str = "diffusers"


class Described(Protocol):
    """What a step needs to know of a system; `weights.System` is one.

    Attributes:
      model: the description.
      encoders: image encoders by name.
      stops: ids that end a caption.
      scorer: of captions, or None.
    """

    model: UAE
    encoders: dict[str, Encoder]
    stops: tuple[int, ...]
    scorer: CaptionScorer | None


def held(parts: Mapping, trained: Collection[str], dtype: str) -> dict:
    """The parts of a model as a stage holds them: large ones that neither it nor a later stage trains or copies in
    another precision.

    Auto-encoder and image encoders compute in float32 and stay as they are.

    Args:
      parts: the model's dictionary, arrays or tracers.
      trained: names that this stage or a later one trains, or a later one copies (`RunConfig.trained_from`).
      dtype: of the others among `HELD`.
    """
    return {
        name: jax.tree.map(lambda leaf: leaf.astype(dtype), part) if name in HELD and name not in trained else part
        for name, part in parts.items()
    }


def with_drawing_policy(parts: Mapping) -> dict:
    """The parts with the whole transformer that und_for_gen has trained, if any, in place of its reference.

    Programs that look at no reference are the same then before and after that stage, and a stage of supervised training
    goes on from it.
    """
    rest = dict(parts)
    policy = rest.pop("transformer_policy", None)
    return rest if policy is None else {**rest, "transformer": policy}


def check_batch(stage: str, config: Any, ways: int) -> None:
    """Checks that a stage's batch can be cut as its settings say.

    Args:
      stage: a name of `STAGES`; config: its settings.
      ways: devices that share the batch.

    Raises:
      ValueError: pictures do not divide over the devices, or samples (drawings in und_for_gen) into updates and
        micro-batches.
    """
    parts = config.updates_per_rollout * config.micro_batches
    samples = config.batch_size * (config.group_size if stage == "und_for_gen" else 1)
    if config.batch_size % ways or samples % parts:
        raise ValueError(
            f"config.{stage}.batch_size is {config.batch_size}; it must be a multiple of the {ways} devices that "
            "share the "
            f"batch, and its {samples} samples one of updates_per_rollout * micro_batches = {parts}"
        )


def make_denoising(
    sampler: SamplerConfig, steps: int, guidance_scale: float, *, policy_condition: bool = False, vae_chunk: int = 0
) -> Denoising:
    """The sampler of a stage, or of an evaluation."""
    sigmas = sigma_schedule(steps, sampler.shift, sampler.schedule)
    return Denoising(tuple(float(sigma) for sigma in sigmas), guidance_scale, policy_condition, vae_chunk)


def reward_encoders(system: Described, config: Any) -> tuple[Encoder, ...]:
    """The image encoders of a stage's reward."""
    return tuple(system.encoders[name] for name in config.reward.names)


def make_policy(
    stage: str, config: Any, sampler: SamplerConfig, system: Described
) -> CaptionPolicy | FlowPolicy | NftPolicy:
    """The description of an RL stage: the model and the stage's settings of the same names."""
    kind, more = (
        (CaptionPolicy, {"scorer": system.scorer})
        if stage == "gen_for_und"
        else (und_for_gen.METHODS[config.method][0], {})
    )
    denoising = make_denoising(
        sampler,
        config.sampler_steps,
        config.guidance_scale,
        policy_condition=config.condition_model == "policy",
        vae_chunk=config.vae_chunk,
    )
    shared = {field.name for field in dataclasses.fields(kind)} & {field.name for field in dataclasses.fields(config)}
    return kind(
        model=system.model,
        denoising=denoising,
        encoders=reward_encoders(system, config),
        stops=system.stops,
        replay=config.updates_per_rollout > 1,
        **more,
        **{name: getattr(config, name) for name in shared},
    )


def make_step(
    stage: str,
    config: Any,
    sampler: SamplerConfig,
    system: Described,
    optimizer: optax.GradientTransformation,
    shardings: Any = None,
) -> Callable:
    """The compiled `train_step(state, frozen, batch, key)` of a stage.

    Args:
      stage: a name of `STAGES`; config: its settings.
      sampler: noise levels.
      system: the model, without its parameters.
      optimizer: of `training.optimizer`.
      shardings: of state and metrics.
    """
    if stage == "pretrain":
        return pretrain.make_step(system.model, config, optimizer, shardings)
    if stage == "cold_start":
        denoising = make_denoising(sampler, config.sampler_steps, config.guidance_scale, vae_chunk=config.vae_chunk)
        return cold_start.make_step(
            system.model, config, denoising, reward_encoders(system, config), optimizer, shardings
        )
    module = gen_for_und if stage == "gen_for_und" else und_for_gen
    return module.make_step(make_policy(stage, config, sampler, system), config, optimizer, shardings)
