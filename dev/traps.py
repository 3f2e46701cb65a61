"""The last column of the tables of docs/correctness.md, from the marks of the tests.

    python -m dev.traps          write the page
    python -m dev.traps --check  exit code 1 where the page is not what would be written

A test that guards a trap has `@pytest.mark.trap(NUMBER)`, with all its numbers.
"""

import argparse
import ast
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).parents[1]
TESTS, PAGE = ROOT / "tests", ROOT / "docs" / "correctness.md"
ROW = re.compile(r"^\| (\d+) \| (.+) \| (.+) \| .* \|$", re.MULTILINE)


def marks(test: ast.FunctionDef) -> list[int]:
    """Numbers of the traps that a test guards."""
    return [
        number.value
        for mark in test.decorator_list
        if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.trap"
        for number in mark.args
        if isinstance(number, ast.Constant) and isinstance(number.value, int)
    ]


def guarded() -> dict[int, list[tuple[str, str]]]:
    """File and name of the tests of each trap, files by name and tests as they stand there."""
    found: dict[int, list[tuple[str, str]]] = {}
    for path in sorted(TESTS.rglob("test_*.py")):
        source = path.read_text()
        if "pytest.mark.trap(" not in source:
            continue
        file = path.relative_to(TESTS).with_suffix("").as_posix()
        for test in ast.parse(source).body:
            for number in marks(test) if isinstance(test, ast.FunctionDef) else ():
                found.setdefault(number, []).append((file, test.name.removeprefix("test_")))
    return found


def cell(tests: list[tuple[str, str]]) -> str:
    """Tests in Markdown; a file is named once."""
    names, last = [], ""
    for file, name in tests:
        names.append(f"`{name}`" if file == last else f"`{file}: {name}`")
        last = file
    return ", ".join(names)


def written(page: str) -> str:
    """The page with the tests of every trap.

    Raises:
      KeyError: a trap has no test.
    """
    found = guarded()
    return ROW.sub(lambda row: f"| {row[1]} | {row[2]} | {row[3]} | {cell(found[int(row[1])])} |", page)


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m dev.traps", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    page, check = PAGE.read_text(), parser.parse_args().check
    if not check:
        PAGE.write_text(written(page))
    return int(check and page != written(page))


if __name__ == "__main__":
    sys.exit(main())
