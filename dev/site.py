"""What mkdocs adds to docs/: reference pages made of the code. `mkdocs.yml` names this file as a hook.

pip install ".[docs]" && mkdocs build --strict
"""

import argparse
import importlib
import inspect
import os
import pathlib
import sys
from collections.abc import Callable

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

COMMANDS = ("infer", "convert", "demo", "precompute", "plan", "fetch_emoji")
WITH_SETTINGS = ("precompute", "plan")  # these take --config.FIELD=VALUE too
CODE_FENCE = "```"


def cell(text: str) -> str:
    """A text inside of a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;") or "-"


def settings_page() -> str:
    """Every setting of a run: name, type and default, meaning with range, unit and source."""
    from uae_jax.settings import describe
    from uae_jax.stages.run_config import RunConfig

    lines = describe(RunConfig, RunConfig())
    rows: dict[str, list[str]] = {}
    for head, meaning in zip(lines[::2], lines[1::2], strict=True):
        name, _, value = head.partition(": ")
        section = name.removeprefix("config.").rpartition(".")[0] or "run"
        rows.setdefault(section, []).append(f"| `{name}` | {cell(value)} | {cell(meaning)} |")
    parts = [
        "# Settings",
        "",
        "Made from the code. `--config.NAME=VALUE` changes one; `--describe` prints them with a preset's values.",
    ]
    for section, entries in rows.items():
        parts += ["", f"## {section}", "", "| setting | type = default | meaning |", "|---|---|---|", *entries]
    return "\n".join(parts) + "\n"


def commands_page() -> str:
    """The help of every command."""
    from uae_jax import evaluate, main
    from uae_jax.command_line import CommandParser

    parts = ["# Commands", "", "Made from the code: what `--help` prints."]
    parts += _help("main", main.make_parser())
    for name in COMMANDS:
        module = importlib.import_module(f"uae_jax.{name}")
        parser = CommandParser(prog=f"python -m uae_jax.{name}", description=module.__doc__)
        module.add_arguments(parser, ()) if name in WITH_SETTINGS else module.add_arguments(parser)
        parts += _help(name, parser)
    for word in evaluate.COMMANDS:
        parser = CommandParser(prog="python -m uae_jax.evaluate", description=evaluate.__doc__)
        evaluate.add_arguments(parser, word)
        parts += _help(f"evaluate {word}", _subcommands(parser)[word])
    return "\n".join(parts) + "\n"


def _subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The subcommands of a parser by name."""
    found = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(found[0].choices) if found else {}


def _help(name: str, parser: argparse.ArgumentParser) -> list[str]:
    """Heading and help of a command, and those of its subcommands."""
    lines = ["", f"## {name}", "", CODE_FENCE + "text", parser.format_help().rstrip(), CODE_FENCE]
    for word, sub in _subcommands(parser).items():
        lines += _help(f"{name} {word}", sub)
    return lines


def api_page() -> str:
    """The Python API: signatures and docstrings."""
    from uae_jax import api

    parts = ["# Python", "", "Made from the code.", "", CODE_FENCE + "python", "import uae_jax", CODE_FENCE]
    parts += _documented("uae_jax.load", api.load)
    for kind in (api.Model, api.Reconstruction):
        parts += _documented(kind.__name__, kind)
        for name, member in vars(kind).items():
            if not name.startswith("_") and (inspect.isfunction(member) or isinstance(member, property)):
                parts += _documented(f"{kind.__name__}.{name}", member, "###")
    return "\n".join(parts) + "\n"


def _documented(name: str, member: object, level: str = "##") -> list[str]:
    """Heading, signature and docstring of one member."""
    lines = ["", f"{level} {name}", ""]
    if callable(member):
        lines += [CODE_FENCE + "python", f"{name}{inspect.signature(member)}", CODE_FENCE, ""]
    return [*lines, CODE_FENCE + "text", inspect.getdoc(member) or "", CODE_FENCE]


def metrics_page() -> str:
    """Metrics of the steps and held-out scores, with units."""
    from uae_jax.training.meanings import FAMILIES, METRICS, MORE_SCORES
    from uae_jax.training.report import MEANINGS

    parts = [
        "# Metrics and scores",
        "",
        "Made from the code.",
        "",
        "## Of the steps (`metrics.jsonl`, TensorBoard)",
        "",
    ]
    parts += ["| metric | unit | meaning |", "|---|---|---|"]
    entries = METRICS | {f"{beginning}...": meaning for beginning, meaning in FAMILIES.items()}
    parts += [f"| `{name}` | {cell(unit)} | {cell(meaning)} |" for name, (unit, meaning) in entries.items()]
    parts += ["", "## Held-out scores (`summary.json`, report)", "", "| score | meaning |", "|---|---|"]
    parts += [f"| `{name}` | {cell(meaning)} |" for name, meaning in (MEANINGS | MORE_SCORES).items()]
    return "\n".join(parts) + "\n"


PAGES: dict[str, Callable[[], str]] = {
    "reference/settings.md": settings_page,
    "reference/commands.md": commands_page,
    "reference/api.md": api_page,
    "reference/metrics.md": metrics_page,
}


def on_files(files, config):
    """Adds the reference pages to those of docs/."""
    from mkdocs.structure.files import File

    for path, make in PAGES.items():
        files.append(File.generated(config, path, content=make()))
    return files
