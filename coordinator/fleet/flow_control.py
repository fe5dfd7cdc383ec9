"""Bytes that may be on their way at once, shared out among all transfers, up and down.

The budget bounds what the coordinator's sockets hold, whatever the number of clients. Turns come in
the order of asking, but a transfer that has begun goes on before another begins: so the first ones
are whole soon, instead of all at the end. Clients whose links are slow share half of the budget at
most, so they cannot hold up the others; of an upload of theirs one part or two are under way, not a
window.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from edge_sdk.protocol.stream import PART_BYTES
from edge_sdk.protocol.timing import DEAD_MS

BUDGET_BYTES = 64 * 1024**2  # of parts that are on their way at once
LEAST_BUDGET_BYTES = 2 * PART_BYTES
WINDOW = 8  # parts under way per transfer, of a link that is not slow
SLOW_WINDOW = 2
SLOW_RATE = PART_BYTES / 1.0  # bytes per second; below it a part takes longer than a second
UNKNOWN_RATE = 16 * 1024  # what a link is taken for until it was measured
LEAST_RATE = 8 * 1024  # to which a link may fall at any time without being taken for lost
PATIENCE = 4.0  # times as long as expected may a part take
# is_slow, is_new, in the order of their turns: the slow need the whole round, and have a share only
QUEUES = ((True, False), (True, True), (False, False), (False, True))
LINK_S = DEAD_MS / 1000  # sooner a lost link does not show itself


class LinkRate:
    """How fast parts move over one client's link, one way; kept over rounds. rate: bytes per
    second, 0: not measured."""

    def __init__(self) -> None:
        self.rate = 0.0

    def note_moved(self, num_bytes: int, seconds: float) -> None:
        """num_bytes took so long, from when they were asked for or the ones before had come. Times
        are averaged, not rates: parts that waited in a queue come in a burst."""
        now = max(seconds, 1e-6) / num_bytes
        self.rate = 1 / (0.7 / self.rate + 0.3 * now) if self.rate else 1 / now

    def halve(self) -> None:
        """The link did not keep its own pace: half of it is expected from now on, of a quick link
        no more than UNKNOWN_RATE."""
        self.rate = min(UNKNOWN_RATE, (self.rate or UNKNOWN_RATE) / 2)

    @property
    def is_slow(self) -> bool:
        return 0 < self.rate < SLOW_RATE

    @property
    def window(self) -> int:
        return WINDOW if self.rate >= SLOW_RATE else SLOW_WINDOW

    def patience_s(self, num_bytes: int) -> float:
        """Seconds without any of num_bytes under way after which something is wrong."""
        expected_s = num_bytes / (self.rate or UNKNOWN_RATE)
        return LINK_S + max(PATIENCE * expected_s, PART_BYTES / LEAST_RATE)


@dataclass(frozen=True)
class LinkRates:
    """The rates of one client's link, one for each way: up, many a link has a hundredth of what it
    has down."""

    down: LinkRate = field(default_factory=LinkRate)
    up: LinkRate = field(default_factory=LinkRate)


class Budget:
    """Who may have how many parts under way. One transfer a client at a time, so a client's name
    stands for it. Every operation but drop() takes constant time."""

    def __init__(self, budget_bytes: int = BUDGET_BYTES) -> None:
        self._num_parts = max(2, budget_bytes // PART_BYTES)
        self._held: dict[str, tuple[bool, int]] = {}  # is_slow, parts under way
        self._used = [0, 0]  # quick, slow
        self._queues = {key: deque[str]() for key in QUEUES}
        self._waiting: set[str] = set()
        self._begun: set[str] = set()

    @property
    def share(self) -> int:
        """Most parts of one client that should be under way."""
        return max(2, self._num_parts // 4)

    def is_waiting(self, name: str) -> bool:
        """Whether the client's turn has not come yet."""
        return name in self._waiting

    @property
    def bytes_under_way(self) -> int:
        return sum(self._used) * PART_BYTES

    def ask(self, name: str, is_slow: bool) -> None:
        """This client would like parts under way; its turn comes with next()."""
        if name not in self._waiting:
            self._waiting.add(name)
            self._queues[is_slow, name not in self._begun].append(name)

    def next(self) -> tuple[str, int] | None:
        """Whose turn it is, and how many parts it may take; None: nobody waits, or all is used."""
        free = self._num_parts - sum(self._used)
        for is_slow, is_new in QUEUES:
            may = min(free, self._num_parts // 2 - self._used[1]) if is_slow else free
            queue = self._queues[is_slow, is_new]
            if queue and may > 0:
                name = queue.popleft()
                self._waiting.discard(name)
                return name, may
        return None

    def take(self, name: str, parts: int, is_slow: bool) -> None:
        """So many more of the client's parts are under way."""
        self._begun.add(name)
        held = self.held(name)
        self.release(name, held)  # all of a client's parts count on one side
        if held + parts:
            self._held[name] = is_slow, held + parts
            self._used[is_slow] += held + parts

    def holders(self) -> list[str]:
        """The clients whose parts are under way."""
        return list(self._held)

    def held(self, name: str) -> int:
        return self._held.get(name, (False, 0))[1]

    def release(self, name: str, parts: int) -> None:
        """So many of the client's parts are under way no more; at most those that were."""
        is_slow, held = self._held.pop(name, (False, 0))
        left = max(0, held - parts)
        self._used[is_slow] -= held - left
        if left:
            self._held[name] = is_slow, left

    def drop(self, name: str) -> None:
        """The client's transfer is over or broken: it waits for nothing, nothing is under way."""
        self.release(name, self.held(name))
        self._begun.discard(name)
        if name in self._waiting:
            self._waiting.discard(name)
            for queue in self._queues.values():
                if name in queue:
                    queue.remove(name)
