"""Trains UAE.

    python -m uae_jax.main --config=configs/unified_grpo.py --workdir=runs/tiny
    python -m uae_jax.main --config=unified_grpo:qwen2_5_vl_3b_sd3_5_medium --workdir=runs/medium \\
        --config.model.folder=/weights/UAE --config.data.folder=/data/images --config.gen_for_und.group_size=16
    python -m uae_jax.main --config=gen_for_und:qwen2_5_vl_3b_sd3_5_medium@1xH200+paper_v5 --workdir=runs/v5 \\
        --config.model.folder=/weights/UAE --config.data.folder=/data/photographs
    python -m uae_jax.main --config=unified_grpo --describe=und_for_gen.nft
    python -m uae_jax.main --config=unified_grpo --workdir=runs/tiny --dry_run

--config takes a path, or the name of a built-in configuration, with :PRESET behind it; docs/recipes.md has
the recipes (+paper_v5). --config.FIELD=VALUE changes a setting. The same workdir continues where it stopped.
"""

import argparse
import logging as logging_of_python
import os
import pathlib
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

from uae_jax.command_line import (
    CommandParser,
    error_line,
    in_range,
    plain_warning,
    printable_output,
    underscored,
)
from uae_jax.config_file import apply_overrides, load_config, split_overrides
from uae_jax.files.paths import is_url, to_path

EXPECTED = (ValueError, OSError, FloatingPointError, ImportError)
GRACE_SECONDS = 10.0  # for threads that still read when a run has ended
CONTINUE = "The same command continues from the newest checkpoint."


def make_parser() -> argparse.ArgumentParser:
    """The flags beside --config.FIELD=VALUE."""
    parser = CommandParser(prog="python -m uae_jax.main", description=__doc__)
    parser.add_argument("--config", required=True, metavar="NAME[:PRESET]", help="configuration, by path or by name")
    parser.add_argument("--workdir", help="folder of checkpoints, metrics, samples, report and export")
    parser.add_argument(
        "--describe", nargs="?", const="", metavar="SECTION", help="print every setting, or those of a section, and end"
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="check everything that needs no weights, say what would run, and end"
    )
    parser.add_argument("--coordinator", help="host:port of process 0, where the cluster does not say it")
    parser.add_argument("--processes", help="number of processes, with --coordinator", **in_range(int, low=1))
    parser.add_argument(
        "--process_id", help="which of them this is, from 0, with --coordinator", **in_range(int, low=0)
    )
    parser.add_argument("--verbose", action="store_true", help="also show what the libraries log")
    return parser


@printable_output()
def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; every expected error is a line and exit code 1, a stop by signal 130 or 143.

    A failure of machines, networks, file systems or devices is exit code 75: the same command may succeed later.
    """
    try:
        overrides, others = split_overrides(sys.argv[1:] if arguments is None else arguments)
        options = make_parser().parse_args(underscored(others))
        quiet(options.verbose)
        config, mistakes = read_command(options, overrides)
        if options.describe is not None:
            show_settings(config, options.describe, mistakes)
            return
        workdir = to_path(options.workdir).absolute()
        if options.dry_run:
            from uae_jax.dry_run import dry_run

            dry_run(config, workdir, mistakes)
            return
        from uae_jax.training import processes

        processes.join(options.coordinator, options.processes, options.process_id)
        if "phases" in config:
            make_builtin_model(config, workdir, mistakes)
            return
        from uae_jax.stages.checks import checked_config

        settings = checked_config(config, workdir, mistakes)
        from uae_jax.planning.utilisation import seconds_at_peak
        from uae_jax.stages.run import run  # after the checks: imports alone take seconds

        run(settings, workdir, seconds_at_peak)
        print(f"done; open {workdir / 'report.html'}")
    except KeyboardInterrupt:  # during imports, outside of the steps, or a second one inside
        print(f"stopped by Ctrl-C; what is saved stays. {CONTINUE}", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        leave_with(error)


def program() -> None:
    """`main` as a process of its own, which ends though a data source never answers, and with its own exit code."""
    from uae_jax.training.signals import end_before_teardown, end_within

    code = 1
    end_before_teardown(lambda: code)
    try:
        main()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
        raise
    finally:
        sys.stdout.flush()
        end_within(GRACE_SECONDS, code)


def read_command(options: argparse.Namespace, overrides: Sequence[tuple[str, str]]) -> tuple[dict[str, Any], list[str]]:
    """The configuration with the values of the command line, and what of them does not fit.

    Raises:
      ValueError: no workdir, or the configuration cannot be opened.
      FileNotFoundError: there is no such configuration.
    """
    if options.workdir is None and options.describe is None:
        raise ValueError("--workdir is not given; name the folder for checkpoints, metrics, samples and report")
    return apply_overrides(load_config(options.config).to_dict(), overrides)


def show_settings(config: dict[str, Any], section: str, mistakes: list[str]) -> None:
    """Prints the settings of a section with their meaning.

    Raises:
      ValueError: there is no such section.
    """
    from uae_jax.settings import Mistakes, describe, read
    from uae_jax.stages.bootstrap.settings import BootstrapConfig
    from uae_jax.stages.run_config import RunConfig

    kind = BootstrapConfig if "phases" in config else RunConfig
    settings, found = read(kind, config)
    if mistakes + found:
        raise Mistakes(mistakes + found)
    lines = describe(kind, settings, wanted=section.removeprefix("config."))
    if not lines:
        raise ValueError(f"--describe={section} names no section; try --describe, which prints all settings")
    print("\n".join(lines))


def make_builtin_model(config: dict[str, Any], workdir: pathlib.Path, mistakes: list[str]) -> None:
    """Runs the phases of `configs/bootstrap.py`.

    Raises:
      ValueError: a setting that does not exist, or several processes.
    """
    from uae_jax.settings import Mistakes
    from uae_jax.stages.bootstrap.run import bootstrap
    from uae_jax.training import processes

    if mistakes:
        raise Mistakes(mistakes)
    if is_url(workdir):
        raise ValueError(
            f"configs/bootstrap.py writes to a local folder, and --workdir={workdir} is none; copy it later"
        )
    if not workdir.parent.is_dir():
        raise FileNotFoundError(f"the folder {workdir.parent} that --workdir needs does not exist; make it first")
    if not processes.alone():
        raise ValueError("configs/bootstrap.py makes a tiny model in one process; start it on one host")
    workdir.mkdir(exist_ok=True)
    print(f"the model is in {bootstrap(config, workdir)}")


def quiet(verbose: bool) -> None:
    """Makes warnings one line each, and hides what libraries log: checkpointing alone writes twenty lines a save."""
    from absl import logging

    # errors of a save come back to the loop, which says them in a line; the library logs each with its traceback
    logging.set_verbosity(logging.INFO if verbose else logging.FATAL)
    if not verbose:
        # XLA writes "Very slow compile?" as an error into the bars; what ends a run is told as an exception
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        # the writes of a failed save fail one by one, each with a traceback
        logging_of_python.getLogger("asyncio").setLevel(logging_of_python.CRITICAL)
    warnings.showwarning = plain_warning
    sys.unraisablehook = sys.__unraisablehook__ if verbose else _without_late_callbacks


def _without_late_callbacks(found: Any) -> None:
    """Prints what a callback raised, but not the callbacks of a failed save that come after it was given up."""
    if str(found.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(found)


def leave_with(error: Exception) -> None:
    """Ends the process with what an error says, or as a stop by a signal; other processes of the run end too."""
    from uae_jax.training import processes
    from uae_jax.training.signals import StopTraining

    if isinstance(error, StopTraining):
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    # first: a lost connection may come as a ValueError of the array that was read
    if processes.lost_process(error):
        reason = str(error).splitlines()[0]
        # the words are those of a lost process, and a fault of a device may use them too: both are said
        gone = f"error: another process of this run is gone ({reason}), or a device failed; see what is said last."
        processes.leave(f"{_traceback(error)}{gone} {CONTINUE}", processes.START_AGAIN, wait=False)
    if isinstance(error, EXPECTED):
        processes.leave(error_line(error), processes.START_AGAIN if processes.infrastructure(error) else 1)
    if processes.infrastructure(error):
        processes.leave(f"{_traceback(error)}error: a device failed. {CONTINUE}", processes.START_AGAIN)
    if processes.alone():
        raise error
    processes.leave(f"{_traceback(error)}the other processes end too. {CONTINUE}", 1)


def _traceback(error: Exception) -> str:
    return "".join(traceback.format_exception(error))


if __name__ == "__main__":
    program()
