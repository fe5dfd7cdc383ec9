"""`edge-coordinator status` as a person and as a program meets it."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from coordinator.cli.main import main
from coordinator.cli.status import (
    STATUS,
    add_status_command,
    lasting,
    run_status,
    seconds_flag,
    size,
)
from coordinator.fleet.counters import OTHER
from coordinator.store.lock import RunLock
from coordinator.store.status import FILE, ClientState, UnfitDevice, utc
from edge_sdk.cli.flags import Parser
from tests.support.examples import one_line
from tests.support.other_user import closed
from tests.support.processes import ROOT
from tests.support.run_states import COHORT, HOSTILE, finished_run, told


def status(folder: Path, *flags: str) -> int:
    return main(["status", "--run-dir", str(folder), *flags])


def test_a_table_for_people(tmp_path, capsys):
    assert status(told(tmp_path, reason="the disk is full")) == 0
    text = capsys.readouterr().out
    for words in (
        "run 1a2b in",
        "round open, round 3 of 50",
        f"process {os.getpid()} runs",
        "1 of 4 returned, 2 needed",
        "5 updates accepted, 1 late (3 counted afterwards), 2 failed",
        "the disk is full",
        "100 B sent, 200 B received",
        "strangers refused 9",
        "faults: gone 1, other 2, tensors 3",
        "not heard: 11 frames that break the protocol, 12 messages too many; "
        "disconnected: 13 peers that said too much, 14 connections",
        "2 clients: away 1, upload 1",
        "2 devices cannot take part:\npi-3, data, 12 times, last 3 s ago: its examples differ\n"
        "10.0.0.9, version, 1 times, last 0 s ago: speaks protocol 3\n",
    ):
        assert words in text
    rows = [line.split() for line in text.splitlines()]
    assert [
        "pi-1",
        "upload",
        "2",
        "3",
        "5.0",
        "MB",
        "1.2",
        "kB",
        "2",
        *("1.25", "/", "0.5", "50.0", "/", "87.5"),
        "2",
        "s",
        "raspberry-pi-4",
        "10.0.0.7",
        "tensors",
        "1",
        "duplicates",
        "1",
    ] in rows
    assert any(row[:2] == ["pi-2", "away"] and "120" in row for row in rows)


def test_json_for_programs(tmp_path, capsys):
    assert status(told(tmp_path), "--json") == 0
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert found["health"] == "running"
    assert 0 <= found["age_s"] < 60
    assert found["status"]["cohort"]["clients"][0]["phase"] == "upload"
    assert found["status"]["cohort"]["faults"] == {"tensors": 3, "gone": 1, OTHER: 2}
    assert found["rounds"] == []


@pytest.mark.parametrize(
    ("changes", "code", "said"),
    [
        ({}, 0, "runs"),
        ({"phase": "finished", "process": "1"}, 0, "finished"),
        ({"process": "1"}, 3, "is gone; go on with --resume"),
        ({"phase": "gave up", "process": "1"}, 3, "gave up"),
        ({"host": "elsewhere", "written_utc": utc() - timedelta(hours=2)}, 4, "on elsewhere"),
    ],
    ids=["fresh", "finished", "gone", "gave up", "elsewhere"],
)
def test_the_exit_code_says_how_it_stands(tmp_path, capsys, changes, code, said):
    assert status(told(tmp_path, **changes)) == code
    assert said in capsys.readouterr().out
    assert status(tmp_path, "--json") == code


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (lambda folder: None, "holds no run; give the --run-dir"),
        (lambda folder: folder.rmdir(), "holds no run"),
        (lambda folder: (folder / FILE).write_text("{"), "status.json cannot be read"),
        (lambda folder: (folder / FILE).mkdir(), "status.json cannot be read"),
    ],
)
def test_no_run_is_one_line(tmp_path, capsys, prepare, said):
    folder = tmp_path / "run"
    folder.mkdir()
    prepare(folder)
    assert status(folder) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("edge-coordinator: ")
    assert said in captured.err
    assert len(captured.err.splitlines()) == 1
    assert not captured.out


def test_a_state_that_may_not_be_read_is_not_said_to_be_of_another_version(tmp_path, capsys):
    told(tmp_path)
    with closed(tmp_path / FILE):
        assert status(tmp_path) == 1
    said = one_line(capsys.readouterr().err, "edge-coordinator")
    assert said.endswith(
        "status.json cannot be read: Permission denied; ask as the user who runs the coordinator\n"
    )


def test_an_emulated_run_is_known_by_its_database(tmp_path, capsys):
    """It tells nothing of itself; who has its folder does."""
    run = tmp_path / "run"
    finished_run(run)
    assert status(run) == STATUS["finished"] == 0
    text = capsys.readouterr().out
    assert f" in {run}: 3 of 3 rounds; finished\n" in text
    assert "accuracy per exit" in text
    with closing(sqlite3.connect(run / "run.sqlite")) as db, db:
        db.execute("DELETE FROM rounds WHERE round = 3")
    (run / "lock").write_text("no number")
    assert status(run) == STATUS["dead"] == 3
    assert "2 of 3 rounds; its process is gone; go on with --resume" in capsys.readouterr().out
    held = RunLock(run)
    assert status(run, "--json") == STATUS["running"] == 0
    assert json.loads(capsys.readouterr().out)["run"]["finished"] == 2
    assert status(run) == 0
    assert f"2 of 3 rounds; process {os.getpid()} runs" in capsys.readouterr().out
    held.release()
    with closing(sqlite3.connect(run / "run.sqlite")) as db, db:
        db.execute("UPDATE runs SET kind = 'serve'")
    assert status(run) == STATUS["unknown"] == 4
    assert "has no status.json" in capsys.readouterr().out


def test_the_reason_of_a_round_in_progress_is_told(tmp_path, capsys):
    said = "round 3, pi-1: failed: trainer: loss is not finite"
    clients = (replace(COHORT.clients[0], failure=said), COHORT.clients[1])
    status(told(tmp_path, cohort=replace(COHORT, clients=clients)))
    assert f"last failure of each client:\n{said}\n" in capsys.readouterr().out


def test_nothing_that_was_told_controls_the_terminal(tmp_path, capsys):
    """Faults are counted by known codes, but a file may hold anything."""
    unfit = (UnfitDevice(name="n", code="data", reason=HOSTILE),)
    clients = (ClientState(name=HOSTILE, phase="ready", failure=HOSTILE),)
    bad = replace(COHORT, faults={HOSTILE: 1}, clients=clients, unfit=unfit)
    status(told(tmp_path, cohort=bad, reason=HOSTILE))
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert "\u2028" not in text
    assert text.count('a" b\\ ? c ?[2J {x="1"} ?') == 5


def test_watching_ends_with_the_run(tmp_path, capsys):
    parser_args = arguments(tmp_path, "--watch", "2.5", "--json")
    told(tmp_path)
    waited: list[float] = []

    def wait(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 2:
            told(tmp_path, phase="finished")

    assert run_status(parser_args, wait) == 0
    assert waited == [2.5, 2.5]
    lines = [json.loads(line)["health"] for line in capsys.readouterr().out.splitlines()]
    assert lines == ["running", "running", "finished"]


def arguments(folder: Path, *flags: str) -> Any:
    parser = Parser()
    add_status_command(parser.add_subparsers())
    return parser.parse_args(["status", "--run-dir", str(folder), *flags])


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "soon", "", "1e9"])
def test_bad_seconds_are_wrong_usage(tmp_path, text, capsys):
    with pytest.raises(SystemExit) as ended:
        status(tmp_path, f"--watch={text}")
    assert ended.value.code == 2
    assert "expected seconds from 0.1 to 86400" in capsys.readouterr().err
    assert seconds_flag("0.1") == 0.1


def test_sizes_and_times_are_short():
    assert [size(n) for n in (0, 999, 1000, 1.25e6, 3e9)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "1.2 MB",
        "3.0 GB",
    ]
    assert [lasting(s) for s in (0, 599, 600, 35_999, 36_000)] == [
        "0 s",
        "599 s",
        "10 min",
        "600 min",
        "10 h",
    ]


def test_looking_needs_no_torch():
    code = (
        "import sys; sys.argv = ['edge-coordinator', 'status', '--run-dir', '/nowhere'];"
        "from coordinator.cli.main import main; code = main();"
        "print(code, *{'torch', 'numpy', 'zmq', 'rich'} & set(sys.modules))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert ended.stdout.split() == ["1"], ended.stderr


@pytest.mark.parametrize("content", [b"", b"no database", b"SQLite format 3\0" + bytes(200)])
def test_a_broken_database_does_not_hide_the_state(tmp_path, capsys, content):
    told(tmp_path)
    (tmp_path / "run.sqlite").write_bytes(content)
    assert status(tmp_path) == 1
    text = capsys.readouterr().out
    assert "round open, round 3 of 50" in text
    assert "run.sqlite cannot be read" in text
    assert "it is damaged: put back a copy of the run's folder, or start another run" in text
    assert "ask as the user" not in text
