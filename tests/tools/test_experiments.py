"""tools/experiments: grids, what they run, resuming, refusing, a tiny one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tools.experiments import __main__ as experiments
from tools.experiments.__main__ import Cell, main
from tools.experiments.grids import GRIDS, Setting
from tools.experiments.tables import all_rows

ROOT = Path(__file__).resolve().parents[2]
DIGITS = ["run", "--grid", "digits", "--regimes", "even", "--only", "owners-mean"]
TINY = ["--rounds", "1", "--extra", "--examples 500 --test-examples 50 --epochs 1"]


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


@pytest.mark.slow
def test_a_real_grid_of_one_cell(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "out"
    script = [sys.executable, "-m", "tools.experiments"]
    done = subprocess.run([*script, *DIGITS, *TINY, "--out", str(out)], cwd=ROOT, check=False)
    assert done.returncode == 0
    name = "digits-even-0.5-owners-mean-s0"
    assert sorted(path.name for path in out.iterdir()) == [f"{name}.json", f"{name}.record.json"]
    record = json.loads((out / f"{name}.record.json").read_text())
    assert record["cell"] == {
        "grid": "digits",
        "label": "owners-mean",
        "data": "digits",
        "regime": "even",
        "alpha": "0.5",
        "seed": 0,
    }
    assert record["command"].endswith("--examples 500 --test-examples 50 --epochs 1")
    (row,) = all_rows(out)
    assert (row["rounds"], row["served_final"] is not None) == (1, True)
    assert row["mb_up_per_round"] > 0
    assert main([*DIGITS, *TINY, "--out", str(out)]) == 0  # nothing is run again
    assert "0 run, 1 there already" in capsys.readouterr().err
    broken = [*TINY[:-1], "--clients 3 --groups 17,17,16"]
    assert main([*DIGITS, *broken, "--out", str(tmp_path / "bad")]) == 1
    assert (
        "failed, exit code 2: edge-coordinator: --groups 17,17,16 need" in capsys.readouterr().err
    )
    assert (tmp_path / "bad" / f"{name}.log").exists()


def test_a_stopped_grid_leaves_no_run_behind(tmp_path: Path):
    script = [sys.executable, "-m", "tools.experiments"]
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
