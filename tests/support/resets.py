"""Connections that end at any moment: python -m tests.support.resets ROUNDS

Peers by hand and real links send to a router, and it to them, more than one side reads; pings come
in between; then the peer, the router or nobody ends the connection, by a reset or not. A program of
its own, because what it looks for ends the process: an assertion of libzmq. At the end it says
"lives", and that a new device is heard.
"""

from __future__ import annotations

import math
import random
import socket
import struct
import sys
import tempfile
import time
from contextlib import closing, suppress
from pathlib import Path

import zmq

from coordinator.admission.client_list import Admission, add_client
from coordinator.links.rate_limit import RateLimits
from coordinator.links.router import Received, Router
from edge_sdk.protocol import link as links
from edge_sdk.protocol.codec import encode
from edge_sdk.protocol.keys import KeyPair, make_keys
from edge_sdk.protocol.link import Link
from edge_sdk.protocol.messages import Heartbeat
from tools.zmtp import COMMAND, MORE, RawPeer, frame

PING = frame(b"\x04PING\x00\x0acontext", COMMAND)
MOST = 80  # messages at once: more than a queue of 32 holds, and few enough for one read of 8 kB
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close() resets
WAIT_S = 30.0
QUICK_MS = 2  # between pings; a socket that is closed in this very moment may still abort (libzmq)
BEAT = Heartbeat(round=1)


def main() -> int:
    rounds = int(sys.argv[1])
    links.PING_MS = QUICK_MS
    draw = random.Random(rounds)
    with tempfile.TemporaryDirectory() as folder:
        keys = {name: make_keys(Path(folder), name) for name in ("server", "good")}
        add_client(Path(folder) / "clients", "good", keys["good"].public)
        admission = Admission(Path(folder) / "clients")
        limits = RateLimits(burst=math.inf)
        with closing(Router("tcp://127.0.0.1:*", None, None, limits)) as router:
            for _ in range(rounds):
                by_hand(router, draw)
                by_link(router, None, None, draw)
            hears_all(router)
        with closing(Router("tcp://127.0.0.1:*", keys["server"], admission, limits)) as router:
            for _ in range(rounds):
                by_link(router, keys["good"], keys["server"].public, draw)
            hears_all(router)
            device = Link(router.endpoint, keys["good"], keys["server"].public)
            is_heard(router, device)
            device.close(is_final=True)
    print("lives", flush=True)
    return 0


def by_hand(router: Router, draw: random.Random) -> None:
    """A peer that sends messages, pings and halves of messages in one piece, and goes."""
    peer = RawPeer(router.endpoint, WAIT_S)
    kinds = [frame(encode(BEAT)), frame(b""), PING, frame(b"x", MORE)]
    with suppress(OSError):
        for _ in range(draw.randint(1, 2)):
            some = draw.choices(kinds, (10, 5, 2, 1), k=draw.randint(0, MOST))
            peer.socket.sendall(b"".join(some)[: draw.choice((8000, 8000, 100))])
            hears(router, draw.choice((0, 0, 1, 40)))
        if draw.random() < 0.5:
            peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    peer.close()
    hears(router, draw.choice((0, 20, 200)))


def by_link(
    router: Router, keys: KeyPair | None, server_key: bytes | None, draw: random.Random
) -> None:
    """A device and the router talk past each other, until the router ends the connection."""
    is_quick = draw.random() < 0.5
    links.PING_MS = QUICK_MS if is_quick else 5000
    device = Link(router.endpoint, keys, server_key)
    route = is_heard(router, device)
    for _ in range(draw.randint(0, MOST)):
        device.send(BEAT)
    for _ in range(draw.randint(0, MOST)):
        router.send(route, BEAT)
    end_newest(router)
    if is_quick:
        until = time.monotonic() + 4 * QUICK_MS / 1000
        while time.monotonic() < until:
            device.wait(1)
    if is_quick or draw.random() < 0.5:
        while device.receive():
            pass
    hears(router, draw.choice((0, 20, 200)))
    device.close()  # what it has not sent is dropped
    device.close(is_final=True)


def is_heard(router: Router, device: Link) -> bytes:
    """Its route, once a message of it came; what others said before is passed over."""
    until = time.monotonic() + WAIT_S
    while not device.send(Heartbeat(round=2)):
        assert time.monotonic() < until, "no connection"
        device.wait(10, wants_to_send=True)
    while time.monotonic() < until:
        _, received = router.receive(10)
        if isinstance(received, Received) and received.message == Heartbeat(round=2):
            return received.route
    raise AssertionError("not heard")


def end_newest(router: Router) -> None:
    connections = router._connections
    with connections._lock:
        if connections._open:
            connections._end(next(reversed(connections._open)))


def hears(router: Router, most: int) -> None:
    for _ in range(most):
        if not router.receive(0)[0]:
            return


def hears_all(router: Router) -> None:
    with suppress(zmq.Again):
        while router.receive(100)[0]:
            pass


if __name__ == "__main__":
    sys.exit(main())
