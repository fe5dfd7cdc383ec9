"""The other end of the link of a real agent, driven step by step from a test. Nothing sleeps: every
wait is for a message and ends after WAIT_S."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from coordinator.links.router import Received, Router
from edge_sdk.protocol.link import Payload
from edge_sdk.protocol.messages import (
    PROTOCOL,
    Fetch,
    Heartbeat,
    Job,
    Message,
    ModelSpec,
    Part,
    Plan,
    Update,
    Welcome,
)
from edge_sdk.protocol.tensors import Receiver, Sender, Tensors
from tests.support.devices import ANY_PORT, WAIT_S, M, asked_for


class ScriptedCoordinator:
    """The other end of one agent, without encryption."""

    def __init__(self) -> None:
        self.router = Router(ANY_PORT, None, None)
        self.endpoint = self.router.endpoint
        self.run = 0  # number of runs that were begun
        self.num_given = 0
        self.job: Job | None = None  # the last one
        self.route = b""
        self._is_open = True

    def send(self, message: Message, payload: Payload | None = None) -> None:
        assert self.router.send(self.route, message, payload), f"{message} was not sent"

    def receive(self) -> Received:
        """The next message; answers go where it came from."""
        until = time.monotonic() + WAIT_S
        while (left_s := until - time.monotonic()) > 0:
            _, received = self.router.receive(int(1000 * left_s))
            if isinstance(received, Received):
                self.route = received.route
                return received
        raise AssertionError(f"nothing came for {WAIT_S} s")

    def drain(self) -> None:
        """Pass over what has come: heartbeats of a long pause fill a link, and it is made anew."""
        while (received := self.router.receive(0)[1]) is not None:
            self.route = received.route

    def expect(self, kind: type[M]) -> M:
        """The next message but heartbeats, which must be of this type."""
        message = self._next(is_heartbeat_wanted=kind is Heartbeat).message
        assert isinstance(message, kind), f"expected {kind.__name__}, got {message}"
        return message

    def wait_for(self, kind: type[M], is_it: Callable[[M], bool] = lambda _: True) -> M:
        """The next message of this type that is it; others are passed over."""
        until = time.monotonic() + WAIT_S
        while time.monotonic() < until:
            message = self.receive().message
            if isinstance(message, kind) and is_it(message):
                return message
        raise AssertionError(f"no such {kind.__name__} for {WAIT_S} s")

    def welcome(self, model: ModelSpec, plan: Plan, **changes: Any) -> None:
        fields: dict[str, Any] = {
            "protocol": PROTOCOL,
            "run": f"run {self.run}",
            "model": model,
            "plan": plan,
            "deadline_s": 0.0,
            "heartbeat_s": 0.1,
        }
        self.send(Welcome(**(fields | changes)))

    def give(self, round: int, model: ModelSpec, plan: Plan, tensors: Tensors) -> Sender:
        """Send a job; the sender of its parts."""
        sender = Sender(tensors)
        self.num_given += 1
        self.job = Job(
            id=f"{self.num_given:032x}",
            round=round,
            model=model,
            plan=plan,
            tensors=sender.specs,
            deadline_s=0.0,
        )
        self.send(self.job)
        return sender

    def send_parts(self, round: int, sender: Sender, indices: Iterable[int]) -> None:
        for index in indices:
            self.send(Part(round=round, index=index), sender.part(index))

    def serve_parts(self, round: int, sender: Sender) -> None:
        """Answer the agent until it says that it has every part."""
        while (fetch := self.expect(Fetch)).have < sender.num_parts:
            asked = asked_for(fetch)
            self.send_parts(round, sender, range(asked.start, min(asked.stop, sender.num_parts)))

    def fetch_update(self, update: Update) -> Tensors:
        """The tensors of an announced update."""
        receiver = Receiver(update.tensors)
        while request := receiver.next_request(8):
            first, count = request
            have = receiver.num_received
            self.send(Fetch(round=update.round, have=have, first=first, count=count))
            for _ in range(count):
                received = self._next()
                assert isinstance(received.message, Part), received.message
                assert received.payload is not None
                receiver.add(received.message.index, received.payload)
        return {name: tensor.clone() for name, tensor in receiver.tensors().items()}

    def hang_up(self) -> None:
        """The coordinator's program is gone."""
        self.router.close()
        self._is_open = False

    def listen_again(self) -> None:
        self.router = Router(self.endpoint, None, None)
        self._is_open = True

    def close(self) -> None:
        if self._is_open:
            self.hang_up()

    def _next(self, *, is_heartbeat_wanted: bool = False) -> Received:
        until = time.monotonic() + WAIT_S
        while time.monotonic() < until:
            received = self.receive()
            if is_heartbeat_wanted or not isinstance(received.message, Heartbeat):
                return received
        raise AssertionError(f"nothing but heartbeats for {WAIT_S} s")
