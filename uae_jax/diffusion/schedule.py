"""Noise levels (sigma) of the flow-matching sampler, computed on the host.

A schedule runs from sigma 1 (pure noise) down to sigma 0 (the image). SD3 bends the even spacing by a static shift
(arXiv 2403.03206, section 5.3.2). Code bases apply the shift in three ways; each has a name in `KINDS`.
"""

import dataclasses
import math
import pathlib
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Array, Float, Float32

from uae_jax.files.json_files import read_json
from uae_jax.files.known_fields import shown, unknown_fields
from uae_jax.files.paths import to_path

KINDS = ("diffusers", "single", "linspace_shift")

_CONFIG_NAME = "scheduler_config.json"
_SCHEDULER_CLASS = "FlowMatchEulerDiscreteScheduler"
# those that are read, and those of the dynamic shift, which is refused
# of the dynamic shifts, which the decoders that have one compute themselves
_BY_DECODERS = ("use_dynamic_shifting", "shift_terminal")
_UNDERSTOOD = (
    "shift",
    "num_train_timesteps",
    "base_shift",
    "max_shift",
    "base_image_seq_len",
    "max_image_seq_len",
    "time_shift_type",
)

Sigma = TypeVar("Sigma", float, Float[np.ndarray, "..."], Float[Array, "..."])


def shift_sigma(sigma: Sigma, shift: float) -> Sigma:
    """The static shift `shift * s / (1 + (shift - 1) * s)` of noise levels in [0, 1]; 0 and 1 are fixed points.

    Source: arXiv 2403.03206, section 5.3.2.
    """
    return shift * sigma / (1 + (shift - 1) * sigma)


def shifted_levels(steps: int, mu: float) -> Float32[np.ndarray, " levels"]:
    """Levels of a sampler with an exponential shift, `e^mu / (e^mu + 1 / s - 1)`, of even spacing from 1 to 1 / steps.

    The arithmetic is float32, as in `FlowMatchEulerDiscreteScheduler.set_timesteps`.

    Args:
      steps: velocity evaluations.
      mu: logarithm of the shift.

    Returns:
      `steps + 1` levels from 1 to 0.

    Raises:
      ValueError: fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"a sampler needs at least 1 step, got steps={steps}")
    even = np.linspace(1.0, 1 / steps, steps).astype(np.float32)
    factor = np.float32(math.exp(mu))
    return np.append(factor / (factor + (1 / even - 1)), np.float32(0)).astype(np.float32)


def shifted_once(steps: int, shift: float) -> Float32[np.ndarray, " levels"]:
    """Levels of a sampler with a static shift of even spacing from 1 to 1 / steps, in float32 as in diffusers.

    Raises:
      ValueError: fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"a sampler needs at least 1 step, got steps={steps}")
    # torch.linspace in float32: each half is counted from its own end, by fused products and sums, which round once
    last, count = np.float32(1 / steps), np.arange(steps, dtype=np.float64)
    step = np.float64((last - np.float32(1)) / np.float32(max(steps - 1, 1)))
    even = np.where(count < max(steps // 2, 1), 1 + step * count, np.float64(last) - step * count[::-1])
    return np.append(shift_sigma(even.astype(np.float32), shift), np.float32(0)).astype(np.float32)


def sigma_schedule(
    steps: int, shift: float = 3.0, kind: str = "diffusers", num_train: int = 1000
) -> Float32[np.ndarray, " levels"]:
    """The noise levels of a sampler with `steps` steps.

    Args:
      steps: number of velocity evaluations, at least 1.
      shift: static shift, above 0; 1 leaves the spacing even, SD3 uses 3.
      kind:
        "diffusers": even spacing from 1 to the smallest training level, which is already shifted; then shifted again.
          SD3's pipelines do this in `FlowMatchEulerDiscreteScheduler.set_timesteps` (huggingface/diffusers#13243).
        "single": even spacing from 1 to 1 / num_train, shifted once.
        "linspace_shift": even spacing from 1 to 0, shifted once (DanceGRPO).
      num_train: number of training noise levels, 1000 in SD3.

    Returns:
      `steps + 1` levels, strictly decreasing from 1 to 0; computed in float64.

    Raises:
      ValueError: an unknown kind, fewer than one step, or a shift that is not positive.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown sigma schedule {kind!r}: choose one of {', '.join(KINDS)}")
    if steps < 1:
        raise ValueError(f"a sampler needs at least 1 step, got steps={steps}")
    if shift <= 0:
        raise ValueError(f"the sigma shift must be positive, got shift={shift}")
    if kind == "linspace_shift":
        return shift_sigma(np.linspace(1.0, 0.0, steps + 1), shift).astype(np.float32)
    smallest = 1.0 / num_train
    if kind == "diffusers":
        smallest = shift_sigma(smallest, shift)
    return np.append(shift_sigma(np.linspace(1.0, smallest, steps), shift), 0.0).astype(np.float32)


def check_scheduler(folder: str | pathlib.Path, **wanted: Any) -> dict[str, Any]:
    """The settings of a scheduler's folder, if they are those with which a decoder's levels are computed.

    Args:
      folder: with `scheduler_config.json`.
      **wanted: settings and the values that they must have; absent counts as None or False.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: another scheduler, another value, or a setting that nothing here reads.
    """
    path = to_path(folder) / _CONFIG_NAME
    stored = read_json(path.parent, path.name)
    name = stored.get("_class_name", _SCHEDULER_CLASS)
    if name != _SCHEDULER_CLASS:
        raise ValueError(f"{path} describes {name}; only {_SCHEDULER_CLASS} is supported")
    for option, value in wanted.items():
        if (stored.get(option) or None) != (value or None):
            raise ValueError(f"{path} sets {shown(option, stored.get(option))}; this decoder's is {value!r}")
    for option, value in unknown_fields(stored, (*_UNDERSTOOD, *_BY_DECODERS)):
        raise ValueError(f"{path} sets {shown(option, value)}, which is not supported")
    return stored


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """What a scheduler folder fixes: the static shift and the number of training levels."""

    shift: float = 3.0
    num_train: int = 1000
    kind: str = "diffusers"

    @classmethod
    def from_folder(cls, folder: str | pathlib.Path) -> "ScheduleConfig":
        """Reads `scheduler_config.json` in `folder` or in its `scheduler` subfolder.

        Raises:
          FileNotFoundError: neither folder has the file.
          ValueError: the file is not JSON, names another scheduler, or sets an option that SD3 and SD3.5 do not use
            (dynamic shift, Karras sigmas, ...).
        """
        folder = to_path(folder)
        places = (folder / _CONFIG_NAME, folder / "scheduler" / _CONFIG_NAME)
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            raise FileNotFoundError(
                f"no {_CONFIG_NAME} in {folder} or {folder / 'scheduler'}: "
                "point to the scheduler folder of an SD3 checkpoint"
            )
        config = read_json(path.parent, path.name)
        name = config.get("_class_name", _SCHEDULER_CLASS)
        if name != _SCHEDULER_CLASS:
            raise ValueError(f"{path} describes {name}; only {_SCHEDULER_CLASS} is supported")
        for option, value in unknown_fields(config, _UNDERSTOOD):
            raise ValueError(
                f"{path} sets {shown(option, value)}, which is not supported: use a static shift as SD3 and SD3.5 do"
            )
        shift, levels = config.get("shift", 1.0), config.get("num_train_timesteps", 1000)
        if isinstance(shift, bool) or not isinstance(shift, int | float) or not 0 < shift < math.inf:
            raise ValueError(f"{path} sets shift={shift!r}; it must be a positive number")
        if isinstance(levels, bool) or not isinstance(levels, int) or levels < 1:
            raise ValueError(f"{path} sets num_train_timesteps={levels!r}; it must be a positive whole number")
        return cls(shift=float(shift), num_train=levels)

    def sigmas(self, steps: int) -> Float32[np.ndarray, " levels"]:
        """`sigma_schedule` with these settings: `steps + 1` levels from 1 to 0."""
        return sigma_schedule(steps, self.shift, self.kind, self.num_train)
