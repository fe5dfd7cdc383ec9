"""Devices that train nothing: the whole protocol without torch, hundreds of them in one process.

    python -m tools.light_client ENDPOINT [--clients FILE] [--from 0] [--count 250]

`LightClient` is one device as a state machine without a socket: a message in, messages out. It
keeps nothing of what it downloads, only counts it and compares the beginning, and all clients of a
process send their updates from one buffer. `Fleet` gives each of them a DEALER socket of its own,
with its own keys, under one epoll. What is known of the wire is in LightClient.

The update of round r is value_of(r) everywhere, so the mean over any number of clients is that
value to the last bit, and what round r + 1 sends down shows whether round r's updates counted.
"""

from __future__ import annotations

import argparse
import functools
import heapq
import itertools
import json
import random
import resource
import select
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeAlias
from uuid import uuid4

import zmq

from edge_sdk.errors import ProtocolError
from edge_sdk.keys import KeyPair
from edge_sdk.profile import DeviceProfile
from edge_sdk.transport import Payload, parse_frames, send_frames, set_common_options
from edge_sdk.wire import (
    ITEM_BYTES,
    PART_BYTES,
    PROTOCOL,
    Accepted,
    Bye,
    ExitResult,
    Fault,
    Fetch,
    Heartbeat,
    Hello,
    Job,
    Message,
    Part,
    Phase,
    Probe,
    Ready,
    Specs,
    Update,
    Welcome,
    digest_of,
    layout,
    num_parts,
    part_size,
)

WINDOW = 8  # parts under way, as real devices have it
HELLO_S, HELLO_MAX_S = 2.0, 15.0  # between tries while there is no answer, as real devices have it
NUM_EXAMPLES = 100
COMPARED_BYTES = 64
PROFILE = DeviceProfile(
    platform="light-client",
    memory_total_bytes=2**32,
    memory_available_bytes=2**31,
    cores=4,
    gflops=10,
)
Outgoing: TypeAlias = tuple[Message, Payload | None]


def value_of(round: int) -> float:
    """What every float of a round's update is: exact in float16, never 0."""
    return 1.0 + (round % 64) / 64


@functools.lru_cache(maxsize=2)
def update_bytes(specs: Specs, round: int) -> memoryview:
    """The stream of an update: value_of(round) in every float, 0 in everything else."""
    offsets, total = layout(specs)
    stream = bytearray(total)
    for spec, offset in zip(specs, offsets, strict=True):
        code = {"float16": "<e", "float32": "<f", "float64": "<d"}.get(spec.dtype)
        if code:
            count = spec.num_bytes // ITEM_BYTES[spec.dtype]
            values = struct.pack(code, value_of(round)) * count
            stream[offset : offset + spec.num_bytes] = values
    return memoryview(bytes(stream))


@functools.lru_cache(maxsize=2)
def update_digest(specs: Specs, round: int) -> str:
    return digest_of([update_bytes(specs, round)])


class LightClient:
    """One device without training. counts: what happened, by name, a fault as "fault CODE".
    given_at, accepted_at: time.monotonic() by round."""

    def __init__(self, client_id: str, input_shape: Sequence[int], num_classes: int) -> None:
        self.client_id = client_id
        self.counts: Counter[str] = Counter()
        self.given_at: dict[int, float] = {}
        self.accepted_at: dict[int, float] = {}
        self.welcome: Welcome | None = None  # None while the coordinator has not answered
        self.is_over = False  # the coordinator's run is
        self.hello_pause_s = HELLO_S  # grows until the coordinator answers
        self._session = uuid4().hex
        self._input_shape = tuple(input_shape)
        self._num_classes = num_classes
        self._job: Job | None = None
        self._update: Update | None = None
        self._num_parts = self._total_bytes = 0
        self._received: set[int] = set()  # indices of parts
        self._asked = 0
        self._last_accepted = 0  # round

    @property
    def round(self) -> int:
        """Of the job in hand, 0: none."""
        return self._job.round if self._job else 0

    def hello(self) -> Hello:
        """The first message of every connection."""
        self.welcome = None
        return Hello(
            protocol=PROTOCOL,
            client_id=self.client_id,
            session=self._session,
            profile=PROFILE,
            num_examples=NUM_EXAMPLES,
            input_shape=self._input_shape,
            num_classes=self._num_classes,
            round=self.round,
            job=self._job.id if self._job else None,
        )

    def heartbeat(self) -> Heartbeat:
        return Heartbeat(round=self.round)

    def on_message(self, message: Message, payload: Payload | None = None) -> list[Outgoing]:
        """What the device answers. Raises ProtocolError for what no coordinator may say."""
        if isinstance(message, Part):
            return self._on_part(message, payload or b"")
        if isinstance(message, Fetch):
            return self._on_fetch(message)
        if isinstance(message, Job):
            return self._on_job(message)
        if isinstance(message, Accepted):
            return self._on_accepted(message)
        if isinstance(message, Welcome):
            return self._on_welcome(message)
        if isinstance(message, Fault):
            return self._on_fault(message)
        if isinstance(message, Heartbeat):
            return []
        if isinstance(message, Probe):
            return [(self.heartbeat(), None)]
        if isinstance(message, Bye):
            self.welcome, self.is_over = None, message.is_final
            return [(Bye(reason="bye"), None)]
        raise ProtocolError(f"{self.client_id}: {type(message).__name__} is not for devices")

    def _on_welcome(self, welcome: Welcome) -> list[Outgoing]:
        is_first, self.welcome = self.welcome is None, welcome
        self.hello_pause_s = HELLO_S
        if self._job is None:
            return self._ready()
        return self._resume() if is_first else []

    def _resume(self) -> list[Outgoing]:
        """The link broke: what was under way is asked for, or told, again."""
        self.counts["resumed"] += 1
        if self._update:
            return [(self._update, None)]
        self._asked = len(self._received)  # parts come in order
        return self._ask()

    def _ready(self) -> list[Outgoing]:
        return [(Ready(exit=self.welcome.model.exit), None)] if self.welcome else []

    def _on_job(self, job: Job) -> list[Outgoing]:
        if self._job and self._job.id == job.id:  # given again by a coordinator that was restarted
            return self._resume()
        self.counts["jobs"] += 1
        self.given_at.setdefault(job.round, time.monotonic())
        self._job, self._update, self._received, self._asked = job, None, set(), 0
        self._total_bytes = layout(job.tensors)[1]
        self._num_parts = num_parts(self._total_bytes)
        return self._ask()

    def _on_part(self, part: Part, payload: Payload) -> list[Outgoing]:
        job = self._job
        if job is None or part.round != job.round or part.index in self._received:
            self.counts["parts unasked"] += 1
            return []
        if len(payload) != part_size(self._total_bytes, part.index):
            raise ProtocolError(f"{self.client_id}: part {part.index} has {len(payload)} bytes")
        self.counts["bytes down"] += len(payload)
        if part.index == 0 and self._last_accepted == job.round - 1 > 0:
            want = update_bytes(job.tensors, self._last_accepted)[:COMPARED_BYTES]
            self.counts["models compared"] += 1
            self.counts["models wrong"] += payload[:COMPARED_BYTES] != want
        self._received.add(part.index)
        return self._ask()

    def _ask(self) -> list[Outgoing]:
        """Fetch what the window allows; the finished update when everything is here."""
        job, num_received = self._job, len(self._received)
        assert job is not None
        if num_received == self._num_parts:
            self._update = finished(job)
            return [(self._fetch(job, 0), None), (self._update, None)]
        under_way = self._asked - num_received
        count = min(WINDOW - under_way, self._num_parts - self._asked)
        if under_way > WINDOW // 2 or count < 1:
            return []
        return [(self._fetch(job, count), None)]

    def _fetch(self, job: Job, count: int) -> Fetch:
        first, self._asked = self._asked, self._asked + count
        return Fetch(round=job.round, have=len(self._received), first=first, count=count)

    def _on_fetch(self, fetch: Fetch) -> list[Outgoing]:
        job = self._job
        if job is None or self._update is None or fetch.round != job.round:
            self.counts["fetches unasked"] += 1
            return []
        stream = update_bytes(job.tensors, job.round)
        parts: list[Outgoing] = []
        for index in range(fetch.first, min(fetch.first + fetch.count, self._num_parts)):
            payload = stream[index * PART_BYTES : (index + 1) * PART_BYTES]
            self.counts["bytes up"] += len(payload)
            parts.append((Part(round=job.round, index=index), payload))
        return parts

    def _on_accepted(self, accepted: Accepted) -> list[Outgoing]:
        if accepted.round != self.round:
            self.counts["accepted twice"] += 1
            return []
        self.counts["accepted"] += 1
        self.accepted_at[accepted.round] = time.monotonic()
        self._last_accepted = accepted.round
        self._job = self._update = None
        return self._ready()

    def _on_fault(self, fault: Fault) -> list[Outgoing]:
        self.counts[f"fault {fault.code}"] += 1
        if fault.code == "hello":
            return [(self.hello(), None)]
        if not self._job or fault.round != self._job.round:
            return []
        self._job = self._update = None
        return self._ready()


def finished(job: Job) -> Update:
    """As if trained: every tensor that came goes back, which is right for jobs of whole models."""
    exits = {e for part in job.plan.segments for e in range(part.first, part.last + 1)}
    return Update(
        job=job.id,
        digest=update_digest(job.tensors, job.round),
        round=job.round,
        num_examples=NUM_EXAMPLES,
        num_steps=1,
        exits=tuple(ExitResult(exit=e, loss=0.0, accuracy=0.0) for e in sorted(exits)),
        phases={"train": Phase(wall_s=0.0)},
        peak_memory_bytes=0,
        tensors=job.tensors,
    )


class Fleet:
    """Clients with a socket each. part_s: how long a client takes to send a part of its update in a
    round; 0: no time. Heartbeats go out as each Welcome says."""

    def __init__(
        self,
        endpoint: str,
        clients: Iterable[tuple[LightClient, KeyPair | None]],
        server_key: bytes | None = None,
        part_s: Callable[[LightClient], float] = lambda _: 0.0,
    ) -> None:
        clients = list(clients)
        raise_file_limit()
        self._context = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, len(clients) + 8)
        self._epoll = select.epoll()
        self._part_s = part_s
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._busy_until: dict[LightClient, float] = {}  # sending parts slowly
        self._ends: dict[int, tuple[LightClient, zmq.Socket[bytes]]] = {}
        for client, keys in clients:
            socket = self._connected(endpoint, keys, server_key)
            self._ends[socket.FD] = client, socket
            self._epoll.register(socket.FD, select.EPOLLIN)
            self._after(0.0, functools.partial(self._beat, client, socket))

    def _connected(
        self, endpoint: str, keys: KeyPair | None, server_key: bytes | None
    ) -> zmq.Socket[bytes]:
        """With the options of a device's Link."""
        socket: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        set_common_options(socket)
        socket.set(zmq.IMMEDIATE, 1)
        socket.set(zmq.RECONNECT_IVL, 200)
        socket.set(zmq.RECONNECT_IVL_MAX, 5_000)
        socket.set(zmq.CONNECT_TIMEOUT, 5_000)
        if keys and server_key:
            socket.set(zmq.CURVE_PUBLICKEY, keys.public)
            socket.set(zmq.CURVE_SECRETKEY, keys.secret)
            socket.set(zmq.CURVE_SERVERKEY, server_key)
        socket.connect(endpoint)
        return socket

    @property
    def clients(self) -> list[LightClient]:
        return [client for client, _ in self._ends.values()]

    def run(self, should_stop: Callable[[], bool] = lambda: False) -> None:
        """Until every client was told that the run is over."""
        while not should_stop() and not all(client.is_over for client in self.clients):
            pause_s = self._timers[0][0] - time.monotonic() if self._timers else 1.0
            for number, _ in self._epoll.poll(min(1.0, max(0.0, pause_s))):
                self._drain(*self._ends[number])
            while self._timers and self._timers[0][0] <= time.monotonic():
                heapq.heappop(self._timers)[2]()

    def close(self) -> None:
        for _, socket in self._ends.values():
            socket.close(linger=500)
        self._context.term()
        self._epoll.close()

    def _after(self, seconds: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._numbers), action))

    def _beat(self, client: LightClient, socket: zmq.Socket[bytes]) -> None:
        """Hello until welcomed, then heartbeats."""
        if client.is_over:
            return
        if client.welcome is None:
            pause_s = client.hello_pause_s * random.uniform(0.8, 1.2)
            if self._send(client, socket, client.hello(), None):
                client.counts["hellos"] += 1
                client.hello_pause_s = min(HELLO_MAX_S, 1.3 * client.hello_pause_s)
        else:
            pause_s = client.welcome.heartbeat_s
            if not self._send(client, socket, client.heartbeat(), None):
                client.welcome, pause_s = None, 0.0
        self._after(pause_s, functools.partial(self._beat, client, socket))
        self._drain(client, socket)

    def _drain(self, client: LightClient, socket: zmq.Socket[bytes]) -> None:
        """Everything that came, until there is nothing: only then does the socket's descriptor tell
        of what comes next."""
        while True:
            try:
                frames = socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            for message, payload in client.on_message(*parse_frames(frames)):
                part_s = self._part_s(client) if isinstance(message, Part) else 0.0
                if part_s:
                    self._send_later(client, socket, message, payload, part_s)
                else:
                    self._send(client, socket, message, payload)

    def _send_later(
        self,
        client: LightClient,
        socket: zmq.Socket[bytes],
        message: Message,
        payload: Payload | None,
        seconds: float,
    ) -> None:
        """After what this client has to send already."""

        def send() -> None:
            self._send(client, socket, message, payload)
            self._drain(client, socket)

        now = time.monotonic()
        self._busy_until[client] = max(now, self._busy_until.get(client, now)) + seconds
        self._after(self._busy_until[client] - now, send)

    def _send(
        self,
        client: LightClient,
        socket: zmq.Socket[bytes],
        message: Message,
        payload: Payload | None,
    ) -> bool:
        try:
            send_frames(socket, [], message, payload)
        except zmq.Again:
            client.counts[f"{type(message).__name__} not sent"] += 1
            return False
        return True


def raise_file_limit() -> None:
    """As many open files as this process may have: two for each client."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def write_clients(path: Path, pairs: Iterable[tuple[str, KeyPair]]) -> None:
    """Lines `NAME PUBLIC SECRET`, for read_clients."""
    path.touch(0o600)
    path.write_text("".join(f"{n} {p.public.decode()} {p.secret.decode()}\n" for n, p in pairs))


def read_clients(path: Path, first: int, count: int) -> list[tuple[str, KeyPair]]:
    rows = [line.split() for line in path.read_text().splitlines()][first : first + count]
    return [(name, KeyPair(public.encode(), secret.encode())) for name, public, secret in rows]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("endpoint")
    add("--clients", type=Path, help="lines NAME PUBLIC SECRET; without it there is no encryption")
    add("--server-key", default="")
    add("--from", dest="first", type=int, default=0, help="number of the first client here")
    add("--count", type=int, default=250)
    add("--input", default="1000", help="shape of an example, e.g. 1x28x28")
    add("--classes", type=int, default=10)
    add("--slow", type=int, default=0, help="so many of them are slow in even rounds")
    add("--part-s", type=float, default=2.0, help="that a slow one takes for a part")
    args = parser.parse_args(argv)
    shape = tuple(int(size) for size in args.input.split("x"))
    names: list[tuple[str, KeyPair | None]] = [
        (f"c{number}", None) for number in range(args.first, args.first + args.count)
    ]
    if args.clients:
        names = [*read_clients(args.clients, args.first, args.count)]
    clients = [(LightClient(name, shape, args.classes), keys) for name, keys in names]
    slow = {name for name, _ in names[: args.slow]}

    def part_s(client: LightClient) -> float:
        return args.part_s if client.client_id in slow and client.round % 2 == 0 else 0.0

    fleet = Fleet(args.endpoint, clients, args.server_key.encode() or None, part_s)
    fleet.run()
    fleet.close()
    told = [
        {
            "client": client.client_id,
            "is_slow": client.client_id in slow,
            "counts": client.counts,
            "given_at": client.given_at,
            "accepted_at": client.accepted_at,
        }
        for client in fleet.clients
    ]
    json.dump({"clients": told, "cpu_s": time.process_time()}, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
