"""The clock jumps: the wall clock under a running process, the monotonic one over a restart, and
all that goes on around a process that stood still."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from tests.chaos.bed import Bed, bed_of
from tests.chaos.conftest import Scenario
from tests.support.processes import wait_until

LIBRARIES = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
DAY_S, FREEZE_S = 86_400, 50.0


@pytest.mark.skipif(not LIBRARIES, reason="needs libfaketime (apt-get install libfaketime)")
@pytest.mark.parametrize("jump_s", [DAY_S, -DAY_S])
def test_wall_clock_jumps(tmp_path: Path, scenario: Scenario, jump_s: int) -> None:
    """On a device and on the coordinator, in the middle of a round: a clock that was set by NTP
    after a boot without one."""
    faked = tmp_path / "clock"
    faked.write_text("+0")
    environment = {
        "LD_PRELOAD": str(LIBRARIES[0]),
        "FAKETIME_TIMESTAMP_FILE": str(faked),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    with bed_of(tmp_path, 2, "--epochs", "6") as bed:
        bed.serve_until_listening(**environment)
        bed.device("a", **environment)
        bed.device("b")
        bed.wait_round(1)
        bed.forget()
        round = bed.wait_phase("a", "train", is_cut=False)
        faked.write_text(f"{jump_s:+d}")
        scenario.count(bed, round + 1)
        for running in (bed.server, bed.agents["a"]):
            assert running is not None
            days = re.findall(r"^(\d{4}-\d\d-\d\d) ", running.text(), re.M)
            assert len(set(days)) == 2, f"the clock of {running.name} did not jump"
        check_all_ok(bed, range(1, round + 2))
        bed.stop()
        scenario.compare(bed, range(round, round + 2))


def test_monotonic_clock_of_another_boot(tmp_path: Path, scenario: Scenario) -> None:
    """Coordinator and device go on after a reboot: their monotonic clocks begin elsewhere."""
    with bed_of(tmp_path, 2, "--epochs", "6") as bed:
        bed.start_all()
        bed.wait_round(1)
        bed.forget()
        round = bed.wait_phase("a", "upload", is_cut=True)
        bed.kill_server()
        bed.kill_agent("a")
        bed.net.mend(bed.links["a"])
        bed.serve_until_listening(prefix=booted(10**6))
        bed.device("a", prefix=booted(10**7))
        scenario.count(bed, round + 1)
        check_all_ok(bed, range(1, round + 2))
        bed.stop()
        scenario.compare(bed, range(round, round + 2))


def booted(seconds: int) -> list[str]:
    """The beginning of a command whose monotonic clock is ahead by so much."""
    return ["unshare", "--time", f"--monotonic={seconds}", f"--boottime={seconds}", "--"]


@pytest.mark.parametrize("victim", ["coordinator", "agent"])
def test_stands_still(tmp_path: Path, scenario: Scenario, victim: str) -> None:
    """A suspended laptop, a paused virtual machine: everything of it stops for longer than silence
    is taken for death, then goes on where it was."""
    with bed_of(tmp_path, 2, "--epochs", "6") as bed:
        bed.start_all()
        bed.wait_round(1)
        bed.forget()
        round = bed.wait_phase("a", "train", is_cut=False)
        running = bed.server if victim == "coordinator" else bed.agents["a"]
        assert running is not None
        process = psutil.Process(running.process.pid)
        stopped = [process, *process.children(recursive=True)]
        send(stopped, signal.SIGSTOP)
        until = time.monotonic() + FREEZE_S
        wait_until(lambda: time.monotonic() >= until, "it has stood still", FREEZE_S + 5)
        send(stopped, signal.SIGCONT)
        scenario.count(bed, round + 2)
        scenario.checked.append(f"a in round {round}: {bed.outcomes('a')[round]}")
        if victim == "coordinator":
            check_all_ok(bed, range(1, round + 3))
        bed.stop()
        scenario.compare(bed, range(round, round + 3))


def send(processes: Sequence[psutil.Process], number: int) -> None:
    for process in processes:
        process.send_signal(number)


def check_all_ok(bed: Bed, rounds: Sequence[int]) -> None:
    for name in bed.links:
        outcomes = bed.outcomes(name)
        assert [outcomes.get(round) for round in rounds] == ["ok"] * len(rounds), outcomes
