"""Parts between the coordinator and everybody who has a job, as Credit lets them go."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping

from coordinator.fleet.flow_control import Credit
from coordinator.fleet.open_job import Seat
from edge_sdk.protocol.link import Payload
from edge_sdk.protocol.messages import Fetch, Message, Part
from edge_sdk.protocol.stream import PART_BYTES


class Transfers:
    """seats: who has a job, by name; send as Desk's."""

    def __init__(
        self,
        seats: Mapping[str, Seat],
        credit: Credit,
        send: Callable[[str, Message, Payload | None], bool],
    ) -> None:
        self._seats = seats
        self._credit = credit
        self._send = send

    def pump(self) -> None:
        """Let those whose turn it is move as much as the budget allows."""
        while turn := self._credit.next():
            if seat := self._seats.get(turn[0]):
                self._move(seat, turn[1])

    def ask(self, seat: Seat) -> None:
        """Its turn comes, if it has anything to move."""
        if seat.has_to_move:
            self._credit.ask(seat.name, seat.pace.is_slow)

    def on_fetch(self, seat: Seat, fetch: Fetch) -> bool:
        """The device says what it has, and wants more. False: it has asked in too many pieces."""
        if not seat.want(fetch.first, fetch.count):
            return False
        if arrived := seat.has_arrived(fetch.have):
            self._credit.arrived(seat.name, arrived)
        self.ask(seat)
        return True

    def arrived(self, seat: Seat) -> None:
        """A new part of its update is here."""
        self._credit.arrived(seat.name, 1)
        seat.stalls = 0
        seat.took(PART_BYTES)

    def break_off(self, seat: Seat) -> None:
        """The connection is another one, or none: nothing is under way."""
        self._credit.drop(seat.name)
        seat.reconnected()
        if seat.receiver is not None:
            self.ask(seat)

    def lost(self, seat: Seat) -> None:
        """Nothing is heard of it; it is not there to be asked."""
        if self._credit.held(seat.name):
            seat.pace.stalled()
        self.break_off(seat)
        self._credit.drop(seat.name)

    def stalled(self) -> Iterator[Seat]:
        """Those whose parts would have come by now at their link's own pace."""
        now = time.monotonic()
        for name in self._credit.holders():
            seat = self._seats.get(name)
            if seat is None or now - seat.moved <= seat.patience_s(self._credit.held(name)):
                continue
            self._credit.drop(name)
            seat.pace.stalled()
            seat.moved = now
            yield seat

    def patience_s(self, name: str) -> float:
        """How long a device may say nothing because a part is on its way; 0 if none is."""
        seat, held = self._seats.get(name), self._credit.held(name)
        return seat.patience_s(held) if seat and held else 0.0

    def _move(self, seat: Seat, parts: int) -> None:
        """Ask for, or send, up to so many parts. What cannot be sent waits until the device says
        something: its connection is lost, or the queue of a slow one is full."""
        if not self._credit.held(seat.name):
            seat.moved = time.monotonic()
        if seat.receiver is not None:
            under_way = seat.receiver.num_under_way
            request = seat.receiver.request(min(parts, seat.pace.window - under_way))
            if request is None:
                return
            first, count = request
            have = seat.receiver.num_received
            fetch = Fetch(round=seat.round, have=have, first=first, count=count)
            if self._send(seat.name, fetch, None):
                self._credit.take(seat.name, count, seat.pace.is_slow)
                self.ask(seat)
            else:
                seat.receiver.restart()
            return
        for _ in range(parts):
            if (index := seat.next_wanted()) is None:
                return
            payload = seat.sender.part(index)
            if not self._send(seat.name, Part(round=seat.round, index=index), payload):
                return
            seat.has_sent()
            self._credit.take(seat.name, 1, seat.pace.is_slow)
            seat.bytes_down += len(payload)
        self.ask(seat)
