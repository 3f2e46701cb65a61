"""What the commands of the benchmarks share: how problems are told."""

from collections.abc import Sequence


def refuse(problems: Sequence[str], what: str, shown: int = 20) -> None:
    """Prints problems one a line and ends with an error; does nothing without any.

    Raises:
      ValueError: there are problems.
    """
    for problem in problems[:shown]:
        print(problem)
    if len(problems) > shown:
        print(f"... and {len(problems) - shown} more")
    if problems:
        raise ValueError(f"{what} has {len(problems)} problem{'s' if len(problems) > 1 else ''}, listed above")
