"""kill -9 of an agent, a training process, the coordinator, in each phase of a job."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.chaos.bed import PHASES, Bed, bed_of
from tests.chaos.conftest import Scenario

VICTIMS = ("agent", "trainer", "coordinator")


@pytest.fixture(scope="module")
def bed(congestion: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    """One run for all of them: each fault falls into a later round."""
    folder = tmp_path_factory.mktemp("kills")
    with bed_of(folder, 2, "--epochs", "7", congestion=congestion) as bed:
        bed.start_all()
        bed.wait_round(1)
        yield bed


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("victim", VICTIMS)
def test_kill(bed: Bed, scenario: Scenario, victim: str, phase: str) -> None:
    """In the middle of a transfer the link is cut first, so that it cannot end meanwhile: nothing
    of the end of the connection is heard on the other side."""
    bed.revive()
    bed.forget()
    round = bed.wait_phase("a", phase, is_cut=phase != "train")
    bed.kill(victim, "a")
    bed.net.mend(bed.links["a"])
    bed.restart(victim, "a")
    scenario.check(bed, round, round + 1)
    assert bed.outcomes("b")[round] == "ok", "a device that nothing happened to lost its work"
    became = bed.rows(
        "SELECT outcome, code FROM participations WHERE client_id = 'a' AND round = ?", round
    )
    scenario.checked.append(f"a's update of round {round}: {became}")
    if victim == "coordinator":
        assert became == [("ok", "")], "the coordinator's death cost a device its work"
