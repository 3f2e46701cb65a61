"""What the commands share: expected errors and warnings are one line; configuration files can import their
neighbours.
"""

import contextlib
import pathlib
import re
import sys
import warnings
from collections.abc import Iterator

from absl import flags


def error_line(error: BaseException) -> str:
    """What is printed of an expected error: one line, or one for each mistake of settings."""
    lines = getattr(error, "lines", None) or [" ".join(str(error).split())]
    return "\n".join(f"error: {line}" for line in lines)


def plain_warning(message: Warning | str, *where: object) -> None:
    """One line of a warning, for `warnings.showwarning`."""
    print(f"warning: {message}", file=sys.stderr)


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Turns expected errors inside into one line and exit code 1, warnings into a line each."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = plain_warning
            yield
    except (ValueError, OSError, ImportError) as error:
        sys.exit(error_line(error))
    except KeyboardInterrupt:
        sys.exit("error: interrupted; what was written stays")


def config_file() -> str | None:
    """The file named by --config on the command line, without its preset."""
    for index, argument in enumerate(sys.argv):
        name, equals, value = argument.lstrip("-").partition("=")
        if argument.startswith("-") and name == "config":
            value = value if equals else (sys.argv[index + 1] if index + 1 < len(sys.argv) else "")
            return value.partition(":")[0]
    return None


def import_configs() -> None:
    """Lets a configuration import its neighbours, wherever the command is started."""
    file = config_file()
    if file:
        sys.path.insert(0, str(pathlib.Path(file).absolute().parents[1]))


def parse_flags(arguments: list[str]) -> list[str]:
    """Parses the flags; an unknown preset, field or flag is one line, without the trace of where it was noticed."""
    try:
        return flags.FLAGS(arguments)
    except (flags.Error, ValueError, AttributeError, KeyError, TypeError, OSError) as error:
        lines = str(error).replace("\\n", "\n").splitlines()
        told = [line.strip() for line in lines if line.strip()]
        message = told[-1] if "Traceback" in str(error) else " ".join(told)
        sys.exit(f"error: {re.sub(r'^[A-Za-z]*Error: ', '', message)}")
