"""Devices that try to take part and cannot, and why: for the log, for `status`, and for who waits.

Refused ones come again every few seconds, for ever: each reason is logged once and then counted.
Names may be a peer's own (--insecure), so MOST devices are remembered, those last heard of.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass

from coordinator.store.status import UnfitDevice
from edge_sdk.helpers.text import one_line

MOST = 100
NEWS_S = 10.0  # between two lines of log about one device, and of a device that displaces another
MOST_TOLD, MOST_LETTERS = 3, 160  # in one line
_FIGURES = re.compile(r"\d+(?:\.\d+)?")


@dataclass
class _Entry:
    code: str
    reason: str
    count: int
    heard: float  # of the clock
    logged: float


class UnfitDevices:
    """By name, or by address where there is no name. clock: seconds that only grow."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._entries: dict[str, _Entry] = {}  # the one heard of last is the last

    def note(self, name: str, code: str, reason: str) -> bool:
        """A device cannot take part. code: as in a Fault. Whether that is to be logged: the device
        or its reason is new, the figures in it aside."""
        now, old = self._clock(), self._entries.pop(name, None)
        if old is None:
            is_news = self._make_room(now)
        else:
            is_same = _FIGURES.sub("", old.reason) == _FIGURES.sub("", reason)
            is_news = not is_same and now - old.logged >= NEWS_S
        count = 1 + (old.count if old else 0)
        logged = now if is_news or old is None else old.logged
        self._entries[name] = _Entry(code, reason, count, now, logged)
        return is_news

    def forget(self, name: str) -> None:
        """The device takes part now."""
        self._entries.pop(name, None)

    def told(self) -> tuple[UnfitDevice, ...]:
        """All of them, the one heard of last first."""
        now = self._clock()
        return tuple(
            UnfitDevice(name=name, code=e.code, reason=e.reason, count=e.count, age_s=now - e.heard)
            for name, e in reversed(self._entries.items())
        )

    def in_words(self) -> str:
        """Behind what is said of too few devices: "; pi-1: its reason; and 2 more", or ""."""
        entries = list(reversed(self._entries.items()))
        told = [f"{name}: {one_line(e.reason, MOST_LETTERS)}" for name, e in entries[:MOST_TOLD]]
        if len(entries) > MOST_TOLD:
            told.append(f"and {len(entries) - MOST_TOLD} more that cannot take part")
        return "".join(f"; {text}" for text in told)

    def _make_room(self, now: float) -> bool:
        """For one more device. False: others came just before it, as a flood of names does."""
        if len(self._entries) < MOST:
            return True
        oldest = next(iter(self._entries))
        return now - self._entries.pop(oldest).heard >= NEWS_S
