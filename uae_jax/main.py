"""Trains UAE.

    python -m uae_jax.main --config=configs/unified_grpo.py --workdir=runs/tiny
    python -m uae_jax.main --config=configs/gen_for_und.py:qwen2_5_vl_3b_sd3_5_medium --workdir=runs/a \
        --config.model.folder=/weights/UAE --config.data.folder=/data/images --config.gen_for_und.group_size=16

The same workdir continues where it stopped.
"""

import pathlib
import sys
import traceback
import warnings

from absl import app, flags, logging
from ml_collections import config_flags

from uae_jax.command_line import error_line, import_configs, parse_flags, plain_warning

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Configuration file, as configs/unified_grpo.py[:PRESET].", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of checkpoints, metrics, samples, report and export; the same one continues."
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0, where the cluster does not say it.")
_PROCESSES = flags.DEFINE_integer("processes", None, "Number of processes, with --coordinator.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0, with --coordinator.")
EXPECTED = (ValueError, FileNotFoundError, FloatingPointError, ImportError, ConnectionError)
CONTINUE = "The same command continues from the newest checkpoint."


def main(argv: list[str]) -> None:
    """Runs the configuration; every expected error is one line and exit code 1, a stop by signal 130 or 143."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}; options start with --")
    if logging.get_verbosity() == logging.INFO and not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.ERROR)  # checkpointing alone writes twenty lines a save
    warnings.showwarning = plain_warning
    config, workdir = _CONFIG.value, pathlib.Path(_WORKDIR.value).absolute()
    from uae_jax.training import processes
    from uae_jax.training.signals import StopTraining

    try:
        if not workdir.parent.is_dir():
            raise FileNotFoundError(f"the folder {workdir.parent} that --workdir needs does not exist; make it first")
        processes.join(_COORDINATOR.value, _PROCESSES.value, _PROCESS_ID.value)
        if "phases" in config:
            from uae_jax.stages.bootstrap.run import bootstrap

            if not processes.alone():
                raise ValueError("configs/bootstrap.py makes a tiny model in one process; start it on one host")
            workdir.mkdir(exist_ok=True)
            print(f"the model is in {bootstrap(config, workdir)}")
            return
        from uae_jax.stages.run import run

        run(config.to_dict(), workdir)
        print(f"done; open {workdir / 'report.html'}")
    except StopTraining as stop:
        print(stop, file=sys.stderr)
        sys.exit(stop.exit_code)
    except Exception as error:
        if processes.lost_process(
            error
        ):  # first: a lost connection may come as a ValueError of the array that was read
            reason = str(error).splitlines()[0]
            processes.leave(
                f"error: another process of this run is gone ({reason}); see what it said last. {CONTINUE}",
                1,
                wait=False,
            )
        if isinstance(error, EXPECTED):
            processes.leave(error_line(error), 1)
        if processes.alone():
            raise
        processes.leave(f"{traceback.format_exc()}the other processes end too. {CONTINUE}", 1)


def command() -> None:
    """The console script."""
    import_configs()
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=parse_flags)


if __name__ == "__main__":
    command()
