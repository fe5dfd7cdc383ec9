"""What is seen of a run: its status file, `edge-coordinator status`, and what Prometheus gets."""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import re
import sqlite3
import stat
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from coordinator import run_reader, store
from coordinator.cli import main
from coordinator.cli_status import (
    STATUS,
    add_status_command,
    lasting,
    run_status,
    seconds_flag,
    size,
)
from coordinator.cohort import InProcessCohort
from coordinator.cohort_zmq import Stopped
from coordinator.methods import make_method
from coordinator.monitor import TELL_S, Monitor
from coordinator.rounds import RoundReport, run_rounds
from coordinator.run_reader import last_rounds
from coordinator.status import (
    FILE,
    ClientState,
    CohortState,
    Snapshot,
    StatusFile,
    health,
    identity,
    is_alive,
    read_status,
    utc,
)
from coordinator.store import RoundTotals, Store
from coordinator.tally import CODES, MAX_CLIENTS, OTHER, Tally
from edge_sdk.errors import EdgeError, QuorumError, StoreError
from tests.helpers import config, examples
from tests.processes import ROOT

HOSTILE = 'a" b\\ \n c \x1b[2J {x="1"} \u2028'
COHORT = CohortState(
    clients=(
        ClientState(
            name="pi-1", phase="upload", address="10.0.0.7", platform="raspberry-pi-4", exit=2,
            round=3, bytes_down=5_000_000, bytes_up=1_234, last_seen_s=1.5, updates=2,
            faults={"tensors": 1}, duplicates=1,
        ),
        ClientState(name="pi-2", phase="away", last_seen_s=7200.0),
    ),
    chosen=4, needed=2, returned=1, bytes_in_flight=10, budget_bytes=64, spool_bytes=7,
    bytes_down=100, bytes_up=200, updates_accepted=5, updates_late=1, updates_stale=3,
    updates_failed=2,
    faults={"tensors": 3, "gone": 1, OTHER: 2}, strangers=9,
)  # fmt: skip


def snapshot(**changes: Any) -> Snapshot:
    """Of this process, now."""
    now, pid = utc(), os.getpid()
    fields: dict[str, Any] = {
        "run": "1a2b", "phase": "round open", "round": 3, "rounds": 50, "pid": pid,
        "host": os.uname().nodename, "process": identity(pid), "started_utc": now,
        "phase_utc": now, "written_utc": now, "cohort": COHORT,
    }  # fmt: skip
    return Snapshot(**(fields | changes))


def told(folder: Path, **changes: Any) -> Path:
    StatusFile(folder / FILE).tell(snapshot(**changes))
    return folder


# -- the file ---------------------------------------------------------------------------------


def test_what_is_written_is_read_by_everybody(tmp_path):
    before = os.umask(0o077)
    try:
        told(tmp_path)
    finally:
        os.umask(before)
    found = read_status(tmp_path)
    assert found is not None
    assert found.cohort == COHORT
    assert (found.phase, found.round, found.pid) == ("round open", 3, os.getpid())
    assert stat.S_IMODE((tmp_path / FILE).stat().st_mode) == 0o644
    assert os.listdir(tmp_path) == [FILE]


def test_a_full_disk_is_one_line_and_the_last_file_stays(tmp_path, caplog, monkeypatch):
    file = StatusFile(tmp_path / FILE)
    file.tell(snapshot(round=1))
    replace_file = os.replace

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    for round in (2, 3):
        file.tell(snapshot(round=round))
    (said,) = caplog.records
    assert "the run goes on" in said.message
    assert said.event == "status_lost"
    assert read_status(tmp_path).round == 1
    assert os.listdir(tmp_path) == [FILE], "no draft is left"
    monkeypatch.setattr(os, "replace", replace_file)
    file.tell(snapshot(round=4))
    assert read_status(tmp_path).round == 4
    monkeypatch.setattr(os, "replace", full)
    file.tell(snapshot(round=5))
    assert len(caplog.records) == 2, "it worked in between, so it is said again"


def test_a_folder_that_is_gone_ends_nothing(tmp_path, caplog):
    told(tmp_path / "nowhere")
    assert len(caplog.records) == 1


def test_another_file_is_never_written_through_a_link(tmp_path, caplog):
    (tmp_path / "precious").write_text("kept")
    (tmp_path / f".{FILE}").symlink_to(tmp_path / "precious")
    told(tmp_path)
    assert len(caplog.records) == 1
    told(tmp_path, round=2)
    assert read_status(tmp_path).round == 2, "the link was taken away"
    assert (tmp_path / "precious").read_text() == "kept"


@pytest.mark.parametrize("content", [
    b"", b"{", b"[]", b'{"run": "a"}', b"\xff",
    msgspec.json.encode(snapshot()).replace(b'"round open"', b'"dancing"'),
    msgspec.json.encode(snapshot()).replace(b'+00:00"', b'"').replace(b'Z"', b'"'),
])  # fmt: skip
def test_a_broken_file_is_one_line(tmp_path, content):
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(StoreError, match=r"status\.json cannot be read"):
        read_status(tmp_path)


# -- who tells --------------------------------------------------------------------------------


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def monitored(folder: Path, clock: Clock | None = None) -> tuple[Monitor, list[CohortState]]:
    """And what was looked at, which differs each time."""
    seen: list[CohortState] = []

    def look() -> CohortState:
        seen.append(CohortState(returned=len(seen)))
        return seen[-1]

    return Monitor(folder, "a run", 5, look, clock or Clock()), seen


def test_it_is_told_every_two_seconds_and_at_every_change(tmp_path):
    clock = Clock()
    monitor, seen = monitored(tmp_path, clock)
    assert read_status(tmp_path).phase == "starting"
    for _ in range(100):
        monitor.tick()
    clock.now += 0.9 * TELL_S
    monitor.tick()
    assert len(seen) == 1
    clock.now += 0.2 * TELL_S
    monitor.tick()
    monitor.tick()
    assert len(seen) == 2
    assert read_status(tmp_path).cohort.returned == 1
    monitor.phase("round open", 4)
    assert len(seen) == 3
    assert (read_status(tmp_path).phase, read_status(tmp_path).round) == ("round open", 4)
    clock.now += 0.9 * TELL_S  # since the change
    monitor.tick()
    assert len(seen) == 3
    monitor.phase("saving")
    assert read_status(tmp_path).round == 4


@pytest.mark.parametrize(("error", "is_finished", "phase", "reason"), [
    (None, True, "finished", ""),
    (None, False, "stopped", ""),
    (Stopped(), False, "stopped", ""),
    (KeyboardInterrupt(), False, "stopped", ""),
    (QuorumError("nobody came"), False, "gave up", "nobody came"),
    (StoreError("disk full"), False, "failed", "StoreError: disk full"),
    (ValueError("a bug"), True, "failed", "ValueError: a bug"),
], ids=str)  # fmt: skip
def test_how_a_run_ended_is_told(tmp_path, error, is_finished, phase, reason):
    monitor, _ = monitored(tmp_path)
    raised = contextlib.nullcontext()
    if error is not None and not isinstance(error, Stopped):
        raised = pytest.raises(type(error))
    with raised, monitor.until_end(lambda: is_finished):
        if error is not None:
            raise error
    assert (read_status(tmp_path).phase, read_status(tmp_path).reason) == (phase, reason)


def test_rounds_are_counted_and_logged(tmp_path, caplog):
    caplog.set_level("INFO")
    monitor, _ = monitored(tmp_path)
    for round, seconds in ((1, 2.0), (2, 3.5)):
        totals = RoundTotals(seconds, 4, 3, 1, 0, 0, 10, 20)
        monitor.round_done(RoundReport(round, [], [], None, totals))
    last = monitor.latest
    assert (last.rounds_done, last.rounds_s, last.last_round_s) == (2, 5.5, 3.5)
    said = caplog.records[-1]
    assert (said.event, said.round, said.chosen, said.returned, said.bytes_up) == (
        "round_closed", 2, 4, 3, 20,
    )  # fmt: skip


def in_process() -> InProcessCohort:
    return InProcessCohort({"a": examples(8), "b": examples(8)}, {"a": 1, "b": 3}, 3)


def test_the_loop_names_its_phases(tmp_path):
    """Evaluation is of every second round here."""
    settings = config("owners-mean", rounds=2, eval_every=2)
    told_phases: list[tuple[str, int]] = []
    run = Store.create(tmp_path / "run", settings, "emulate")
    run_rounds(
        run, make_method(settings), in_process(), examples(6),
        phase=lambda phase, round: told_phases.append((phase, round)),
    )  # fmt: skip
    run.close()
    first = ["waiting for devices", "round open", "aggregating", "saving"]
    second = [*first[:3], "evaluating", "saving"]
    assert told_phases == [(phase, 1) for phase in first] + [(phase, 2) for phase in second]


# -- whether it lives -------------------------------------------------------------------------


def test_this_process_lives_and_a_later_one_with_its_pid_is_another():
    pid = os.getpid()
    assert is_alive(pid, identity(pid))
    assert not is_alive(pid, "12345")
    assert health(snapshot()) == "running"
    assert health(snapshot(process="12345")) == "dead"
    assert health(snapshot(process="12345", phase="finished")) == "finished"
    assert health(snapshot(phase="stopped", process="12345")) == "dead"


def test_a_killed_process_is_dead_before_and_after_it_is_waited_for():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    name = identity(process.pid)
    assert is_alive(process.pid, name)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert not is_alive(process.pid, name), "a zombie runs nothing"
    process.communicate()
    assert not is_alive(process.pid, name)


def test_of_another_machine_only_what_it_told_lately_counts():
    old = utc() - timedelta(seconds=3600)
    assert health(snapshot(host="elsewhere")) == "running"
    assert health(snapshot(host="elsewhere", written_utc=old)) == "unknown"
    assert health(snapshot(host="elsewhere", written_utc=old, phase="finished")) == "finished"
    assert health(snapshot(written_utc=old)) == "running", "here its process is looked at"


# -- the command ------------------------------------------------------------------------------


def status(folder: Path, *flags: str) -> int:
    return main(["status", "--run-dir", str(folder), *flags])


def test_a_table_for_people(tmp_path, capsys):
    assert status(told(tmp_path, reason="the disk is full")) == 0
    text = capsys.readouterr().out
    for words in (
        "run 1a2b in", "round open, round 3 of 50", f"process {os.getpid()} runs",
        "1 of 4 returned, 2 needed", "5 updates accepted, 1 late (3 counted afterwards), 2 failed",
        "the disk is full",
        "100 B sent, 200 B received", "strangers refused 9", "faults: gone 1, other 2, tensors 3",
        "2 clients: away 1, upload 1",
    ):  # fmt: skip
        assert words in text
    rows = [line.split() for line in text.splitlines()]
    assert [
        "pi-1", "upload", "2", "3", "5.0", "MB", "1.2", "kB", "2", "2", "s", "raspberry-pi-4",
        "10.0.0.7", "tensors", "1", "duplicates", "1",
    ] in rows  # fmt: skip
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


@pytest.mark.parametrize(("changes", "code", "said"), [
    ({}, 0, "runs"),
    ({"phase": "finished", "process": "1"}, 0, "finished"),
    ({"process": "1"}, 3, "is gone; go on with --resume"),
    ({"phase": "gave up", "process": "1"}, 3, "gave up"),
    ({"host": "elsewhere", "written_utc": utc() - timedelta(hours=2)}, 4, "on elsewhere"),
], ids=str)  # fmt: skip
def test_the_exit_code_says_how_it_stands(tmp_path, capsys, changes, code, said):
    assert status(told(tmp_path, **changes)) == code
    assert said in capsys.readouterr().out
    assert status(tmp_path, "--json") == code


@pytest.mark.parametrize(("prepare", "said"), [
    (lambda folder: None, "holds no run; give the --run-dir"),
    (lambda folder: folder.rmdir(), "holds no run"),
    (lambda folder: (folder / FILE).write_text("{"), "status.json cannot be read"),
    (lambda folder: (folder / FILE).mkdir(), "status.json cannot be read"),
])  # fmt: skip
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


def test_a_run_that_tells_nothing_of_itself_shows_its_rounds(tmp_path, capsys):
    """Emulated runs do not."""
    finished_run(tmp_path / "run")
    assert status(tmp_path / "run") == STATUS["unknown"] == 4
    text = capsys.readouterr().out
    assert "has no status.json" in text
    assert "accuracy per exit" in text


def test_nothing_that_was_told_controls_the_terminal(tmp_path, capsys):
    """Faults are counted by known codes, but a file may hold anything."""
    bad = replace(COHORT, faults={HOSTILE: 1}, clients=(ClientState(name=HOSTILE, phase="ready"),))
    status(told(tmp_path, cohort=bad, reason=HOSTILE))
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert "\u2028" not in text
    assert text.count('a" b\\ ? c ?[2J {x="1"} ?') == 3


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
    parser = argparse.ArgumentParser()
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
        "0 B", "999 B", "1.0 kB", "1.2 MB", "3.0 GB",
    ]  # fmt: skip
    assert [lasting(s) for s in (0, 599, 600, 35_999, 36_000)] == [
        "0 s", "599 s", "10 min", "600 min", "10 h",
    ]  # fmt: skip


def test_looking_needs_no_torch():
    code = (
        "import sys; sys.argv = ['edge-coordinator', 'status', '--run-dir', '/nowhere'];"
        "from coordinator.start import main; code = main();"
        "print(code, *{'torch', 'numpy', 'zmq', 'rich'} & set(sys.modules))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert ended.stdout.split() == ["1"], ended.stderr


# -- rounds from the database -----------------------------------------------------------------


def finished_run(folder: Path) -> None:
    settings = config("owners-mean", rounds=3, eval_every=2)
    run = Store.create(folder, settings, "emulate")
    run_rounds(run, make_method(settings), in_process(), examples(6))
    run.close()


@contextlib.contextmanager
def not_allowed_to_write(*folders: Path):
    """As another user, who may read all of these; root has to become one for it."""
    modes = {folder: folder.stat().st_mode for folder in folders}
    for folder in folders:
        for file in folder.iterdir():
            file.chmod(0o644 if file.is_file() else 0o755)
        folder.chmod(0o555)
    above = [
        parent for parent in folders[0].resolve().parents if parent.stat().st_uid == os.getuid()
    ]
    opened = {parent: parent.stat().st_mode for parent in above if not parent.stat().st_mode & 0o5}
    for parent, mode in opened.items():
        parent.chmod(stat.S_IMODE(mode) | 0o055)
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)
        for path, mode in (modes | opened).items():
            path.chmod(stat.S_IMODE(mode))


def test_the_last_rounds_of_a_finished_run(tmp_path):
    """Rounds 2 and 3 were evaluated."""
    folder = tmp_path / "run"
    finished_run(folder)
    rows = last_rounds(folder, 10)
    full = Store.resume(folder)
    history = full.history()
    full.close()
    assert [(row.round, len(row.accuracy)) for row in rows] == [(1, 0), (2, 3), (3, 3)]
    for row, entry in zip(rows, history, strict=True):
        assert list(row.accuracy) == entry["accuracy"]
        for name in ("wall_s", "chosen", "returned", "stragglers", "failures", "bytes_up"):
            assert getattr(row, name) == entry[name]
    assert [row.round for row in last_rounds(folder, 1)] == [history[-1]["round"]]
    assert last_rounds(folder, 0) == []


def test_reading_leaves_nothing_behind(tmp_path):
    folder = tmp_path / "run"
    finished_run(folder)
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert last_rounds(folder, 5)
    with not_allowed_to_write(folder):
        assert last_rounds(folder, 5)
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == before


def test_a_run_in_progress_is_read_also_by_who_may_not_write(tmp_path):
    """Its newest rows are in the log only."""
    folder = tmp_path / "run"
    finished_run(folder)
    with contextlib.closing(writer(folder)) as db:
        assert (folder / "run.sqlite-wal").stat().st_size
        assert last_rounds(folder, 1)[0].round == 77
        with not_allowed_to_write(folder):
            assert last_rounds(folder, 1)[0].round == 77
        db.execute("BEGIN IMMEDIATE")  # it is not waited for
        assert last_rounds(folder, 1)[0].round == 77


def test_a_killed_run_is_read_with_its_log(tmp_path):
    """As kill -9 leaves it: database, log and index are copied while they are in use."""
    folder, killed = tmp_path / "run", tmp_path / "killed"
    finished_run(folder)
    killed.mkdir()
    with contextlib.closing(writer(folder)):
        for name in ("run.sqlite", "run.sqlite-wal", "run.sqlite-shm"):
            (killed / name).write_bytes((folder / name).read_bytes())
    with not_allowed_to_write(killed):
        assert last_rounds(killed, 1)[0].round == 77
    (killed / "run.sqlite-shm").unlink()
    assert last_rounds(killed, 1)[0].round == 77


def writer(folder: Path) -> sqlite3.Connection:
    """Has committed round 77 to the log, and stays open."""
    db = sqlite3.connect(folder / "run.sqlite", isolation_level=None)
    db.execute("PRAGMA journal_mode = WAL")
    row = db.execute("SELECT * FROM rounds LIMIT 1").fetchone()
    marks = ", ".join("?" * len(row))
    db.execute(f"INSERT INTO rounds VALUES ({marks})", (77, *row[1:]))
    return db


@pytest.mark.parametrize("content", [b"", b"no database", b"SQLite format 3\0" + bytes(200)])
def test_a_broken_database_does_not_hide_the_state(tmp_path, capsys, content):
    told(tmp_path)
    (tmp_path / "run.sqlite").write_bytes(content)
    assert status(tmp_path) == 0
    text = capsys.readouterr().out
    assert "round open, round 3 of 50" in text
    assert "run.sqlite cannot be read" in text


def test_the_database_has_one_name():
    assert run_reader.DATABASE == store.DATABASE


# -- what is counted --------------------------------------------------------------------------


def test_codes_of_peers_are_counted_within_bounds():
    tally = Tally()
    for number in range(1000):
        tally.fault("pi-1", f"made up {number}")
    tally.fault("pi-1", "tensors")
    tally.fault(None, "protocol")
    assert tally.faults == {OTHER: 1000, "tensors": 1, "protocol": 1}
    assert tally.of("pi-1").faults == {OTHER: 1000, "tensors": 1}


def test_strangers_names_are_counted_within_bounds():
    tally = Tally()
    for number in range(MAX_CLIENTS + 50):
        tally.result(f"client-{number}", "accepted")
        tally.moved(f"client-{number}", 1, 2)
    assert len(tally.clients) == MAX_CLIENTS
    assert tally.updates["accepted"] == tally.bytes_down == MAX_CLIENTS + 50


def test_every_code_of_an_error_is_known():
    kinds, codes = [EdgeError], set()
    while kinds:
        kind = kinds.pop()
        codes.add(kind.code)
        kinds += kind.__subclasses__()
    assert codes <= CODES


SAID = re.compile(
    r'Fault\(\s*code="(\w+)"|(?:_fault|refuse|on_gone)\([^,"]+,\s*"(\w+)"'
    r'|_absent\([^,"]+,\s*"\w+",\s*"(\w+)"'
)


def test_every_code_that_is_said_is_known():
    sources = [
        file for folder in ("edge_sdk", "coordinator") for file in (ROOT / folder).rglob("*.py")
    ]
    codes = {"".join(found) for file in sources for found in SAID.findall(file.read_text())}
    assert {"round", "late", "gone", "stalled", "capacity", "duplicate"} <= codes, "they are found"
    assert codes <= CODES
