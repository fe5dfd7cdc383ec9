"""tools/experiments: rows and tables of made-up results, by hand."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from tests.support.grid_results import evaluated, served_at, write
from tools.experiments.__main__ import main
from tools.experiments.tables import all_rows, interval, read_rows, table_lines


def test_rows_by_hand(tmp_path: Path):
    """8 rounds, evaluated in 2, 6 and 8: the last five hold 6 and 8."""
    none = {n: evaluated(n, (), ()) for n in (1, 3, 4, 5, 7)}
    some = {
        2: evaluated(2, (0.9, 0.9), (0.9, 0.9)),
        6: evaluated(6, (0.2, 0.50), (0.3, 0.6), stages_trained=300, peak_memory_bytes=7e6),
        8: evaluated(
            8,
            (0.4, 0.54),
            (0.5, 0.7),
            stages_trained=500,
            peak_memory_bytes=5e6,
            seconds={"fit": 3.0, "generate": 1.0, "aggregate": 0.5},
            figures={"generator_bytes": 4e6},
        ),
    }
    write(tmp_path, "svd-mlp-k25", 0, [(none | some)[n] for n in range(1, 9)], flags="--rank 25")
    (row,) = all_rows(tmp_path)
    assert (row["label"], row["seed"], row["rounds"], row["rank"]) == ("svd-mlp-k25", 0, 8, 25.0)
    assert (row["served_exit_1"], row["served_final"]) == pytest.approx((40.0, 65.0))
    assert (row["last_exit_1"], row["last_final"]) == pytest.approx((30.0, 52.0))
    assert row["swing"] == pytest.approx(8**0.5)  # of 50 and 54 about 52: sqrt(4 + 4)
    assert (row["example_stages_per_round"], row["peak_memory_mb"]) == (400.0, 7.0)
    assert (row["mb_up_per_round"], row["mb_down_per_round"], row["generator_mb"]) == (
        2.0,
        3.0,
        4.0,
    )
    assert (row["fit_s_per_round"], row["aggregate_s_per_round"]) == (3.0, 0.5)
    assert row["server_s_per_round"] == 4.5
    assert row["commit"] == "0123456789+"  # the tree had changes


def test_what_is_missing_is_an_empty_cell(tmp_path: Path):
    bare = {"round": 1, "accuracy": [0.5], "accuracy_served": [0.6]}  # fedavg-s has exit 1 only
    write(tmp_path, "fedavg-s", 0, [bare])
    write(tmp_path, "owners-mean", 0, [evaluated(1, (), ())])
    write(tmp_path, "fedavg-l", 0, served_at(0.1, 0.2, 0.3))
    assert main(["rows", "--out", str(tmp_path), "--csv", str(tmp_path / "rows.csv")]) == 0
    with (tmp_path / "rows.csv").open(newline="") as file:
        full, small, unknown = csv.DictReader(file)
    assert (full["served_exit_3"], full["peak_memory_mb"], full["fit_s_per_round"]) == (
        "30.0",
        "",
        "",
    )
    assert (small["served_final"], small["served_exit_1"], small["served_exit_2"]) == (
        "60.0",
        "60.0",
        "",
    )
    assert (small["server_s_per_round"], small["mb_up_per_round"], small["swing"]) == ("", "", "")
    assert (unknown["served_final"], unknown["served_exit_1"]) == ("", "")
    assert main(["table", "--out", str(tmp_path)]) == 0
    assert [line["label"] for line in table_lines(all_rows(tmp_path))] == [
        "fedavg-s",
        "fedavg-l",
        "owners-mean",
    ]


def test_paired_difference_and_interval(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Seed 3 of the baseline and seed 4 of the rule have no partner."""
    for seed, share in enumerate((0.50, 0.60, 0.40, 0.90)):
        write(tmp_path, "owners-mean", seed, served_at(0.1, share))
    for seed, share in ((0, 0.51), (1, 0.62), (2, 0.43), (4, 0.20)):
        write(tmp_path, "rotation-add", seed, served_at(0.3, share))
    write(tmp_path, "fedavg-l", 0, served_at(0.2, 0.61))
    bound, base, rule = table_lines(all_rows(tmp_path))
    assert [line["label"] for line in (bound, base, rule)] == [
        "fedavg-l",
        "owners-mean",
        "rotation-add",
    ]
    assert (rule["seeds"], rule["pairs"]) == (4, 3)
    assert rule["served"] == pytest.approx((51 + 62 + 43 + 20) / 4)
    # differences 1, 2, 3: mean 2, deviation 1; t with 2 degrees is 4.303
    half = 4.303 / 3**0.5
    assert rule["minus_owners-mean"] == pytest.approx(2.0)
    assert (rule["low_95"], rule["high_95"]) == pytest.approx((2 - half, 2 + half), abs=1e-3)
    assert rule["minus_fedavg-l"] == pytest.approx(51 - 61)
    assert bound["minus_owners-mean"] == pytest.approx(61 - 50)
    assert (bound["low_95"], bound["served_sd"], bound["pairs"]) == (None, None, 1)
    assert base["served_sd"] == pytest.approx((1400 / 3) ** 0.5)  # 50 60 40 90 about 60
    assert (base["minus_owners-mean"], bound["minus_fedavg-l"]) == (None, None)
    assert main(["table", "--out", str(tmp_path), "--markdown"]) == 0
    text = capsys.readouterr().out
    assert "### fashion, even groups, Dirichlet 0.5" in text
    assert "| +2.0 [-0.5, +4.5]" in text
    assert text.strip() in (tmp_path / "table.md").read_text()


def test_table_from_rows_is_that_from_results(tmp_path: Path):
    write(tmp_path, "owners-mean", 0, served_at(0.1, 0.5))
    write(tmp_path, "fedavg-s", 0, served_at(0.4))
    rows = tmp_path / "csv" / "rows.csv"
    assert main(["rows", "--out", str(tmp_path), "--csv", str(rows)]) == 0
    assert table_lines(read_rows(rows)) == table_lines(all_rows(tmp_path))
    assert main(["table", "--csv", str(rows)]) == 0
    lines = (rows.parent / "table.csv").read_text().splitlines()
    assert lines[0] == "# python -m tools.experiments table; commit 0123456789+, x86_64"
    assert lines[1].startswith("data,regime,alpha,label,seeds,served,")
    assert len(lines) == 4


@pytest.mark.parametrize("name", ["table.csv", "table.md"])
@pytest.mark.parametrize("to", [[], ["--to", "DIR"], ["--to", "LINK"]], ids=str)
def test_a_table_does_not_overwrite_its_own_rows(tmp_path: Path, capsys, name, to):
    folder, link = tmp_path / "rows", tmp_path / "link"
    folder.mkdir()
    link.symlink_to(folder)
    write(folder, "owners-mean", 0, served_at(0.5))
    rows = folder / name
    assert main(["rows", "--out", str(folder), "--csv", str(rows)]) == 0
    before, there = rows.read_bytes(), sorted(folder.iterdir())
    flags = [{"DIR": str(folder), "LINK": str(link)}.get(flag, flag) for flag in to]
    assert main(["table", "--csv", str(rows), *flags]) == 1
    assert capsys.readouterr().err == (
        f"experiments: --csv {rows} would be overwritten; give another folder as --to\n"
    )
    assert (rows.read_bytes(), sorted(folder.iterdir())) == (before, there)
    assert main(["table", "--csv", str(rows), "--to", str(tmp_path / "other")]) == 0


def test_rows_of_an_earlier_folder_are_kept_on_request(tmp_path: Path):
    """A grid that goes on in another folder: new rows replace those of the same cell only."""
    first, second, rows = tmp_path / "first", tmp_path / "second", tmp_path / "rows.csv"
    for folder in (first, second):
        folder.mkdir()
    write(first, "owners-mean", 0, served_at(0.5))
    write(first, "owners-mean", 10, served_at(0.6))
    write(second, "owners-mean", 2, served_at(0.7))
    write(second, "owners-mean", 10, served_at(0.8, 0.9))
    for folder in (first, second):
        assert main(["rows", "--out", str(folder), "--csv", str(rows), "--add"]) == 0
    kept = [(row["seed"], row["served_final"], row["served_exit_2"]) for row in read_rows(rows)]
    assert kept == [("0", 50.0, None), ("2", 70.0, None), ("10", 90.0, 90.0)]
    assert main(["rows", "--out", str(second), "--csv", str(rows)]) == 0
    assert [row["seed"] for row in read_rows(rows)] == ["2", "10"]


def test_interval_of_one_difference_and_the_table_of_t():
    assert interval([]) == (None, None, None, 0)
    assert interval([3.0]) == (3.0, None, None, 1)
    # 1, 2, 3: mean 2, deviation 1; t of 2 degrees of freedom is 4.303 in a printed table
    half = 4.303 / 3**0.5
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 2 - half, 2 + half, 3), abs=1e-3)


def test_no_results_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write(tmp_path, "owners-mean", 0, served_at(0.3))
    (tmp_path / "fashion-even-0.5-owners-mean-s0.json").write_text("{")  # cut off
    assert main(["table", "--out", str(tmp_path)]) == 1
    left_out, error = capsys.readouterr().err.splitlines()
    assert "owners-mean-s0.json is left out" in left_out
    assert error.endswith(
        "holds no results; make some with `python -m tools.experiments run --out`"
    )
    (tmp_path / "rows.csv").write_text("data,label\n1,2\n")
    assert main(["table", "--csv", str(tmp_path / "rows.csv")]) == 1
    assert "rows.csv lacks alpha, commit" in capsys.readouterr().err
