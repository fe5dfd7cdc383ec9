"""Fixtures of the chaos suite, and its table of outcomes (`--chaos-csv FILE`)."""

from __future__ import annotations

import csv
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.bed import FAULT_PATIENCE_S, Bed
from tests.chaos.ledger import TOLERANCE, read_ledger, replayed
from tests.chaos.net import CONGESTION, lacks_congestion, what_is_missing

COLUMNS = ("scenario", "congestion", "outcome", "rounds", "seconds", "checked")
TABLE: list[dict[str, object]] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--chaos-csv", type=Path, help="write the chaos suite's outcomes here")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    if here and (missing := what_is_missing()):
        for item in here:
            item.add_marker(pytest.mark.skip(reason=missing))


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--chaos-csv")
    if path and TABLE:
        write_table(path, TABLE, "make test-chaos ARGS='--chaos-csv FILE'")


def write_table(path: Path, rows: list[dict[str, object]], command: str) -> None:
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    cpus, kernel = os.cpu_count(), platform.release().partition("-")[0]
    with path.open("w", newline="") as file:
        file.write(f"# {command}; commit {found.stdout.strip() or 'unknown'}; ")
        file.write(f"{cpus} shared cores, {platform.machine()}, Linux {kernel}\n")
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    if report.when == "call" or (report.when == "setup" and report.skipped):
        item.stash.setdefault(REPORT, report)


REPORT = pytest.StashKey[pytest.TestReport]()


class Scenario:
    """What a test says of itself for the table."""

    def __init__(self, name: str, congestion: str) -> None:
        self.name, self.congestion = name, congestion
        self.rounds = 0
        self.checked: list[str] = []

    def check(self, bed: Bed, first: int, last: int) -> None:
        """The rounds first to last are committed, every update is counted once, the model is that
        of an undisturbed run with the same updates."""
        bed.wait_round(last, FAULT_PATIENCE_S)
        ledger = read_ledger(bed)
        assert not ledger.problems, "\n".join(ledger.problems)
        differences = replayed(bed, range(first, last + 1))
        assert max(differences.values()) < TOLERANCE, differences
        self.rounds = ledger.last_round
        self.checked += [
            str(ledger),
            f"model of rounds {first}-{last} within {max(differences.values()):.1e}",
        ]


@pytest.fixture
def scenario(request: pytest.FixtureRequest) -> Iterator[Scenario]:
    """Named after the test and its parameters; its row is written whatever becomes of it."""
    parameters = dict(request.node.callspec.params) if hasattr(request.node, "callspec") else {}
    congestion = str(parameters.pop("congestion", CONGESTION[0]))
    words = [request.node.originalname.removeprefix("test_").replace("_", " ")]
    found = Scenario(" ".join([*words, *map(str, parameters.values())]), congestion)
    begin = time.monotonic()
    yield found
    report = request.node.stash.get(REPORT, None)
    TABLE.append(
        {
            "scenario": found.name,
            "congestion": congestion,
            "outcome": report.outcome if report else "error",
            "rounds": found.rounds,
            "seconds": round(time.monotonic() - begin, 1),
            "checked": "; ".join(found.checked),
        }
    )


@pytest.fixture(params=CONGESTION, scope="module")
def congestion(request: pytest.FixtureRequest) -> str:
    if missing := lacks_congestion(request.param):
        pytest.skip(missing)
    return str(request.param)
