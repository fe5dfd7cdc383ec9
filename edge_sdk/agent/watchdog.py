"""What systemd hears of the agent (sd_notify): ready, what it does now, and that it gets on.

The watchdog is fed by progress only: without a job the agent's loop is progress, with one only what
the trainer says, which it does at least every few steps. A trainer that is silent for SILENT_S is
ended by the agent itself, so the watchdog, twice as long, is for an agent that is stuck."""

from __future__ import annotations

import logging
import socket

log = logging.getLogger(__name__)
# A step of the slowest board takes seconds; one that swaps itself to death, minutes.
SILENT_S = 300.0
THRASHING_S = 30.0  # of silence, after which lack of memory counts as its reason
WATCHDOG_S = 600  # WatchdogSec= of the unit
FEED_S = 1.0  # at most one WATCHDOG=1 in so long


class Notifier:
    """Datagrams to NOTIFY_SOCKET; without one everything is silent. "@" begins an abstract name."""

    def __init__(self, address: str = "") -> None:
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        self._is_failing = False
        kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        self._socket = socket.socket(socket.AF_UNIX, kind) if address else None

    def send(self, *lines: str) -> bool:
        """Lines such as READY=1. False: the manager did not take them; no reason to stop."""
        if self._socket is None or not lines:
            return True
        try:
            self._socket.sendto("\n".join(lines).encode(), self._address)
        except OSError as error:
            if not self._is_failing:
                log.warning("systemd could not be notified: %s", error)
            self._is_failing = True
            return False
        self._is_failing = False
        return True

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


class Watchdog:
    """Turns what the agent does into messages to systemd. Times are those of time.monotonic()."""

    def __init__(self, notifier: Notifier, now: float) -> None:
        self._notifier = notifier
        self._heard_at = now  # the trainer's last message, or its start
        self._fed_at = now  # the last WATCHDOG=1
        self._is_ready = False
        self._status = ""

    def note_alive(self, now: float) -> None:
        """The trainer said something, or was started."""
        self._heard_at = now

    def silent_s(self, now: float) -> float:
        """How long the trainer has said nothing."""
        return now - self._heard_at

    def notify(self, now: float, *, is_ready: bool, has_job: bool, status: str) -> None:
        """Send systemd what changed; called once in every turn of the agent's loop."""
        lines = []
        if is_ready and not self._is_ready:
            lines.append("READY=1")
        if status != self._status:
            lines.append(f"STATUS={status}")
        progress = self._heard_at if has_job else now
        is_fed = progress > self._fed_at and now >= self._fed_at + FEED_S
        if is_fed:
            lines.append("WATCHDOG=1")
        if self._notifier.send(*lines):  # else the next turn says it again
            self._is_ready, self._status = self._is_ready or is_ready, status
            self._fed_at = now if is_fed else self._fed_at

    def notify_stopping(self) -> None:
        """For an end on request; after an error systemd is to see the exit status only."""
        self._notifier.send("STOPPING=1", "STATUS=stopping")

    def close(self) -> None:
        self._notifier.close()
