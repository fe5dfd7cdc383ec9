"""How each client's last job ended, and what its device is told of that: once more when it is heard
of, if it could not be reached, for a device that never hears of the end waits without end."""

from __future__ import annotations

from collections.abc import Callable

from coordinator.fleet.sessions import Sessions
from edge_sdk.protocol.messages import Accepted, Fault


class Endings:
    """Tells devices how their jobs ended, again where a full queue kept it from them.
    was_counted(job): whether a committed round holds its update."""

    def __init__(self, sessions: Sessions, was_counted: Callable[[str], bool]) -> None:
        self._sessions = sessions
        self._was_counted = was_counted
        self._last: dict[str, tuple[str, bool]] = {}  # job of each client, whether it counts
        self._unheard: dict[str, Accepted | Fault] = {}

    def note(self, name: str, job: str, *, counts: bool) -> None:
        self._last[name] = job, counts

    def is_last(self, name: str, job: str) -> bool:
        """Whether this is the client's job that ended last."""
        return self._last.get(name, ("", False))[0] == job

    def counts(self, name: str, job: str) -> bool:
        """Whether the update of this job counts."""
        return self._last.get(name) == (job, True) or self._was_counted(job)

    def send_or_keep(self, name: str, message: Accepted | Fault) -> None:
        if not self._sessions.send(name, message):
            self._unheard[name] = message

    def tell_again(self, name: str) -> None:
        """The device is heard of: it hears what it could not be told."""
        if message := self._unheard.pop(name, None):
            self.send_or_keep(name, message)

    def forget_unheard(self, name: str) -> None:
        """The device has another job, or says itself which one it has."""
        self._unheard.pop(name, None)
