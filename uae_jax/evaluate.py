"""Measures models with the paper's benchmarks.

python -m uae_jax.evaluate COMMAND --help
python -m uae_jax.evaluate unified_bench --ref_dir=originals --gen_dir=drawn --clip=DIR --output=scores.json
"""

import argparse
import importlib
import os
import sys

from uae_jax.command_line import plain_errors

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# command -> its module, which has add_arguments(parser) and run(options), and what it does
COMMANDS = {
    "unified_bench": (
        "uae_jax.evaluation.unified_bench",
        "similarity of pictures and their reconstructions (Unified-Bench, protocol 1)",
    ),
    "judge": (
        "uae_jax.evaluation.judge",
        "captions of two models compared by a language model (Unified-Bench, protocol 2)",
    ),
    "captions": (
        "uae_jax.evaluation.captions",
        "what captions say: facts, length, repetition, similarity to their picture",
    ),
    "geneval": (
        "uae_jax.evaluation.geneval",
        "pictures of GenEval's prompts, and their scores; for the built-in scenes without a detector",
    ),
    "geneval_plus": ("uae_jax.evaluation.geneval_plus", "pictures of GenEval++'s prompts, and their scores"),
    "dpg": ("uae_jax.evaluation.dpg", "grids of pictures of DPG-Bench's prompts, and their scores"),
    "mmt": ("uae_jax.evaluation.mmt", "answers to MMT-Bench, and their accuracy"),
}


def _parser(command: str) -> argparse.ArgumentParser:
    """The parser with the arguments of one command; only its module is imported."""
    table = "\n".join(f"  {name:14} {text}" for name, (_, text) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="python -m uae_jax.evaluate",
        description=f"{__doc__}\ncommands:\n{table}",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", help="one of the commands above")
    for name in COMMANDS:
        module = importlib.import_module(COMMANDS[name][0]) if name == command else None
        part = commands.add_parser(
            name,
            description=module and module.__doc__,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if module:
            module.add_arguments(part)
            part.set_defaults(run=module.run)
    return parser


def main(arguments: list[str] | None = None) -> None:
    """The command line; every expected error is one line and exit code 1, and what was written before stays."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser(next((word for word in arguments if not word.startswith("-")), "")).parse_args(arguments)
    with plain_errors():
        options.run(options)


if __name__ == "__main__":
    main()
