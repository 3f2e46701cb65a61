"""Seconds of every stage's compiled step: compilation, then the median of repeated steps.

    python -m benchmarks.stage_steps --config=configs/unified_grpo.py --repeats=5 [--json=FILE]

One table; with --json one object a line: {"stage", "compile_seconds", "step_seconds", "peak_bytes"}.
"""

import json
import pathlib
import sys
import tempfile
import time

import jax
import numpy as np
from absl import app, flags
from ml_collections import config_flags
from uae_jax.stages.settings import frozen

from uae_jax import sharding, trees
from uae_jax.data.loader import make_loader
from uae_jax.stages.run import STAGES, Run, RunConfig
from uae_jax.training.optimizer import make_optimizer
from uae_jax.training.step import init_state

_CONFIG = config_flags.DEFINE_config_file("config", "configs/unified_grpo.py", "As for uae_jax.main.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed steps of each stage.")
_JSON = flags.DEFINE_string("json", None, "File for one JSON object a stage.")


def time_stage(whole: Run, stage: str, repeats: int) -> dict:
    """Compiles and repeats one stage's step on the run's own data."""
    config = getattr(whole.config, stage)
    optimizer = make_optimizer(config.optimizer, config.steps * config.updates_per_rollout)
    start = STAGES[stage][1](whole.parts, config, whole.key)
    state = sharding.shard_tree(init_state(start, optimizer, ema=bool(config.ema_decay)), whole.mesh)
    frozen_parts = {name: part for name, part in whole.parts.items() if name not in start}
    data = make_loader(whole.source, whole.rows, config.batch_size, 0)
    key = trees.name_key(whole.key, stage)
    begin = time.perf_counter()
    compiled = (
        whole.step(stage, state, optimizer)
        .lower(state, frozen_parts, sharding.shard_batch(next(data), whole.mesh), key)
        .compile()
    )
    compile_seconds = time.perf_counter() - begin
    seconds = []
    for _ in range(repeats + 1):
        batch = sharding.shard_batch(next(data), whole.mesh)
        begin = time.perf_counter()
        state, metrics = compiled(state, frozen_parts, batch, key)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - begin)
    memory = compiled.memory_analysis()
    peak = int(memory.temp_size_in_bytes + memory.argument_size_in_bytes) if memory else None
    return {
        "stage": stage,
        "compile_seconds": round(compile_seconds, 2),
        "step_seconds": round(float(np.median(seconds[1:])), 4),
        "peak_bytes": peak,
    }


def main(_) -> None:
    """Prints the table."""
    with tempfile.TemporaryDirectory() as folder:
        whole = Run(frozen(RunConfig, _CONFIG.value.to_dict()), pathlib.Path(folder))
        rows = [time_stage(whole, stage, _REPEATS.value) for stage in whole.config.stages]
    print(
        f"{'stage':14s} {'compile s':>10s} {'step s':>9s} {'MB':>8s}   on {jax.device_count()} x "
        f"{jax.devices()[0].device_kind}"
    )
    for row in rows:
        print(
            f"{row['stage']:14s} {row['compile_seconds']:10.2f} {row['step_seconds']:9.4f} "
            f"{row['peak_bytes'] / 1e6:8.0f}"
        )
    if _JSON.value:
        pathlib.Path(_JSON.value).write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
    app.run(main)
