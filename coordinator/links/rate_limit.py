"""How much one peer may say, and how often one thing is logged.

A peer is a client, an invitation's key, or without keys a connection. What it says is paid from a
token bucket of its own, before it is decoded; what the coordinator asks it for is paid in advance,
so a quick link is not held up however many parts it moves. Who goes on with an empty bucket, or
says nothing but what is refused, is ended and kept out for a while. No device comes near: it says
a heartbeat in 5 s, and after a pause of the coordinator's of an hour 720 at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import zmq

from edge_sdk.protocol.messages import Fetch, Job, Message, Part

RATE = 20.0  # tokens that come back each second
BURST = 2000.0  # an update of MAX_TENSORS tensors costs 1024
BYTES_A_TOKEN = 1024  # of a control frame: a large one takes long to decode
MOST_DROPPED = 1000  # messages in a row that come with an empty bucket
MOST_REFUSED = 20  # frames in a row that break the protocol
OUT_S = 60.0  # for which a peer that was ended is kept out
LEAST_KEPT = 4096  # peers, before those with a full bucket are forgotten
SAME_LINES, SAME_S = 20, 60.0  # lines of one kind about one client that are logged, in how long
Verdict: TypeAlias = Literal["hear", "drop", "warn", "end", "out"]


@dataclass(slots=True)
class _Peer:
    tokens: float
    seen: float  # of the clock
    num_dropped: int = 0
    num_refused: int = 0
    out_until: float = 0.0


def cost_of(frames: Sequence[zmq.Frame]) -> int:
    """Tokens that a message costs. frames: the route, the control frame, what else there is."""
    control = len(frames[1].buffer) if len(frames) > 1 else 0
    return 1 + control // BYTES_A_TOKEN + max(0, len(frames) - 3)


def earned_by(message: Message) -> int:
    """Tokens that a peer gets for this, to answer it."""
    match message:
        case Job():  # answered by fetch, fault or update, with the names of its tensors, and ready
            return 8 + len(message.tensors) // 4
        case Part():
            return 2
        case Fetch():
            return 1 + message.count
        case _:
            return 0


class RateLimits:
    """The buckets. take() and earn() are for the thread that listens, is_out() for any."""

    def __init__(
        self,
        rate: float = RATE,
        burst: float = BURST,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rate, self._burst, self._clock = rate, burst, clock
        self._peers: dict[Hashable, _Peer] = {}
        self._forget_at = LEAST_KEPT

    def take(self, peer: Hashable, cost: int) -> Verdict:
        """What becomes of its message. warn: dropped, the first of a row; end: the peer is out from
        now on; out: it is already."""
        now, known = self._clock(), self._of(peer)
        if now < known.out_until:
            return "out"
        known.tokens = max(known.tokens, min(self._burst, self._refilled(known, now)))
        known.seen = now
        if cost <= known.tokens:
            known.tokens -= cost
            known.num_dropped = 0
            return "hear"
        known.num_dropped += 1
        if known.num_dropped > MOST_DROPPED:
            return self._end(known)
        return "warn" if known.num_dropped == 1 else "drop"

    def earn(self, peer: Hashable, message: Message) -> None:
        """The peer was sent this, and may answer. It saves up twice its bucket at most."""
        if more := earned_by(message):
            known = self._of(peer)
            known.tokens = min(2 * self._burst, known.tokens + more)

    def note_frame(self, peer: Hashable, *, is_refused: bool) -> Verdict:
        """Whether its last message kept to the protocol. end: too many in a row did not."""
        known = self._of(peer)
        known.num_refused = known.num_refused + 1 if is_refused else 0
        return self._end(known) if known.num_refused > MOST_REFUSED else "hear"

    def is_out(self, peer: Hashable) -> bool:
        known = self._peers.get(peer)
        return known is not None and self._clock() < known.out_until

    def out_since(self, peer: Hashable) -> float:
        """When this peer was ended last, in seconds of the clock."""
        return self._of(peer).out_until - OUT_S

    def _of(self, peer: Hashable) -> _Peer:
        if (known := self._peers.get(peer)) is None:
            if len(self._peers) >= self._forget_at:
                self._forget()
            known = self._peers[peer] = _Peer(self._burst, self._clock())
        return known

    def _forget(self) -> None:
        """Drop those who are as if they had never been here."""
        now = self._clock()
        self._peers = {
            peer: known
            for peer, known in self._peers.items()
            if now < known.out_until or self._refilled(known, now) < self._burst
        }
        self._forget_at = max(LEAST_KEPT, 2 * len(self._peers))

    def _refilled(self, known: _Peer, now: float) -> float:
        return known.tokens + (now - known.seen) * self._rate

    def _end(self, known: _Peer) -> Verdict:
        known.out_until = self._clock() + OUT_S
        known.num_dropped = known.num_refused = 0
        return "end"


class Repeats:
    """Which of many like lines are logged: so many in a while, and then how many were not."""

    def __init__(
        self,
        most: int = SAME_LINES,
        seconds: float = SAME_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._most, self._seconds, self._clock = most, seconds, clock
        self._told: dict[Hashable, tuple[float, int]] = {}  # since when, how many lines

    def note(self, *kind: Hashable) -> str | None:
        """What to write behind the line, mostly ""; None: the line is left out."""
        now = self._clock()
        since, count = self._told.get(kind, (now, 0))
        behind = ""
        if now - since >= self._seconds:
            left_out = max(0, count - self._most)
            behind = f" ({left_out} more like it in {now - since:.0f} s)" if left_out else ""
            since, count = now, 0
            if len(self._told) > LEAST_KEPT:
                recent = now - self._seconds
                self._told = {k: told for k, told in self._told.items() if told[0] > recent}
        self._told[kind] = since, count + 1
        return behind if count < self._most else None
