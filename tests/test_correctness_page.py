"""The page of traps has a test for each of them, and names the tests that are marked."""

import pytest

from dev import traps

ROWS = [match.groups() for match in traps.ROW.finditer(traps.PAGE.read_text())]


def test_the_traps_are_listed_in_order():
    assert [int(number) for number, _, _ in ROWS] == list(range(1, 71))
    assert all(trap and done for _, trap, done in ROWS)


def test_every_trap_has_a_test_and_every_mark_a_trap():
    assert set(traps.guarded()) == {int(number) for number, _, _ in ROWS}


def test_the_page_names_the_marked_tests():
    page = traps.PAGE.read_text()
    assert page == traps.written(page), "write the page by: python -m dev.traps"


@pytest.mark.parametrize(
    "mark, numbers", [("@pytest.mark.trap(3)", [3]), ("@pytest.mark.trap(3, 70)", [3, 70]), ("@pytest.mark.slow", [])]
)
def test_a_mark_gives_its_numbers(mark, numbers):
    [test] = traps.ast.parse(f"{mark}\ndef test_a(): pass").body
    assert traps.marks(test) == numbers
