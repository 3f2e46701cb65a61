"""All stages of a configuration on a topology: counted, compiled or estimated, one after the other."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from uae_jax import sharding, trees
from uae_jax.methods import STAGES
from uae_jax.methods.gathered import DECODER
from uae_jax.models.language.config import TextConfig
from uae_jax.nn.attention import use_attention
from uae_jax.planning.between import Between, plan_between
from uae_jax.planning.chips import Topology, parse_topology
from uae_jax.planning.collectives import received_by_kind
from uae_jax.planning.compile import RUN, Memory, compile_program, plan_mesh
from uae_jax.planning.estimate import estimate_memory
from uae_jax.planning.flops import Count, count_work
from uae_jax.planning.hlo import Module
from uae_jax.planning.hlo_seconds import program_seconds
from uae_jax.planning.loading import Loading, plan_loading
from uae_jax.planning.pieces import compile_pieces, problem
from uae_jax.planning.remedies import smaller
from uae_jax.planning.roofline import MeshSizes, Rollout, Updates, group_sums, roofline
from uae_jax.planning.system import abstract_system
from uae_jax.planning.table import Compiled, StagePlan
from uae_jax.settings import Mistakes, frozen
from uae_jax.stages.checks import check_batch
from uae_jax.stages.kinds import AnyAbstract, kind_of_model
from uae_jax.stages.program import Program, make_program
from uae_jax.stages.run_config import RunConfig


@dataclasses.dataclass(frozen=True)
class Compiling:
    """What is compiled, and kept.

    Attributes:
      texts: folder for the text of each compiled stage; None for none.
      run_effort: whether a stage is also compiled for TPUs with a run's effort, for its memory.
      cycles: whether pieces of it are, for libtpu's estimates of cycles (`pieces`).
    """

    texts: pathlib.Path | None = None
    run_effort: bool = False
    cycles: bool = False


def mesh_sizes(config: RunConfig, devices: int) -> MeshSizes:
    """The sizes of the mesh's axes, -1 filled in.

    Raises:
      ValueError: they do not multiply to the number of devices.
    """
    sizes = dataclasses.asdict(config.mesh)
    known = 1
    for size in sizes.values():
        known *= size if size != -1 else 1
    filled = {name: devices // known if size == -1 else size for name, size in sizes.items()}
    found = MeshSizes(**filled)
    if found.batch * found.tensor != devices:
        raise ValueError(f"mesh {sizes} does not fit {devices} devices; change config.mesh")
    return found


def step_work(config: RunConfig, system: AnyAbstract, stage: str) -> Count:
    """Work of one step of a stage; sampling loops run to the last token.

    Attention is counted in its plain form, whose backward pass computes nothing twice; the kernels' recomputation of a
    few percent is left out, as is what they save where a causal mask hides half of the pairs.
    """
    program = make_program(config, system, system.parts, system.batch, stage)
    with use_attention("plain"):
        trips = getattr(program.config, "max_new_tokens", 1)
        return count_work(program.step, program.arguments, (0, 1), trips=trips, once=gathered_at_once(program))


def gathered_at_once(program: Program) -> tuple:
    """Which arguments of a step are gathered at its beginning (`gather_decoder`): a tree of them."""
    state, frozen, batch, key = jax.tree.map(lambda leaf: False, program.arguments)
    if getattr(program.config, "gather_decoder", False):
        found = {name: frozen[name] for name in DECODER if name in frozen}
        frozen = {**frozen, **jax.tree.map(lambda leaf: True, found)}
    return state, frozen, batch, key


def rollout_of(settings: Any, text: TextConfig, sizes: MeshSizes) -> Rollout:
    """The layout of a stage's captioner while it samples; with `gather_weights` the copy that reads the prompts serves
    all tokens.
    """
    if not getattr(settings, "gather_weights", False):
        return Rollout()
    ways = getattr(settings, "rollout_ways", 0)
    if not ways:
        return Rollout(0.0)
    rows = settings.batch_size * settings.captions_per_image / sizes.batch
    return Rollout(0.0, ways, max(ways // text.key_heads, 1), group_sums(rows, settings.max_new_tokens, ways, text))


def step_updates(config: RunConfig, program: Program) -> Updates:
    """The gradients of one step, which XLA sums over devices in the precision of activations."""
    settings = program.config
    sums = getattr(settings, "micro_batches", 1) * getattr(settings, "updates_per_rollout", 1)
    width = 2 if config.model.dtype == "bfloat16" else 4
    return Updates(float(width * trees.parameter_count(program.state.params)), sums)


def without_recomputation(config: RunConfig) -> RunConfig:
    """The configuration whose count is that of the model alone."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, remat="none"))


def plan_stage(
    config: RunConfig, system: AnyAbstract, stage: str, topology: Topology, mesh: Mesh | None, how: Compiling
) -> StagePlan:
    """Counts a stage and finds its memory: compiled for a mesh, estimated without one; see `make_plan`."""
    sizes = mesh_sizes(config, topology.devices)
    program = make_program(config, system, system.parts, system.batch, stage, mesh)
    if mesh is None:
        memory, compiled = estimate_memory(program, config, sizes, system), None
    else:
        memory, compiled = _compiled(program, mesh, topology, how)
    found = compile_pieces(program, system, topology, mesh) if how.cycles and mesh is not None else ()
    count = step_work(config, system, stage)
    plain = without_recomputation(config)
    model_flops = step_work(plain, abstract_system(plain), stage).flops
    rollout = rollout_of(program.config, system.model.text, sizes)
    return StagePlan(
        stage,
        program.config.batch_size,
        trees.parameter_count(program.state.params),
        trees.parameter_count(program.frozen),
        memory,
        count.flops,
        model_flops,
        roofline(count, model_flops, topology, sizes, rollout, step_updates(config, program)),
        count.drawing,
        compiled,
        smaller(stage, program.config),
        found,
    )


def _compiled(program: Program, mesh: Mesh, topology: Topology, how: Compiling) -> tuple[Memory, Compiled | None]:
    """Memory of a compiled stage, and what its text says; None for a program that does not fit."""
    memory, text = compile_program(program, mesh)
    if how.run_effort:
        memory = memory.beside(compile_program(program, mesh, RUN)[0])
    if not text:
        return memory, None
    if how.texts is not None:
        (how.texts / f"{program.stage}.hlo").write_text(text)
    module = Module(text, getattr(program.config, "max_new_tokens", 1))
    seconds = program_seconds(module, topology) if topology.kind != "cpu" else None
    return memory, Compiled(received_by_kind(module, topology), seconds)


def _mesh(config: RunConfig, chips: Topology) -> Mesh | None:
    """The mesh to compile for; None for cards where the CUDA wheels are absent, whose plan is then an estimate."""
    try:
        return plan_mesh(config, chips)
    except ImportError:
        if chips.kind != "gpu":
            raise
        return None


def make_plan(
    config: Mapping[str, Any],
    topology: str,
    stages: tuple[str, ...] = (),
    report: Callable[[StagePlan], None] = lambda plan: None,
    how: Compiling = Compiling(),
) -> tuple[list[StagePlan], Topology, MeshSizes]:
    """Plans the stages of a configuration.

    Args:
      config: of a file in `configs/`.
      topology: see `chips.parse_topology`.
      stages: which; empty for those of the configuration.
      report: called with each stage's plan as soon as it is there.
      how: what is compiled.

    Raises:
      ValueError: an unknown topology or stage, or a mesh or batch that does not divide.
      Mistakes: settings that the decoder cannot draw with.
      ImportError: libtpu is needed and absent.
    """
    settings, chips = frozen(RunConfig, config), parse_topology(topology)
    for stage in stages:
        if stage not in STAGES:
            raise ValueError(f"--stages names {stage!r}; the stages are {', '.join(STAGES)}")
        if stage not in settings.stages:
            raise ValueError(
                f"--stages names {stage!r}, which this configuration does not run; it runs {', '.join(settings.stages)}"
            )
    sizes, plans = mesh_sizes(settings, chips.devices), []
    wanted = stages or tuple(settings.distinct_stages())
    for stage in wanted:
        check_batch(settings, stage, sizes.batch)
        if how.cycles and (found := problem(settings, stage, chips)):
            raise ValueError(found)
    mesh = _mesh(settings, chips)
    if how.run_effort and chips.kind != "tpu":
        raise ValueError(f"--effort is libtpu's, and {topology} is no slice of TPUs; leave it out")
    if how.texts is not None and mesh is None:
        raise ValueError(
            "--hlo needs compiled stages, and the CUDA wheels are not installed; install the extra `cuda` (pip "
            "install 'uae_jax[cuda]')"
        )
    system = abstract_system(settings)
    if mistakes := list(kind_of_model(system.model).mistakes(settings, system.model)):
        raise Mistakes(mistakes)
    sharding.check_rules(system.parts, sizes)
    for stage in wanted:
        plans.append(plan_stage(settings, system, stage, chips, mesh, how))
        report(plans[-1])
    return plans, chips, sizes


def rest_of_run(config: Mapping[str, Any], topology: Topology, sizes: MeshSizes) -> tuple[Loading, Between]:
    """What a configuration needs beside its steps: see `loading.plan_loading` and `between.plan_between`."""
    settings = frozen(RunConfig, config)
    system = abstract_system(settings)
    return plan_loading(settings, system, topology, sizes), plan_between(settings, system, topology, sizes)
