"""Seconds of a compiled program by the roofline of its own instructions, in the order in which they are scheduled.

Each instruction takes the longer of its operations at the chip's peak and its bytes at the memory's bandwidth. A loop
takes its body's seconds as often as it runs; a conditional takes its slowest branch. What is started and awaited later
runs beside the rest: collectives on one line, copies between memories on another. The step waits at the end of each.

Not in it: conflicts between copies and products, the latency of links beyond `LATENCY`, what kernels do not reach of
the peak, and the host. Vector work may take one to four times what its bytes say. So the figures rank and compare; they
are no forecast.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

from uae_jax.planning.chips import Topology
from uae_jax.planning.collectives import DONE, START, STEP, channel, collectives_of, kind, part_of, received
from uae_jax.planning.hlo import Module, Use, branches_of, called_by
from uae_jax.planning.hlo_text import NAMING, Instruction, short_name
from uae_jax.planning.loops import Scope

LATENCY = 2e-6  # seconds of one collective at least; an all-reduce has two
CYCLES = r'"estimated_cycles":"?(\d+)'
KINDS = ("products", "vector and copies", "Pallas", "links")
PRODUCTS, VECTOR, PALLAS, LINKS = KINDS
# operations of a splash attention kernel in units of T S K: forward, and its two backward kernels (arXiv 2205.14135)
SPLASH = {"dkv": 8.0, "dq": 6.0, "fwd": 4.0}


@dataclasses.dataclass(frozen=True)
class Entry:
    """An instruction, or the instructions of one name and kind, with the seconds of all runs."""

    kind: str
    seconds: float
    runs: float
    shape: str
    path: str


@dataclasses.dataclass(frozen=True)
class Loop:
    """The instructions of one loop, without those of loops inside of it.

    Attributes:
      path: of the loop in the traced program; empty outside of loops.
      runs: of its body in one step.
      seconds: by kind.
      name: of its instruction; several loops may have one path.
    """

    path: str
    runs: float
    seconds: dict[str, float]
    name: str = ""


@dataclasses.dataclass(frozen=True)
class ProgramSeconds:
    """The seconds of a compiled step.

    Attributes:
      seconds: of the step.
      kinds: the same by kind; those of links are waits.
      links: seconds in which the links are busy, also beside other work.
      loops: the same by loop, the longest first.
      largest: the ten instructions with the most seconds.
      unknown: targets of kernels without known operations, which count with their bytes.
    """

    seconds: float
    kinds: dict[str, float]
    links: float
    loops: tuple[Loop, ...]
    largest: tuple[Entry, ...]
    unknown: tuple[str, ...]


def program_seconds(module: Module, topology: Topology, cycles: bool = False) -> ProgramSeconds:
    """The seconds of one step on one device, see the top of this file.

    Args:
      module: compiled for the topology.
      topology: the chips.
      cycles: instructions for which libtpu estimates cycles take these, at the chip's clock. It estimates none for
        collectives, copies beside other work, and kernels.
    """
    clock = _Clock(module, topology, cycles)
    total = clock.run(module.first, module.entry, 1.0, ())
    loops = [
        Loop(short_name(path), clock.runs[names], seconds, name)
        for names, seconds in clock.seconds.items()
        for path, _, name in [(names[-1] if names else "").partition(" ")]
    ]
    loops.sort(key=lambda loop: -sum(loop.seconds.values()))
    kinds = {name: sum(loop.seconds.get(name, 0.0) for loop in loops) for name in KINDS}
    largest = sorted(clock.entries.values(), key=lambda entry: -entry.seconds)[:10]
    return ProgramSeconds(total, kinds, clock.busy, tuple(loops), tuple(largest), tuple(sorted(clock.unknown)))


@dataclasses.dataclass
class _Line:
    """One call of a computation, in seconds from its beginning.

    Attributes:
      now: when the last instruction has ended.
      free: when the links, and the copies beside the instructions, have ended what was started.
      ends: when a started instruction ends, and of what kind it is.
    """

    now: float = 0.0
    free: dict[str, float] = dataclasses.field(default_factory=dict)
    ends: dict[str, tuple[str, float]] = dataclasses.field(default_factory=dict)

    def start(self, name: str, what: str, seconds: float) -> None:
        """Begins on the line of its kind as soon as that is free."""
        self.free[what] = max(self.now, self.free.get(what, 0.0)) + seconds
        self.ends[name] = what, self.free[what]

    def pass_on(self, update: Instruction) -> None:
        """What was started goes on under the name of its update."""
        for name in update.operands:
            if name in self.ends:
                self.ends[update.name] = self.ends[name]

    def end(self, names: tuple[str, ...]) -> tuple[str, float]:
        """Waits for what was started under one of the names; its kind, and the seconds of waiting."""
        found = [self.ends[name] for name in names if name in self.ends]
        what, end = max(found, key=lambda item: item[1], default=(VECTOR, self.now))
        waited = max(end - self.now, 0.0)
        self.now += waited
        return what, waited


class _Clock:
    """Adds up the seconds of a module's computations."""

    def __init__(self, module: Module, topology: Topology, cycles: bool):
        self.module, self.topology, self.cycles, self.busy = module, topology, cycles, 0.0
        self.seconds: dict[tuple[str, ...], dict[str, float]] = {}
        self.runs: dict[tuple[str, ...], float] = {}
        self.entries: dict[str, Entry] = {}
        self.unknown: set[str] = set()

    def run(self, scope: Scope, name: str, times: float, loops: tuple[str, ...]) -> float:
        """Seconds of one call of a computation that is called so many times in a step."""
        line = _Line()
        self.runs[loops] = max(times, self.runs.get(loops, 0.0))
        for instruction in scope.inside.values():
            code = instruction.opcode
            if code == "while":
                line.now += self._loop(instruction, scope, times, loops)
            elif code == "conditional":
                line.now += self._slowest(instruction, times, loops)
            elif code == "call":
                for inner in called_by(instruction):
                    given = Scope(self.module.computations[inner], instruction.operands, scope)
                    line.now += self.run(given, inner, times, loops)
            elif code.endswith("-done"):
                self._add(loops, times, *line.end(instruction.operands))
            elif code.endswith("-update"):
                line.pass_on(instruction)
            elif code not in NAMING:
                self._instruction(Use(instruction, name, times, loops), line)
        return line.now

    def _loop(self, loop: Instruction, scope: Scope, times: float, loops: tuple[str, ...]) -> float:
        runs, (body, name) = self.module.trips_of(loop, scope), self.module.body(loop, scope)
        return runs * self.run(body, name, times * runs, (*loops, f"{loop.path} {loop.name}"))

    def _slowest(self, conditional: Instruction, times: float, loops: tuple[str, ...]) -> float:
        branches = {name: Scope(self.module.computations[name]) for name in branches_of(conditional)}
        if not branches:
            return 0.0
        alone = {
            name: _Clock(self.module, self.topology, self.cycles).run(scope, name, 1.0, ())
            for name, scope in branches.items()
        }
        slowest = max(alone, key=lambda name: alone[name])
        return self.run(branches[slowest], slowest, times, loops)

    def _instruction(self, use: Use, line: _Line) -> None:
        instruction = use.instruction
        part, gather = part_of(self.module, use)
        if part == DONE and gather:
            self._add(use.loops, use.times, *line.end((channel(gather),)))
            return
        what, seconds = self.cost(use)
        if not seconds:
            return
        self.busy += use.times * seconds if what == LINKS else 0.0
        self._list(use, what, seconds)
        if part == START and gather:
            line.start(channel(gather), what, seconds)
        elif instruction.opcode.endswith("-start"):
            line.start(instruction.name, what, seconds)
        elif what == LINKS:  # links take one collective at a time
            line.start(instruction.name, what, seconds)
            self._add(use.loops, use.times, *line.end((instruction.name,)))
        else:
            line.now += seconds
            self._add(use.loops, use.times, what, seconds)

    def cost(self, use: Use) -> tuple[str, float]:
        """Kind and seconds of one run of an instruction."""
        instruction, chip = use.instruction, self.topology.chip
        if instruction.opcode == "async-start":
            inner = [
                self.cost(dataclasses.replace(use, instruction=i, computation=name)) for name, i in self._called(use)
            ]
            return max(inner, key=lambda pair: pair[1], default=(VECTOR, 0.0))
        moved = max(self.module.traffic(use) - self._passed(use), 0.0) / chip.memory_bandwidth
        flops = self.module.flops(use)
        if found := collectives_of(self.module, use):
            own = sum(self._collective(collective) for collective in found)
            return LINKS, max(own, flops / chip.flops)
        if instruction.target == "tpu_custom_call":
            flops = self._kernel(use)
            return PALLAS, max(flops / chip.flops, moved)
        seconds = max(flops / chip.flops, moved)
        if self.cycles and (estimated := instruction.value(CYCLES)):
            seconds = int(estimated) / chip.clock
        return (PRODUCTS if flops else VECTOR), seconds

    def _passed(self, use: Use) -> float:
        """Bytes of the buffers of a gather that goes on beside a fusion: they are operands and results of the fusion,
        and are written by the links.
        """
        part, gather = part_of(self.module, use)
        if part != STEP or gather is None:
            return 0.0
        around = self.module.computations[use.computation]
        buffers = {(array.dtype, array.shape) for array in gather.results}
        read = [array for name in use.instruction.operands if name in around for array in around[name].results]
        return sum(array.moved for array in (*read, *use.instruction.results) if (array.dtype, array.shape) in buffers)

    def _called(self, use: Use) -> Iterator[tuple[str, Instruction]]:
        for name in called_by(use.instruction):
            for instruction in self.module.computations[name].values():
                if instruction.opcode not in NAMING:
                    yield name, instruction

    def _collective(self, instruction: Instruction) -> float:
        latency = LATENCY * (2 if kind(instruction) == "all-reduce" else 1)
        return latency + received(instruction, self.topology).seconds(self.topology)

    def _kernel(self, use: Use) -> float:
        """Operations of a kernel written in Pallas: of splash attention by its form, else as its author says."""
        instruction, around = use.instruction, self.module.computations[use.computation]
        name = f"{instruction.name} {instruction.path}"
        said = re.search(r'"flops":"?(\d+)', instruction.attributes)
        factor = next((value for word, value in SPLASH.items() if word in name), 0.0) if "splash" in name else 0.0
        if factor:
            # query, key and value are the first operands of float, `[H, T, K]` and `[J, S, K]`
            arrays = [around[operand].results[0] for operand in instruction.operands if operand in around]
            query, key, *_ = (array.shape for array in arrays if "f" in array.dtype)
            return factor * math.prod(query) * key[-2]
        if said:
            return float(said[1])
        self.unknown.add(short_name(instruction.path) or instruction.name)
        return 0.0

    def _add(self, loops: tuple[str, ...], times: float, what: str, seconds: float) -> None:
        kinds = self.seconds.setdefault(loops, {})
        kinds[what] = kinds.get(what, 0.0) + times * seconds

    def _list(self, use: Use, what: str, seconds: float) -> None:
        made = use.instruction.made[0] if use.instruction.made else None
        shape = f"{made.dtype}[{','.join(map(str, made.shape))}]" if made else ""
        name = short_name(use.instruction.path) or use.instruction.name
        key = f"{what} {shape} {name} {use.loops}"
        old = self.entries.get(key)
        runs, total = use.times, use.times * seconds
        if old is not None:
            runs, total = runs + old.runs, total + old.seconds
        self.entries[key] = Entry(what, total, runs, shape, name)
