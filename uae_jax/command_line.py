"""What the commands share: how flags are read, errors and warnings of one line."""

import argparse
import contextlib
import difflib
import io
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from uae_jax.settings import Meaning, one_line


def stay_offline() -> None:
    """Keeps the libraries off the Hub, unless the person said otherwise; an id that is given is the one exception."""
    if "HF_HUB_OFFLINE" not in os.environ:
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ["UAE_JAX_OFFLINE"] = "1"  # see `hf.hub`


def error_line(error: BaseException) -> str:
    """The message of an expected error: one line, or one for each mistake of settings."""
    lines = getattr(error, "lines", None) or [one_line(error)]
    return "\n".join(f"error: {line}" for line in lines)


def plain_warning(message: Warning | str, *where: object) -> None:
    """One line of a warning, for `warnings.showwarning`."""
    print(f"warning: {message}", file=sys.stderr)


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Ends on an expected error with one line and exit code 1; prints a warning as one line."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = plain_warning
            yield
    except (ValueError, OSError, ImportError) as error:
        sys.exit(error_line(error))
    except KeyboardInterrupt:
        sys.exit("error: interrupted; what was written stays")


class _Help(argparse.RawDescriptionHelpFormatter):
    """Help with the default of every flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        plain = default is None or isinstance(default, bool) or default in ("", (), [], argparse.SUPPRESS)
        return text if plain or "default" in text else f"{text} (default: %(default)s)"


class _InRange(argparse.Action):
    """Stores a number that is in range."""

    def __init__(self, *arguments: Any, meaning: Meaning, **settings: Any):
        super().__init__(*arguments, **settings)
        self.meaning = meaning

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None):
        if problem := self.meaning.problem(values):
            raise ValueError(f"{option_string or self.dest} is {values!r}; {problem}")
        setattr(namespace, self.dest, values)


def in_range(kind: type, **bounds: Any) -> dict[str, Any]:
    """Arguments of `add_argument` for a finite number in a range; another is an error of one line.

    Args:
      kind: `int` or `float`.
      **bounds: `low`, `high` and `above`, see `settings.Meaning`.
    """
    return {"type": kind, "action": _InRange, "meaning": Meaning("", **bounds)}


@contextlib.contextmanager
def printable_output() -> Iterator[None]:
    """What the terminal cannot print is printed as an escape, so that a name or caption never ends the work."""
    streams = [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, io.TextIOWrapper)]
    before = [stream.errors for stream in streams]
    try:
        for stream in streams:
            stream.reconfigure(errors="backslashreplace")
        yield
    finally:
        for stream, errors in zip(streams, before):
            if not stream.closed:
                stream.reconfigure(errors=errors)


class _Commands(argparse._SubParsersAction):
    """Subcommands; the help of each ends with its examples from the description of the command above."""

    text = ""

    def add_parser(self, name: str, *, help: str, **settings: Any) -> Any:
        parser = super().add_parser(name, help=help, **{"description": f"{help[0].upper()}{help[1:]}", **settings})
        if "description" not in settings:
            lines = rf"^ *{re.escape(parser.prog)}\b(?:.*\\\n)*.*$"
            parser.epilog = "\n".join(["examples:", *re.findall(lines, self.text, re.MULTILINE)])
        return parser


class CommandParser(argparse.ArgumentParser):
    """A parser whose flags are not abbreviated, whose subcommands show examples, and whose errors are one line."""

    def __init__(self, **settings: Any):
        super().__init__(allow_abbrev=False, formatter_class=_Help, **settings)

    def error(self, message: str) -> NoReturn:
        """Ends with one line and exit code 2: all flags of a model would hide what is wrong with one of them."""
        _, _, words = message.partition("unrecognized arguments: ")
        found = (self._nearest(word) for word in words.split() if word.startswith("-"))
        self.exit(2, f"error: {message}; {next(filter(None, found), f'see {self.prog} --help')}\n")

    def _nearest(self, word: str) -> str:
        """The flag that an unknown word is nearest to, as the end of a sentence; empty for none."""
        begin = re.split("[.=]", word)[0]
        near = difflib.get_close_matches(begin, self.flags(), 1)
        return f"did you mean {near[0]}{word.removeprefix(begin)}?" if near else ""

    def flags(self) -> list[str]:
        """The flags of this parser and of its subcommands."""
        found = [flag for action in self._actions for flag in action.option_strings]
        for action in self._actions:
            parts = action.choices.values() if isinstance(action, argparse._SubParsersAction) else ()
            found += [flag for part in parts for flag in part.flags()]
        return found

    def add_subparsers(self, **settings: Any) -> Any:
        commands: Any = super().add_subparsers(action=_Commands, **{"required": True, "metavar": "COMMAND", **settings})
        commands.text = self.description or ""
        return commands


def underscored(arguments: Sequence[str]) -> list[str]:
    """Arguments with `--a-b` and `--a-b=value` as `--a_b` and `--a_b=value`; what follows `--` stays."""
    found: list[str] = []
    for index, word in enumerate(arguments):
        if word == "--":
            return [*found, *arguments[index:]]
        name, equals, value = word.partition("=")
        if re.fullmatch(r"--\w[\w-]*", name):
            name = f"--{name[2:].replace('-', '_')}"
        found.append(name + equals + value)
    return found


def run_command(
    module: str,
    text: str | None,
    add_arguments: Callable[[CommandParser], None],
    arguments: Sequence[str] | None = None,
) -> None:
    """Reads a command line and runs the function that it chooses; an expected error is one line and exit code 1.

    Args:
      module: that is started, such as `uae_jax.infer`.
      text: its docstring: what the command does, with examples.
      add_arguments: adds flags and subcommands, and sets the default `run` of each: a function of the parsed flags,
        which returns an exit code or None.
      arguments: words of the command line; None for those of the process.
    """
    parser = CommandParser(prog=f"python -m {module}", description=text)
    add_arguments(parser)
    with printable_output():
        with plain_errors():
            options = parser.parse_args(underscored(sys.argv[1:] if arguments is None else arguments))
            code = options.run(options)
        if code:
            sys.exit(code)
