"""Digests of updates, computed in a thread of its own while their parts arrive.

SHA-256 of 5 MB takes 3 ms, half of what all else takes the coordinator's own thread for such an
update; hashlib lets that go on meanwhile. An announced digest tells that neither the memory nor the
disk of its device changed an update: links keep bytes as they are."""

from __future__ import annotations

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from threading import BoundedSemaphore

from edge_sdk.protocol.link import Payload
from edge_sdk.protocol.stream import PART_BYTES

MOST_WAITING = 64  # parts: 32 MiB


class Digests:
    """Makes a RunningDigest for each update; the thread ends with this object."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "digests")
        self._room = BoundedSemaphore(MOST_WAITING)

    def begin(self) -> RunningDigest:
        return RunningDigest(self._thread, self._room)


class RunningDigest:
    """The digest of one stream, whose parts may come in any order: those that come in their turn
    are hashed at once, the rest at the end."""

    def __init__(self, thread: ThreadPoolExecutor, room: BoundedSemaphore) -> None:
        self._thread, self._room = thread, room
        self._hashed = hashlib.sha256()
        self._next = 0  # part
        self._last: Future[None] | None = None

    def add(self, index: int, payload: Payload) -> None:
        """A new part is here; waits while too many others are not hashed yet."""
        if index != self._next:
            return
        self._next += 1
        self._room.acquire()
        self._last = self._thread.submit(self._hash, payload)

    def of_whole(self, stream: memoryview) -> str:
        """The digest as it travels, once all parts are here: in this stream."""
        if self._last is not None:
            self._last.result()
        self._hashed.update(stream[self._next * PART_BYTES :])
        self._next = -(-len(stream) // PART_BYTES)
        return self._hashed.hexdigest()[:32]

    def _hash(self, payload: Payload) -> None:
        try:
            self._hashed.update(payload)
        finally:
            self._room.release()
