"""A plan of all stages as text and as JSON."""

import dataclasses
import json
import math
from typing import Any

from uae_jax.planning.between import Between
from uae_jax.planning.chips import GIB, USABLE, Topology
from uae_jax.planning.compile import Memory
from uae_jax.planning.hlo_seconds import KINDS, ProgramSeconds
from uae_jax.planning.links import Received
from uae_jax.planning.loading import Loading
from uae_jax.planning.pieces import Piece
from uae_jax.planning.roofline import MeshSizes, Roofline

COLUMNS = (
    "stage",
    "images",
    "trainable",
    "frozen",
    "arguments",
    "temporaries",
    "in a run",
    "peak",
    "of chip",
    "FLOPs",
    "bound s",
    "sampling s",
    "MFU at most",
    "program s",
    "compile s",
)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the text of a compiled stage says.

    Attributes:
      received: what a device receives in a step, by the kind of collective.
      seconds: of the compiled instructions; None for simulated devices.
    """

    received: dict[str, Received]
    seconds: ProgramSeconds | None


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """The plan of one stage.

    Attributes:
      stage: name of the stage.
      images: in a global batch.
      trainable, frozen: numbers of parameters.
      memory: of one chip.
      flops: of a step over all chips, with recomputation.
      model_flops: without recomputation.
      time: the least seconds of a step.
      drawing: FLOPs among `flops` with which a rollout draws its images, the text encoder's left out.
      compiled: what the compiled program's text says; None where there is none.
      smaller: flags that need less memory, see `remedies.smaller`.
      pieces: those compiled with a run's effort.
    """

    stage: str
    images: int
    trainable: int
    frozen: int
    memory: Memory
    flops: float
    model_flops: float
    time: Roofline
    drawing: float = 0.0
    compiled: Compiled | None = None
    smaller: tuple[str, ...] = ()
    pieces: tuple[Piece, ...] = ()

    def share(self, topology: Topology) -> float:
        """The peak as a share of a chip's memory."""
        return self.memory.peak / topology.chip.memory

    def fits(self, topology: Topology) -> bool:
        """Whether the peak is within the usable share of a chip's memory."""
        return self.share(topology) <= USABLE


def _parameters(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e8 else f"{count / 1e6:.1f} M"


def _size(size: float) -> str:
    return f"{size / GIB:.2f}" if size >= 0.01 * GIB else f"{size / GIB:.4f}"


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) or math.isinf(value) else form.format(value)


def _row(plan: StagePlan, topology: Topology) -> list[str]:
    memory, known = plan.memory, math.isfinite(topology.chip.memory)
    return [
        plan.stage,
        str(plan.images),
        _parameters(plan.trainable),
        _parameters(plan.frozen),
        _size(memory.arguments),
        _size(memory.temporaries),
        "-" if memory.run_temporaries is None else _size(memory.run_temporaries),
        _size(memory.peak),
        f"{100 * plan.share(topology):.0f} %" if known else "-",
        f"{plan.flops:.2e}",
        _number(plan.time.seconds, "{:.2f}"),
        _number(plan.time.decoding, "{:.2f}"),
        _number(100 * plan.time.utilisation, "{:.0f} %"),
        "-" if plan.compiled is None or plan.compiled.seconds is None else f"{plan.compiled.seconds.seconds:.2f}",
        "-" if memory.estimated else f"{memory.seconds:.0f}",
    ]


def text_table(
    plans: list[StagePlan],
    topology: Topology,
    sizes: MeshSizes,
    title: str,
    loading: Loading | None = None,
    between: Between | None = None,
) -> str:
    """The table in Markdown: GiB per device, FLOPs and seconds of a step, then what reading the weights needs, what
    happens between the steps, the largest temporaries, what devices receive, and the compiled program's seconds.
    """
    chip = topology.chip
    room = f"{chip.memory / GIB:.0f} GiB each" if math.isfinite(chip.memory) else "no limit"
    end = ", estimated." if plans and plans[0].memory.estimated else "."
    rows = [list(COLUMNS), *(_row(plan, topology) for plan in plans)]
    widths = [max(len(row[index]) for row in rows) for index in range(len(COLUMNS))]
    lines = [
        f"{title} on {topology.name}: {topology.devices} devices ({chip.name}, {room}), mesh data={sizes.data} "
        f"fsdp={sizes.fsdp} tensor={sizes.tensor}. Bytes in GiB per device{end}",
        "",
    ]
    for number, row in enumerate(rows):
        lines.append("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |")
        if number == 0:
            lines.append("|" + "|".join("-" * (width + 2) for width in widths) + "|")
    lines += [] if loading is None else ["", loading.line()]
    lines += [] if between is None else ["", *between.lines()]
    for plan in plans:
        if plan.memory.largest:
            named = "; ".join(f"{_size(size)} GiB {shape} ({name})" for size, shape, name in plan.memory.largest)
            lines += ["", f"{plan.stage}, largest temporaries: {named}"]
    for plan in plans:
        lines += _drawings(plan, topology) + _links(plan, topology) + _program(plan) + _pieces(plan)
    for plan in plans:
        lines += [] if plan.fits(topology) else _too_large(plan, chip.memory)
    return "\n".join(lines)


def _too_large(plan: StagePlan, memory: float) -> list[str]:
    """What to do about a stage that does not fit."""
    lines = [
        "",
        f"{plan.stage} does not fit: {_size(plan.memory.peak)} GiB of the {USABLE * memory / GIB:.1f} GiB that may be "
        f"used ({USABLE:.0%} of a chip).",
    ]
    if plan.smaller:
        lines.append(f"Less memory, the same results; try from the left: {' '.join(plan.smaller)}")
    if plan.memory.arguments > USABLE * memory:
        lines.append(
            "Weights and optimizer alone are more than the chip holds: take more chips (mesh.fsdp), adapters "
            "(train=lora), or a smaller model; python -m uae_jax.plan --fits lists what fits"
        )
    return lines


def _received(what: dict[str, Received]) -> str:
    """GB by name, those of the network beside those of links."""
    parts = [
        f"{name} {found.links / 1e9:.2f}" + (f" and {found.network / 1e9:.2f} by the network" if found.network else "")
        for name, found in what.items()
        if found.links or found.network
    ]
    return ", ".join(parts) or "nothing"


def _drawings(plan: StagePlan, topology: Topology) -> list[str]:
    """One line: the part of a step that draws the images of a rollout."""
    if not plan.drawing:
        return []
    seconds = plan.drawing / topology.devices / topology.chip.flops
    line = f"{plan.stage}, drawings of the rollout: {100 * plan.drawing / plan.flops:.0f} % of the FLOPs"
    return ["", line + (f", at least {seconds:.2f} s" if math.isfinite(seconds) else "")]


def _links(plan: StagePlan, topology: Topology) -> list[str]:
    """One line: what a device receives in a step, as counted for the bound and as compiled."""
    if topology.devices == 1:
        return []
    counted = {"weights": plan.time.weights, "gradients": plan.time.gradients}
    line = f"{plan.stage}, GB received by a device: counted {_received(counted)}"
    return ["", line + (f"; compiled {_received(plan.compiled.received)}" if plan.compiled else "")]


def _program(plan: StagePlan) -> list[str]:
    """The seconds of a compiled program by kind, by loop, and of its ten longest instructions."""
    found = plan.compiled and plan.compiled.seconds
    if not found:
        return []
    kinds = ", ".join(f"{name} {found.kinds[name]:.3f}" for name in KINDS)
    lines = [
        "",
        f"{plan.stage}, seconds of the compiled instructions: {found.seconds:.3f} = {kinds} (waits; busy "
        f"{found.links:.3f})",
        "",
        "| loop | runs | " + " | ".join(KINDS) + " |",
        "|" + "---|" * (2 + len(KINDS)),
    ]
    for loop in found.loops[:8]:
        cells = [loop.path or "outside of loops", f"{loop.runs:,.0f}"]
        lines.append("| " + " | ".join(cells + [f"{loop.seconds.get(name, 0.0):.3f}" for name in KINDS]) + " |")
    lines += ["", "| longest | runs | seconds | kind |", "|---|---|---|---|"]
    lines += [
        f"| {entry.path} {entry.shape} | {entry.runs:,.0f} | {entry.seconds:.3f} | {entry.kind} |"
        for entry in found.largest
    ]
    if found.unknown:
        lines += ["", f"Kernels that count with their bytes alone: {', '.join(found.unknown)}"]
    return lines


def _pieces(plan: StagePlan) -> list[str]:
    """The loops of each piece: seconds by the roofline, and with libtpu's cycles for products and vector work."""
    if not plan.pieces:
        return []
    lines = ["", f"| {plan.stage}, with a run's effort | runs | | s | " + " | ".join(KINDS) + " |"]
    lines.append("|" + "---|" * (4 + len(KINDS)))
    for piece in plan.pieces:
        measures = (("roofline", piece.roofline), ("cycles", piece.cycles))
        for name, found in measures:
            cells = [f"{piece.name} ({piece.compile_seconds:.0f} s to compile)", "1", name, f"{found.seconds:.3f}"]
            lines.append("| " + " | ".join(cells + [f"{found.kinds[kind]:.3f}" for kind in KINDS]) + " |")
        for loop in piece.cycles.loops[:3]:
            for name, found in measures:
                kinds = next(other.seconds for other in found.loops if other.name == loop.name)
                cells = [loop.path or "outside of loops", f"{loop.runs:,.0f}", name, f"{sum(kinds.values()):.3f}"]
                lines.append("| " + " | ".join(cells + [f"{kinds.get(kind, 0.0):.3f}" for kind in KINDS]) + " |")
    return lines


def as_json(
    plans: list[StagePlan],
    topology: Topology,
    sizes: MeshSizes,
    preset: str,
    loading: Loading | None = None,
    between: Between | None = None,
) -> str:
    """The content of the table as JSON, with bytes and seconds unrounded."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [clean(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    stages = [dataclasses.asdict(plan) | {"fits": plan.fits(topology)} for plan in plans]
    content = {
        "preset": preset,
        "topology": topology.name,
        "devices": topology.devices,
        "chip": dataclasses.asdict(topology.chip),
        "mesh": dataclasses.asdict(sizes),
        "loading": None if loading is None else dataclasses.asdict(loading),
        "between": None if between is None else dataclasses.asdict(between),
        "stages": stages,
    }
    return json.dumps(clean(content), indent=1) + "\n"
