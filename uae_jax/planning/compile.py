"""Compiles a stage's step for devices that may be absent, and reads the compiler's memory figures."""

import dataclasses
import math
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from uae_jax import sharding
from uae_jax.planning.cards import target_text
from uae_jax.planning.chips import GIB, Topology
from uae_jax.planning.hlo_text import WIDTHS, short_name
from uae_jax.stages.program import Program
from uae_jax.stages.run_config import RunConfig

# instructions without a result of their own
NAMING = frozenset(
    (
        "parameter",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "while",
        "conditional",
        "call",
        "constant",
        "copy-done",
        "all-gather-done",
        "all-reduce-done",
        "collective-permute-done",
        "async-done",
        "slice-done",
    )
)
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (\w+)\[([\d,]*)\](\{[^}]*\})? ([\w\-]+)\(")
# libtpu's two messages for a program that does not fit: by its total, or by its temporaries alone
TOTAL = re.compile(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm")
TEMPORARIES = re.compile(r"required for HLO temporaries \(([\d.]+)([KMGT])\)")
LISTED = re.compile(r'Size: ([\d.]+)([KMGT])\s+Operator: op_name="([^"]*)"\s+Shape: (\S+)')
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# by default, libtpu schedules the instructions of one 3x3 convolution of the auto-encoder for 7 to 37 seconds, and with
# the least effort for less than one second. Fusions, loops and collectives are the same. Temporaries are not: by
# default more gathers are begun early, and their results wait in memory
QUICK = -1.0
RUN = 0.0  # the effort of a run
# halves the time of XLA's GPU compiler; libraries then compute all matrix products
QUICK_GPU = {"xla_gpu_enable_triton_gemm": False, "xla_llvm_disable_expensive_passes": True}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device, and the time of the compiler.

    Attributes:
      arguments: everything that stays on the device, also parts that this stage does not read.
      temporaries: of the step; of TPUs as compiled with the least effort, which a run may exceed.
      peak: arguments, the larger of both temporaries, and results that do not replace an argument.
      largest: (bytes, shape, operation) of the largest temporaries.
      seconds: of lowering and compiling; 0 for an estimate.
      estimated: whether the figures are estimated, without compiling.
      run_temporaries: as compiled with a run's effort; None where that was not done.
    """

    arguments: float
    temporaries: float
    peak: float
    largest: tuple[tuple[float, str, str], ...] = ()
    seconds: float = 0.0
    estimated: bool = False
    run_temporaries: float | None = None

    def beside(self, run: "Memory") -> "Memory":
        """These figures with those of the same step compiled with a run's effort."""
        return dataclasses.replace(
            self,
            peak=max(self.peak, run.peak),
            seconds=self.seconds + run.seconds,
            run_temporaries=run.temporaries,
        )


def resident_bytes(program: Program) -> float:
    """Bytes of one device's share of all arguments."""

    def share(leaf: jax.ShapeDtypeStruct) -> float:
        shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding is not None else leaf.shape
        size = 8 if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize
        return size * math.prod(shape)

    return float(sum(share(leaf) for leaf in jax.tree.leaves(program.arguments)))


def plan_mesh(config: RunConfig, topology: Topology) -> Mesh:
    """The configured mesh over a topology's devices, described by a compiler or simulated on the host.

    Raises:
      ValueError: no such slice, or a mesh that does not divide the slice.
      ImportError: libtpu, or the CUDA wheels, are not installed.
    """
    devices = {
        "cpu": lambda: jax.devices()[: topology.devices],
        "tpu": lambda: _slice(topology),
        "gpu": lambda: _cards(topology),
    }
    return sharding.make_mesh(config.mesh, devices[topology.kind]())


def _slice(topology: Topology) -> list[Any]:
    # the two cores of a v4 chip are one device in slices, and two devices in libtpu's default
    more: dict[str, Any] = {"chip_config_name": "megacore"} if topology.chip.name == "v4" else {}
    more |= {"num_slices": topology.groups} if topology.groups > 1 else {}
    name = f"{topology.chip.name.replace('7x', 'tpu7x')}:{topology.slice_name}"
    try:
        return list(topologies.get_topology_desc(name, platform="tpu", **more).devices)
    except RuntimeError as error:
        if "not installed" in str(error):
            raise ImportError(
                "libtpu is not installed; install the extra `tpu` (pip install 'uae_jax[tpu]')"
            ) from error
        raise ValueError(
            f"libtpu does not know the topology {topology.name!r}: {str(error).splitlines()[0]}"
        ) from error


def _cards(topology: Topology) -> list[Any]:
    chip = topology.chip
    text = target_text(chip.name, chip.memory, chip.memory_bandwidth, chip.device_kind)
    try:
        # slices x hosts x devices per host
        found = topologies.get_topology_desc(
            platform="cuda",
            topology_name="",
            target_config=text,
            topology=f"1x{topology.groups}x{topology.devices // topology.groups}",
        )
    except NotImplementedError as error:  # JAX's error for a platform without plugin
        raise ImportError(
            "the CUDA wheels are not installed; install the extra `cuda` (pip install 'uae_jax[cuda]')"
        ) from error
    except RuntimeError as error:
        raise ValueError(f"XLA does not take the topology {topology.name!r}: {str(error).splitlines()[0]}") from error
    return list(found.devices)


def effort_of(effort: float) -> dict[str, Any]:
    """Options of libtpu."""
    return {"exec_time_optimization_effort": effort}


def compile_program(program: Program, mesh: Mesh, effort: float = QUICK) -> tuple[Memory, str]:
    """Compiles a step for the devices of a mesh: its memory, and the compiled program's text.

    A program that does not fit gives libtpu's figures and no text, not an error.

    Args:
      program: with shardings on the mesh.
      mesh: of devices that may be absent.
      effort: libtpu's, from -1 to 1; runs have `RUN`.
    """
    options = {"tpu": effort_of(effort), "gpu": QUICK_GPU}.get(mesh.devices.flat[0].platform)
    begin, resident = time.monotonic(), resident_bytes(program)
    with sharding.in_use(mesh):
        lowered = program.step.lower(*program.arguments)
        try:
            compiled = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            return _too_large(str(error), resident, time.monotonic() - begin), ""
    seconds, written = time.monotonic() - begin, compiled.as_text()
    return memory_of(compiled, resident, largest_results(written), seconds), written


def memory_of(compiled: jax.stages.Compiled, resident: float, largest: tuple = (), seconds: float = 0.0) -> Memory:
    """The memory of a compiled step by the compiler's buffer assignment.

    Args:
      compiled: the step.
      resident: bytes of the arguments, of `resident_bytes`.
      largest, seconds: see `Memory`.

    Raises:
      ValueError: the compiler has no memory analysis.
    """
    stats = compiled.memory_analysis()
    if stats is None:
        raise ValueError("the compiler of this backend has no memory analysis; plan for another topology")
    temporaries = stats.temp_size_in_bytes + stats.generated_code_size_in_bytes
    results = max(stats.output_size_in_bytes - stats.alias_size_in_bytes, 0)
    return Memory(resident, temporaries, resident + temporaries + results, largest, seconds)


def _too_large(message: str, resident: float, seconds: float) -> Memory:
    """The memory of a program that does not fit, from libtpu's error message.

    Raises:
      ValueError: the compiler failed for another reason.
    """

    def size(found: re.Match) -> float:
        return float(found[1]) * UNITS[found[2]]

    if found := TOTAL.search(message):
        temporaries = max(size(found) - resident, 0.0)
    elif found := TEMPORARIES.search(message):
        temporaries = size(found)
    else:
        raise ValueError(f"the compiler refused the step: {message.splitlines()[0]}")
    return Memory(resident, temporaries, resident + temporaries, _listed(message), seconds)


def _listed(message: str) -> tuple[tuple[float, str, str], ...]:
    """The allocations in libtpu's error message for a program that does not fit."""
    found = [
        (float(size) * UNITS[unit], shape, short_name(name)) for size, unit, name, shape in LISTED.findall(message)
    ]
    return tuple(dict.fromkeys(found))[:5]


def largest_results(text: str, count: int = 5) -> tuple[tuple[float, str, str], ...]:
    """(bytes, shape, operation) of the largest results in an optimised module, outside of fusions."""
    found: dict[tuple[str, str], float] = {}
    inside = False
    for line in text.splitlines():
        if line and not line[0].isspace():
            inside = "fused" in line.split("(")[0] or "fusion" in line.split("(")[0]
        match = None if inside else INSTRUCTION.match(line)
        # memory space 1 is on-chip memory
        if not match or match[4] in NAMING or match[1] not in WIDTHS or "S(1)" in (match[3] or ""):
            continue
        size = WIDTHS[match[1]] * math.prod(int(side or 1) for side in match[2].split(","))
        name = re.search(r'op_name="([^"]*)"', line)
        found[f"{match[1]}[{match[2]}]", short_name(name[1] if name else match[4])] = float(size)
    ordered = sorted(((size, shape, name) for (shape, name), size in found.items()), reverse=True)
    kept: dict[str, tuple[float, str, str]] = {}
    for entry in ordered:
        kept.setdefault(entry[1], entry)
    return tuple(kept.values())[:count]


def gib(size: float) -> float:
    """Bytes in GiB."""
    return size / GIB
