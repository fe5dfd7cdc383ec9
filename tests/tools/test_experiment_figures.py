"""tools/experiments: plots of made-up results and the numbers behind them."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

from tests.support.grid_results import evaluated, served_at, write
from tools.experiments.__main__ import main
from tools.experiments.figures import MAX_LINES, Point, alpha_order, even_chunks, panels_of


def test_plots_and_the_numbers_behind_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Warnings are errors: fonts, layout and scales are checked by drawing."""
    errors = [{"error_stage_2": e, "previous_stage_2": 0.2} for e in (0.3, 0.1)]
    for seed in (0, 1):
        for alpha in ("0.1", "iid"):
            for k in (25, 4096):
                rounds = [
                    evaluated(n, (0.1, 0.2), (0.2, 0.4 + 0.2 * seed), figures=errors[n - 1])
                    for n in (1, 2)
                ]
                write(tmp_path, f"svd-mlp-k{k}", seed, rounds, alpha, flags=f"--rank {k}")
            write(tmp_path, "owners-mean", seed, served_at(0.3, 0.3), alpha)
            moved = [{"deviation_error_stage_3": 0.8 + 0.1 * seed}]
            learned = [evaluated(1, (0.1, 0.2), (0.2, 0.3), figures=moved[0])]
            write(tmp_path, "default", seed, learned, alpha)
            write(tmp_path, "unknown", seed, [evaluated(1, (), ())], alpha)
    figures = tmp_path / "figures"
    assert main(["plot", "--out", str(tmp_path), "--figures", str(figures)]) == 0
    made = sorted(path.name for path in figures.glob("*.png"))
    kinds = ("accuracy", "deviations", "exits", "rank", "weights")
    each = [f"{kind}-fashion-even-{alpha}.png" for kind in kinds for alpha in ("0.1", "iid")]
    assert made == sorted([*each, "alpha-fashion-even.png"])
    assert len(capsys.readouterr().out.splitlines()) == len(made)
    curves = rows_of(figures / "accuracy-fashion-even-iid.csv")
    assert [row["x"] for row in curves if row["label"] == "svd-mlp-k25"] == ["1", "2"]
    first = next(row for row in curves if row["label"] == "svd-mlp-k25")
    assert (first["mean"], first["sd"], first["seeds"]) == ("50.0", "14.1421", "2")
    ranks = rows_of(figures / "rank-fashion-even-0.1.csv")
    assert {(row["label"], row["x"]) for row in ranks} == {
        (label, k) for label in ("svd-mlp", "owners-mean") for k in ("25", "full")
    }
    weights = rows_of(figures / "weights-fashion-even-0.1.csv")
    assert [row["mean"] for row in weights if row["label"] == "svd-mlp-k25"] == ["0.3", "0.1"]
    (deviation,) = rows_of(figures / "deviations-fashion-even-0.1.csv")
    assert (deviation["label"], deviation["mean"]) == ("default", "0.85")
    assert "svd-mlp-k25: previous global" in {row["label"] for row in weights}
    assert [row["x"] for row in rows_of(figures / "alpha-fashion-even.csv")][:2] == ["0.1", "IID"]


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_plot_without_matplotlib_is_one_line(tmp_path: Path, monkeypatch, capsys):
    write(tmp_path, "owners-mean", 0, served_at(0.3))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["plot", "--out", str(tmp_path), "--figures", str(tmp_path / "f")]) == 1
    assert capsys.readouterr().err.endswith("install it: pip install matplotlib\n")


def test_every_panel_has_the_baseline_and_few_lines():
    """9 rules and two references, 8 lines a panel: 6 + 6 places, so 4 and 5."""
    point = [Point(1.0, 50.0, 0.0, 1)]
    curves = [(f"rule-{i}", point) for i in range(9)] + [
        ("owners-mean", point),
        ("fedavg-l", point),
    ]
    panels = panels_of(curves, "t")
    assert [len(panel.lines) for panel in panels] == [6, 7]
    for panel in panels:
        assert [line.label for line in panel.lines[:2]] == ["fedavg-l", "owners-mean"]
        assert len({line.style for line in panel.lines}) == len(panel.lines)
    assert [len(panel.lines) for panel in panels_of(curves[:9], "t")] == [4, 5]
    assert [len(panel.lines) for panel in panels_of(curves[9:], "t")] == [2]


def test_panels_are_few_and_even():
    sizes = [len(part) for part in even_chunks(range(17), MAX_LINES)]
    assert sorted(sizes) == [5, 6, 6]
    assert even_chunks([], MAX_LINES) == []
    assert sorted(["iid", "1e4", "0.5", "subject", "1"], key=alpha_order) == [
        "0.5",
        "1",
        "1e4",
        "iid",
        "subject",
    ]
