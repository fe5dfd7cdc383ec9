"""tools/experiments curves: speed and steadiness of rows, by hand from made-up results."""

from __future__ import annotations

import csv

import pytest

from tests.support.grid_results import evaluated, write
from tools.experiments.__main__ import main
from tools.experiments.curves import row_of, table_lines
from tools.experiments.tables import read_runs


def rounds_at(**served):
    """Twelve rounds; r4=0.5: evaluated in round 4, the global itself gets 0.1 less right."""
    found = {int(name[1:]): share for name, share in served.items()}
    return [
        evaluated(
            number,
            (0.1, found[number] - 0.1) if number in found else (),
            (0.1, found[number]) if number in found else (),
        )
        for number in range(1, 13)
    ]


@pytest.fixture
def results(tmp_path):
    for seed, more in ((0, 0.0), (1, 0.1)):
        write(tmp_path, "fedavg-l", seed, rounds_at(r4=0.5, r8=0.6, r12=0.8 + more))
        write(tmp_path, "slow", seed, rounds_at(r4=0.2, r8=0.4, r12=0.6))
    return tmp_path


def test_a_row_by_hand(results):
    (run,) = [r for r in read_runs(results) if (r.cell["label"], r.cell["seed"]) == ("slow", 0)]
    row = row_of(run)
    assert row["at_10"] == pytest.approx(40)  # round 8 is the last evaluated one up to 10
    assert row["at_20"] is None, "it has twelve rounds"
    assert row["end"] == pytest.approx(50), "rounds 8 and 12 are among the last five"
    assert row["area"] == pytest.approx(40)
    assert row["last"] == pytest.approx(40)


def test_differences_are_paired_by_seed(results):
    bound, slow = table_lines(read_runs(results), "fedavg-l")
    assert (bound["label"], slow["label"]) == ("fedavg-l", "slow"), "the largest area first"
    assert bound["end_minus_bound"] is None
    assert slow["end_minus_bound"] == pytest.approx(50 - (70 + 75) / 2)
    assert slow["area_minus_bound"] == pytest.approx(40 - (190 + 200) / 6)


def test_the_command_writes_both_files(results, capsys):
    assert main(["curves", "--out", str(results), "--to", str(results / "to"), "--name", "c"]) == 0
    assert "| slow" in capsys.readouterr().out
    text = (results / "to" / "c.md").read_text()
    assert "end minus fedavg-l" in text
    with (results / "to" / "c.csv").open() as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    assert [row["label"] for row in rows] == ["fedavg-l", "slow"]
