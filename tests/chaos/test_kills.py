"""kill -9 of an agent, a training process, the coordinator, in each phase of a job."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.bed import FAULT_PATIENCE_S, PHASES, Bed, bed_of
from tests.chaos.conftest import Scenario
from tests.support.processes import wait_until

VICTIMS = ("agent", "trainer", "coordinator")
ROUNDS: list[int] = []  # of the present bed, that something happened in


@pytest.fixture(scope="module")
def bed(congestion: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    """One run for all of them: each fault falls into a later round."""
    folder = tmp_path_factory.mktemp("kills")
    with bed_of(folder, 2, "--epochs", "6", congestion=congestion) as bed:
        ROUNDS.clear()
        bed.start_all()
        bed.wait_round(1)
        yield bed


@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.parametrize("phase", PHASES)
def test_kill(bed: Bed, scenario: Scenario, phase: str, victim: str) -> None:
    """In the middle of a transfer the link is cut first, so that it cannot end meanwhile: nothing
    of the end of the connection is heard on the other side. An agent that is started again has
    forgotten that its training process was killed, and does not choose less for it."""
    bed.revive()
    bed.forget()
    round = bed.wait_phase("a", phase, is_cut=phase != "train")
    ROUNDS.append(round)
    bed.kill(victim, "a")
    bed.net.mend(bed.links["a"])
    bed.restart(victim, "a")
    scenario.count(bed, round + 1)
    assert bed.outcomes("b")[round] == "ok", "a device that nothing happened to lost its work"
    became = bed.rows(
        "SELECT outcome, code FROM participations WHERE client_id = 'a' AND round = ?", round
    )
    scenario.checked.append(f"a's update of round {round}: {became}")
    if victim == "coordinator" or phase == "upload":
        assert became == [("ok", "")], "a death cost a device its work"


def test_model_after_kills(bed: Bed, scenario: Scenario) -> None:
    """That of undisturbed rounds with the same updates, after each round that had a fault."""
    bed.stop()
    assert ROUNDS, "no fault was done"
    scenario.count(bed, max(ROUNDS))
    scenario.compare(bed, ROUNDS)


def test_coordinator_killed_while_a_late_device_trains(
    tmp_path: Path, congestion: str, scenario: Scenario
) -> None:
    """Its round is over, its link cut, its job known to a coordinator that is gone: what it trains
    counts in a later round, and it trains it once."""
    late = ("--quorum", "0.5", "--deadline", "15", "--grace", "1", "--staleness-half-life", "1000")
    with bed_of(tmp_path, 2, "--epochs", "6", *late, congestion=congestion) as bed:
        bed.start_all()
        bed.wait_round(1)
        bed.forget()
        begun = bed.wait_phase("a", "train", is_cut=True)
        bed.wait_round(begun)  # without it
        bed.kill_server()
        bed.net.mend(bed.links["a"])
        bed.serve_until_listening()

        def counted_in() -> int:
            found = bed.rows(
                "SELECT round FROM participations JOIN rounds USING (round) WHERE client_id = 'a'"
                " AND outcome = 'ok' AND staleness > 0 AND round - staleness = ?",
                begun,
            )
            return int(found[0][0]) if found else 0

        counted = wait_until(counted_in, "the late update counts", FAULT_PATIENCE_S)
        scenario.count(bed, counted)
        given = bed.agents["a"].text().count(f"round {begun}: job for")
        assert given == 1, "its work was lost, and done again"
        scenario.checked.append(f"a's update of round {begun} counted in round {counted}")
        bed.stop()
        scenario.compare(bed, [counted])
