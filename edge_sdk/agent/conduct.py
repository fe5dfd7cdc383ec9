"""How the coordinator behaves. Whatever comes from it that was not asked for, or leads to nothing,
uses up its credit; who has none left is left alone for a while. So a coordinator that repeats
parts, jobs or welcomes without end costs a device bounded memory, processor time and log.

A sound coordinator uses up little: a fault that ends a job, a part that came twice when the link
broke. A job costs one message, paid back when it is trained."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable

log = logging.getLogger(__name__)
CREDIT = 200.0  # messages
CREDIT_PER_S = 2.0  # given back
MOST_AWAITED = 1000  # answers of one kind
SILENT_S = 30.0  # with heartbeats unanswered, until that is logged; then when it has doubled
LEAST_UNHEARD = 3  # heartbeats: another coordinator may want them seldom
SILENT = (
    "coordinator %s has said nothing for %.0f s and answers no heartbeat: it is busy or stopped, "
    "or nothing comes back over the link; waiting for it"
)


class Conduct:
    """Of the coordinator at one endpoint. clock: seconds, of any beginning."""

    def __init__(self, endpoint: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._endpoint, self._clock = endpoint, clock
        self._awaited: Counter[str] = Counter()  # answers that the device has asked for, by kind
        self._heard_at, self._num_unheard, self._tell_silence_s = self._clock(), 0, SILENT_S
        self.begin_anew()

    def begin_anew(self) -> None:
        """A new connection begins with full credit."""
        self._credit, self._now = CREDIT, self._clock()
        self._unwanted: Counter[str] = Counter()

    @property
    def is_exhausted(self) -> bool:
        return self._credit < 0

    def in_words(self) -> str:
        """What has come unwanted, the most first."""
        return ", ".join(f"{count} x {kind}" for kind, count in self._unwanted.most_common(3))

    def expect(self, kind: str, number: int = 1) -> None:
        """So many more messages of a kind may come."""
        self._awaited[kind] = min(MOST_AWAITED, self._awaited[kind] + number)

    def await_heartbeat(self, is_sent: bool, heard_at: float) -> None:
        """A heartbeat was sent, which is answered by one. heard_at: when anything came last, by the
        clock; long silence is logged, and its end."""
        self.expect("heartbeat", int(is_sent))
        if heard_at != self._heard_at:
            if self._tell_silence_s > SILENT_S:
                log.warning("coordinator %s answers again", self._endpoint)
            self._heard_at, self._num_unheard, self._tell_silence_s = heard_at, 0, SILENT_S
        silent_s = self._clock() - heard_at
        if self._num_unheard >= LEAST_UNHEARD and silent_s >= self._tell_silence_s:
            self._tell_silence_s = 2 * silent_s
            log.warning(SILENT, self._endpoint, silent_s)
        self._num_unheard += is_sent

    def note(self, kind: str, detail: str = "") -> None:
        """A message of a kind has come; one that was not expected costs credit, and the first of
        its kind is logged."""
        if self._awaited[kind]:
            self._awaited[kind] -= 1
            return
        if not self._unwanted[kind]:
            said = "coordinator %s: a %s that nobody asked for%s; more of them are only counted"
            log.warning(said, self._endpoint, kind, detail and f": {detail}")
        self.charge(kind)

    def charge(self, kind: str, messages: int = 1) -> None:
        """Take credit for messages of a kind."""
        now = self._clock()
        given_back = CREDIT_PER_S * (now - self._now)
        self._credit, self._now = min(CREDIT, self._credit + given_back) - messages, now
        self._unwanted[kind] += messages

    def repay(self, kind: str) -> None:
        """A message of this kind has led to something."""
        if self._unwanted[kind]:
            self._unwanted[kind] -= 1
            self._credit = min(CREDIT, self._credit + 1)
