"""Pieces of a stage that libtpu compiles as a run does, for its own estimates of cycles.

With the least effort of `compile.QUICK` libtpu looks for no tiles, and its cycles say nothing. With a run's effort a
whole stage takes more than 20 minutes. What a step repeats takes less: sampling of captions, whose loop over tokens is
compiled once, and one evaluation of the denoiser, whose blocks are.
"""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from uae_jax import sharding
from uae_jax.methods.rollout_captions import write_captions
from uae_jax.methods.stage_settings import DecodedRollouts
from uae_jax.planning.chips import Topology
from uae_jax.planning.compile import RUN, effort_of, memory_of
from uae_jax.planning.hlo import Module
from uae_jax.planning.hlo_seconds import ProgramSeconds, program_seconds
from uae_jax.stages.program import Program
from uae_jax.stages.run_config import RunConfig


@dataclasses.dataclass(frozen=True)
class Piece:
    """A piece of a step, compiled with a run's effort.

    Attributes:
      name: of the piece.
      roofline: its seconds by the roofline of its instructions.
      cycles: the same with libtpu's cycles, where it estimates them.
      temporaries: bytes.
      compile_seconds: on this host.
    """

    name: str
    roofline: ProgramSeconds
    cycles: ProgramSeconds
    temporaries: float
    compile_seconds: float


def compile_pieces(program: Program, system: Any, topology: Topology, mesh: Mesh) -> tuple[Piece, ...]:
    """Both pieces of a stage.

    Args:
      program: of a stage that draws its own captions, with shardings on the mesh.
      system: without weights.
      topology: slices of chips whose clock is known.
      mesh: over their devices.
    """
    found = []
    for name, function, arguments in (captions(program, system), denoiser(program, system, mesh)):
        begin = time.monotonic()
        with sharding.in_use(mesh):
            compiled = jax.jit(function).lower(*arguments).compile(compiler_options=effort_of(RUN))
        seconds, module = time.monotonic() - begin, Module(compiled.as_text() or "", program.config.max_new_tokens)
        roofline, cycles = (program_seconds(module, topology, cycles) for cycles in (False, True))
        temporaries = memory_of(compiled, 0.0).temporaries
        found.append(Piece(name, roofline, cycles, temporaries, seconds))
    return tuple(found)


def problem(config: RunConfig, stage: str, topology: Topology) -> str:
    """Why a stage has no pieces on these devices; empty if it has."""
    if math.isnan(topology.chip.clock):
        return f"--cycles needs libtpu's estimates for a known clock, and {topology.name} has none; use v5e or v6e"
    if not isinstance(config.stage(stage), DecodedRollouts):
        return f"--cycles has pieces of gen_for_und and und_for_gen; leave {stage} out of --stages"
    return ""


def captions(program: Program, system: Any) -> tuple[str, Callable, tuple]:
    """Sampling of all captions of a step; its name, its function and the shapes of the arguments."""

    def function(params: dict, frozen: dict, batch: dict, key: jax.Array) -> Any:
        return write_captions(program.config, system, {**frozen, **params}, batch, key)

    return "captions", function, (program.state.params, program.frozen, program.batch, program.key)


def denoiser(program: Program, system: Any, mesh: Mesh) -> tuple[str, Callable, tuple]:
    """One velocity of all drawings of a step, both halves of guidance; as `captions`."""
    settings, model = program.config, system.model
    rows = settings.batch_size * settings.group_size * (1 if settings.guidance_scale == 1 else 2)
    (length, width), dtype = model.decoder.states_shape(settings.max_new_tokens)
    place = NamedSharding(mesh, PartitionSpec(sharding.BATCH))

    def array(dtype: str, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=place)

    def function(params: dict, frozen: dict, latents: Any, sigma: Any, states: Any, mask: Any) -> jax.Array:
        parts = {**frozen, **params}
        return model.decoder.velocity(parts, latents, sigma, model.decoder.context(parts, states, mask))

    inputs = array("float32", *model.latent_shape), array("float32"), array(dtype, length, width), array("bool", length)
    return "denoiser, one evaluation", function, (program.state.params, program.frozen, *inputs)
