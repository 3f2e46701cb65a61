"""Measures models with the paper's benchmarks.

    python -m uae_jax.evaluate COMMAND --help
    python -m uae_jax.evaluate unified_bench --ref_dir=originals --gen_dir=generated --clip=DIR --output=scores.json

The help of a command has its flags and examples.
"""

import argparse
import functools
import importlib
import sys

from uae_jax.command_line import run_command, stay_offline

stay_offline()

# command -> its module, whose add_arguments(parser) sets `run`, and what it does
COMMANDS = {
    "unified_bench": (
        "uae_jax.evaluation.unified_bench",
        "similarity of images and reconstructions (Unified-Bench, protocol 1)",
    ),
    "judge": (
        "uae_jax.evaluation.judge",
        "captions of two models compared by a language model (Unified-Bench, protocol 2)",
    ),
    "captions": (
        "uae_jax.evaluation.captions",
        "captions: facts, length, repetition, similarity to the image",
    ),
    "decoder": (
        "uae_jax.evaluation.decoder",
        "a decoder of the built-in scenes at several guidances: captions and prompts of unseen texts",
    ),
    "geneval": (
        "uae_jax.evaluation.geneval",
        "images for GenEval and their scores; the built-in scenes need no detector",
    ),
    "geneval_plus": ("uae_jax.evaluation.geneval_plus", "images for GenEval++ and their scores"),
    "dpg": ("uae_jax.evaluation.dpg", "image grids for DPG-Bench and their scores"),
    "mmt": ("uae_jax.evaluation.mmt", "answers to MMT-Bench and their accuracy"),
    "mmb": ("uae_jax.evaluation.mmb", "answers to MMBench and their accuracy with circular groups"),
    "mmmu": ("uae_jax.evaluation.mmmu", "answers to MMMU and their accuracy by subject"),
    "pope": ("uae_jax.evaluation.pope", "answers to POPE and their F1, accuracy, precision and recall"),
}


def add_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    """Adds all commands, and the flags of `command` alone: the other modules are not imported."""
    commands = parser.add_subparsers()
    for name, (path, text) in COMMANDS.items():
        module = importlib.import_module(path) if name == command else None
        part = commands.add_parser(name, help=text, description=module and module.__doc__)
        if module:
            module.add_arguments(part)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    words = sys.argv[1:] if arguments is None else arguments
    command = next((word for word in words if not word.startswith("-")), "")
    run_command("uae_jax.evaluate", __doc__, functools.partial(add_arguments, command=command), words)


if __name__ == "__main__":
    main()
