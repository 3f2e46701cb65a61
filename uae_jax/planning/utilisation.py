"""The least seconds that a step of a run can take on its devices, against which its own seconds are a utilisation."""

import jax

from uae_jax.planning.chips import CHIPS
from uae_jax.planning.plan import step_work, without_recomputation
from uae_jax.planning.system import abstract_system
from uae_jax.stages.run_config import RunConfig


def peak_flops() -> float | None:
    """bfloat16 peak of all devices of the run, a second; None for devices of unknown peak, such as CPUs."""
    kinds = {chip.device_kind: chip.flops for chip in CHIPS.values()}
    found = [kinds.get(device.device_kind) for device in jax.devices()]
    return None if None in found else sum(peak for peak in found if peak is not None)


def seconds_at_peak(config: RunConfig, stage: str) -> float | None:
    """Seconds of one step at the devices' peak; None where the peak is unknown.

    What the backward pass computes again does not count, and captions count at their longest.
    """
    peak = peak_flops()
    if peak is None:
        return None
    plain = without_recomputation(config)
    return step_work(plain, abstract_system(plain), stage).flops / peak
