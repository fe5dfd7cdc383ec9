"""Real devices as a cohort: admission, jobs, transfers with credit, deadlines, stragglers.

One thread, one socket. Uploads are admitted while their bytes fit a budget, so memory does not grow
with the number of participants; an update counts only when it has arrived whole and was checked.
Whatever a device does, the others and the round go on.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from coordinator.cohort import Absence, Assignment, Client, ClientUpdate
from coordinator.hub import Hub, Received
from edge_sdk.errors import EdgeError, ShapeError
from edge_sdk.tensors import Receiver, Sender, check_finite, check_specs
from edge_sdk.wire import (
    PROTOCOL,
    Accepted,
    Bye,
    Fault,
    Fetch,
    Heartbeat,
    Hello,
    Job,
    ModelSpec,
    Part,
    Phase,
    Plan,
    Ready,
    Update,
    Welcome,
    layout,
)

log = logging.getLogger(__name__)
WINDOW = 8  # parts under way per upload
UPLOAD_BUDGET_BYTES = 64 * 1024**2  # of updates being received; one larger update still fits
HEARTBEAT_S = 5.0
SILENCE_S = 45.0  # a device that says nothing for so long is gone
TELL_S = 15.0  # between lines about what is waited for


class Stopped(Exception):
    """The run was asked to stop; the round in progress is dropped."""


@dataclass(frozen=True)
class Terms:
    """What every device is told, and when a round may close."""

    run: str
    model: ModelSpec
    plan: Plan
    deadline_s: float
    grace_s: float
    quorum: float
    min_clients: int


@dataclass
class _Device:
    """One client's live link."""

    route: bytes
    hello: Hello
    seen: float
    ready: Ready | None = None


@dataclass
class _Seat:
    """One participant in the round in progress."""

    client: Client
    job: Job
    assignment: Assignment
    sender: Sender
    session: str
    update: Update | None = None
    receiver: Receiver | None = None
    announced: float = 0.0
    bytes_down: int = 0
    bytes_up: int = 0
    outcome: str = ""  # "", then "ok" or what an Absence says


@dataclass
class _Round:
    number: int
    seats: dict[str, _Seat] = field(default_factory=dict)
    finished: list[ClientUpdate | Absence] = field(default_factory=list)


class ZmqCohort:
    """Clients over a Hub. should_stop is asked about twice a second; then Stopped is raised."""

    def __init__(
        self, hub: Hub, terms: Terms, should_stop: Callable[[], bool] = lambda: False
    ) -> None:
        self._hub = hub
        self._terms = terms
        self._should_stop = should_stop
        self._devices: dict[str, _Device] = {}
        self._names: dict[bytes, str] = {}
        self._round: _Round | None = None
        self._is_assembled = False

    # -- Cohort ------------------------------------------------------------------------------

    def clients(self) -> Sequence[Client]:
        """Devices ready to train. Waits for min_clients before the first round, for a quorum of
        them before later ones, and says what it waits for."""
        least = self._terms.min_clients
        if self._is_assembled:
            least = max(1, math.ceil(self._terms.quorum * least))
        told = 0.0
        while len(ready := self._ready_clients()) < least:
            if time.monotonic() - told > TELL_S:
                told = time.monotonic()
                log.info("waiting for devices: %d of %d ready", len(ready), least)
            self._pump()
        while self._pump(0):
            pass
        self._is_assembled = True
        return self._ready_clients()

    def train(
        self, work: Mapping[str, Assignment], round: int, deadline_s: float
    ) -> Iterator[ClientUpdate | Absence]:
        """Hand out the jobs; yield each result as it completes. The round closes when nobody is
        left to wait for, or at deadline + grace once a quorum has returned."""
        self._round = _Round(round)
        started = told = time.monotonic()
        try:
            for client_id, assignment in work.items():
                self._seat(client_id, assignment, round, deadline_s)
            needed = math.ceil(self._terms.quorum * len(work))
            returned = 0
            while True:
                while self._round.finished:
                    returned += isinstance(self._round.finished[0], ClientUpdate)
                    yield self._round.finished.pop(0)  # no reference stays here
                if all(seat.outcome for seat in self._round.seats.values()):
                    return
                late = time.monotonic() - started - (deadline_s or 0) - self._terms.grace_s
                if late > 0 and returned >= needed:
                    self._close_late(round)
                elif late > 0 and time.monotonic() - told > TELL_S:
                    told = time.monotonic()
                    log.warning("round %d: %d of %d needed", round, returned, needed)
                self._pump()
        finally:
            self._round = None

    def close(self, reason: str) -> None:
        """Tell every device, then close the socket."""
        for device in self._devices.values():
            self._hub.send(device.route, Bye(reason=reason))
        time.sleep(0.2)  # LINGER is 0: let the goodbyes leave
        self._hub.close()

    # -- rounds ------------------------------------------------------------------------------

    def _ready_clients(self) -> list[Client]:
        return [
            Client(
                id=name,
                exit=device.ready.exit,
                stages=device.ready.stages,
                num_examples=device.hello.num_examples,
                profile=device.hello.profile,
            )
            for name, device in sorted(self._devices.items())
            if device.ready is not None and device.ready.exit > 0
        ]

    def _seat(self, name: str, assignment: Assignment, round: int, deadline_s: float) -> None:
        """Give one participant its job; one that left since it was chosen has failed."""
        assert self._round is not None
        client = next((c for c in self._ready_clients() if c.id == name), Client(id=name, exit=1))
        sender = Sender(assignment.tensors)
        job = Job(
            round=round,
            model=assignment.model,
            plan=assignment.plan,
            tensors=sender.specs,
            deadline_s=deadline_s,
        )
        device = self._devices.get(name)
        session = device.hello.session if device else ""
        seat = _Seat(client, job, assignment, sender, session)
        self._round.seats[name] = seat
        if device is None:
            self._absent(seat, "failed", "link", "left before the round began")
        else:
            self._hub.send(device.route, job)

    def _close_late(self, round: int) -> None:
        assert self._round is not None
        for name, seat in self._round.seats.items():
            if not seat.outcome:
                self._absent(seat, "straggler", "late", "did not return in time")
                if device := self._devices.get(name):
                    device.ready = None  # until it says that it dropped the job
                    detail = "the round was closed without this update"
                    self._hub.send(device.route, Fault(code="late", detail=detail, round=round))

    def _absent(self, seat: _Seat, outcome: str, code: str, detail: str) -> None:
        """The participant returns nothing that counts."""
        assert self._round is not None
        log.warning("round %d: %s %s: %s", seat.job.round, seat.client.id, outcome, detail)
        seat.receiver = None
        seat.outcome = outcome
        self._round.finished.append(
            Absence(seat.client, outcome, code, detail, {}, seat.bytes_down, seat.bytes_up)
        )
        self._admit_uploads()

    def _admit_uploads(self) -> None:
        """Start announced uploads, oldest first, while their bytes fit the budget."""
        assert self._round is not None
        open_bytes = sum(s.receiver.total_bytes for s in self._round.seats.values() if s.receiver)
        waiting = [
            s for s in self._round.seats.values() if s.update and not s.receiver and not s.outcome
        ]
        for seat in sorted(waiting, key=lambda seat: seat.announced):
            assert seat.update is not None
            size = layout(seat.update.tensors)[1]
            if open_bytes and open_bytes + size > UPLOAD_BUDGET_BYTES:
                return
            seat.receiver = Receiver(seat.update.tensors)
            open_bytes += size
            self._fetch(seat)

    def _fetch(self, seat: _Seat) -> None:
        device = self._devices.get(seat.client.id)
        if device and seat.receiver and (request := seat.receiver.next_request(WINDOW)):
            first, count = request
            self._hub.send(device.route, Fetch(round=seat.job.round, first=first, count=count))

    # -- messages ----------------------------------------------------------------------------

    def _pump(self, timeout_ms: int = 500) -> bool:
        """Handle one message if there is one; look after silent devices. Raises Stopped."""
        if self._should_stop():
            raise Stopped
        received = self._hub.receive(timeout_ms)
        if received is not None:
            self._handle(received)
        self._drop_silent()
        return received is not None

    def _handle(self, received: Received) -> None:
        route, message = received.route, received.message
        if isinstance(message, Hello):
            self._on_hello(received, message)
            return
        name = self._names.get(route)
        device = self._devices.get(name) if name else None
        if name is None or device is None or device.route != route:
            self._fault(route, "hello", "this connection has not said hello", 0)
            return
        device.seen = time.monotonic()
        if isinstance(message, Heartbeat):
            self._hub.send(route, Heartbeat(round=message.round))
        elif isinstance(message, Ready):
            self._on_ready(name, device, message)
        elif isinstance(message, Bye):
            self._leave(name, "said bye")
        elif isinstance(message, Fetch | Part | Update | Fault):
            self._on_round_message(name, route, message, received)
        else:
            self._fault(route, "protocol", f"{type(message).__name__} is not for coordinators", 0)

    def _on_hello(self, received: Received, hello: Hello) -> None:
        route, name = received.route, hello.client_id
        if received.name is not None and received.name != name:
            detail = f"this key belongs to {received.name!r}, hello says {name!r}"
            self._fault(route, "admission", detail, 0)
            return
        model = self._terms.model
        if hello.input_shape != model.input_shape or hello.num_classes > model.num_classes:
            detail = (
                f"its examples are {hello.input_shape} with {hello.num_classes} classes, this run "
                f"trains on {model.input_shape} with {model.num_classes}"
            )
            self._fault(route, "data", detail, 0)
            return
        old = self._devices.get(name)
        if old is not None:
            self._names.pop(old.route, None)
        is_same = old is not None and old.hello.session == hello.session
        self._names[route] = name
        ready = old.ready if old is not None and is_same else None
        self._devices[name] = _Device(route, hello, time.monotonic(), ready)
        log.info("%s %s from %s", name, "is back" if is_same else "joined", hello.profile.platform)
        terms = self._terms
        self._hub.send(
            route,
            Welcome(
                protocol=PROTOCOL,
                run=terms.run,
                model=terms.model,
                plan=terms.plan,
                deadline_s=terms.deadline_s,
                heartbeat_s=HEARTBEAT_S,
            ),
        )
        self._resume_seat(name, hello)

    def _resume_seat(self, name: str, hello: Hello) -> None:
        """A participant reconnected: go on where the link broke, or count it as failed."""
        seat = self._round.seats.get(name) if self._round else None
        if seat is None or seat.outcome:
            return
        if hello.session != seat.session:
            self._absent(seat, "failed", "restarted", "the device restarted during its job")
        elif hello.round != seat.job.round:
            seat.update = seat.receiver = None
            self._hub.send(self._devices[name].route, seat.job)
        elif seat.receiver is not None:
            seat.receiver.restart()
            self._fetch(seat)

    def _on_ready(self, name: str, device: _Device, ready: Ready) -> None:
        deepest = self._terms.model.exit
        if ready.exit > deepest or any(stage > deepest for stage in ready.stages):
            self._fault(device.route, "protocol", f"the model has {deepest} exits", 0)
            return
        if device.ready is None or device.ready.exit != ready.exit:
            log.info("%s trains up to exit %d (%s)", name, ready.exit, ready.reason)
        device.ready = ready

    def _on_round_message(
        self, name: str, route: bytes, message: Fetch | Part | Update | Fault, received: Received
    ) -> None:
        seat = self._round.seats.get(name) if self._round else None
        if isinstance(message, Fault):
            log.warning("%s reports %s: %s", name, message.code, message.detail)
        if seat is None or self._round is None or message.round != self._round.number:
            if isinstance(message, Update):
                detail = f"no update of round {message.round} is wanted from {name} now"
                self._fault(route, "round", detail, message.round)
            return
        if seat.outcome:
            if isinstance(message, Update):
                self._answer_again(seat, route)
            return
        if isinstance(message, Fault):
            self._absent(seat, "failed", message.code, message.detail)
        elif isinstance(message, Fetch):
            self._send_parts(seat, route, message)
        elif isinstance(message, Update):
            self._on_update(seat, route, message)
        elif seat.receiver is not None:
            self._on_part(seat, route, message.index, received)

    def _answer_again(self, seat: _Seat, route: bytes) -> None:
        """An update sent twice counts once."""
        round = seat.job.round
        if seat.outcome == "ok":
            self._hub.send(route, Accepted(round=round))
        else:
            self._fault(route, "twice", f"{seat.client.id} has failed in this round already", round)

    def _send_parts(self, seat: _Seat, route: bytes, fetch: Fetch) -> None:
        """Parts go out as the receiver asks; one it cannot take now it will ask for again."""
        for index in range(fetch.first, min(fetch.first + fetch.count, seat.sender.num_parts)):
            payload = seat.sender.part(index)
            if not self._hub.send(route, Part(round=fetch.round, index=index), payload):
                return
            seat.bytes_down += len(payload)

    def _on_update(self, seat: _Seat, route: bytes, update: Update) -> None:
        if seat.update is not None:  # announced again after a reconnect
            return
        try:
            check_update(update, seat, self._devices[seat.client.id].hello)
        except EdgeError as error:
            self._refuse(seat, route, error)
            return
        seat.update, seat.announced = update, time.monotonic()
        self._admit_uploads()

    def _on_part(self, seat: _Seat, route: bytes, index: int, received: Received) -> None:
        assert seat.receiver is not None
        assert seat.update is not None
        payload = received.payload or b""
        try:
            seat.receiver.add(index, payload)
            seat.bytes_up += len(payload)
            if not seat.receiver.is_complete:
                self._fetch(seat)
                return
            tensors = seat.receiver.tensors()
            check_finite(tensors, f"update from {seat.client.id}, round {seat.job.round}")
        except EdgeError as error:
            self._refuse(seat, route, error)
            return
        update = seat.update
        upload = Phase(wall_s=time.monotonic() - seat.announced)
        result = ClientUpdate(
            client=seat.client,
            tensors=tensors,
            num_examples=update.num_examples,
            num_steps=update.num_steps,
            exits=update.exits,
            phases=dict(update.phases) | {"upload": upload},
            peak_memory_bytes=update.peak_memory_bytes,
            bytes_down=seat.bytes_down,
            bytes_up=seat.bytes_up,
            retries=update.retries,
        )
        seat.outcome, seat.receiver = "ok", None
        self._hub.send(route, Accepted(round=seat.job.round))
        assert self._round is not None
        self._round.finished.append(result)
        self._admit_uploads()

    def _refuse(self, seat: _Seat, route: bytes, error: EdgeError) -> None:
        self._fault(route, error.code, str(error), seat.job.round)
        self._absent(seat, "failed", error.code, str(error))

    def _fault(self, route: bytes, code: str, detail: str, round: int) -> None:
        log.debug("fault to a device: %s: %s", code, detail)
        self._hub.send(route, Fault(code=code, detail=detail[:2000], round=round))

    def _drop_silent(self) -> None:
        now = time.monotonic()
        for name in [n for n, d in self._devices.items() if now - d.seen > SILENCE_S]:
            self._leave(name, f"said nothing for {SILENCE_S:.0f} s")

    def _leave(self, name: str, why: str) -> None:
        device = self._devices.pop(name)
        self._names.pop(device.route, None)
        log.info("%s is gone: %s", name, why)
        seat = self._round.seats.get(name) if self._round else None
        if seat is not None and not seat.outcome:
            self._absent(seat, "failed", "gone", why)


def check_update(update: Update, seat: _Seat, hello: Hello) -> None:
    """Raise ShapeError unless the announced update is what the job asked for."""
    where = f"update from {seat.client.id}, round {update.round}"
    check_specs(update.tensors, seat.assignment.returns, where)
    if update.num_examples > hello.num_examples:
        raise ShapeError(
            f"{where}: {update.num_examples} examples, hello said {hello.num_examples}"
        )
    for result in update.exits:
        if not math.isfinite(result.loss):
            raise ShapeError(f"{where}: loss of exit {result.exit} is {result.loss}")
