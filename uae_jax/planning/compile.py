"""A stage's step compiled for devices that need not be there, and what the compiler says about its memory."""

import dataclasses
import pathlib
import re
import time

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from uae_jax import sharding
from uae_jax.planning.cards import target_text
from uae_jax.planning.chips import GIB, Topology
from uae_jax.stages.program import Program
from uae_jax.stages.run_config import RunConfig

TYPES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "bf16": 2,
    "f16": 2,
    "s16": 2,
    "u16": 2,
    "f32": 4,
    "s32": 4,
    "u32": 4,
    "f64": 8,
    "s64": 8,
    "u64": 8,
}
# instructions that only name what another one made
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
# the two ways in which libtpu says that a program does not fit: by its total, or by its temporaries alone
TOTAL = re.compile(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm")
TEMPORARIES = re.compile(r"required for HLO temporaries \(([\d.]+)([KMGT])\)")
LISTED = re.compile(r'Size: ([\d.]+)([KMGT])\s+Operator: op_name="([^"]*)"\s+Shape: (\S+)')
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# libtpu schedules the instructions of one 3x3 convolution of the auto-encoder for 7 to 37 seconds by default, and for
# less than one with the least effort; its temporaries are then not smaller, since fewer of them stay on the chip
QUICK = -1.0
# of XLA's GPU compiler, which takes twice as long by default; libraries take the products that its own kernels would
# compete for
QUICK_GPU = {"xla_gpu_enable_triton_gemm": False, "xla_llvm_disable_expensive_passes": True}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device, and how long the compiler took.

    Attributes:
      arguments: everything that stays on the device, whether this stage reads it or not.
      temporaries: what the step needs beside them.
      peak: both, and results that do not replace an argument.
      largest: (bytes, shape, operation) of the largest temporaries.
      seconds: of lowering and compiling; 0 for an estimate.
      estimated: whether nothing was compiled.
    """

    arguments: float
    temporaries: float
    peak: float
    largest: tuple[tuple[float, str, str], ...] = ()
    seconds: float = 0.0
    estimated: bool = False


def resident_bytes(program: Program) -> float:
    """Bytes of one device's share of all arguments."""

    def share(leaf: jax.ShapeDtypeStruct) -> float:
        shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding is not None else leaf.shape
        size = 8 if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize
        total = size
        for side in shape:
            total *= side
        return total

    return float(sum(share(leaf) for leaf in jax.tree.leaves(program.arguments)))


def plan_mesh(config: RunConfig, topology: Topology) -> Mesh:
    """The configured mesh over a topology's devices: a compiler's description of them, or the host's faked devices.

    Raises:
      ValueError: no such slice, or a mesh that does not divide it.
      ImportError: libtpu, or the CUDA wheels, are not installed.
    """
    devices = {
        "cpu": lambda: jax.devices()[: topology.devices],
        "tpu": lambda: _slice(topology),
        "gpu": lambda: _cards(topology),
    }
    return sharding.make_mesh(config.mesh, devices[topology.kind]())


def _slice(topology: Topology) -> list:
    # v4's two cores are one device in the configuration that its slices run in, and two in libtpu's default
    more = {"chip_config_name": "megacore"} if topology.chip.name == "v4" else {}
    try:
        return list(
            topologies.get_topology_desc(topology.name.replace("7x:", "tpu7x:"), platform="tpu", **more).devices
        )
    except RuntimeError as error:
        if "not installed" in str(error):
            raise ImportError(
                "libtpu is not installed; install the extra `tpu` (pip install 'uae_jax[tpu]')"
            ) from error
        raise ValueError(
            f"libtpu does not know the topology {topology.name!r}: {str(error).splitlines()[0]}"
        ) from error


def _cards(topology: Topology) -> list:
    chip = topology.chip
    text = target_text(chip.name, chip.memory, chip.memory_bandwidth, chip.device_kind)
    try:
        # slices x hosts x devices of a host
        found = topologies.get_topology_desc(
            platform="cuda",
            topology_name="",
            target_config=text,
            topology=f"1x{topology.hosts}x{topology.devices // topology.hosts}",
        )
    except NotImplementedError as error:  # of JAX, where no plugin knows the platform
        raise ImportError(
            "the CUDA wheels are not installed; install the extra `cuda` (pip install 'uae_jax[cuda]')"
        ) from error
    except RuntimeError as error:
        raise ValueError(f"XLA does not take the topology {topology.name!r}: {str(error).splitlines()[0]}") from error
    return list(found.devices)


def compile_program(program: Program, mesh: Mesh, effort: float = QUICK, text: pathlib.Path | None = None) -> Memory:
    """Compiles a step for the devices of a mesh; a program that does not fit them is reported, not raised.

    Args:
      program: with shardings on the mesh.
      mesh: its devices need not be there.
      effort: libtpu's, from -1 to 1; 0 is what a run gets.
      text: file for the compiled program's text.
    """
    options = {"tpu": {"exec_time_optimization_effort": effort}, "gpu": QUICK_GPU}.get(mesh.devices.flat[0].platform)
    begin, resident = time.monotonic(), resident_bytes(program)
    with sharding.in_use(mesh):
        lowered = program.step.lower(*program.arguments)
        try:
            compiled = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            return _too_large(str(error), resident, time.monotonic() - begin)
    seconds, written = time.monotonic() - begin, compiled.as_text()
    if text is not None:
        text.write_text(written)
    return memory_of(compiled, resident, largest_results(written), seconds)


def memory_of(compiled: jax.stages.Compiled, resident: float, largest: tuple = (), seconds: float = 0.0) -> Memory:
    """What the compiler's buffer assignment says of a step whose arguments have so many bytes (`resident_bytes`)."""
    stats = compiled.memory_analysis()
    temporaries = stats.temp_size_in_bytes + stats.generated_code_size_in_bytes
    results = max(stats.output_size_in_bytes - stats.alias_size_in_bytes, 0)
    return Memory(resident, temporaries, resident + temporaries + results, largest, seconds)


def _too_large(message: str, resident: float, seconds: float) -> Memory:
    """What libtpu says of a program that does not fit.

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
    """The allocations that libtpu lists when a program does not fit."""
    found = [
        (float(size) * UNITS[unit], shape, short_name(name)) for size, unit, name, shape in LISTED.findall(message)
    ]
    return tuple(dict.fromkeys(found))[:5]


def largest_results(text: str, count: int = 5) -> tuple[tuple[float, str, str], ...]:
    """The largest results of instructions of an optimised module, outside of fusions: (bytes, shape, operation)."""
    found: dict[tuple[str, str], float] = {}
    inside = False
    for line in text.splitlines():
        if line and not line[0].isspace():
            inside = "fused" in line.split("(")[0] or "fusion" in line.split("(")[0]
        match = None if inside else INSTRUCTION.match(line)
        # memory space 1 is on-chip memory
        if not match or match[4] in NAMING or match[1] not in TYPES or "S(1)" in (match[3] or ""):
            continue
        size = TYPES[match[1]]
        for side in match[2].split(","):
            size *= int(side or 1)
        name = re.search(r'op_name="([^"]*)"', line)
        found[f"{match[1]}[{match[2]}]", short_name(name[1] if name else match[4])] = float(size)
    ordered = sorted(((size, shape, name) for (shape, name), size in found.items()), reverse=True)
    kept: dict[str, tuple[float, str, str]] = {}
    for entry in ordered:
        kept.setdefault(entry[1], entry)
    return tuple(kept.values())[:count]


def short_name(name: str) -> str:
    """The end of an operation's path, without the transformations around it."""
    parts = [part for part in name.split("/") if part not in ("while", "body", "closed_call", "checkpoint", "cond")]
    return "/".join(parts[-4:])


def gib(size: float) -> float:
    """Bytes in GiB."""
    return size / GIB
