"""Sigma schedules of the flow-matching sampler, computed on the host.

A schedule runs from sigma 1 (pure noise) down to sigma 0 (the image). SD3 bends the even
spacing with a static shift, `s -> shift * s / (1 + (shift - 1) * s)` (arXiv 2403.03206,
section 5.3.2), and code bases differ in where they apply it; the three conventions in use have
names here.
"""

import dataclasses
import json
import pathlib

import numpy as np

KINDS = ("diffusers", "single", "linspace_shift")

_CONFIG_NAME = "scheduler_config.json"
_SCHEDULER_CLASS = "FlowMatchEulerDiscreteScheduler"
_UNSUPPORTED = (
    "use_dynamic_shifting",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "invert_sigmas",
    "shift_terminal",
    "stochastic_sampling",
)


def shift_sigma(sigma, shift: float):
    """Applies the static shift `shift * s / (1 + (shift - 1) * s)` to sigmas in [0, 1].

    Works on numpy and on jax arrays of any shape; 0 and 1 are fixed points.
    Source: arXiv 2403.03206, section 5.3.2.
    """
    return shift * sigma / (1 + (shift - 1) * sigma)


def sigma_schedule(steps: int, shift: float = 3.0, kind: str = "diffusers", num_train: int = 1000) -> np.ndarray:
    """The noise levels of a sampler with `steps` steps.

    Args:
      steps: number of velocity evaluations N, at least 1.
      shift: static shift, above 0; 1 leaves the spacing even, SD3 uses 3.
      kind: "diffusers": the even spacing from 1 to the already shifted smallest training sigma,
        shifted again, as `FlowMatchEulerDiscreteScheduler.set_timesteps` does (the "double
        shift", huggingface/diffusers#13243; what the SD3 pipelines run).
        "single": even spacing from 1 to 1 / num_train, shifted once.
        "linspace_shift": even spacing from 1 to 0 with N + 1 points, shifted once (DanceGRPO).
      num_train: number of training noise levels, 1000 in SD3.

    Returns:
      float32 [N + 1], strictly decreasing from 1 to 0; computed in float64.

    Raises:
      ValueError: for an unknown kind, fewer than one step or a shift that is not positive.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown sigma schedule {kind!r}: choose one of {', '.join(KINDS)}")
    if steps < 1:
        raise ValueError(f"a sampler needs at least 1 step, got steps={steps}")
    if shift <= 0:
        raise ValueError(f"the sigma shift must be positive, got shift={shift}")
    if kind == "linspace_shift":
        sigmas = shift_sigma(np.linspace(1.0, 0.0, steps + 1), shift)
        return sigmas.astype(np.float32)
    smallest = 1.0 / num_train
    if kind == "diffusers":
        smallest = shift_sigma(smallest, shift)
    sigmas = shift_sigma(np.linspace(1.0, smallest, steps), shift)
    return np.append(sigmas, 0.0).astype(np.float32)


def timestep(sigma, num_train: int = 1000):
    """The transformer's time input, `num_train * sigma`: a float in [0, num_train], not rounded."""
    return num_train * sigma


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """What a scheduler folder fixes: the static shift and the number of training levels."""

    shift: float = 3.0
    num_train: int = 1000
    kind: str = "diffusers"

    @classmethod
    def from_folder(cls, folder) -> "ScheduleConfig":
        """Reads `scheduler_config.json` in `folder` or in its `scheduler` subfolder.

        Raises:
          FileNotFoundError: when neither place holds the file.
          ValueError: when the file is not JSON, names another scheduler, or asks for an option
            (dynamic shift, Karras sigmas, ...) that SD3 and SD3.5 do not use.
        """
        folder = pathlib.Path(folder)
        places = (folder / _CONFIG_NAME, folder / "scheduler" / _CONFIG_NAME)
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            raise FileNotFoundError(
                f"no {_CONFIG_NAME} in {folder} or {folder / 'scheduler'}: "
                "point to the scheduler folder of an SD3 checkpoint"
            )
        try:
            config = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from error
        name = config.get("_class_name", _SCHEDULER_CLASS)
        if name != _SCHEDULER_CLASS:
            raise ValueError(f"{path} describes {name}; only {_SCHEDULER_CLASS} is supported")
        for option in _UNSUPPORTED:
            if config.get(option):
                raise ValueError(
                    f"{path} sets {option}={config[option]!r}, which is not supported: "
                    "use a static shift as SD3 and SD3.5 do"
                )
        return cls(
            shift=float(config.get("shift", 1.0)),
            num_train=int(config.get("num_train_timesteps", 1000)),
        )

    def sigmas(self, steps: int) -> np.ndarray:
        """`sigma_schedule` with these settings: float32 [steps + 1] from 1 to 0."""
        return sigma_schedule(steps, self.shift, self.kind, self.num_train)
