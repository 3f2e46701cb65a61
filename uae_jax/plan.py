"""Says what a run needs on machines that are not there: bytes a chip, floating-point operations, seconds.

    python -m uae_jax.plan --config=unified_grpo:qwen2_5_vl_3b_sd3_5_large --topology=v6e:8x8
    python -m uae_jax.plan --config=unified_grpo --topology=cpu:8 --config.mesh.fsdp=8 --config.mesh.data=1
    python -m uae_jax.plan --config=unified_grpo:qwen2_5_vl_3b_sd3_5_medium --topology=gpu:8xH200 --stages=gen_for_und
    python -m uae_jax.plan --fits=RTX4090
    python -m uae_jax.plan --config=unified_ar --fits

TPU slices are compiled for, ahead of time, by libtpu on this host (extra `tpu`); `2xv5e:16x16` are two of them. `cpu:N`
compiles for N faked devices. `gpu:NxCARD` is compiled where the CUDA wheels are (extra `cuda`), and estimated
elsewhere. --fits lists, by the same estimates, which stages of which presets fit a card. The exit code is 3 when a
stage does not fit, and 1 for an error. No weights are read.
"""

import argparse
import os
import pathlib
import sys
from collections.abc import Sequence

from uae_jax.command_line import CommandParser, run_command
from uae_jax.config_file import apply_overrides, load_config, machine_presets, split_overrides


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


def add_arguments(parser: CommandParser, overrides: Sequence[tuple[str, str]]) -> None:
    """The flags beside --config.FIELD=VALUE, whose values are the overrides."""
    parser.add_argument("--config", metavar="NAME[:PRESET]", help="configuration, by path or by name")
    parser.add_argument(
        "--topology",
        help="v6e:8x8, v5p:4x4x4, 2xv5e:16x16 (slices), gpu:8xH200, gpu:2x8xH100 (hosts x cards), or cpu:8",
    )
    parser.add_argument("--stages", default="", help="which stages, with commas; all of the configuration if not given")
    parser.add_argument("--hlo", help="folder for the text of each compiled stage, for benchmarks.gpu_program")
    parser.add_argument(
        "--effort",
        choices=("quick", "default"),
        default="quick",
        help="default: compile for TPUs a second time, as a run does, and fit by the larger memory; takes long",
    )
    parser.add_argument(
        "--cycles",
        action="store_true",
        help="for v5e and v6e: compile sampling of captions and one evaluation of the denoiser as a run does, and "
        "print libtpu's own estimates",
    )
    parser.add_argument("--json", help="file for all figures, unrounded")
    parser.add_argument(
        "--fits",
        nargs="?",
        const="",
        metavar="CARDS",
        help="print which stages of which presets fit these cards, with commas between them; without names, all cards",
    )
    parser.set_defaults(run=lambda options: plan(options, overrides))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    overrides, others = split_overrides(sys.argv[1:] if arguments is None else arguments)
    run_command("uae_jax.plan", __doc__ or "", lambda parser: add_arguments(parser, overrides), others)


def plan(options: argparse.Namespace, overrides: Sequence[tuple[str, str]]) -> int:
    """Prints the plan of parsed flags; the exit code is 3 where a stage does not fit."""
    if options.fits is not None:
        return _fits(options, overrides)
    for name in ("config", "topology"):
        if getattr(options, name) is None:
            raise ValueError(f"--{name} is not given; a plan needs --config and --topology, or --fits alone")
    prepare_environment(options.topology)
    from uae_jax.planning.compile import gib
    from uae_jax.planning.plan import Compiling, make_plan, rest_of_run
    from uae_jax.planning.table import as_json, text_table
    from uae_jax.settings import Mistakes

    config, mistakes = apply_overrides(load_config(options.config).to_dict(), overrides)
    if mistakes:
        raise Mistakes(mistakes)
    if "phases" in config:
        raise ValueError(
            "configs/bootstrap.py has no stages to plan; give a configuration that has, such as configs/unified_grpo.py"
        )
    if options.json and not pathlib.Path(options.json).absolute().parent.is_dir():
        raise FileNotFoundError(f"the folder of --json={options.json} does not exist; make it first")
    texts = _texts(options.hlo)
    plans, topology, sizes = make_plan(
        config,
        options.topology,
        tuple(name for name in options.stages.split(",") if name),
        lambda plan: print(f"{plan.stage}: {gib(plan.memory.peak):.2f} GiB a device", file=sys.stderr, flush=True),
        Compiling(texts, options.effort == "default", options.cycles),
    )
    rest = rest_of_run(config, topology, sizes)
    print(text_table(plans, topology, sizes, config["preset"], *rest))
    if options.json:
        pathlib.Path(options.json).write_text(as_json(plans, topology, sizes, config["preset"], *rest))
    return 0 if all(plan.fits(topology) for plan in plans) else 3


def _fits(options: argparse.Namespace, overrides: Sequence[tuple[str, str]]) -> int:
    """Prints what fits which card, of a configuration's presets that name a machine."""
    if overrides or options.topology:
        raise ValueError("--fits is for the presets as they are; plan changed settings by --config and --topology")
    prepare_environment("")
    from uae_jax.planning.fits import chosen_chips, fit_table, fits_of
    from uae_jax.settings import one_line

    chips = chosen_chips([name for name in options.fits.split(",") if name])
    config = options.config or "unified_grpo"
    rows = []
    for preset in machine_presets(config):
        try:
            values = load_config(f"{config}:{preset}").to_dict()
        except ValueError as error:  # a preset that has none of the configuration's stages
            print(f"left out: {one_line(error)}", file=sys.stderr, flush=True)
            continue
        found = fits_of(preset, values)
        rows += [fit for fit in found if not options.fits or any(fit.fits(chip) for chip in chips)]
        print(f"{preset}: estimated", file=sys.stderr, flush=True)
    print(fit_table(rows, chips))
    return 0 if rows else 3


def _texts(name: str | None) -> pathlib.Path | None:
    if name is None:
        return None
    folder = pathlib.Path(name)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"--hlo={folder} is a file; give a folder")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


if __name__ == "__main__":
    main()
