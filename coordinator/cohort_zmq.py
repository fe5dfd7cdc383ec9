"""Real devices as a cohort: who is there, what they can train, deadlines and quorum.

One thread, one socket; a round's transfers are in seats.py. Whatever a device does, the others and
the round go on. While the caller aggregates, messages wait in ZeroMQ's queues, and no device is
taken for silent for it.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from coordinator.cohort import Absence, Assignment, Client, ClientUpdate
from coordinator.cohort_status import cohort_state
from coordinator.hub import Hub, Received
from coordinator.seats import UPLOAD_BUDGET_BYTES, RoundDesk
from coordinator.status import CohortState
from coordinator.tally import Tally
from edge_sdk.logs import event
from edge_sdk.transport import Payload
from edge_sdk.wire import (
    PROTOCOL,
    Bye,
    Fault,
    Fetch,
    Heartbeat,
    Hello,
    Message,
    ModelSpec,
    Part,
    Plan,
    Ready,
    Update,
    Welcome,
)

log = logging.getLogger(__name__)
HEARTBEAT_S = 5.0
SILENCE_S = 45.0  # a device that says nothing for so long is gone
TELL_S = 15.0  # between lines about what is waited for
FAREWELL_S = 3.0  # for devices to answer a Bye
LISTENING_GAP_S = 1.0  # a longer pause between two looks was the caller's


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
    """One client's live link. ready: what it can train; None while it must say so anew."""

    route: bytes
    hello: Hello
    seen: float
    ready: Ready | None = None


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
        self._desk: RoundDesk | None = None
        self._is_assembled = False
        self._tally = Tally()
        self._listened = time.monotonic()
        self._num_heard = 0  # messages since the last look after the silent

    # -- Cohort ------------------------------------------------------------------------------

    def clients(self) -> Sequence[Client]:
        """Devices ready to train. Waits for min_clients before the first round, for a quorum of
        them before later ones, and says what it waits for."""
        least = self._terms.min_clients
        if self._is_assembled:
            least = max(1, math.ceil(self._terms.quorum * least))
        self._drain()
        told = 0.0
        while len(ready := self._ready_clients()) < least:
            if time.monotonic() - told > TELL_S:
                told = time.monotonic()
                log.info("waiting for devices: %d of %d ready", len(ready), least)
            self._pump()
        self._is_assembled = True
        return ready

    def train(
        self, work: Mapping[str, Assignment], round: int, deadline_s: float
    ) -> Iterator[ClientUpdate | Absence]:
        """Hand out the jobs; yield each result as it completes. The round closes when nobody is
        left to wait for, or at deadline + grace once a quorum has returned or no longer can."""
        desk = self._desk = RoundDesk(round, deadline_s, self._send)
        ready = {client.id: client for client in self._ready_clients()}
        started = told = time.monotonic()
        needed, returned = math.ceil(self._terms.quorum * len(work)), 0
        try:
            for name, assignment in work.items():
                if name in ready:
                    desk.give(ready[name], assignment, self._devices[name].hello)
                else:
                    desk.miss(Client(id=name, exit=assignment.model.exit), assignment)
            while True:
                while desk.finished:
                    returned += isinstance(desk.finished[0], ClientUpdate)
                    self._note(desk.finished[0])
                    yield desk.finished.pop(0)  # no reference stays here
                    self._num_heard = 0  # messages waited for the caller
                if desk.is_over:
                    return
                overdue_s = time.monotonic() - started - deadline_s - self._terms.grace_s
                is_hopeless = returned + desk.num_open < needed  # too many have failed
                if overdue_s > 0 and (returned >= needed or is_hopeless):
                    self._drain()  # what came while the caller aggregated is not late
                    if not desk.finished:
                        desk.close_late()
                    continue
                if overdue_s > 0 and time.monotonic() - told > TELL_S:
                    told = time.monotonic()
                    log.warning("round %d: %d of %d needed returned", round, returned, needed)
                self._pump()
        finally:
            self._desk = None

    def snapshot(self) -> CohortState:
        """What everybody does now; for the thread that uses the cohort."""
        seats = self._desk.seats if self._desk else {}
        return cohort_state(
            self._tally,
            self._devices,
            seats,
            round=self._desk.number if self._desk else 0,
            needed=math.ceil(self._terms.quorum * len(seats)),
            budget_bytes=UPLOAD_BUDGET_BYTES,
            strangers=self._hub.num_strangers,
            now=time.monotonic(),
        )

    def close(self, reason: str, *, is_final: bool) -> None:
        """Tell every device and wait for its answer, not long, then close the socket: ZeroMQ drops
        what a device has not read yet when the connection ends."""
        for name in self._devices:
            self._send(name, Bye(reason=reason, is_final=is_final))
        give_up = time.monotonic() + FAREWELL_S
        while self._devices and time.monotonic() < give_up:
            _, received = self._hub.receive(100)
            if received is not None and isinstance(received.message, Bye):
                name = self._names.get(received.route, "")
                if name in self._devices:
                    self._leave(name, "said bye")
        self._hub.close()

    # -- devices -----------------------------------------------------------------------------

    def _ready_clients(self) -> list[Client]:
        return [
            Client(
                id=name,
                exit=device.ready.exit,
                stages=device.ready.stages,
                prefix_s=device.ready.prefix_s,
                stage_s=device.ready.stage_s,
                num_examples=device.hello.num_examples,
                profile=device.hello.profile,
            )
            for name, device in sorted(self._devices.items())
            if device.ready is not None and device.ready.exit > 0
        ]

    def _note(self, result: ClientUpdate | Absence) -> None:
        """A device that failed or was late gets no job until it says that it is ready."""
        name, down, up = result.client.id, result.bytes_down, result.bytes_up
        if not isinstance(result, Absence):
            self._tally.result(name, "accepted", down, up)
            return
        self._tally.fault(name, result.code)
        self._tally.result(name, "late" if result.code == "late" else "failed", down, up)
        device = self._devices.get(name)
        if device and result.code != "gone":
            device.ready = None

    def _send(self, name: str, message: Message, payload: Payload | None = None) -> bool:
        device = self._devices.get(name)
        return device is not None and self._hub.send(device.route, message, payload)

    def _drain(self) -> None:
        """Handle what came while nobody listened, a bounded number of messages, up to a result: the
        caller takes it before what its device says next, as a ready, is handled, and before another
        update is whole, which would be outside the budget."""
        for _ in range(self._many):
            if not self._pump(0) or (self._desk and self._desk.finished):
                return

    @property
    def _many(self) -> int:
        """So many messages and everybody has been heard: ZeroMQ takes them from all by turns."""
        return 100 * (len(self._devices) + 10)

    def _pump(self, timeout_ms: int = 500) -> bool:
        """Handle one message if there is one; look after those who are silent, also while one
        never stops talking. Raises Stopped."""
        if self._should_stop():
            raise Stopped
        now = time.monotonic()
        if now - self._listened > LISTENING_GAP_S:
            for device in self._devices.values():
                device.seen += now - self._listened
        has_message, received = self._hub.receive(0)
        self._num_heard += 1
        if not has_message or self._num_heard > self._many:  # all that came has been heard
            self._num_heard = 0
            self._drop_silent()
            if self._desk:
                self._desk.check_stalls()
        if not has_message:
            has_message, received = self._hub.receive(timeout_ms)
        self._listened = time.monotonic()
        if received is not None:
            self._handle(received)
        return has_message

    def _drop_silent(self) -> None:
        now = time.monotonic()
        for name in [n for n, d in self._devices.items() if now - d.seen > SILENCE_S]:
            self._leave(name, f"said nothing for {SILENCE_S:.0f} s")

    def _leave(self, name: str, why: str) -> None:
        device = self._devices.pop(name)
        self._names.pop(device.route, None)
        self._tally.of(name).seen = device.seen
        log.info("%s is gone: %s", name, why, extra=event("gone", client=name))
        if self._desk:
            self._desk.on_gone(name, "gone", why)

    # -- messages ----------------------------------------------------------------------------

    def _handle(self, received: Received) -> None:
        route, message = received.route, received.message
        if isinstance(message, Hello):
            self._on_hello(received, message)
            return
        name = self._names.get(route)
        device = self._devices.get(name) if name else None
        if name is None or device is None or device.route != route:
            self._refuse(route, "hello", "this connection has not said hello")
            return
        if received.name not in (None, name):
            self._refuse(route, "admission", f"this key no longer belongs to {name!r}")
            return
        device.seen = time.monotonic()
        if isinstance(message, Heartbeat):
            self._send(name, Heartbeat(round=message.round))
            if self._desk:
                self._desk.on_heartbeat(name, message.round)
        elif isinstance(message, Ready):
            self._on_ready(name, device, message)
        elif isinstance(message, Bye):
            self._leave(name, "said bye")
        elif isinstance(message, Fetch | Part | Update | Fault):
            self._on_round_message(name, message, received.payload)
        else:
            self._refuse(route, "protocol", f"{type(message).__name__} is not for coordinators")

    def _on_round_message(
        self, name: str, message: Fetch | Part | Update | Fault, payload: Payload | None
    ) -> None:
        if isinstance(message, Fault):
            extra = event("fault", client=name, code=message.code, round=message.round)
            log.warning("%s reports %s: %s", name, message.code, message.detail, extra=extra)
            if self._desk is None or self._desk.open_seat(name) is None:
                self._tally.fault(name, message.code)  # else it counts as its absence
        if self._desk is None:
            if isinstance(message, Update):
                detail = f"no update of round {message.round} is wanted now"
                self._send(name, Fault(code="round", detail=detail, round=message.round))
        elif isinstance(message, Fault) and message.code in ("protocol", "version"):
            self._desk.on_gone(name, message.code, message.detail)
        else:
            self._desk.on_message(name, message, payload)

    def _on_hello(self, received: Received, hello: Hello) -> None:
        route, name = received.route, hello.client_id
        known = received.name or self._names.get(route, name)
        if known != name:
            self._refuse(route, "admission", f"this is {known!r}, hello says {name!r}")
            return
        model = self._terms.model
        if hello.input_shape != model.input_shape or hello.num_classes > model.num_classes:
            detail = (
                f"its examples are {hello.input_shape} with {hello.num_classes} classes, this run "
                f"trains on {model.input_shape} with {model.num_classes}"
            )
            self._refuse(route, "data", detail)
            return
        old = self._devices.get(name)
        if old is not None:
            self._names.pop(old.route, None)
        is_same = old is not None and old.hello.session == hello.session
        self._names[route] = name
        ready = old.ready if old is not None and is_same else None
        self._devices[name] = _Device(route, hello, time.monotonic(), ready)
        counts = self._tally.of(name)
        counts.address, counts.platform = received.address, hello.profile.platform
        extra = event("back" if is_same else "joined", client=name, address=received.address)
        said = "is back" if is_same else "joined"
        log.info("%s %s from %s", name, said, hello.profile.platform, extra=extra)
        terms = self._terms
        welcome = Welcome(
            protocol=PROTOCOL,
            run=terms.run,
            model=terms.model,
            plan=terms.plan,
            deadline_s=terms.deadline_s,
            heartbeat_s=HEARTBEAT_S,
        )
        self._send(name, welcome)
        if self._desk:
            self._desk.on_return(name, hello)
        elif hello.round:
            detail = f"round {hello.round} is over"
            self._send(name, Fault(code="round", detail=detail, round=hello.round))

    def _on_ready(self, name: str, device: _Device, ready: Ready) -> None:
        deepest = self._terms.model.exit
        if ready.exit > deepest or any(stage > deepest for stage in ready.stages):
            self._refuse(device.route, "protocol", f"the model has {deepest} exits")
            return
        if ready.stage_s and len(ready.stage_s) != len(ready.stages):
            detail = f"{len(ready.stage_s)} stage_s for {len(ready.stages)} stages"
            self._refuse(device.route, "protocol", detail)
            return
        if device.ready is None or device.ready.exit != ready.exit:
            log.info("%s trains up to exit %d (%s)", name, ready.exit, ready.reason)
        device.ready = ready

    def _refuse(self, route: bytes, code: str, detail: str) -> None:
        """A Fault that is not about a round."""
        self._tally.fault(self._names.get(route), code)
        log.debug("fault to a device: %s: %s", code, detail, extra=event("refused", code=code))
        self._hub.send(route, Fault(code=code, detail=detail))
