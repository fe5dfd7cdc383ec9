"""tools/experiments.py: figures of made-up results by hand, resuming, refusing, a tiny grid."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
from scipy import stats

from tools import experiments
from tools.experiments import Cell, main
from tools.figures import MAX_LINES, Point, alpha_order, even_chunks, panels_of
from tools.grids import GRIDS, Setting
from tools.tables import STUDENT_T, all_rows, interval, read_rows, table_lines

ROOT = Path(__file__).resolve().parent.parent
DIGITS = ["run", "--grid", "digits", "--regimes", "even", "--only", "owners-mean"]
TINY = ["--rounds", "1", "--extra", "--examples 500 --test-examples 50 --epochs 1"]


def evaluated(number: int, last: Sequence[float], served: Sequence[float], **more: object) -> dict:
    """A round as Store.history gives it. last, served: shares, exit 1 first; empty: not taken."""
    return {
        "round": number,
        "accuracy": list(last),
        "accuracy_served": list(served),
        "seconds": {"aggregate": 0.5},
        "bytes_up": 2_000_000,
        "bytes_down": 3_000_000,
        "figures": {},
    } | more


def write(
    folder: Path, label: str, seed: int, rounds: Sequence[dict], alpha: str = "0.5", flags: str = ""
) -> None:
    """A result and its record, as `run` leaves them."""
    name = f"fashion-even-{alpha}-{label}-s{seed}"
    cell = {"grid": "main", "label": label, "data": "fashion", "regime": "even", "alpha": alpha}
    origin = {"commit": "0123456789abcdef", "is_dirty": True, "machine": "x86_64"}
    record = {"cell": cell | {"seed": seed}, "command": f"--method {label} {flags}", **origin}
    (folder / f"{name}.record.json").write_text(json.dumps(record))
    (folder / f"{name}.json").write_text(json.dumps({"config": {}, "rounds": list(rounds)}))


def served_at(*shares: float) -> list[dict]:
    """One evaluated round, of all exits."""
    return [evaluated(1, shares, shares)]


def test_rows_by_hand(tmp_path: Path):
    """8 rounds, evaluated in 2, 6 and 8: the last five hold 6 and 8."""
    none = {n: evaluated(n, (), ()) for n in (1, 3, 4, 5, 7)}
    some = {
        2: evaluated(2, (0.9, 0.9), (0.9, 0.9)),
        6: evaluated(6, (0.2, 0.50), (0.3, 0.6), stages_trained=300, peak_memory_bytes=7e6),
        8: evaluated(
            8, (0.4, 0.54), (0.5, 0.7), stages_trained=500, peak_memory_bytes=5e6,
            seconds={"fit": 3.0, "generate": 1.0, "aggregate": 0.5},
            figures={"generator_bytes": 4e6},
        ),
    }  # fmt: skip
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
        "fedavg-s", "fedavg-l", "owners-mean",
    ]  # fmt: skip


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
    assert (rule["low_95"], rule["high_95"]) == pytest.approx((2 - half, 2 + half))
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
    assert lines[0] == "# python tools/experiments.py table; commit 0123456789+, x86_64"
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
    for freedom, t in enumerate(STUDENT_T, 1):
        assert t == pytest.approx(stats.t.ppf(0.975, freedom), abs=5e-4)


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


def test_paths_from_here_reach_runs_that_start_elsewhere(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-data").mkdir()
    grid = ["run", "--grid", "main", "--only", "owners-mean", "--regimes", "even", "--out", "o"]
    assert main([*grid, "--alphas", "0.5", "--data", "fashion=my-data", "--dry-run"]) == 0
    assert f"--data {tmp_path / 'my-data'} " in capsys.readouterr().out
    assert main([*grid, "--alphas", "0.5", "--data", "fashion=digits", "--dry-run"]) == 0
    assert "--data digits " in capsys.readouterr().out


def test_what_no_grid_can_run_with_is_one_line(tmp_path: Path, capsys):
    (tmp_path / "file").write_text("")
    assert main([*DIGITS, *TINY, "--out", str(tmp_path / "file" / "x")]) == 1
    assert f"experiments: {tmp_path / 'file' / 'x'}: Not a directory" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main([*DIGITS, "--rounds", "0", "--out", str(tmp_path)])
    assert stop.value.code == 2
    assert "argument --rounds: '0', expected a whole number from 1" in capsys.readouterr().err


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
        "0.5", "1", "1e4", "iid", "subject",
    ]  # fmt: skip


def test_grids_are_whole():
    """Every flag is one word or a word and its value, and names in file names stay unambiguous."""
    for name, grid in GRIDS.items():
        places = [(s.data, s.regime, s.alpha) for s in grid.settings]
        assert len(set(places)) == len(places), name
        assert not any("/" in label or "," in label or " " in label for label in grid.rows), name
    assert GRIDS["alpha"].rows.items() <= GRIDS["main"].rows.items()


def test_all_rows_of_a_seed_come_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    command = ["run", "--grid", "main", "--data", "fashion=F", "--only", "fedavg-s,fedavg-l"]
    command += ["--alphas", "0.5", "--seeds", "0,1", "--out", str(tmp_path), "--dry-run"]
    assert main([*command, "--rounds", "7"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    cells = [
        [line[line.index(f) + 1] for f in ("--seed", "--groups", "--method")] for line in lines
    ]
    assert cells == [
        [seed, groups, method]
        for seed in ("0", "1")
        for groups in ("17,17,16", "30,15,5")
        for method in ("fedavg-s", "fedavg-l")
    ]
    assert all(line[-2:] == ["--rounds", "7"] for line in lines)  # the last one counts


def test_results_are_kept_and_other_flags_refused(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)  # a run that begins fails the test
    command = [*DIGITS, "--out", str(tmp_path), "--extra", "--lr 0.5"]
    assert main([*command, "--dry-run"]) == 0
    flags = capsys.readouterr().out.strip().removeprefix("edge-coordinator emulate ")
    name = "digits-even-0.5-owners-mean-s0"
    (tmp_path / f"{name}.record.json").write_text(json.dumps({"command": flags}))
    (tmp_path / f"{name}.json").write_text("{}")
    assert main(command) == 0
    assert "0 run, 1 there already, 0 refused, 0 failed" in capsys.readouterr().err
    assert main([*command[:-1], "--lr 0.6"]) == 1
    assert f"{name}.json was made by other flags" in capsys.readouterr().err
    (tmp_path / f"{name}.json").unlink()  # a record alone: the run was interrupted
    assert main([*command, "--dry-run"]) == 0
    assert capsys.readouterr().out.strip().endswith(flags)


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
def test_every_cell_names_the_commit_that_it_starts_from(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(experiments, "ROOT", tmp_path)
    cell = Cell("digits", "default", Setting("digits", "even", "0.5", ""), 0, ())

    def git(*words: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        command = ["git", *who, *words]
        done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    def record() -> tuple[object, object]:
        made = cell.record()
        return made["commit"], made["is_dirty"]

    git("init")
    heads = []
    for text in ("first", "second"):
        (tmp_path / "code.py").write_text(text)
        git("add", "code.py")
        git("commit", "-m", text)
        heads.append(git("rev-parse", "HEAD"))
        assert record() == (heads[-1], False)
    assert heads[0] != heads[1]
    (tmp_path / "code.py").write_text("third")
    assert record() == (heads[1], True)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--grid", "main"], "grid main needs data: --data fashion=SOURCE"),
        (["--grid", "digits", "--only", "x,fedavg-s"], "no row x; known: fedavg-s, owners-mean"),
        (["--grid", "digits", "--alphas", "9"], "no alpha 9; known: 0.5"),
        (["--grid", "digits", "--seeds", "-1"], "--seeds has '-1', expected whole numbers"),
        (["--grid", "digits", "--jobs", "0"], "--jobs is 0, expected at least 1"),
        (["--grid", "digits", "--data", "fashion"], "--data 'fashion' is not NAME=SOURCE"),
    ],
)
def test_bad_flags_are_one_line(flags: list[str], says: str, tmp_path: Path, capsys):
    assert main(["run", *flags, "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_no_results_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write(tmp_path, "owners-mean", 0, served_at(0.3))
    (tmp_path / "fashion-even-0.5-owners-mean-s0.json").write_text("{")  # cut off
    assert main(["table", "--out", str(tmp_path)]) == 1
    left_out, error = capsys.readouterr().err.splitlines()
    assert "owners-mean-s0.json is left out" in left_out
    assert error.endswith("holds no results; make some with `experiments.py run --out`")
    (tmp_path / "rows.csv").write_text("data,label\n1,2\n")
    assert main(["table", "--csv", str(tmp_path / "rows.csv")]) == 1
    assert "rows.csv lacks alpha, commit" in capsys.readouterr().err


@pytest.mark.slow
def test_a_real_grid_of_one_cell(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "out"
    script = [sys.executable, str(ROOT / "tools" / "experiments.py")]
    done = subprocess.run([*script, *DIGITS, *TINY, "--out", str(out)], cwd=ROOT, check=False)
    assert done.returncode == 0
    name = "digits-even-0.5-owners-mean-s0"
    assert sorted(path.name for path in out.iterdir()) == [f"{name}.json", f"{name}.record.json"]
    record = json.loads((out / f"{name}.record.json").read_text())
    assert record["cell"] == {
        "grid": "digits", "label": "owners-mean", "data": "digits", "regime": "even",
        "alpha": "0.5", "seed": 0,
    }  # fmt: skip
    assert record["command"].endswith("--examples 500 --test-examples 50 --epochs 1")
    (row,) = all_rows(out)
    assert (row["rounds"], row["served_final"] is not None) == (1, True)
    assert row["mb_up_per_round"] > 0
    assert main([*DIGITS, *TINY, "--out", str(out)]) == 0  # nothing is run again
    assert "0 run, 1 there already" in capsys.readouterr().err
    broken = [*TINY[:-1], "--clients 3"]  # the groups sum to 50
    assert main([*DIGITS, *broken, "--out", str(tmp_path / "bad")]) == 1
    assert "failed, exit code 1: edge-coordinator: groups 17,17,16 need" in capsys.readouterr().err
    assert (tmp_path / "bad" / f"{name}.log").exists()


def test_a_stopped_grid_leaves_no_run_behind(tmp_path: Path):
    script = [sys.executable, str(ROOT / "tools" / "experiments.py")]
    with subprocess.Popen(
        [*script, *DIGITS, "--out", str(tmp_path)], cwd=ROOT, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "experiments: run digits-even-0.5-owners-mean-s0\n"
        while not (runs := psutil.Process(process.pid).children()):
            os.sched_yield()
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
    assert process.returncode == 130
    assert "stopping 1 runs" in rest
    assert not any(run.is_running() for run in runs)
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]  # the record: interrupted
