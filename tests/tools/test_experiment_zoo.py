"""tools/experiments zoo: the table of all methods, worked out by hand from made-up results."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from coordinator.methods.registry import METHODS
from tests.support.grid_results import evaluated, write
from tools.experiments.__main__ import main
from tools.experiments.grids import GRIDS
from tools.experiments.tables import read_runs
from tools.experiments.zoo import in_words, table_lines

GROUPS = {
    "exit 1": {"clients": 3, "variant": 1, "peak_memory_bytes": 1_500_000},
    "exit 3": {"clients": 1, "variant": 3, "peak_memory_bytes": 4_000_000},
}


def rounds_at(*served, down=3_000_000, seconds=10.0, personal=0.5):
    """One round for each accuracy; None: not evaluated."""
    return [
        evaluated(
            number,
            () if share is None else (0.1, share - 0.1),
            () if share is None else (0.1, share),
            bytes_down=down,
            emulated_s=seconds,
            operations=2e9,
            figures={"state_bytes": 8e6}
            | ({} if share is None else {"personal_accuracy": personal}),
        )
        for number, share in enumerate(served, 1)
    ]


def with_more(folder, label, seed, **more):
    path = folder / f"fashion-even-0.5-{label}-s{seed}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | more))


@pytest.fixture
def results(tmp_path):
    """The baseline moves 5 MB and takes 10 s a round, `slow` 7 MB and 20 s. `own` has no model for
    all."""
    for seed in (0, 1):
        write(tmp_path, "owners-mean", seed, rounds_at(0.4, None, 0.6 + 0.1 * seed))
        with_more(tmp_path, "owners-mean", seed, personalised={"groups": {"all": {"after": 0.75}}})
        slow = rounds_at(0.5, 0.7 + 0.1 * seed, 0.8, down=5_000_000, seconds=20.0)
        write(tmp_path, "slow", seed, slow)
        with_more(tmp_path, "slow", seed, groups=GROUPS)
        own = [r | {"accuracy": [], "accuracy_served": []} for r in rounds_at(0.5, personal=0.9)]
        write(tmp_path, "own", seed, own)
    return tmp_path


def lines_of(folder):
    return {line["label"]: line for line in table_lines(read_runs(folder))}


def test_accuracies_over_seeds(results):
    lines = lines_of(results)
    # slow: means of (50, 70, 80) and (50, 80, 80); owners-mean: of (40, 60) and (40, 70)
    assert lines["slow"]["served"] == pytest.approx((200 / 3 + 70) / 2)
    assert lines["slow"]["last"] == pytest.approx((200 / 3 + 70) / 2 - 10)
    assert lines["owners-mean"]["served"] == pytest.approx((50 + 55) / 2)
    # differences 50/3 and 15, t of one degree of freedom 12.7062
    middle, half = (50 / 3 + 15) / 2, 12.7062 * (50 / 3 - 15) / 2
    assert lines["slow"]["minus_owners-mean"] == pytest.approx(middle)
    assert lines["slow"]["low_95"] == pytest.approx(middle - half, rel=1e-4)
    assert lines["slow"]["served_95"] == pytest.approx(12.7062 * (70 - 200 / 3) / 2, rel=1e-4)
    assert lines["owners-mean"]["minus_owners-mean"] is None
    assert lines["owners-mean"]["tuned"] == 75
    assert (lines["own"]["served"], lines["own"]["personal"]) == (None, 90)


def test_equal_bytes_and_seconds_are_those_of_the_baselines_run(results):
    """15 MB and 30 s: `slow` has moved 7, 14, 21 MB and taken 20, 40, 60 s."""
    lines = lines_of(results)
    assert lines["slow"]["at_bytes"] == pytest.approx((70 + 80) / 2)
    assert lines["slow"]["at_seconds"] == pytest.approx(50)
    assert lines["owners-mean"]["at_bytes"] == pytest.approx((60 + 70) / 2)
    assert lines["own"]["at_bytes"] is None


def test_costs(results):
    line = lines_of(results)["slow"]
    assert (line["memory_mb"], line["variants"]) == ("1.50/4.00", "1/3")
    assert (line["gop"], line["mb_down"], line["mb_up"], line["emulated_s"]) == (2, 5, 2, 20)
    assert (line["server_s"], line["state_mb"]) == (0.5, 8)


def test_best_first_and_personal_ones_last_in_files_and_figures(results, capsys):
    figures = results / "figures"
    assert main(["zoo", "--out", str(results), "--figures", str(figures)]) == 0
    said = capsys.readouterr().out
    assert said.startswith(in_words(table_lines(read_runs(results))))
    text = (results / "zoo.md").read_text()
    assert text.index("| slow ") < text.index("| owners-mean ") < text.index("| own ")
    assert "commit 0123456789" in text
    with (results / "zoo.csv").open() as file:
        note, *rows = file.read().splitlines()
    assert "python -m tools.experiments zoo; commit 0123456789, x86_64" in note
    assert [row["label"] for row in csv.DictReader(rows)] == ["slow", "owners-mean", "own"]
    made = sorted(path.name for path in figures.glob("*.png"))
    assert made == ["zoo-bytes-fashion-even-0.5.png", "zoo-seconds-fashion-even-0.5.png"]


def test_the_grid_has_every_method_but_the_parts_of_one(tmp_path: Path, capsys):
    methods = {flags.split()[1] for flags in GRIDS["zoo"].rows.values()}
    assert methods == set(METHODS) - {"stale-copy", "stage-rotation", "feddf", "heterotune"}
    command = ["run", "--grid", "zoo", "--out", str(tmp_path), "--dry-run"]
    assert main([*command, "--quick"]) == 0, "it needs no data"
    assert len(capsys.readouterr().out.splitlines()) == len(GRIDS["zoo"].rows)
    assert main([*command, "--data", "unimib=U", "--seeds", "0,1,2"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3 * 4 * len(GRIDS["zoo"].rows)
    assert main(["run", "--grid", "main", "--out", str(tmp_path), "--quick"]) == 1
    assert (
        "grid main has no --quick setting; label-skew, zoo, personal, adjusted has"
        in capsys.readouterr().err
    )
