"""Many light clients in one process, each with a socket and a key of its own.

python -m tools.bench.light_fleet ENDPOINT ...
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
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeAlias

import zmq

from edge_sdk.protocol.keys import KeyPair
from edge_sdk.protocol.link import Payload, parse_frames, send_frames, set_common_options
from edge_sdk.protocol.messages import Message, Part
from tools.light_client import HELLO_MAX_S, LightClient

End: TypeAlias = "tuple[LightClient, zmq.Socket[bytes]]"


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
        self._ends: dict[int, End] = {}
        for client, keys in clients:
            socket = self._connected(endpoint, keys, server_key)
            self._ends[socket.FD] = end = (client, socket)
            self._epoll.register(socket.FD, select.EPOLLIN)
            self._after(0.0, functools.partial(self._beat, end))

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
                self._drain(self._ends[number])
            while self._timers and self._timers[0][0] <= time.monotonic():
                heapq.heappop(self._timers)[2]()

    def close(self) -> None:
        for _, socket in self._ends.values():
            socket.close(linger=500)
        self._context.term()
        self._epoll.close()

    def _after(self, seconds: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._numbers), action))

    def _beat(self, end: End) -> None:
        """Hello until welcomed, then heartbeats."""
        client, _ = end
        if client.is_over:
            return
        if client.welcome is None:
            pause_s = client.hello_pause_s * random.uniform(0.8, 1.2)
            if self._send(end, client.hello(), None):
                client.counts["hellos"] += 1
                client.hello_pause_s = min(HELLO_MAX_S, 1.3 * client.hello_pause_s)
        else:
            pause_s = client.welcome.heartbeat_s
            if not self._send(end, client.heartbeat(), None):
                client.welcome, pause_s = None, 0.0
        self._after(pause_s, functools.partial(self._beat, end))
        self._drain(end)

    def _drain(self, end: End) -> None:
        """Everything that came, until there is nothing: only then does the socket's descriptor tell
        of what comes next."""
        client, socket = end
        while True:
            try:
                frames = socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            for message, payload in client.on_message(*parse_frames(frames)):
                part_s = self._part_s(client) if isinstance(message, Part) else 0.0
                if part_s:
                    self._send_later(end, message, payload, part_s)
                else:
                    self._send(end, message, payload)

    def _send_later(
        self, end: End, message: Message, payload: Payload | None, seconds: float
    ) -> None:
        """After what this client has to send already."""

        def send() -> None:
            self._send(end, message, payload)
            self._drain(end)

        client, now = end[0], time.monotonic()
        self._busy_until[client] = max(now, self._busy_until.get(client, now)) + seconds
        self._after(self._busy_until[client] - now, send)

    def _send(self, end: End, message: Message, payload: Payload | None) -> bool:
        client, socket = end
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
