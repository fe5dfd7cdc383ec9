"""The status file of a run, who tells it, whether the run lives, and what is counted for it."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import re
import stat
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import msgspec
import pytest

from coordinator.fleet.cohort import Stopped
from coordinator.fleet.counters import CODES, MAX_CLIENTS, OTHER, Counters
from coordinator.methods.base import Metrics
from coordinator.methods.registry import make_method
from coordinator.runs.monitor import TELL_S, Monitor
from coordinator.runs.rounds import RoundReport, run_rounds
from coordinator.store.status import (
    FILE,
    CohortState,
    StatusFile,
    health,
    identity,
    is_alive,
    read_status,
    utc,
)
from coordinator.store.store import Store
from coordinator.store.tables import RoundTotals
from edge_sdk.errors import EdgeError, QuorumError, StoreError
from tests.support.examples import config, examples
from tests.support.processes import ROOT
from tests.support.run_states import COHORT, in_process, snapshot, told

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


def test_a_metric_that_is_not_finite_is_none_to_those_who_look(tmp_path):
    """An RMSE of outputs beyond float32; JSON has no number for it."""
    found = read_status(told(tmp_path, task="regress", metric=(0.5, math.nan, math.inf)))
    assert found is not None
    assert found.metric == (0.5, None, None)


def test_a_full_disk_is_one_line_and_the_last_file_stays(tmp_path, caplog, monkeypatch):
    file = StatusFile(tmp_path / FILE)
    file.write(snapshot(round=1))
    replace_file = os.replace

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    for round in (2, 3):
        file.write(snapshot(round=round))
    (said,) = caplog.records
    assert "the run goes on" in said.message
    assert said.event == "status_lost"
    assert read_status(tmp_path).round == 1
    assert os.listdir(tmp_path) == [FILE], "no draft is left"
    monkeypatch.setattr(os, "replace", replace_file)
    file.write(snapshot(round=4))
    assert read_status(tmp_path).round == 4
    monkeypatch.setattr(os, "replace", full)
    file.write(snapshot(round=5))
    assert len(caplog.records) == 2, "it worked in between, so it is said again"


def test_a_folder_that_is_gone_ends_nothing(tmp_path, caplog):
    told(tmp_path / "nowhere")
    assert len(caplog.records) == 1


def test_another_file_is_never_written_through_a_link(tmp_path, caplog):
    (tmp_path / "precious").write_text("kept")
    (tmp_path / f".{FILE}.0.new").symlink_to(tmp_path / "precious")
    told(tmp_path, round=2)
    assert caplog.records == []
    assert read_status(tmp_path).round == 2, "another draft was taken"
    assert (tmp_path / "precious").read_text() == "kept"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'{"run": "a"}',
        b"\xff",
        msgspec.json.encode(snapshot()).replace(b'"round open"', b'"dancing"'),
        msgspec.json.encode(snapshot()).replace(b'+00:00"', b'"').replace(b'Z"', b'"'),
    ],
)
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
    monitor.phase("saving", 4)
    assert len(seen) == 3
    assert (read_status(tmp_path).phase, read_status(tmp_path).round) == ("saving", 4)
    clock.now += 0.9 * TELL_S  # since the change
    monitor.tick()
    assert len(seen) == 3
    monitor.phase("evaluating")
    assert read_status(tmp_path).round == 4


def test_who_is_asked_is_told_with_the_first_message_of_the_round(tmp_path):
    monitor, seen = monitored(tmp_path)
    monitor.phase("round open", 4)
    assert read_status(tmp_path).cohort.returned == 1
    monitor.tick()
    assert read_status(tmp_path).cohort.returned == 2
    monitor.tick()
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("error", "is_finished", "phase", "reason"),
    [
        (None, True, "finished", ""),
        (None, False, "stopped", ""),
        (Stopped(), False, "stopped", ""),
        (KeyboardInterrupt(), False, "stopped", ""),
        (QuorumError("nobody came"), False, "gave up", "nobody came"),
        (StoreError("disk full"), False, "failed", "StoreError: disk full"),
        (ValueError("a bug"), True, "failed", "ValueError: a bug"),
    ],
    ids=str,
)
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
        monitor.round_done(RoundReport(round, [], [], Metrics(), totals))
    last = monitor.latest
    assert (last.rounds_done, last.rounds_s, last.last_round_s) == (2, 5.5, 3.5)
    said = caplog.records[-1]
    assert (said.event, said.round, said.chosen, said.returned, said.bytes_up) == (
        "round_closed",
        2,
        4,
        3,
        20,
    )


def test_the_loop_names_its_phases(tmp_path):
    """Evaluation is of every second round here."""
    settings = config("owners-mean", rounds=2, eval_every=2)
    told_phases: list[tuple[str, int]] = []
    run = Store.create(tmp_path / "run", settings, "emulate")
    run_rounds(
        run,
        make_method(settings),
        in_process(),
        examples(6),
        phase=lambda phase, round: told_phases.append((phase, round)),
    )
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


# -- what is counted --------------------------------------------------------------------------


def test_codes_of_peers_are_counted_within_bounds():
    counters = Counters()
    for number in range(1000):
        counters.count_fault("pi-1", f"made up {number}")
    counters.count_fault("pi-1", "tensors")
    counters.count_fault(None, "protocol")
    assert counters.faults == {OTHER: 1000, "tensors": 1, "protocol": 1}
    assert counters.of("pi-1").faults == {OTHER: 1000, "tensors": 1}


def test_strangers_names_are_counted_within_bounds():
    counters = Counters()
    for number in range(MAX_CLIENTS + 50):
        counters.count_result(f"client-{number}", "accepted")
        counters.count_bytes(f"client-{number}", 1, 2)
    assert len(counters.clients) == MAX_CLIENTS
    assert counters.updates["accepted"] == counters.bytes_down == MAX_CLIENTS + 50


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
