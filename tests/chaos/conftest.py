"""Fixtures of the chaos suite, and its table of outcomes (`--chaos-csv FILE`)."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from tests.chaos.bed import Bed
from tests.chaos.ledger import TOLERANCE, read_ledger, replayed
from tests.chaos.net import CONGESTION, lacks_congestion, what_is_missing
from tools.tables import kernel, made_by, write_csv

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
        command = "make test-chaos ARGS='--chaos-csv FILE'"
        write_csv(Path(path), TABLE, made_by(command, kernel()))


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

    def count(self, bed: Bed, last: int) -> None:
        """The rounds up to `last` are committed, every update is counted once, none is lost."""
        bed.wait_round(last)
        ledger = read_ledger(bed)
        assert not ledger.problems, "\n".join(ledger.problems)
        self.rounds = ledger.last_round
        self.checked.append(str(ledger))

    def compare(self, bed: Bed, rounds: Iterable[int]) -> None:
        """The model is, after each round, that of an undisturbed round with the same updates. The
        processes are to have ended: this takes all of the machine."""
        found = replayed(bed, rounds)
        worst = max(found.values())
        assert worst < TOLERANCE, found
        self.checked.append(f"model of {len(found)} rounds within {worst:.1e}")

    def check(self, bed: Bed, first: int, last: int) -> None:
        """Both, as the end of a run."""
        self.count(bed, last)
        bed.stop()
        self.compare(bed, range(first, last + 1))


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
