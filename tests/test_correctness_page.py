"""The page of traps promises tests; each of them exists."""

import ast
import pathlib
import re

import pytest

TESTS = pathlib.Path(__file__).parent
ROWS = [
    [cell.strip() for cell in line.strip().strip("|").split("|")]
    for line in (TESTS.parent / "docs" / "correctness.md").read_text().splitlines()
    if re.match(r"\| \d+ \|", line)
]


def test_the_traps_are_listed_in_order():
    assert [int(row[0]) for row in ROWS] == list(range(1, 71))
    assert all(len(row) == 4 for row in ROWS)


def functions(file: str) -> list[str]:
    path = TESTS / f"{file}.py"
    assert path.exists(), f"tests/{file}.py does not exist"
    return [
        node.name
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_every_named_test_exists(row):
    named, file = re.findall(r"`([^`]+)`", row[3]), None
    assert named, f"row {row[0]} names no test"
    for entry in named:
        found, colon, name = entry.rpartition(": ")
        if "/" in entry or colon:
            file = found or entry
        assert file, f"row {row[0]} names {entry} before any file"
        written = functions(file)
        if colon or "/" not in entry:
            assert any(test.startswith(f"test_{name or entry}") for test in written), (
                f"tests/{file}.py has no test_{name or entry}"
            )
        assert written
