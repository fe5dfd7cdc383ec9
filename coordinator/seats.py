"""One round's participants over the network: jobs out, updates in, each update whole or not at all.

Uploads are admitted while their bytes fit a budget, so memory does not grow with the number of
participants: the updates under way take UPLOAD_BUDGET_BYTES or one update, whichever is more.
No socket here: `send` takes a client's name.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from coordinator.cohort import Absence, Assignment, Client, ClientUpdate
from edge_sdk.errors import EdgeError, ShapeError
from edge_sdk.tensors import Receiver, Sender, check_finite, check_specs
from edge_sdk.transport import Payload
from edge_sdk.wire import (
    Accepted,
    Fault,
    Fetch,
    Hello,
    Job,
    Message,
    Part,
    Phase,
    Update,
    layout,
)

log = logging.getLogger(__name__)
WINDOW = 8  # parts under way per upload
UPLOAD_BUDGET_BYTES = 64 * 1024**2  # of updates being received; one larger update still fits
RESEND_S = 10.0  # a device that says it has another job gets it again
STALL_S = 30.0  # an upload without a new part is asked for again, then failed


@dataclass
class Seat:
    """One participant. outcome: "" while it is waited for, then "ok" or what its Absence says."""

    client: Client
    job: Job
    assignment: Assignment
    sender: Sender
    hello: Hello
    mismatched_since: float | None = None
    update: Update | None = None
    announced: float = 0.0
    receiver: Receiver | None = None
    moved: float = 0.0  # when the last new part came, or was asked for again
    has_stalled: bool = False
    bytes_down: int = 0
    bytes_up: int = 0
    outcome: str = ""


class RoundDesk:
    """send(name, message, payload): False when the device cannot be reached now. Results gather in
    `finished`, from where the cohort takes them."""

    def __init__(
        self, number: int, deadline_s: float, send: Callable[[str, Message, Payload | None], bool]
    ) -> None:
        self.number = number
        self.finished: list[ClientUpdate | Absence] = []
        self._deadline_s = deadline_s
        self._send = send
        self._seats: dict[str, Seat] = {}

    @property
    def num_open(self) -> int:
        """Participants that are still waited for."""
        return sum(not seat.outcome for seat in self._seats.values())

    @property
    def seats(self) -> Mapping[str, Seat]:
        return self._seats

    @property
    def is_over(self) -> bool:
        return self.num_open == 0

    def open_seat(self, name: str) -> Seat | None:
        """The seat that is still waited for, if this client has one."""
        seat = self._seats.get(name)
        return seat if seat and not seat.outcome else None

    def give(self, client: Client, assignment: Assignment, hello: Hello) -> None:
        """Send one participant its job."""
        sender = Sender(assignment.tensors)
        job = Job(
            round=self.number,
            model=assignment.model,
            plan=assignment.plan,
            tensors=sender.specs,
            deadline_s=self._deadline_s,
        )
        self._seats[client.id] = Seat(client, job, assignment, sender, hello)
        self._send(client.id, job, None)

    def miss(self, client: Client, assignment: Assignment) -> None:
        """A participant that left between being chosen and being given its job."""
        self.finished.append(
            Absence(client, assignment.plan.segments, "failed", "gone", "left before its job")
        )

    def close_late(self) -> None:
        """Count everybody who is still waited for as a straggler and tell them."""
        late = [seat for seat in self._seats.values() if not seat.outcome]
        for seat in late:
            seat.update = None  # or each one closed would let the next begin its upload
        for seat in late:
            self._fault(seat.client.id, "late", "the round was closed without this update")
            self._absent(seat, "straggler", "late", "did not return in time")

    # -- what devices say ----------------------------------------------------------------------

    def on_message(
        self, name: str, message: Fetch | Part | Update | Fault, payload: Payload | None
    ) -> None:
        """A message about a round. What is not about this client's open seat is refused."""
        seat = self._seats.get(name)
        if seat is None or message.round != self.number:
            if isinstance(message, Update):
                detail = f"no update of round {message.round} is wanted from {name} now"
                self._fault(name, "round", detail, message.round)
        elif seat.outcome:
            if isinstance(message, Update) and seat.outcome == "ok":  # sent twice counts once
                self._send(name, Accepted(round=self.number), None)
            elif isinstance(message, Update):
                self._fault(name, "round", f"{name} has failed in this round already")
        elif isinstance(message, Fault):
            self._absent(seat, "failed", message.code, message.detail)
        elif isinstance(message, Fetch):
            self._send_parts(seat, message)
        elif isinstance(message, Update):
            self._on_update(seat, message)
        elif seat.receiver is not None:
            self._on_part(seat, message.index, payload or b"")

    def on_return(self, name: str, hello: Hello) -> None:
        """A device connected again: go on where the link broke, or count it as failed."""
        seat = self._seats.get(name)
        if seat and seat.outcome == "ok" and hello.round == self.number:
            self._send(name, Accepted(round=self.number), None)  # the first one was lost
            return
        if hello.round and (seat is None or seat.outcome or hello.round != self.number):
            self._fault(name, "round", f"round {hello.round} is over", hello.round)
        if seat is None or seat.outcome:
            return
        if hello.session != seat.hello.session:
            self._absent(seat, "failed", "restarted", "the device restarted during its job")
        elif hello.round != self.number:
            self._send_again(seat)
        elif seat.receiver is not None:
            seat.receiver.restart()
            self._fetch(seat)

    def on_heartbeat(self, name: str, round: int) -> None:
        """A device that has another job in hand, or none, for a while never got this one."""
        seat = self.open_seat(name)
        if seat is None or round == self.number:
            if seat:
                seat.mismatched_since = None
            return
        now = time.monotonic()
        if seat.mismatched_since is None:  # may have been sent before the job came
            seat.mismatched_since = now
        elif now - seat.mismatched_since > RESEND_S:
            self._send_again(seat)

    def on_gone(self, name: str, code: str, why: str) -> None:
        if seat := self.open_seat(name):
            self._absent(seat, "failed", code, why)

    def check_stalls(self) -> None:
        """Ask again for uploads that stopped, then give them up: they hold the budget."""
        now = time.monotonic()
        for seat in [s for s in self._seats.values() if s.receiver and now - s.moved > STALL_S]:
            assert seat.receiver is not None
            if seat.has_stalled:
                detail = f"its update stopped after {seat.bytes_up} bytes"
                self._fault(seat.client.id, "stalled", detail)
                self._absent(seat, "failed", "stalled", detail)
                continue
            seat.has_stalled, seat.moved = True, now
            seat.receiver.restart()
            self._fetch(seat)

    # -- inside --------------------------------------------------------------------------------

    def _send_again(self, seat: Seat) -> None:
        seat.update = seat.receiver = None
        seat.mismatched_since = None
        self._send(seat.client.id, seat.job, None)
        self._admit_uploads()

    def _send_parts(self, seat: Seat, fetch: Fetch) -> None:
        """Parts go out as the receiver asks. One that cannot be sent was lost with its connection:
        the device asks again when it is back."""
        for index in range(fetch.first, min(fetch.first + fetch.count, seat.sender.num_parts)):
            payload = seat.sender.part(index)
            if not self._send(seat.client.id, Part(round=self.number, index=index), payload):
                return
            seat.bytes_down += len(payload)

    def _on_update(self, seat: Seat, update: Update) -> None:
        if seat.update is not None:  # announced again after a reconnect
            return
        if not seat.bytes_down:  # of a job that a coordinator gave before it was killed; the device
            return  # has not fetched this one yet
        try:
            check_update(update, seat)
        except EdgeError as error:
            self._refuse(seat, error)
            return
        seat.update, seat.announced = update, time.monotonic()
        self._admit_uploads()

    def _admit_uploads(self) -> None:
        """Start announced uploads, oldest first, while their bytes fit the budget."""
        open_bytes = sum(s.receiver.total_bytes for s in self._seats.values() if s.receiver)
        waiting = [s for s in self._seats.values() if s.update and not s.receiver and not s.outcome]
        for seat in sorted(waiting, key=lambda seat: seat.announced):
            assert seat.update is not None
            size = layout(seat.update.tensors)[1]
            if open_bytes and open_bytes + size > UPLOAD_BUDGET_BYTES:
                return
            seat.receiver, seat.moved = Receiver(seat.update.tensors), time.monotonic()
            if seat.receiver.is_complete:  # an update of no bytes
                self._complete(seat, seat.receiver)
                return
            open_bytes += size
            self._fetch(seat)

    def _fetch(self, seat: Seat) -> None:
        if seat.receiver and (request := seat.receiver.next_request(WINDOW)):
            first, count = request
            self._send(seat.client.id, Fetch(round=self.number, first=first, count=count), None)

    def _on_part(self, seat: Seat, index: int, payload: Payload) -> None:
        assert seat.receiver is not None
        try:
            if not seat.receiver.add(index, payload):
                return  # a repeated part is no progress, or one device could hold the budget
            seat.bytes_up += len(payload)
            seat.moved, seat.has_stalled = time.monotonic(), False
            if seat.receiver.is_complete:
                self._complete(seat, seat.receiver)
            else:
                self._fetch(seat)
        except EdgeError as error:
            self._refuse(seat, error)

    def _complete(self, seat: Seat, receiver: Receiver) -> None:
        """Everything arrived: check the values, then it counts. Raises ShapeError."""
        update = seat.update
        assert update is not None
        tensors = receiver.tensors()
        check_finite(tensors, f"update from {seat.client.id}, round {self.number}")
        upload = Phase(wall_s=time.monotonic() - seat.announced)
        seat.outcome, seat.receiver = "ok", None
        self._send(seat.client.id, Accepted(round=self.number), None)
        self.finished.append(
            ClientUpdate(
                client=seat.client,
                tensors=tensors,
                segments=seat.job.plan.segments,
                num_examples=update.num_examples,
                num_steps=update.num_steps,
                exits=update.exits,
                phases=dict(update.phases) | {"upload": upload},
                peak_memory_bytes=update.peak_memory_bytes,
                bytes_down=seat.bytes_down,
                bytes_up=seat.bytes_up,
                retries=update.retries,
                micro_batch=update.micro_batch,
                recompute=update.recompute,
            )
        )
        self._admit_uploads()

    def _refuse(self, seat: Seat, error: EdgeError) -> None:
        self._fault(seat.client.id, error.code, str(error))
        self._absent(seat, "failed", error.code, str(error))

    def _absent(self, seat: Seat, outcome: str, code: str, detail: str) -> None:
        """The participant returns nothing that counts."""
        log.warning("round %d: %s %s: %s: %s", self.number, seat.client.id, outcome, code, detail)
        seat.receiver, seat.outcome = None, outcome
        self.finished.append(
            Absence(
                seat.client, seat.job.plan.segments, outcome, code, detail,
                bytes_down=seat.bytes_down, bytes_up=seat.bytes_up,
            )
        )  # fmt: skip
        self._admit_uploads()

    def _fault(self, name: str, code: str, detail: str, round: int | None = None) -> None:
        number = self.number if round is None else round
        self._send(name, Fault(code=code, detail=detail, round=number), None)


def check_update(update: Update, seat: Seat) -> None:
    """Raise ShapeError unless the announced update is what the job asked for."""
    where = f"update from {seat.client.id}, round {update.round}"
    check_specs(update.tensors, seat.assignment.returns, where)
    if update.num_examples > seat.hello.num_examples:
        raise ShapeError(
            f"{where}: {update.num_examples} examples, hello said {seat.hello.num_examples}"
        )
    segments = seat.job.plan.segments
    trained = {exit for g in segments for exit in range(g.first, g.last + 1)}
    told = [result.exit for result in update.exits]
    if sorted(told) != sorted(trained):
        raise ShapeError(f"{where}: results of exits {told}, trained were {sorted(trained)}")
    for result in update.exits:
        if not math.isfinite(result.loss):
            raise ShapeError(f"{where}: loss of exit {result.exit} is {result.loss}")
