"""The benchmark of the data pipeline measures both sides on the same files, and the two openings of a folder."""

import json

import numpy as np
import pytest

from benchmarks import data_rows
from uae_jax.data.folder import open_folder
from uae_jax.data.formats import ReadOptions


def test_both_sides_read_the_same_rows(tmp_path):
    (tmp_path / "images").mkdir()
    data_rows.write_folder(tmp_path / "images", 6, 64, distinct=2)
    source = open_folder(tmp_path / "images", ReadOptions(side=32)).source
    assert len(source) == 6  # no copies
    rows = data_rows.row_builder(tmp_path, 32)
    for draft in (True, False):
        ours = open_folder(tmp_path / "images", ReadOptions(side=32, scaled=draft)).source
        theirs = data_rows.TorchRows(ours, rows, 32, draft)
        for index in range(6):
            row = rows.only(data_rows.READS)(index, ours[index])
            for name in data_rows.READS:
                np.testing.assert_array_equal(theirs[index][name], row[name])


@pytest.mark.slow
def test_one_line_for_each_side(tmp_path, capsys):
    sizes = ("--images=8", "--side=64", "--size=32", "--batch=4", "--batches=2", "--cores=1")
    data_rows.main([*sizes, f"--json={tmp_path / 'rows.json'}"])
    found = [json.loads(line) for line in (tmp_path / "rows.json").read_text().splitlines()]
    assert [(row["side"], row["workers"]) for row in found] == [
        (side, workers) for side in ("uae_jax", "uae_jax, jpeg=full", "torch, draft", "torch") for workers in (0, 1)
    ]
    assert all(row["rows_a_second"] > 0 and row["rows_a_second_a_core"] > 0 for row in found)
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(found)


def test_a_folder_is_opened_twice(tmp_path):
    data_rows.main(["--folder=5", f"--json={tmp_path / 'rows.json'}"])
    found = [json.loads(line) for line in (tmp_path / "rows.json").read_text().splitlines()]
    assert [row["opening"] for row in found] == ["first", "second"] and all(row["images"] == 5 for row in found)
