"""The coordinator's end of one client's link, driven step by step by a scenario: a real ROUTER
socket with CURVE, the client as a process of its own, and a record of what was said."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import zmq
from msgspec.structs import replace

from edge_sdk.data.loading import Examples, load_shard
from edge_sdk.errors import ConfigError, ProtocolError
from edge_sdk.models import initial_tensors
from edge_sdk.protocol.keys import DEVICE_KEYS, SERVER_KEYS, KeyPair, make_keys
from edge_sdk.protocol.link import Payload, parse_frames, send_frames, set_common_options
from edge_sdk.protocol.messages import (
    PROTOCOL,
    Fault,
    Fetch,
    Heartbeat,
    Hello,
    Job,
    Message,
    ModelSpec,
    Part,
    Plan,
    Ready,
    Segment,
    Update,
    Welcome,
)
from edge_sdk.protocol.tensor_lists import needed_names
from edge_sdk.protocol.tensors import Receiver, Sender, Tensors

NAME = "device"
SHAPE, NUM_CLASSES, NUM_EXAMPLES = (1, 4, 6), 4, 24
WIDTHS = (1024, 1536)  # 13 parts: more than a window
PLAN = Plan(segments=(Segment(first=1, last=2),), batch_size=NUM_EXAMPLES)
HEARTBEAT_S = 0.5
WINDOW = 8  # parts that a device may have under way
M = TypeVar("M", bound=Message)


class Failed(Exception):
    """The client did not do what docs/protocol.md says."""


@dataclass(frozen=True)
class Given:
    """A job as it was given."""

    job: Job
    sender: Sender
    tensors: Tensors


def check(is_so: bool, otherwise: str) -> None:
    if not is_so:
        raise Failed(otherwise)


def filled(command: str, places: dict[str, str]) -> list[str]:
    """The words of a command line with its places filled in. Raises ConfigError."""
    try:
        return [word.format(**places) for word in shlex.split(command)]
    except (ValueError, KeyError, IndexError) as error:
        known = ", ".join(f"{{{place}}}" for place in places)
        raise ConfigError(f"--client {command!r}: {error!r}; the places are {known}") from error


def make_client_folder(folder: Path) -> KeyPair:
    """Keys of both sides and the client's data in `folder`. Returns the coordinator's keys."""
    server = make_keys(folder / "coordinator", SERVER_KEYS)
    make_keys(folder / "keys", DEVICE_KEYS)
    (folder / "keys" / "server.public").write_bytes(server.public)
    rng = np.random.default_rng(0)
    y = np.arange(NUM_EXAMPLES) % NUM_CLASSES
    x = rng.integers(0, 256, (NUM_EXAMPLES, *SHAPE), np.uint8)
    x[:, 0, 0] = (60 * y + 30)[:, None]  # something to learn
    np.savez(folder / "data.npz", x=x, y=y, num_classes=NUM_CLASSES)
    return server


class Bed:
    """command: the client's, with the places {endpoint}, {name}, {keys}, {data}. patience_s: for
    whatever must come. is_free: it has no job. in_hand: the round that its heartbeats must name, if
    that is known."""

    def __init__(self, command: str, folder: Path, patience_s: float) -> None:
        places = {"endpoint": "", "name": NAME}
        places |= {"keys": str(folder / "keys"), "data": str(folder / "data.npz")}
        filled(command, places)  # before anything is opened
        self.patience_s = patience_s
        self.said: list[str] = []
        options = {"widths": WIDTHS}
        self.model = ModelSpec(
            family="mlp", input_shape=SHAPE, num_classes=NUM_CLASSES, exit=2, options=options
        )
        self.plan = PLAN
        self.log = folder / "client.log"
        self._keys = make_client_folder(folder)
        self.examples: Examples = load_shard(str(folder / "data.npz"))
        self._context = zmq.Context()
        self._endpoint = "tcp://127.0.0.1:*"
        self._socket = self._listen()
        self._command = filled(command, places | {"endpoint": self._endpoint})
        self.client: subprocess.Popen[bytes] | None = None
        self.num_runs, self.num_jobs = 1, 0
        self._forget()

    def _forget(self) -> None:
        """A client's program that has not begun yet."""
        self.route = b""
        self.hello: Hello | None = None
        self.ready: Ready | None = None
        self.num_heartbeats, self.heartbeat_s = 0, HEARTBEAT_S
        self.is_free = False
        self.in_hand: int | None = None

    # -- the client's process and its link -----------------------------------------------------

    def start(self) -> None:
        self._forget()
        self.note("client's program is started")
        try:
            with self.log.open("ab") as log:
                self.client = subprocess.Popen(
                    self._command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as error:
            raise ConfigError(f"--client: {self._command[0]!r} does not start: {error}") from error

    def stop(self) -> None:
        """End the client and what it has started; take what it had sent off the socket."""
        if self.client is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.client.pid, signal.SIGKILL)
            self.client.wait()
            self.client = None
        while self._socket.poll(100):
            self._socket.recv_multipart()

    @property
    def is_running(self) -> bool:
        return self.client is not None and self.client.poll() is None

    def ends(self) -> int:
        """The client's exit status, once it has ended by itself."""
        assert self.client is not None
        try:
            return self.client.wait(self.patience_s)
        except subprocess.TimeoutExpired:
            raise Failed(f"its program still runs after {self.patience_s:g} s") from None

    def _listen(self) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.ROUTER)
        set_common_options(socket)
        socket.set(zmq.ROUTER_MANDATORY, 1)
        socket.set(zmq.CURVE_SERVER, 1)
        socket.set(zmq.CURVE_PUBLICKEY, self._keys.public)
        socket.set(zmq.CURVE_SECRETKEY, self._keys.secret)
        until = time.monotonic() + self.patience_s
        while True:
            try:
                socket.bind(self._endpoint)
                break
            except zmq.ZMQError:  # the socket before is closed by a thread of ZeroMQ's
                if time.monotonic() > until:
                    raise
                time.sleep(0.01)
        self._endpoint = bytes(socket.get(zmq.LAST_ENDPOINT)).rstrip(b"\0").decode()
        return socket

    def cut(self) -> None:
        """End the connection and listen anew, like a coordinator that is restarted."""
        self._socket.close(linger=0)
        self.note("link is cut")
        self._socket = self._listen()

    def close(self) -> None:
        self.stop()
        self._socket.close(linger=0)
        self._context.term()

    # -- messages ------------------------------------------------------------------------------

    def note(self, what: str) -> None:
        self.said.append(what)

    def send(self, message: Message, payload: Payload | None = None) -> None:
        if not isinstance(message, Heartbeat):
            self.note(f"coordinator: {in_short(message)}")
        try:
            send_frames(self._socket, [self.route], message, payload)
        except zmq.ZMQError as error:
            raise Failed(f"its link is gone or takes nothing: {error}") from error

    def send_raw(self, what: str, *frames: bytes) -> None:
        self.note(f"coordinator: {what}")
        self._socket.send_multipart([self.route, *frames])

    def receive(self, until: float) -> tuple[Message, Payload | None] | None:
        """The next message, None when the time (monotonic) is over. Heartbeats are answered."""
        while not self._socket.poll(min(500, max(0, int(1000 * (until - time.monotonic()))))):
            if self.client is not None and self.client.poll():
                raise Failed(f"its program has ended with status {self.client.poll()}")
            if time.monotonic() >= until:
                return None
        route, *frames = self._socket.recv_multipart(copy=False)
        try:
            message, payload = parse_frames(frames)
        except ProtocolError as error:
            raise Failed(f"it sends what the protocol refuses: {error}") from error
        if isinstance(message, Heartbeat):
            self.num_heartbeats += 1
        else:
            self.note(f"client: {in_short(message)}")
        if isinstance(message, Hello):
            self.route = route.bytes
        elif route.bytes != self.route:  # it has not noticed that this is another connection
            before, self.route = self.route, route.bytes
            self.send(Fault(code="hello", detail="say hello first"))
            self.route = before
            return self.receive(until)
        elif isinstance(message, Heartbeat):
            named, wanted = message.round, self.in_hand
            told = f"a heartbeat names round {named}, in hand is {wanted}"
            check(wanted in (None, named), told)
            self.send(message)
        elif isinstance(message, Fetch | Update):
            self.in_hand = message.round
        return message, payload

    def next(self, within_s: float | None = None) -> tuple[Message, Payload | None]:
        """The next message but heartbeats."""
        wait_s = self.patience_s if within_s is None else within_s
        until = time.monotonic() + wait_s
        while received := self.receive(until):
            if not isinstance(received[0], Heartbeat):
                return received
        raise Failed(f"nothing but heartbeats for {wait_s:g} s")

    def expect(self, kind: type[M], within_s: float | None = None) -> M:
        """The next message but heartbeats, which must be of this type."""
        wanted = f"expected {kind.__name__.lower()}"
        try:
            message, _ = self.next(within_s)
            while isinstance(message, Ready) and kind is not Ready:  # its choice may change
                message, _ = self.next(within_s)
        except Failed as error:
            raise Failed(f"{wanted}, got {error}") from error
        if not isinstance(message, kind):
            raise Failed(f"{wanted}, got {in_short(message)}")
        return message

    def wait_for(self, kind: type[M], is_it: Callable[[M], bool] = lambda _: True) -> M:
        """The next message of this type that is it; others are passed over."""
        until = time.monotonic() + self.patience_s
        while received := self.receive(until):
            if isinstance(received[0], kind) and is_it(received[0]):
                return received[0]
        raise Failed(f"no {kind.__name__.lower()} for {self.patience_s:g} s")

    def stays_quiet(self, seconds: float = 0.5) -> None:
        """Nothing but heartbeats comes for so long, or `ready`, as a choice may change."""
        until = time.monotonic() + seconds
        while received := self.receive(until):
            check(isinstance(received[0], Heartbeat | Ready), f"unasked: {in_short(received[0])}")

    # -- a session -----------------------------------------------------------------------------

    def welcome(self, **changes: Any) -> None:
        welcome = Welcome(
            protocol=PROTOCOL,
            run=f"conformance {self.num_runs}",
            model=self.model,
            plan=self.plan,
            deadline_s=0.0,
            heartbeat_s=self.heartbeat_s,
            scaling=self.examples.input_scaling,
        )
        self.send(replace(welcome, **changes))

    def make_ready(self) -> None:
        """Wait for the client's hello, welcome it, and wait until it is ready for a job."""
        self.hello = self.wait_for(Hello)
        self.welcome()
        self.wait_ready()

    def wait_ready(self) -> Ready:
        """A `ready` with an exit, which makes another job possible."""
        self.ready = self.wait_for(Ready, lambda ready: ready.exit > 0)
        self.in_hand, self.is_free = 0, True
        return self.ready

    def expect_ready(self) -> None:
        """The next message is `ready`, of a client that has no job any more."""
        self.ready = self.expect(Ready)
        self.in_hand, self.is_free = 0, True

    def hello_again(self, given: Given | None) -> None:
        """The client comes back with this job in hand, and is welcomed."""
        hello, before = self.wait_for(Hello), self.hello
        job = given.job if given else None
        wanted = (job.round, job.id) if job else (0, None)
        got = (hello.round, hello.job)
        check(got == wanted, f"hello names round and job {got}, in hand is {wanted}")
        same = before is None or hello.session == before.session
        check(same, "another `session` in the hello of the same program")
        self.hello = hello
        self.welcome()

    def make_job(self, plan: Plan = PLAN, whole: ModelSpec | None = None) -> Given:
        """A job of the next round, its model, or that of the bed, cut at the plan's deepest
        stage."""
        deepest = max(segment.last for segment in plan.segments)
        model = replace(whole or self.model, exit=deepest)
        self.num_jobs += 1
        held = initial_tensors(model, self.num_jobs)
        tensors = {name: held[name] for name in needed_names(held, plan.segments)}
        sender = Sender(tensors)
        number = self.num_jobs
        job = Job(
            id=f"{number:032x}",
            round=number,
            model=model,
            plan=plan,
            tensors=sender.specs,
            deadline_s=0.0,
        )
        return Given(job, sender, tensors)

    def give(self, plan: Plan = PLAN) -> Given:
        """Give a job, of which the client was told by a welcome before."""
        whole = replace(plan, segments=PLAN.segments)
        if whole != self.plan:
            self.plan = whole
            self.welcome()
            self.wait_ready()
        given = self.make_job(plan)
        self.send_job(given.job)
        return given

    def send_job(self, job: Job) -> None:
        self.send(job)
        self.is_free, self.in_hand = False, None

    def send_parts(self, given: Given, indices: Iterable[int]) -> None:
        for index in indices:
            self.send(Part(round=given.job.round, index=index), given.sender.part(index))

    def serve_parts(self, given: Given) -> None:
        """Answer the client until it says that it has every part."""
        while (fetch := self.expect(Fetch)).have < given.sender.num_parts:
            end = min(fetch.first + fetch.count, given.sender.num_parts)
            self.send_parts(given, range(fetch.first, end))

    def ask_parts(self, update: Update, receiver: Receiver) -> None:
        """Ask for the parts of an update that the receiver lacks."""
        while request := receiver.next_request(2):
            first, count = request
            have = receiver.num_received
            self.send(Fetch(round=update.round, have=have, first=first, count=count))
            for index in range(first, first + count):
                message, payload = self.next()
                wanted = Part(round=update.round, index=index)
                check(message == wanted, f"expected part {index}, got {in_short(message)}")
                assert payload is not None
                try:
                    receiver.add(index, bytes(payload))
                except ProtocolError as error:
                    raise Failed(str(error)) from error


def in_short(message: Message) -> str:
    """A message in a few words."""
    told = [type(message).__name__.lower()]
    for name in ("code", "detail", "round", "index", "have", "first", "count", "job", "exit"):
        if (value := getattr(message, name, None)) is not None:
            told.append(f"{name} {value!r}"[:120])
    return " ".join(told)
