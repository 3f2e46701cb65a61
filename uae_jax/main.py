"""Trains UAE.

    python -m uae_jax.main --config=configs/unified_grpo.py --workdir=runs/tiny
    python -m uae_jax.main --config=configs/gen_for_und.py:qwen2_5_vl_3b_sd3_5_medium --workdir=runs/a \
        --config.model.folder=/weights/UAE --config.data.folder=/data/images --config.gen_for_und.group_size=16

The same workdir continues where it stopped.
"""

import os
import pathlib
import re
import sys
import warnings

from absl import app, flags, logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file, as configs/unified_grpo.py[:PRESET].", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of checkpoints, metrics, samples, report and export; the same one continues.")


def _config_file() -> str | None:
    """The file named by --config on the command line, without its preset."""
    for index, argument in enumerate(sys.argv):
        name, equals, value = argument.lstrip("-").partition("=")
        if argument.startswith("-") and name == "config":
            value = value if equals else (sys.argv[index + 1] if index + 1 < len(sys.argv) else "")
            return value.partition(":")[0]
    return None


def _start_processes() -> None:
    """Joins the other hosts of a pod or cluster; a single host needs nothing."""
    import jax

    cluster = ("SLURM_JOB_ID", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES", "MEGASCALE_COORDINATOR_ADDRESS", "JAX_COORDINATOR_ADDRESS")
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "")
    several = any(name in os.environ for name in cluster) and (
        "," in hosts or int(os.environ.get("SLURM_NTASKS", "1")) > 1 or int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1")) > 1
        or "JAX_COORDINATOR_ADDRESS" in os.environ or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ)
    if several:
        jax.distributed.initialize()


def main(argv: list[str]) -> None:
    """Runs the configuration; every expected error is one line and exit code 1, a stop by signal 130 or 143."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}; options start with --")
    if logging.get_verbosity() == logging.INFO and not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.ERROR)  # checkpointing alone writes twenty lines a save
    warnings.showwarning = lambda message, *where: print(f"warning: {message}", file=sys.stderr)
    config, workdir = _CONFIG.value, pathlib.Path(_WORKDIR.value).absolute()
    from uae_jax.training.signals import StopTraining

    try:
        if not workdir.parent.is_dir():
            raise FileNotFoundError(f"the folder {workdir.parent} that --workdir needs does not exist; make it first")
        _start_processes()
        if "phases" in config:
            from uae_jax.stages.bootstrap.run import bootstrap

            workdir.mkdir(exist_ok=True)
            print(f"the model is in {bootstrap(config, workdir)}")
            return
        from uae_jax.stages.run import run

        run(config.to_dict(), workdir)
        print(f"done; open {workdir / 'report.html'}")
    except StopTraining as stop:
        print(stop, file=sys.stderr)
        sys.exit(stop.exit_code)
    except (ValueError, FileNotFoundError, FloatingPointError, ImportError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


def _parse(arguments: list[str]) -> list[str]:
    """Parses the flags; an unknown preset, field or flag is one line, without the trace of where it was noticed."""
    try:
        return flags.FLAGS(arguments)
    except (flags.Error, ValueError, AttributeError, KeyError, TypeError, OSError) as error:
        lines = str(error).replace("\\n", "\n").splitlines()
        told = [line.strip() for line in lines if line.strip()]
        message = told[-1] if "Traceback" in str(error) else " ".join(told)
        sys.exit(f"error: {re.sub(r'^[A-Za-z]*Error: ', '', message)}")


def command() -> None:
    """The console script."""
    file = _config_file()
    if file:  # a config imports its neighbours, wherever the command is started
        sys.path.insert(0, str(pathlib.Path(file).absolute().parents[1]))
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=_parse)


if __name__ == "__main__":
    command()
