"""What clients did since the coordinator's start, counted within bounds.

A fault's code is any text of a peer's: those of CODES are counted by name, all others as "other".
At most MAX_CLIENTS clients are counted one by one: where everybody may join (--insecure), names are
a peer's, too.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from edge_sdk import errors
from edge_sdk.helpers.text import one_line
from edge_sdk.protocol.messages import ExitResult

Outcome: TypeAlias = Literal["accepted", "stale", "late", "failed"]
MAX_CLIENTS = 10_000
MAX_FAILURE = 400  # characters
OTHER = "other"
OF_ERRORS = {
    kind.code
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, errors.EdgeError)
}
OF_ROUNDS = {
    "admission",
    "duplicate",
    "flood",
    "gone",
    "hello",
    "late",
    "restarted",
    "round",
    "stalled",
}
OF_DEVICES = {"cancelled", "conditions"}
CODES = frozenset({*OF_ERRORS, *OF_ROUNDS, *OF_DEVICES})


def known_code(code: str) -> str:
    return code if code in CODES else OTHER


@dataclass
class ClientCounts:
    """What one client did, and what was last known of it. seen: in time.monotonic()'s seconds."""

    address: str = ""
    platform: str = ""
    exit: int = 0
    seen: float = 0.0
    bytes_down: int = 0  # of jobs that it is through with
    bytes_up: int = 0
    updates: int = 0
    duplicates: int = 0
    exits: tuple[ExitResult, ...] = ()  # of its last update that counts
    failure: str = ""  # why its last job that failed did
    faults: Counter[str] = field(default_factory=Counter)


class Counters:
    """Used by the cohort's thread only."""

    def __init__(self) -> None:
        self.clients: dict[str, ClientCounts] = {}
        self.faults: Counter[str] = Counter()
        self.updates: Counter[Outcome] = Counter()
        self.bytes_down = 0
        self.bytes_up = 0

    def of(self, name: str) -> ClientCounts:
        """This client's counts; beyond MAX_CLIENTS they are kept nowhere."""
        if name not in self.clients and len(self.clients) >= MAX_CLIENTS:
            return ClientCounts()
        return self.clients.setdefault(name, ClientCounts())

    def count_fault(self, name: str | None, code: str) -> None:
        """Count a fault. name: None for a device that has not said hello."""
        self.faults[known_code(code)] += 1
        if name is not None:
            self.of(name).faults[known_code(code)] += 1

    def count_result(self, name: str, outcome: Outcome) -> None:
        """Count a participation. accepted: its update counts in its own round; stale: in a later
        one, after it had been late in its own."""
        self.of(name).updates += outcome in ("accepted", "stale")
        self.updates[outcome] += 1

    def note_failure(self, name: str, round: int, outcome: str, code: str, detail: str) -> None:
        """What status tells of it; the detail is a peer's."""
        said = f"round {round}, {name}: {outcome}: {code}: {detail}"
        self.of(name).failure = one_line(said, MAX_FAILURE)

    def count_bytes(self, name: str, bytes_down: int, bytes_up: int) -> None:
        """Count the bytes that were moved for a job that a client is through with."""
        counts = self.of(name)
        counts.bytes_down += bytes_down
        counts.bytes_up += bytes_up
        self.bytes_down += bytes_down
        self.bytes_up += bytes_up
