"""One process of several: the first step of some stages, and the export, written by process 0.

python process_worker.py CONFIG.json RESULT.pickle COORDINATOR PROCESSES PROCESS_ID STAGE...
"""

import json
import pathlib
import pickle
import sys

import jax
from stage_pieces import one_step

from uae_jax import sharding
from uae_jax.settings import frozen
from uae_jax.stages import run as run_module
from uae_jax.stages.export import export_system
from uae_jax.stages.run_config import RunConfig
from uae_jax.training import processes


def main(config: str, result: str, coordinator: str, count: str, index: str, *stages: str) -> None:
    """See the module."""
    processes.join(coordinator, int(count), int(index))
    sharding.SMALL = 256  # even a tiny model is cut
    values = json.loads(pathlib.Path(config).read_text())
    run = run_module.Run(frozen(RunConfig, values), pathlib.Path(result).parent)
    assert not all(leaf.is_fully_addressable for leaf in jax.tree.leaves(run.parts))
    export_system(run.system, run.parts, pathlib.Path(result).parent / "export")
    found = {stage: one_step(run, stage) for stage in stages}
    if jax.process_index() == 0:
        pathlib.Path(result).write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
