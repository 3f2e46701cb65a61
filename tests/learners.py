"""A learner of two functions, for tests of the train step and of the loop."""

import dataclasses
from collections.abc import Callable

from uae_jax.methods.method import Supervised
from uae_jax.methods.stage_settings import SupervisedSettings


@dataclasses.dataclass(frozen=True)
class Sampled(Supervised):
    """A learner whose samples are made by a function."""

    sample: Callable = None

    def rollout(self, params, frozen, batch, key):
        """What the function makes of the batch."""
        return self.sample(params, frozen, batch, key)


class PairSettings(SupervisedSettings):
    """Settings with two samples an image."""

    samples_per_image = 2


def learner(loss, sample=None, *, kind=SupervisedSettings, **settings) -> Supervised:
    """A learner with the given loss, settings and, where there is one, function of samples."""
    values = kind(**settings)
    return Supervised(loss, values) if sample is None else Sampled(loss, values, sample)
