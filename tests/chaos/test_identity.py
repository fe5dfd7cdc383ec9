"""Two live devices with one key, and a device that comes back as another process elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

from tests.chaos.bed import FAULT_PATIENCE_S, bed_of
from tests.chaos.conftest import Scenario
from tests.support.processes import run_cli

ROUNDS = 3


def test_duplicate_identity(tmp_path: Path, scenario: Scenario) -> None:
    """Who was there first goes on, the newcomer is told, the operator sees it."""
    with bed_of(tmp_path, 2, "--epochs", "2", spare=1) as bed:
        bed.start_all()
        bed.wait_round(1)
        second = bed.second_device("a", 3)
        second.wait_said("another device with the key of 'a'", FAULT_PATIENCE_S)
        begin = bed.last_round()
        bed.wait_rounds(ROUNDS)
        shown = run_cli("coordinator.cli", "status", "--run-dir", str(bed.run_dir), "--json")
        state = json.loads(shown.stdout)["status"]["cohort"]["clients"]
        clients = {client["name"]: client for client in state}
        assert clients["a"]["duplicates"] > 0, clients
        assert bed.agents["a"].is_alive
        assert not second.said("job for"), "both were given work"
        scenario.check(bed, begin + 1, begin + ROUNDS)
        rounds = range(begin + 1, begin + ROUNDS + 1)
        assert [bed.outcomes("a")[round] for round in rounds] == ["ok"] * ROUNDS
        scenario.checked.append("the newcomer was told and status shows it")


def test_back_from_elsewhere(tmp_path: Path, scenario: Scenario) -> None:
    """A device dies with its link cut, and is started again on another link: the coordinator still
    believes in the old connection."""
    with bed_of(tmp_path, 2, "--epochs", "2", spare=1) as bed:
        bed.start_all()
        bed.wait_round(1)
        bed.forget()
        round = bed.wait_phase("a", "upload", is_cut=True)
        bed.kill_agent("a")
        bed.move_device("a", 3)
        scenario.check(bed, round, round + 1)
        assert bed.server is not None
        assert not bed.server.said("a is gone: said nothing"), "its place was not taken at once"
        assert bed.outcomes("a")[round] == "ok", "what it had trained was lost"
        scenario.checked.append("its place was free at once, what it had trained counted")
