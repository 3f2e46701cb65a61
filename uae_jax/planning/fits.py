"""What fits my card: the memory of every preset's stages against the memory of cards and chips.

The bytes are the estimates of `planning.estimate`, so that the table needs no compiler. A stage is planned on as many
devices as its preset is made for.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from uae_jax.planning.cards import TARGETS
from uae_jax.planning.chips import CHIPS, GIB, USABLE, Chip
from uae_jax.planning.estimate import estimate_memory
from uae_jax.planning.plan import mesh_sizes
from uae_jax.planning.system import abstract_system
from uae_jax.settings import frozen
from uae_jax.stages.program import make_program
from uae_jax.stages.run_config import RunConfig

MACHINE = re.compile(r"@(?:(\d+)x[\w.]+|(v\w+)-(\d+))")  # @8xH200, @1x24GB, or @v5e-8
HEAD = ("preset", "stage", "images a step", "samples a micro-batch", "GiB a device", "own chip")


@dataclasses.dataclass(frozen=True)
class Fit:
    """One stage of a preset.

    Attributes:
      preset: its name.
      stage: its name.
      devices: that the preset is made for.
      chip: of a slice; empty where the preset is for cards, of any kind.
      images: in a global batch.
      samples: captions or drawings of all devices whose gradient is computed at once.
      peak: bytes of one device.
    """

    preset: str
    stage: str
    devices: int
    chip: str
    images: int
    samples: int
    peak: float

    def fits(self, chip: Chip) -> bool:
        """Whether the stage fits the usable memory of such a device, and is made for its kind."""
        kind = chip.name == self.chip if self.chip else chip.name in TARGETS
        return kind and self.peak <= USABLE * chip.memory


def machine_of(preset: str) -> tuple[int, str]:
    """The number of devices of `PRESET@MACHINE`, and the chip's name for slices.

    Raises:
      ValueError: the preset names no machine.
    """
    found = MACHINE.search(preset)
    if not found:
        raise ValueError(f"the preset {preset!r} names no machine; give one such as {preset}@1x80GB")
    return int(found[1] or found[3]), found[2] or ""


def fits_of(preset: str, values: Mapping[str, Any]) -> list[Fit]:
    """The stages of a preset with its configuration's values, estimated."""
    config, (devices, chip) = frozen(RunConfig, values), machine_of(preset)
    sizes, system = mesh_sizes(config, devices), abstract_system(config)
    found = []
    for stage in config.distinct_stages():
        program = make_program(config, system, system.parts, system.batch, stage)
        memory, settings = estimate_memory(program, config, sizes, system), program.config
        samples = settings.batch_size * getattr(settings, "group_size", 1) // settings.micro_batches
        found.append(Fit(preset, stage, devices, chip, settings.batch_size, samples, memory.peak))
    return found


def chosen_chips(names: Sequence[str]) -> list[Chip]:
    """Chips by name, those of slices too; all cards for no name.

    Raises:
      ValueError: a name is unknown.
    """
    for name in names:
        if name not in CHIPS:
            raise ValueError(f"--fits names {name!r}; known are {', '.join(CHIPS)}")
    return [CHIPS[name] for name in names or TARGETS]


def fit_table(fits: Iterable[Fit], chips: Sequence[Chip]) -> str:
    """The table in Markdown: a row for each stage, and a column for each chip with the share of its memory."""
    rows = [[*HEAD, *(f"{chip.name} ({chip.memory / GIB:.0f})" for chip in chips)]]
    rows.append(["---"] * len(rows[0]))
    for fit in fits:
        shares = [f"{100 * fit.peak / chip.memory:.0f} %" if fit.fits(chip) else "-" for chip in chips]
        own = f"{100 * fit.peak / CHIPS[fit.chip].memory:.0f} % of {fit.chip}" if fit.chip else "-"
        known = [f"`{fit.preset}`", fit.stage, str(fit.images), str(fit.samples), f"{fit.peak / GIB:.1f}", own]
        rows.append([*known, *shares])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
