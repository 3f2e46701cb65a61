"""Three steps of one stage of the medium model with random weights: seconds, memory against the plan, utilisation."""

import pathlib
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from benchmarks.gpu_check.random_model import random_batch, random_parts
from configs import presets
from uae_jax import sharding, trees
from uae_jax.planning.chips import CHIPS, Chip
from uae_jax.planning.compile import Memory, memory_of, resident_bytes
from uae_jax.planning.estimate import estimate_memory
from uae_jax.planning.plan import mesh_sizes, step_work, without_recomputation
from uae_jax.planning.system import AbstractSystem, abstract_system
from uae_jax.settings import frozen
from uae_jax.stages.program import Program, make_program
from uae_jax.stages.run_config import RunConfig
from uae_jax.training.optimizer import make_optimizer
from uae_jax.training.step import TrainState, init_state

STAGES = ("gen_for_und", "und_for_gen", "pretrain", "cold_start")  # in the order of their value
PRESETS = {"full": "qwen2_5_vl_3b_sd3_5_medium@1xH200", "small": "tiny"}
STEPS = 3
# one part of the preset's rollouts and of its cold start: a borrowed card has minutes
FULL = {
    "cold_start": dict(batch_size=16, micro_batches=16),
    "gen_for_und": dict(batch_size=8, rollout_parts=1, micro_batches=2),
    "und_for_gen": dict(batch_size=4, rollout_parts=1, micro_batches=4),
}
# of a dry run: the built-in model in the full preset's precisions and methods, with as few samples as they take
SMALL = {
    "model": dict(frozen_dtype="bfloat16", dtype="bfloat16", remat="full"),
    "pretrain": dict(batch_size=2, micro_batches=2),
    "cold_start": dict(batch_size=2, micro_batches=2, sampler_steps=2),
    "gen_for_und": dict(batch_size=2, micro_batches=2, group_size=2, max_new_tokens=8, sampler_steps=2),
    "und_for_gen": dict(
        method="flow_grpo",
        train="lora",
        batch_size=2,
        micro_batches=2,
        group_size=4,
        max_new_tokens=8,
        sampler_steps=3,
        flow_grpo=dict(updates_per_rollout=2, window=1, window_high=2, ema_decay=0.9),
    ),
}


def check_config(size: str) -> RunConfig:
    """The preset of a size, `full` or `small`, with all four stages."""
    values = presets.preset(PRESETS[size], ("pretrain", "cold_start", "gen_for_und", "und_for_gen")).to_dict()
    return frozen(RunConfig, presets.merged(values, SMALL if size == "small" else FULL))


def chip_of(device: Any) -> Chip | None:
    """The row of `planning.chips` for a device; None for a card that is not in the table."""
    return next((chip for chip in CHIPS.values() if device.device_kind == chip.device_kind), None)


def peak_bytes() -> int | None:
    """Bytes that this process's device held at most so far; None on a CPU."""
    stats = jax.local_devices()[0].memory_stats() if jax.default_backend() != "cpu" else None
    return stats["peak_bytes_in_use"] if stats else None


def run(size: str, stage: str, until: float, report: Callable[[dict], None]) -> None:
    """Compiles a stage's step, makes weights and a batch on the device, and takes the steps.

    Args:
      size: `full` or `small`.
      stage: of `STAGES`.
      until: Unix time; a step that would probably end after it is not begun.
      report: keeps the figures so far.

    Raises:
      RuntimeError: a metric is not finite, or an update was skipped since its gradient was not.
    """
    config = check_config(size)
    mesh, system = sharding.make_mesh(config.mesh, jax.devices()[:1]), abstract_system(config)
    program = make_program(config, system, system.parts, system.batch, stage, mesh)
    figures: dict[str, Any] = {
        "preset": config.preset,
        "images": program.config.batch_size,
        "trainable": trees.parameter_count(program.state.params),
        "frozen": trees.parameter_count(program.frozen),
    }
    figures |= planned(config, system, program)
    report(figures)  # what is known stays where compilation takes all of the time
    with sharding.in_use(mesh):
        compiled, found = compile_step(config, system, program)
        figures |= found
        report(figures)
        begin = time.perf_counter()
        state, held_parts = random_arguments(program, system)
        whole = random_batch(system, program.config.batch_size)
        batch = sharding.shard_batch({name: whole[name] for name in program.batch}, mesh)
        jax.block_until_ready((state, held_parts, batch))
        figures |= {"weights_seconds": time.perf_counter() - begin, "peak_before_steps": peak_bytes()}
        take_steps(compiled, (state, held_parts, batch), mesh, figures, until, report)
    if not figures["finite"]:
        raise RuntimeError(f"a step is not finite: {figures['metrics']}, {figures['skipped']} updates skipped")


def planned(config: RunConfig, system: AbstractSystem, program: Program) -> dict:
    """What is known before anything is compiled: memory by estimate, and the card's peak."""
    estimate, chip = estimate_memory(program, config, mesh_sizes(config, 1), system), chip_of(jax.devices()[0])
    return {"peak_flops": chip.flops if chip else None, "estimate": figures_of(estimate)}


def figures_of(memory: Memory) -> dict[str, float]:
    """Bytes for the report."""
    return {"arguments": memory.arguments, "temporaries": memory.temporaries, "peak": memory.peak}


def compile_step(config: RunConfig, system: AbstractSystem, program: Program) -> tuple[Callable, dict]:
    """The compiled step, and what is then known of it: seconds, operations, memory by the compiler."""
    begin, programs = time.perf_counter(), stored_programs()
    lowered = program.step.lower(*program.arguments)
    with ThreadPoolExecutor(1) as pool:  # the compiler leaves the interpreter free
        counted = pool.submit(count_flops, config, system, program.stage)
        compiled = lowered.compile()
        seconds = time.perf_counter() - begin
        flops, model_flops = counted.result()
    memory = memory_of(compiled, resident_bytes(program))
    return compiled, {
        "compile_seconds": seconds,
        "from_disk": programs is not None and stored_programs() == programs,
        "flops": flops,
        "model_flops": model_flops,
        "compiler": figures_of(memory),
    }


def stored_programs() -> int | None:
    """How many compiled programs are kept on disk; None where none are kept."""
    folder = jax.config.jax_compilation_cache_dir
    return sum(1 for _ in pathlib.Path(folder).glob("*-cache")) if folder else None


def count_flops(config: RunConfig, system: AbstractSystem, stage: str) -> tuple[float, float]:
    """Floating-point operations of a step as it runs, and without recomputation; captions have their full length."""
    plain = without_recomputation(config)
    return step_work(config, system, stage).flops, step_work(plain, abstract_system(plain), stage).flops


def random_arguments(program: Program, system: AbstractSystem) -> tuple[TrainState, dict]:
    """State and frozen parts of a step, on the device, where its program wants them."""
    transformer, settings = system.model.transformer, program.config
    held_parts = random_parts(program.frozen, transformer)
    params = random_parts(program.state.params, transformer, seed=1)
    optimizer = make_optimizer(settings.optimizer, settings.total_updates)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, program.state)

    def start(params: dict) -> TrainState:
        return init_state(params, optimizer, ema=bool(settings.ema_decay))

    # donated, so that the state takes the place of the parameters
    return jax.jit(start, donate_argnums=0, out_shardings=shardings)(params), held_parts


def take_steps(
    compiled: Callable, arguments: tuple, mesh: Mesh, figures: dict, until: float, report: Callable[[dict], None]
) -> None:
    """Adds seconds, peak and metrics to the figures, step by step."""
    state, held_parts, batch = arguments
    key = sharding.replicate_key(jax.random.key(0), mesh)
    figures["step_seconds"] = []
    while len(figures["step_seconds"]) < STEPS:
        if figures["step_seconds"] and time.time() + figures["step_seconds"][-1] > until:
            break
        begin = time.perf_counter()
        state, metrics = compiled(state, held_parts, batch, key)
        jax.block_until_ready((state, metrics))
        figures["step_seconds"].append(time.perf_counter() - begin)
        seconds, skipped = statistics.median(figures["step_seconds"]), int(state.skipped)
        metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
        figures |= {
            "seconds": seconds,
            "images_per_second": figures["images"] / seconds,
            "metrics": metrics,
            "finite": bool(np.isfinite(list(metrics.values())).all()) and not skipped,
            "skipped": skipped,
            "peak_bytes": peak_bytes(),
        }
        report(figures)
