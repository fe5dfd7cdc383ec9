"""Text of peers in a CSV file begins no formula; numbers stay numbers."""

from __future__ import annotations

import csv

import pytest

from edge_sdk.helpers.text import csv_cell
from tools.tables import read_csv, write_csv


@pytest.mark.parametrize(
    "cell",
    ["", "generic", "a=1", None, -1, -0.5, "-0.5", "+3", "-1e-05", "-inf", "1 - 2", True],
)
def test_what_stays(cell):
    assert csv_cell(cell) is cell


@pytest.mark.parametrize(
    "text", ['=HYPERLINK("http://x","y")', "+1+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "-"]
)
def test_what_is_quoted(text, tmp_path):
    assert csv_cell(text) == f"'{text}"
    write_csv(tmp_path / "t.csv", [{"platform": text, "loss": -0.5}], "how it was made")
    (row,) = read_csv(tmp_path / "t.csv")
    assert row == {"platform": f"'{text}", "loss": "-0.5"}
    with (tmp_path / "t.csv").open(newline="") as file:
        assert len(list(csv.reader(file))) == 3  # no cell broke a line
