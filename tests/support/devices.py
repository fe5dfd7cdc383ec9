"""Devices driven step by step from a test; real_coordinator.py is the other end of their link.

Nothing sleeps: every wait is for a message and ends after WAIT_S. The other way round:
support/coordinator.py.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
import zmq

from edge_sdk.protocol.keys import KeyPair
from edge_sdk.protocol.link import Link, Payload
from edge_sdk.protocol.messages import (
    PROTOCOL,
    Accepted,
    DeviceProfile,
    ExitResult,
    Fault,
    Fetch,
    Heartbeat,
    Hello,
    Job,
    Message,
    Part,
    Phase,
    Ready,
    Update,
    Welcome,
)
from edge_sdk.protocol.tensor_lists import trained_names
from edge_sdk.protocol.tensors import Receiver, Sender, Tensors, specs_of

WAIT_S = 30.0  # for what must come; the machine may be busy
ANY_PORT = "tcp://127.0.0.1:*"
PROFILE = DeviceProfile(
    platform="generic",
    memory_total_bytes=4 * 1024**3,
    memory_available_bytes=2 * 1024**3,
    cores=4,
    gflops=10.0,
)
M = TypeVar("M", bound=Message)


class ScriptedDevice:
    """One device. Every start of its program has a session of its own; restart() begins another."""

    def __init__(
        self,
        endpoint: str,
        name: str,
        keys: KeyPair | None = None,
        server_key: bytes | None = None,
    ) -> None:
        self.name = name
        self.session = f"{name}, first start"
        self.link = Link(endpoint, keys, server_key)
        self.job: Job | None = None
        self.received: list[int] = []  # indices of the job's parts, as they came
        self.sent: list[int] = []  # of the update's
        self.trained: Tensors = {}  # what it returns

    # -- messages ------------------------------------------------------------------------------

    def send(self, message: Message, payload: Payload | None = None) -> None:
        """Send, waiting for a connection if there is none."""
        until = time.monotonic() + WAIT_S
        while not self.link.send(message, payload):
            self._wait(zmq.POLLOUT, until)

    def send_frames(self, *frames: bytes) -> None:
        """Send what is not a message."""
        assert self.link.socket is not None
        self._wait(zmq.POLLOUT, time.monotonic() + WAIT_S)
        self.link.socket.send_multipart(frames)

    def receive(self) -> tuple[Message, Payload | None]:
        """The next message."""
        until = time.monotonic() + WAIT_S
        while (received := self.link.receive()) is None:
            self._wait(zmq.POLLIN, until)
        return received

    def expect(self, kind: type[M]) -> M:
        """The next message, which must be of this type."""
        message, _ = self.receive()
        assert isinstance(message, kind), f"{self.name} expected {kind.__name__}, got {message}"
        return message

    def stays_quiet(self, seconds: float = 0.2) -> None:
        """Nothing arrives for so long."""
        assert self.link.socket is not None
        assert not self.link.socket.poll(int(1000 * seconds)), f"{self.name}: {self.receive()}"

    def ping(self, round: int = 0) -> None:
        """A heartbeat and its answer: the coordinator has handled all that was sent before."""
        self.send(Heartbeat(round=round))
        assert self.expect(Heartbeat).round == round

    def loses_connection(self) -> None:
        """Wait until the other side has ended the connection."""
        while not self._next_event()[0]:
            pass

    def refusal(self) -> str:
        """Wait until the handshake is refused; why."""
        while not (text := self._next_event()[1]):
            pass
        return text

    # -- a session -----------------------------------------------------------------------------

    def hello(self, **changes: Any) -> Welcome:
        self.send(self.make_hello(**changes))
        return self.expect(Welcome)

    def make_hello(self, **changes: Any) -> Hello:
        fields: dict[str, Any] = {
            "protocol": PROTOCOL,
            "client_id": self.name,
            "session": self.session,
            "profile": PROFILE,
            "num_examples": 10,
            "input_shape": (1, 8, 8),
            "num_classes": 3,
        }
        return Hello(**(fields | changes))

    def ready(
        self, exit: int = 3, stages: tuple[int, ...] = (), stage_s: tuple[float, ...] = ()
    ) -> None:
        self.send(Ready(exit=exit, stages=stages, prefix_s=1.0, stage_s=stage_s))

    def join(self) -> None:
        self.hello()
        self.ready()

    def reconnect(self, **changes: Any) -> None:
        """A new connection of the same start, with the job in hand unless told otherwise."""
        self.link.open()
        held = {"round": self.job.round, "job": self.job.id} if self.job else {}
        self.hello(**(held | changes))

    def restart(self) -> None:
        """The device's program ended and was started again."""
        self.session, self.job = f"{self.session} again", None
        self.link.open()
        self.hello()

    def take_job(self) -> Job:
        """Receive a job and all its parts; what it would return is what came, plus one."""
        job = self.expect_job()
        receiver = Receiver(job.tensors)
        while request := receiver.next_request(8):
            self.fetch(receiver, *request)
        self.tell(receiver)
        self.train(receiver)
        return job

    def expect_job(self) -> Job:
        self.job = self.expect(Job)
        self.received, self.sent = [], []
        return self.job

    def fetch(self, receiver: Receiver, first: int, count: int, take: int | None = None) -> None:
        """Ask for parts; wait for all of them, or for the first `take`."""
        assert self.job is not None
        have = receiver.num_received
        self.send(Fetch(round=self.job.round, have=have, first=first, count=count))
        for _ in range(count if take is None else take):
            part, payload = self.receive()
            assert isinstance(part, Part), part
            assert part.round == self.job.round
            assert payload is not None
            receiver.add(part.index, payload)
            self.received.append(part.index)
            self.tell(receiver)

    def tell(self, receiver: Receiver) -> None:
        """How many parts are here."""
        assert self.job is not None
        have = receiver.num_received
        self.send(Fetch(round=self.job.round, have=have, first=have, count=0))

    def train(self, receiver: Receiver) -> None:
        assert self.job is not None
        tensors = receiver.tensors()
        names = trained_names(tensors, self.job.plan.segments)
        self.trained = {name: tensors[name] + 1 for name in names}

    def make_update(self, **changes: Any) -> Update:
        """Of the job in hand, as the coordinator wants it."""
        assert self.job is not None
        exits = [e for g in self.job.plan.segments for e in range(g.first, g.last + 1)]
        fields: dict[str, Any] = {
            "job": self.job.id,
            "digest": Sender(self.trained).digest(),
            "round": self.job.round,
            "num_examples": 10,
            "num_steps": 2,
            "exits": tuple(ExitResult(exit=exit, loss=0.5, metric=0.5) for exit in exits),
            "phases": {"train": Phase(wall_s=1.0, cpu_s=0.5)},
            "peak_memory_bytes": 0,
            "tensors": specs_of(self.trained),
        }
        return Update(**(fields | changes))

    def send_parts(self, indices: Iterable[int]) -> None:
        """Parts of the trained tensors."""
        assert self.job is not None
        sender = Sender(self.trained)
        for index in indices:
            self.send(Part(round=self.job.round, index=index), sender.part(index))
            self.sent.append(index)

    def upload(self) -> Accepted | Fault:
        """Send the parts that the coordinator asks for; what it says in the end."""
        while isinstance(message := self.receive()[0], Fetch):
            self.send_parts(asked_for(message))
        assert isinstance(message, Accepted | Fault), message
        return message

    def announce(self) -> Fetch:
        """Say that the update is there; what of it is asked for first."""
        self.send(self.make_update())
        return self.expect(Fetch)

    def return_update(self) -> None:
        """Announce, upload, be accepted."""
        self.send(self.make_update())
        answer = self.upload()
        assert isinstance(answer, Accepted), answer

    def finish(self) -> None:
        """Do a whole job."""
        self.take_job()
        self.return_update()

    def close(self) -> None:
        self.link.close(is_final=True)

    # -- waiting -------------------------------------------------------------------------------

    def _wait(self, flags: int, until: float) -> None:
        assert self.link.socket is not None
        left_ms = int(1000 * (until - time.monotonic()))
        assert left_ms > 0, f"{self.name} waited {WAIT_S} s"
        assert self.link.socket.poll(left_ms, flags), f"{self.name} waited {WAIT_S} s"

    def _next_event(self) -> tuple[bool, str]:
        assert self.link.monitor is not None
        assert self.link.monitor.poll(int(1000 * WAIT_S)), f"{self.name} waited {WAIT_S} s"
        return self.link.events()


def asked_for(fetch: Fetch) -> range:
    return range(fetch.first, fetch.first + fetch.count)


def floats(*shape: int, start: float = 0.0) -> torch.Tensor:
    """Counting up from start."""
    count = int(torch.tensor(shape).prod()) if shape else 1
    return torch.arange(count, dtype=torch.float32).reshape(shape) + start
