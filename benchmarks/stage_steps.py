"""Seconds of every stage's compiled step: compilation, then the median of repeated steps.

    python -m benchmarks.stage_steps --config=configs/unified_grpo.py --repeats=5 [--json=FILE]

One table; with --json one object a line: {"stage", "compile_seconds", "step_seconds", "peak_bytes"}.
"""

import argparse
import json
import pathlib
import sys
import tempfile
import time
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from uae_jax import sharding, trees
from uae_jax.config_file import apply_overrides, load_config, split_overrides
from uae_jax.methods.method import build_step, make_method
from uae_jax.methods.trained import trainable
from uae_jax.settings import Mistakes, frozen
from uae_jax.stages.run import Run
from uae_jax.stages.run_config import RunConfig
from uae_jax.training.optimizer import make_optimizer
from uae_jax.training.step import init_state


class TimedStage:
    """One stage's compiled step, which is repeated on the run's own data.

    Args:
      whole: the run; its parameters stay.
      stage: its name.
    """

    def __init__(self, whole: Run, stage: str):
        config = whole.config.stage(stage)
        optimizer = make_optimizer(config.optimizer, config.total_updates)
        names, rank = whole.config.trains(stage), getattr(config, "lora_rank", 1)
        start = trainable(whole.system.model, whole.parts, names, rank, whole.key)
        self.state = sharding.shard_tree(init_state(start, optimizer, ema=bool(config.ema_decay)), whole.mesh)
        self.frozen = {name: part for name, part in whole.frozen_of(stage).items() if name not in start}
        self.mesh, self.key = whole.mesh, trees.name_key(whole.key, stage)
        self.data = whole.batches(stage, config.batch_size)
        method = make_method(stage, config, whole.config.sampler, whole.system)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.state), NamedSharding(whole.mesh, PartitionSpec())
        begin = time.perf_counter()
        step = build_step(method, optimizer, shardings)
        self.compiled = step.lower(self.state, self.frozen, self._batch(), self.key).compile()
        self.compile_seconds = time.perf_counter() - begin

    def _batch(self) -> dict:
        return sharding.shard_batch(next(self.data), self.mesh)

    def seconds(self) -> float:
        """Seconds of one more step, without its batch."""
        batch = self._batch()
        begin = time.perf_counter()
        self.state, metrics = self.compiled(self.state, self.frozen, batch, self.key)
        jax.block_until_ready(metrics)
        return time.perf_counter() - begin


def time_stage(whole: Run, stage: str, repeats: int) -> dict:
    """Compiles and repeats one stage's step on the run's own data."""
    timed = TimedStage(whole, stage)
    seconds = [timed.seconds() for _ in range(repeats + 1)]
    timed.data.close()
    memory = timed.compiled.memory_analysis()
    peak = int(memory.temp_size_in_bytes + memory.argument_size_in_bytes) if memory else None
    return {
        "stage": stage,
        "compile_seconds": round(timed.compile_seconds, 2),
        "step_seconds": round(float(np.median(seconds[1:])), 4),
        "peak_bytes": peak,
    }


def read_options(arguments: Sequence[str] | None = None) -> tuple[argparse.Namespace, RunConfig]:
    """The flags, and the configuration with the changes of the command line.

    Raises:
      Mistakes: a field that does not exist, or a value that cannot be.
    """
    overrides, others = split_overrides(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="unified_grpo", help="as for uae_jax.main")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each stage")
    parser.add_argument("--json", type=pathlib.Path, help="file for one JSON object a stage")
    options = parser.parse_args(others)
    values, mistakes = apply_overrides(load_config(options.config).to_dict(), overrides)
    if mistakes:
        raise Mistakes(mistakes)
    return options, frozen(RunConfig, values)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table."""
    options, config = read_options(arguments)
    with tempfile.TemporaryDirectory() as folder:
        whole = Run(config, pathlib.Path(folder))
        rows = [time_stage(whole, stage, options.repeats) for stage in config.stages]
    print(
        f"{'stage':14s} {'compile s':>10s} {'step s':>9s} {'MB':>8s}   on {jax.device_count()} x "
        f"{jax.devices()[0].device_kind}"
    )
    for row in rows:
        print(
            f"{row['stage']:14s} {row['compile_seconds']:10.2f} {row['step_seconds']:9.4f} "
            f"{row['peak_bytes'] / 1e6:8.0f}"
        )
    if options.json:
        options.json.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
