"""Collectives of a compiled program: who takes part, and the bytes that a device receives."""

import re

import numpy as np

from uae_jax.planning.chips import Topology
from uae_jax.planning.hlo import Module, Use
from uae_jax.planning.hlo_text import COLLECTIVES, Instruction
from uae_jax.planning.links import Group, Received, gathered, summed

_LISTS = re.compile(r"replica_groups=\{(\{[\d,{}]*\})\}")
_RANGES = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_AXES = re.compile(r"replica_groups=@?\w*mesh\w*\[([^\]]*)\]\s*\{([^}]*)\}")
_AXIS = re.compile(r"'(\w+)'(?:=(\d+)|:\((\d+)\)(\d+))?")


# parts of a collective that is spread over fusions
START, STEP, DONE = "start", "step", "done"


def numbers(text: str) -> list[int]:
    """The whole numbers of a text."""
    return [int(found) for found in re.findall(r"\d+", text)]


def members(attributes: str, devices: int) -> np.ndarray:
    """The devices of each group `[groups, ways]`, by their place in the mesh.

    XLA has three spellings: lists, a reshaped and transposed range (`[8,8]<=[8,8]T(1,0)`), and axes of a mesh
    (`mesh['a'=2,'b'=4] {'b'}`). Without groups all devices are one.

    Args:
      attributes: of the instruction.
      devices: of the program.
    """
    if found := _RANGES.search(attributes):
        shape, sides = numbers(found[1]), numbers(found[2])
        order = numbers(found[3]) if found[3] else list(range(len(sides)))
        return np.arange(int(np.prod(sides))).reshape(sides).transpose(order).reshape(shape)
    if found := _LISTS.search(attributes):
        return np.array([numbers(group) for group in re.findall(r"\{([\d,]+)\}", found[1])])
    if found := _AXES.search(attributes):
        return _along_axes(found[1], found[2])
    return np.arange(devices)[None]


def _along_axes(mesh: str, wanted: str) -> np.ndarray:
    """Groups along some axes of a mesh; `'a':(2)4` is the part of axis `a` behind its first 2 and of size 4."""
    sizes = {name: int(size) for name, size, _, _ in _AXIS.findall(mesh)}
    sides, chosen = [], []
    parts = {name: (int(before or 1), int(size or sizes[name])) for name, _, before, size in _AXIS.findall(wanted)}
    for name, size in sizes.items():
        before, own = parts.get(name, (size, 1))
        chosen.append(len(sides) + 1)
        sides += [before, own, size // before // own]
    every = np.arange(int(np.prod(sides))).reshape(sides)
    rest = [at for at in range(len(sides)) if at not in chosen]
    return every.transpose([*rest, *chosen]).reshape(-1, int(np.prod([sides[at] for at in chosen])))


def kind(instruction: Instruction) -> str:
    """The kind of a collective; empty for every other instruction."""
    return next((name for name in COLLECTIVES if instruction.opcode.startswith(name)), "")


def group_of(instruction: Instruction, topology: Topology) -> Group:
    """The devices of one of a collective's groups, all of which are of one size."""
    groups = members(instruction.attributes, topology.devices)
    slices = len(np.unique(groups[0] // (topology.devices // topology.groups)))
    return Group(groups.shape[1], slices if groups.shape[1] % slices == 0 else 1)


def received(instruction: Instruction, topology: Topology) -> Received:
    """What a device receives in one run of a collective.

    A permutation sends one message a device; it counts to the network where any of its pairs lies in two slices.
    """
    what = kind(instruction)
    if what == "collective-permute":
        pairs = np.array(numbers(instruction.value(r"source_target_pairs=\{([\d,{}]*)\}"))).reshape(-1, 2)
        slices = pairs // (topology.devices // topology.groups)
        far = bool(len(pairs)) and bool((slices[:, 0] != slices[:, 1]).any())
        return Received(0.0, instruction.bytes) if far else Received(instruction.bytes)
    group = group_of(instruction, topology)
    if what == "all-reduce":
        return summed(instruction.bytes, group)
    return gathered(instruction.bytes * (group.ways if what == "reduce-scatter" else 1), group)


def received_by_kind(module: Module, topology: Topology) -> dict[str, Received]:
    """What a device receives in one step, by the kind of collective, also of those inside of fusions."""
    found: dict[str, Received] = {}
    for use in module.uses():
        for inner in collectives_of(module, use):
            found[kind(inner)] = found.get(kind(inner), Received()) + received(inner, topology) * use.times
    return dict(sorted(found.items(), key=lambda item: -item[1].links - item[1].network))


def collectives_of(module: Module, use: Use) -> list[Instruction]:
    """The collectives that an instruction runs: itself, or those of a fusion.

    Where libtpu spreads one collective over several fusions, it is that of the first alone.
    """
    if kind(use.instruction):
        return [use.instruction]
    part, _ = part_of(module, use)
    return [] if part in (STEP, DONE) else _inside(module, use)


def _inside(module: Module, use: Use) -> list[Instruction]:
    if use.instruction.opcode != "fusion":
        return []
    inside = module.computations[use.instruction.called["calls"][0]]
    return [instruction for instruction in inside.values() if kind(instruction) and "-done" not in instruction.opcode]


def part_of(module: Module, use: Use) -> tuple[str, Instruction | None]:
    """The part of a collective that a fusion runs beside its own work, and the collective.

    With a run's effort, libtpu begins a gather in one fusion, goes on in products, and ends in a last fusion. All of
    them name the gather by one channel.

    Returns:
      `START`, `STEP` or `DONE`, and its instruction; an empty name for every other instruction.
    """
    chained = [inner for inner in _inside(module, use) if "chain_id=" in inner.attributes]
    if not chained:
        return "", None
    name = use.instruction.name
    part = next((part for part in (START, DONE) if name.startswith(f"async-collective-{part}")), STEP)
    return part, chained[0]


def channel(instruction: Instruction) -> str:
    """What all parts of one collective have in common."""
    return instruction.value(r"channel_id=(\d+)")
