"""What a run will do, for the estimate of its time: steps, scores, compilations and exports.

Before a stage has run, its steps are weighed by a rough count: passes of one image through the decoder. It is right to
a factor of about three, and is replaced by the seconds of the stage's own steps as soon as there are some.
"""

import pathlib
from collections.abc import Collection
from typing import Any

from uae_jax.methods.stage_settings import RolloutSettings
from uae_jax.stages.bootstrap.settings import BootstrapConfig
from uae_jax.stages.run_config import RunConfig, is_rl
from uae_jax.training.progress import COMPILE, EXPORT, SCORES, SCORES_DURING, Estimate
from uae_jax.training.records import finished_record

GRADIENT = 3  # a gradient costs as much as so many passes: forward, and twice backward


def passes(settings: Any) -> float:
    """Passes of one image through the decoder in one step of a stage.

    Args:
      settings: of the stage; those of a stranger's method count its images alone.
    """
    guided = 1 if getattr(settings, "guidance_scale", 1) == 1 else 2
    drawn = getattr(settings, "sampler_steps", 1) * guided
    if isinstance(settings, RolloutSettings):
        if not settings.draws:
            return settings.batch_size * GRADIENT
        samples = settings.batch_size * settings.group_size
        return samples * (drawn + GRADIENT * getattr(settings, "updates_per_rollout", 1))
    return settings.batch_size * drawn * GRADIENT


def has_checkpoint(workdir: pathlib.Path, name: str) -> bool:
    """Whether a stage has begun: its first checkpoint has the scores before it."""
    folder = workdir / "checkpoints" / name
    return folder.is_dir() and any(path.name.isdigit() for path in folder.iterdir())


def expected_work(config: RunConfig, workdir: pathlib.Path) -> Estimate:
    """The estimate of a run before its first step; what is done already counts nothing."""
    order = [
        (name, stage) for name, stage in config.order() if not finished_record(workdir, name, config.stage(stage).steps)
    ]
    estimate = Estimate({name: passes(config.stage(stage)) for name, stage in order})
    begun = order != config.order() or any(has_checkpoint(workdir, name) for name, _ in order[:1])
    estimate.expect(SCORES, len(order) + (not begun))
    estimate.expect(COMPILE, len(order))
    estimate.expect(EXPORT, len(order))
    for name, stage in order:
        steps, every = config.stage(stage).steps, config.loop.eval_every
        estimate.expect(name, steps)
        if is_rl(stage, config) and every:
            estimate.expect(SCORES_DURING, (steps - 1) // every)
    return estimate


def expected_trainings(config: BootstrapConfig, names: Collection[str]) -> Estimate:
    """The estimate of a bootstrap whose trainings of these names are left, such as `vae`; weighed by their batches."""
    trainings = {f"bootstrap_{name}": getattr(config, name) for name in names if getattr(config, name).steps}
    estimate = Estimate({name: training.batch_size for name, training in trainings.items()})
    estimate.expect(COMPILE, len(trainings))
    for name, training in trainings.items():
        estimate.expect(name, training.steps)
    return estimate
