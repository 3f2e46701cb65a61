"""What the commands with a configuration file share: its neighbours can be imported, and wrong flags are one line."""

import pathlib
import re
import sys

from absl import flags


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
