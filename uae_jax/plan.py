"""Says what a run needs on machines that are not there: bytes a chip, floating-point operations, seconds.

    python -m uae_jax.plan --config=configs/unified_grpo.py:qwen2_5_vl_3b_sd3_5_large --topology=v6e:8x8
    python -m uae_jax.plan --config=configs/unified_grpo.py --topology=cpu:8 --config.mesh.fsdp=8 --config.mesh.data=1
    python -m uae_jax.plan --config=configs/unified_grpo.py:qwen2_5_vl_3b_sd3_5_medium --topology=gpu:8xH200
    --stages=gen_for_und

TPU slices are compiled for, ahead of time, by libtpu on this host (extra `tpu`); `cpu:N` compiles for N faked devices;
`gpu:NxCARD` is compiled where the CUDA wheels are (extra `cuda`), and estimated elsewhere. The exit code is 1 when a
stage does not fit. No weights are read.
"""

import os
import pathlib
import sys

from absl import app, flags
from ml_collections import config_flags

from uae_jax.command_line import import_configs, parse_flags, plain_errors

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Configuration file, as configs/unified_grpo.py[:PRESET].", lock_config=True
)
_TOPOLOGY = flags.DEFINE_string(
    "topology",
    None,
    "TPU slice such as v6e:8x8 or v5p:4x4x4, cards such as gpu:8xH200 or gpu:2x8xH100 (hosts x cards), or cpu:8.",
)
_STAGES = flags.DEFINE_list("stages", [], "Which stages; all of the configuration when it is not given.")
_HLO = flags.DEFINE_string(
    "hlo", None, "Folder for the text of each compiled stage (python -m benchmarks.gpu_program reads it)."
)
_JSON = flags.DEFINE_string("json", None, "File for all figures, unrounded.")


def prepare_environment(topology: str) -> None:
    """Has JAX use the host alone, with as many faked devices as the topology names; before JAX is imported."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    kind, _, count = topology.partition(":")
    if kind == "cpu" and count.isdigit():
        others = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in flag]
        os.environ["XLA_FLAGS"] = " ".join([*others, f"--xla_force_host_platform_device_count={count}"])
    # libtpu otherwise looks for the host that it runs on, at length, and refuses to be loaded by two processes
    quiet = {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": "v6e-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
    }
    for name, value in quiet.items():
        os.environ.setdefault(name, value)


def main(argv: list[str]) -> None:
    """Prints the plan; every expected error is one line and exit code 1, as is a stage that does not fit."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}; options start with --")
    prepare_environment(_TOPOLOGY.value)
    from uae_jax.planning.compile import gib
    from uae_jax.planning.plan import make_plan
    from uae_jax.planning.table import as_json, text_table

    config = _CONFIG.value.to_dict()
    with plain_errors():
        if "phases" in config:
            raise ValueError(
                "configs/bootstrap.py has no stages to plan; give a configuration that has, such as "
                "configs/unified_grpo.py"
            )
        if _JSON.value and not pathlib.Path(_JSON.value).absolute().parent.is_dir():
            raise FileNotFoundError(f"the folder of --json={_JSON.value} does not exist; make it first")
        texts = pathlib.Path(_HLO.value) if _HLO.value else None
        if texts:
            if texts.exists() and not texts.is_dir():
                raise NotADirectoryError(f"--hlo={texts} is a file; give a folder")
            texts.mkdir(parents=True, exist_ok=True)
        plans, topology, sizes = make_plan(
            config,
            _TOPOLOGY.value,
            tuple(_STAGES.value),
            lambda plan: print(f"{plan.stage}: {gib(plan.memory.peak):.2f} GiB a device", file=sys.stderr, flush=True),
            texts,
        )
    print(text_table(plans, topology, sizes, config["preset"]))
    if _JSON.value:
        pathlib.Path(_JSON.value).write_text(as_json(plans, topology, sizes, config["preset"]))
    if not all(plan.fits(topology) for plan in plans):
        sys.exit(1)


def command() -> None:
    """The console script."""
    import_configs()
    flags.mark_flags_as_required(["config", "topology"])
    app.run(main, flags_parser=parse_flags)


if __name__ == "__main__":
    command()
