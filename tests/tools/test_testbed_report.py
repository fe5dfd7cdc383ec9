"""The report of a run as text, JSON and CSV, and what is no run."""

from __future__ import annotations

import csv
import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.cli.main import main as coordinator
from coordinator.store.store import Store
from tests.support.recorded_run import CONFIG, PI_4, record_run
from tools.testbed.report import main, print_table
from tools.testbed.run_report import Trained, read_run

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = record_run(tmp_path / "run #1?")  # a folder with a URI's characters
    yield store
    store.close()


def test_text_through_a_pipe(store: Store):
    script = ("-m", "tools.testbed.report")
    command = [sys.executable, *script, str(store.folder)]
    text = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    cells = [line.split() for line in lines]
    clock, cpu, link = ["wall", "clock"], ["CPU", "x", "scale"], ["bytes", "/", "link"]
    begin = lines.index("raspberry-pi-4 (emulated), 1 client") + 1
    assert cells[begin : begin + 5] == [
        ["wait", "2", "3.000", "5.000", "5.000", "3.000", "5.000", "5.000", *clock],
        ["download", "2", "2.000", "4.000", "4.000", "0.010", "0.030", "0.030", *link],
        ["load", "2", "0.250", "0.500", "0.500", "0.200", "0.400", "0.400", *cpu],
        ["train", "2", "2.500", "5.000", "5.000", "2.000", "3.000", "3.000", *cpu],
        ["upload", "2", "1.000", "2.000", "2.000", "0.020", "0.040", "0.040", *link],
    ]
    assert ["train", "not", "measured", "4.000", "4.000", "4.000", *cpu] in cells  # NANO
    assert ["train", "2", "6.000", "8.000", "8.000", *clock] in cells  # REAL
    assert ["fit", "not", "measured", *clock] in cells
    assert ["all", "4.0", "MB", "1.8", "MB", "12.0", "MB", "5.5", "MB", "700", "B"] in cells
    assert ["all", "9", "5", "1", "3", "3", "(gone", "2,", "trainer", "1)"] in cells
    assert ["raspberry-pi-4", "(emulated)", "stage", "3", "alone", "1", "1"] in cells
    assert ["pi,", "raspberry-pi-4", "(emulated)", "2", "2", "8", "1"] in cells
    assert ["real,", "raspberry-pi-4", "2", "0", "-", "1"] in cells
    assert not [line for line in lines if line.startswith("nano,")]  # it saved none
    assert ["exit", "1", "1", "20.0", "3", "50.0", "40.0"] in cells
    assert "3 of 5 rounds finished, 3 clients." in lines
    assert "error = 0.25; gap = not a number" in text
    assert "EMULATED boards ran on this machine" in text


def test_json_has_the_same_content(store: Store, capsys: pytest.CaptureFixture[str]):
    assert main([str(store.folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["rounds"], found["figures"]) == (3, {"error": 0.25, "gap": None})
    nano = found["platforms"][0]
    assert nano["totals"]["bytes_down_each"] == 16e6 / 3  # not rounded
    nothing = {"count": 0, "p50_s": None, "p95_s": None, "max_s": None}
    wait = {"phase": "wait", "source": "wall clock", "board": nothing, "wall": nothing}
    assert nano["phases"][0] == wait
    assert found["platforms"][2]["levers"] == [
        {"client_id": "pi", "updates": 2, "in_parts": 2, "smallest_part": 8, "recomputed": 1}
    ]


def test_csv_has_a_row_per_platform_and_phase(store: Store, tmp_path: Path):
    assert main([str(store.folder), "--csv", str(tmp_path / "phases.csv")]) == 0
    with (tmp_path / "phases.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 5  # three groups of boards and the server
    of_pi = [row for row in rows if (row["platform"], row["is_emulated"]) == (PI_4, "1")]
    assert [row["phase"] for row in of_pi] == ["wait", "download", "load", "train", "upload"]
    assert (of_pi[1]["p50_s"], of_pi[1]["wall_p50_s"]) == ("2.0", "0.01")
    assert (rows[0]["count"], rows[0]["p50_s"]) == ("0", "not measured")
    assert {row["platform"] for row in rows[15:]} == {"server"}


def test_in_process_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """fedavg-l gives every client the whole model, one prefix whatever its exit."""
    arguments = "emulate --data digits --examples 120 --test-examples 40 --rounds 2 --clients 3"
    arguments += " --groups 1,1,1 --batch-size 8 --split iid --threads 1 --method fedavg-l"
    assert coordinator([*arguments.split(), "--run-dir", str(tmp_path)]) == 0
    capsys.readouterr()
    assert main([str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "No board is emulated" in text
    assert "In-process clients train by turns" in text
    assert "by no device: whole batches, all activations kept" in text
    report = read_run(tmp_path)
    assert [(p.platform, p.is_emulated, p.clients) for p in report.platforms] == [
        ("in-process", False, 3)
    ]
    counts = {time.phase: time.board.count for time in report.platforms[0].phases}
    assert counts == {"wait": 0, "download": 0, "load": 6, "train": 6, "upload": 0}
    assert report.platforms[0].trained == [Trained(3, False, 3, 6)]
    assert [tested.of for tested in report.tested] == ["exit 1", "exit 2", "exit 3"]
    with sqlite3.connect(f"file:{tmp_path / 'run.sqlite'}?mode=ro", uri=True) as db:
        (bytes_up,) = db.execute("SELECT SUM(bytes_up) FROM rounds").fetchone()
        (longest_s,) = db.execute("SELECT MAX(wall_s) FROM phases WHERE phase = 'train'").fetchone()
    db.close()
    assert report.totals.bytes_up_a_round == bytes_up / 2
    assert report.platforms[0].phases[3].board.max_s == longest_s


@pytest.mark.parametrize("flags", [[], ["--json"]], ids=str)
def test_a_reader_that_has_enough_is_no_error(store: Store, flags: list[str]):
    script = ("-m", "tools.testbed.report")
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "wb") as closed:
        ended = subprocess.run(
            [sys.executable, *script, str(store.folder), *flags],
            stdout=closed,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            cwd=ROOT,
        )
    assert (ended.returncode, ended.stderr) == (0, "")


def test_control_characters_stay_off_the_terminal(capsys: pytest.CaptureFixture[str]):
    print_table("platform,count", [["pi\x1b[2J\n", "1"]])
    assert capsys.readouterr().out == "\nplatform  count\npi?[2J?       1\n"


def missing_folder(folder: Path) -> None:
    folder.rmdir()


def empty_folder(folder: Path) -> None:
    """Nothing in it."""


def other_file(folder: Path) -> None:
    (folder / "run.sqlite").write_text("not a database, but long enough to be read as one\n" * 9)


def empty_file(folder: Path) -> None:
    (folder / "run.sqlite").touch()


def other_database(folder: Path) -> None:
    db = sqlite3.connect(folder / "run.sqlite")
    db.execute("CREATE TABLE runs (version)")
    db.close()


def other_version(folder: Path) -> None:
    Store.create(folder, CONFIG, "serve").close()
    db = sqlite3.connect(folder / "run.sqlite")
    db.execute("UPDATE runs SET version = 7")
    db.commit()
    db.close()


def other_config(folder: Path) -> None:
    Store.create(folder, CONFIG, "serve").close()
    db = sqlite3.connect(folder / "run.sqlite")
    db.execute("UPDATE runs SET config = '{}'")
    db.execute("INSERT INTO rounds (round) VALUES (1)")
    db.commit()
    db.close()


def no_round(folder: Path) -> None:
    Store.create(folder, CONFIG, "serve").close()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (missing_folder, "is not a folder; give the --run-dir"),
        (empty_folder, "holds no run.sqlite; give the --run-dir"),
        (other_file, "cannot be read as a run's database: file is not a database"),
        (empty_file, "cannot be read as a run's database: no such table"),
        (other_database, "was written by run format unknown, this is format 6"),
        (other_version, "was written by run format 7, this is format 6"),
        (other_config, "missing required field `method`"),
        (no_round, "has no finished round yet"),
    ],
)
def test_bad_input_is_one_line(make, says: str, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    make(folder)
    assert main([str(folder)]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("testbed_report: ")
    assert says in output.err
    assert output.err.count("\n") == 1


def test_csv_that_cannot_be_written(store: Store, tmp_path: Path, capsys):
    assert main([str(store.folder), "--csv", str(tmp_path / "none" / "phases.csv")]) == 1
    assert "No such file or directory" in capsys.readouterr().err
