"""The link is cut for half a minute in each phase of a job, by dropping every packet."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.chaos.bed import PHASES, Bed, bed_of
from tests.chaos.conftest import Scenario
from tests.support.processes import wait_until

CUT_S = 30.0


def test_cut_30_s_in_download_train_and_upload(
    tmp_path: Path, congestion: str, scenario: Scenario
) -> None:
    """Three devices of one round, each in another phase. No update of the round is missing."""
    with bed_of(tmp_path, 3, "--epochs", "6", congestion=congestion) as bed:
        bed.start_all()
        bed.wait_round(1)
        bed.forget()
        cut_at = {}
        for name, phase in zip("abc", PHASES, strict=True):
            round = bed.wait_phase(name, phase, is_cut=True)
            cut_at[name] = time.monotonic()
        for name, since in cut_at.items():
            mend(bed, name, since + CUT_S)
        scenario.check(bed, round, round + 1)
        assert [bed.outcomes(name)[round] for name in "abc"] == ["ok"] * 3
        scenario.checked.append(f"all of round {round} arrived")


def mend(bed: Bed, name: str, when: float) -> None:
    """Mend the link at this moment. What the cut is to last is the scenario, not a guess."""
    wait_until(lambda: time.monotonic() >= when, "the cut has lasted", CUT_S + 5)
    bed.net.mend(bed.links[name])


@pytest.mark.parametrize("phase", ["download", "upload"])
def test_half_open_link(tmp_path: Path, congestion: str, scenario: Scenario, phase: str) -> None:
    """A device gets another address in the middle of a transfer: its old connection is dead, and
    the coordinator is told nothing. The new one takes its place, the job goes on."""
    with bed_of(tmp_path, 2, "--epochs", "2", congestion=congestion) as bed:
        bed.start_all()
        bed.wait_round(1)
        bed.forget()
        round = bed.wait_phase("a", phase, is_cut=True)
        bed.net.hosts[bed.links["a"]].move()
        bed.net.mend(bed.links["a"])
        scenario.check(bed, round, round + 1)
        assert bed.outcomes("a")[round] == "ok", bed.rows("SELECT * FROM participations")
        assert bed.server is not None
        assert not bed.server.said("a is gone"), "it had to wait for the old connection's end"
        scenario.checked.append(f"a's update of round {round} arrived")
