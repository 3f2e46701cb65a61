"""Computes what frozen parts make of a data set once, so that the supervised stages read it instead.

    python -m uae_jax.precompute --config=pretrain --out=runs/inputs
    python -m uae_jax.precompute --config=pretrain:qwen2_5_vl_3b_sd3_5_medium --out=/data/inputs --dry_run \\
        --config.model.folder=/weights/UAE --config.data.folder=/data/longcap
    python -m uae_jax.main --config=pretrain --workdir=runs/pretrain --config.data.precomputed=runs/inputs

Give the --config flags of the run. Latents are those of the auto-encoder (mean and log-variance), states those of
captions in the language model. The same command goes on where it was ended. docs/precompute.md has more.
"""

import argparse
import sys
from collections.abc import Sequence

from uae_jax.command_line import CommandParser, error_line, in_range, run_command, stay_offline
from uae_jax.config_file import apply_overrides, load_config, split_overrides
from uae_jax.files.paths import to_path

stay_offline()


def add_arguments(parser: CommandParser, overrides: Sequence[tuple[str, str]] = ()) -> None:
    """The flags beside --config.FIELD=VALUE, whose values are the overrides."""
    parser.add_argument("--config", required=True, metavar="NAME[:PRESET]", help="configuration, by path or by name")
    parser.add_argument("--out", required=True, type=to_path, help="folder of the shards; its parent exists")
    parser.add_argument(
        "--parts", default="", help="latents, states, or both with a comma; all that the stages can read if not given"
    )
    parser.add_argument(
        "--examples",
        help="only so many, in the order of the run; else a whole data set, or what the stages read of endless scenes",
        **in_range(int, low=1),
    )
    parser.add_argument(
        "--batch_size",
        help="examples that are computed at once; as in a micro-batch if not given",
        **in_range(int, low=1),
    )
    parser.add_argument(
        "--shard_examples", help="examples of a shard; as many as make 256 MiB if not given", **in_range(int, low=1)
    )
    parser.add_argument("--dry_run", action="store_true", help="check everything, say how many bytes, and end")
    parser.add_argument("--coordinator", help="host:port of process 0, where the cluster does not say it")
    parser.add_argument("--processes", help="number of processes, with --coordinator", **in_range(int, low=1))
    parser.add_argument(
        "--process_id", help="which of them this is, from 0, with --coordinator", **in_range(int, low=0)
    )
    parser.set_defaults(run=lambda options: run(options, overrides))


def run(options: argparse.Namespace, overrides: Sequence[tuple[str, str]]) -> None:
    """Computes as parsed flags say.

    Raises:
      ValueError, FileNotFoundError: see `stages.precompute.precompute`.
    """
    config, mistakes = apply_overrides(load_config(options.config).to_dict(), overrides)
    if "phases" in config:
        raise ValueError("configs/bootstrap.py has no stages that read images and captions; give one such as pretrain")
    from uae_jax.stages.precompute import Request, precompute  # seconds of imports, which `--help` does not need
    from uae_jax.training import processes

    processes.join(options.coordinator, options.processes, options.process_id)
    parts = tuple(part.strip() for part in options.parts.split(",") if part.strip())
    counts = {name: getattr(options, name) or 0 for name in ("examples", "batch_size", "shard_examples")}
    try:
        precompute(config, Request(options.out, parts, **counts, dry_run=options.dry_run), mistakes)
    except Exception as error:
        if processes.alone():
            raise
        # the others would wait for this one in the next batch
        processes.leave(error_line(error), processes.START_AGAIN if processes.infrastructure(error) else 1)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    overrides, others = split_overrides(sys.argv[1:] if arguments is None else arguments)
    run_command("uae_jax.precompute", __doc__, lambda parser: add_arguments(parser, overrides), others)


if __name__ == "__main__":
    main()
