"""Two live devices with one key, and a device that comes back as another process elsewhere."""

from __future__ import annotations

from pathlib import Path

from tests.chaos.bed import bed_of
from tests.chaos.conftest import Scenario

ROUNDS = 3


def test_duplicate_identity(tmp_path: Path, congestion: str, scenario: Scenario) -> None:
    """Rounds go on, whichever of the two is heard; no update counts twice; somebody is told."""
    with bed_of(tmp_path, 2, "--epochs", "2", congestion=congestion, spare=1) as bed:
        bed.start_all()
        bed.wait_round(1)
        bed.forget()
        first = bed.agents["a"]
        second = bed.second_device("a", 3)
        begin = bed.last_round()
        bed.wait_rounds(ROUNDS)
        scenario.check(bed, begin + 1, begin + ROUNDS)
        assert bed.server is not None
        outcomes = bed.outcomes("a")
        good = [outcomes.get(round, "none") for round in range(begin + 1, begin + ROUNDS + 1)]
        scenario.checked.append(f"outcomes of a: {good}")
        alive = first.is_alive, second.is_alive
        scenario.checked.append(f"alive: first {alive[0]}, second {alive[1]}")
        assert good.count("ok") >= ROUNDS - 1, "two devices with one key starve each other"


def test_back_from_elsewhere(tmp_path: Path, congestion: str, scenario: Scenario) -> None:
    """A device dies with its link cut, and is started again on another link: the coordinator still
    believes in the old connection."""
    with bed_of(tmp_path, 2, "--epochs", "2", congestion=congestion, spare=1) as bed:
        bed.start_all()
        bed.wait_round(1)
        bed.forget()
        round = bed.wait_phase("a", "upload", is_cut=True)
        bed.kill_agent("a")
        bed.move_device("a", 3)
        scenario.check(bed, 1, round + 1)
        assert bed.server is not None
        assert not bed.server.said("a is gone: said nothing"), "its place was not taken at once"
        assert bed.outcomes("a")[round + 1] == "ok"
