"""Devices driven step by step from a test, and the real coordinator at the other end of their link.

Nothing sleeps: every wait is for a message and ends after WAIT_S. The other way round:
support/coordinator.py.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
import zmq

from coordinator.admission.client_list import Admission, add_client
from coordinator.cohorts.base import Absence, Assignment, Client, ClientUpdate, Offer
from coordinator.fleet.cohort import ZmqCohort
from coordinator.fleet.flow_control import BUDGET_BYTES
from coordinator.fleet.rate_limit import RateLimits
from coordinator.fleet.router import Router
from coordinator.fleet.spool import Spool
from edge_sdk.protocol.keys import KeyPair, make_keys
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
from tests.support.examples import config

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
T = TypeVar("T")
Result = ClientUpdate | Absence


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
            "exits": tuple(ExitResult(exit=exit, loss=0.5, accuracy=0.5) for exit in exits),
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


def make_cohort(
    router: Any,
    spool: Path,
    *,
    oldest: int = 0,
    should_stop: Callable[[], bool] = lambda: False,
    next_round: int = 1,
    give_up_after_s: float = 0.0,
    budget_bytes: int = BUDGET_BYTES,
    **settings: Any,
) -> ZmqCohort:
    """A cohort of the real kind for cnn(). oldest: rounds after which a late update is not taken
    any more, 0: none is. settings: changes to those of the run."""
    late = {"late": "accept", "staleness_half_life": oldest / 4} if oldest else {"late": "drop"}
    run = config("owners-mean", **({"quorum": 1.0, "min_clients": 1} | late | settings))
    assert run.oldest == oldest
    return ZmqCohort(
        router,
        Spool(spool),
        run,
        Offer(run.model, run.plan(run.rounds)),
        run="a run",
        give_up_after_s=give_up_after_s,
        budget_bytes=budget_bytes,
        should_stop=should_stop,
        next_round=next_round,
    )


class Coordinator:
    """The real Router and ZmqCohort. The cohort is used by one thread only, as it must be; what is
    asked of it comes back as a Future.

    folder: of keys and the client list; None: insecure. spool: of a coordinator that was there
    before; None: a new one. next_round: see ZmqCohort. terms: as for make_cohort."""

    def __init__(
        self,
        folder: Path | None,
        names: Sequence[str],
        spool: Path | None = None,
        next_round: int = 1,
        limits: RateLimits | None = None,
        **terms: Any,
    ) -> None:
        self.folder = folder
        self.names = tuple(names)
        self.keys: dict[str, KeyPair] = {}
        self.clients_file = folder / "clients" if folder else None
        if folder:
            self.keys = {name: make_keys(folder, name) for name in ("server", *names)}
            for name in names:
                add_client(folder / "clients", name, self.keys[name].public)
        admission = Admission(self.clients_file) if self.clients_file else None
        limits = limits or RateLimits(burst=math.inf)
        self.router = Router(ANY_PORT, self.keys.get("server"), admission, limits)
        self.arrived: queue.Queue[Result] = queue.Queue()  # results, as the cohort yields them
        self._stopping = threading.Event()
        self._closing: Future[None] | None = None
        self._folder = TemporaryDirectory()
        self.spool = spool or Path(self._folder.name)
        self._cohort = make_cohort(
            self.router,
            self.spool,
            should_stop=self._stopping.is_set,
            next_round=next_round,
            **({"min_clients": len(names)} | terms),
        )
        self._thread = ThreadPoolExecutor(1)
        self._devices: list[ScriptedDevice] = []

    def device(self, name: str, **link: Any) -> ScriptedDevice:
        """A device that has not said hello. link: other keys than its own."""
        own = {"keys": self.keys.get(name)}
        if server := self.keys.get("server"):
            own["server_key"] = server.public  # type: ignore[assignment]
        device = ScriptedDevice(self.router.endpoint, name, **(own | link))
        self._devices.append(device)
        return device

    def gather(self) -> list[ScriptedDevice]:
        """All the devices that have names here, joined and ready."""
        clients = self.clients()
        devices = [self.device(name) for name in self.names]
        for device in devices:
            device.join()
        assert [client.id for client in clients.result(WAIT_S)] == sorted(self.names)
        return devices

    def ask(self, question: Callable[[ZmqCohort], T]) -> Future[T]:
        """Anything, in the cohort's thread."""
        return self._thread.submit(question, self._cohort)

    def clients(self) -> Future[Sequence[Client]]:
        return self.ask(lambda cohort: cohort.clients())

    def train(
        self,
        work: Mapping[str, Assignment],
        round: int = 1,
        deadline_s: float = 0.0,
        pause: Callable[[], object] = lambda: None,
    ) -> Future[list[Result]]:
        """A round. pause: what the caller does with each result before it asks for the next."""

        def all_results(cohort: ZmqCohort) -> list[Result]:
            results = []
            for result in cohort.train(work, round, deadline_s):
                self.arrived.put(result)
                results.append(result)
                pause()
            return results

        return self.ask(all_results)

    def begin_close(self, reason: str, *, is_final: bool = False) -> Future[None]:
        """Whatever is under way is stopped."""
        if self._closing is None:
            self._stopping.set()
            self._closing = self.ask(lambda cohort: cohort.close(reason, is_final=is_final))
        return self._closing

    def close(self, reason: str = "test over", *, is_final: bool = False) -> None:
        self.begin_close(reason, is_final=is_final).result(WAIT_S)
        self._thread.shutdown()
        self._folder.cleanup()

    def close_devices(self) -> None:
        for device in self._devices:
            device.close()


def floats(*shape: int, start: float = 0.0) -> torch.Tensor:
    """Counting up from start."""
    count = int(torch.tensor(shape).prod()) if shape else 1
    return torch.arange(count, dtype=torch.float32).reshape(shape) + start
