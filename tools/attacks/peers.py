"""The attackers, each a program of its own: python -m tools.attacks.peers NAME FOLDER SECONDS.

FOLDER holds endpoint, server.public, and the keys of `bad`, an admitted device, and of a used
invitation. At the end a line of JSON says how much was sent, and what came of it.
"""

from __future__ import annotations

import json
import socket
import struct
import sys
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import zmq

from edge_sdk.protocol.keys import KeyPair
from edge_sdk.protocol.link import parse_frames, send_frames, set_common_options
from edge_sdk.protocol.messages import (
    Fault,
    Fetch,
    Heartbeat,
    Hello,
    Job,
    Join,
    Message,
    Part,
    Ready,
    Update,
    Welcome,
)
from tools.bench.light_fleet import raise_file_limit, read_clients
from tools.light_client import LightClient

WIDE = b"\xdc\x00\x68" + (b"\xdc\x27\x10" + bytes(10_000)) * 104  # 104 arrays of 10,000 numbers
FRAME = bytes(1000 * 1024)
MOST_FRAMES = 1500  # of one message: enough to be seen, and the machine lives on
HUGE = 1e20
NUM_HUGE = 2**31
STRANGERS, CONNECTIONS, SCRAPERS = 200, 600, 200
Told = dict[str, Any]


class Peer:
    """A socket with keys. seconds: after which it stops."""

    def __init__(self, folder: Path, seconds: float, name: str = "bad") -> None:
        self.folder, self.name = folder, name
        self.until = time.monotonic() + seconds
        self.endpoint = (folder / "run" / "endpoint").read_text().strip()
        self.client = LightClient(name, (1000,), 10)
        self.context = zmq.Context()
        self.context.set(zmq.MAX_SOCKETS, 4096)
        pairs = dict(read_clients(folder / "others", 0, 2))
        self.socket = self.connect(pairs[name])

    def connect(self, keys: KeyPair) -> zmq.Socket[bytes]:
        server = (self.folder / "server.public").read_text().split()[-1].encode()
        socket: zmq.Socket[bytes] = self.context.socket(zmq.DEALER)
        set_common_options(socket)
        socket.set(zmq.RECONNECT_IVL, 200)
        socket.set(zmq.CURVE_PUBLICKEY, keys.public)
        socket.set(zmq.CURVE_SECRETKEY, keys.secret)
        socket.set(zmq.CURVE_SERVERKEY, server)
        socket.connect(self.endpoint)
        return socket

    def is_time(self) -> bool:
        return time.monotonic() < self.until

    def say(self, message: Message, payload: Any = None) -> bool:
        with suppress(zmq.Again):
            send_frames(self.socket, [], message, payload)
            return True
        self.socket.poll(10, zmq.POLLOUT)
        return False

    def heard(self, timeout_ms: int = 0) -> Iterator[tuple[Message, Any]]:
        while self.socket.poll(timeout_ms):
            yield parse_frames(self.socket.recv_multipart(copy=False))
            timeout_ms = 0

    def join(self, hello: Hello | None = None, seconds: float = 5.0) -> bool:
        """Say hello, and what a device says then. Whether it is welcomed."""
        self.say(hello or self.client.hello())
        until = min(self.until, time.monotonic() + seconds)
        while time.monotonic() < until:
            for message, _ in self.heard(100):
                if isinstance(message, Welcome):
                    self.client.on_message(message)
                    return True
        return False

    def flood(self, say: Callable[[int], bool]) -> Told:
        sent = 0
        while self.is_time():
            sent += say(sent)
            for _ in self.heard():
                pass
        return {"sent": sent}


def hello(peer: Peer) -> Told:
    hellos = [LightClient("bad", (1000,), 10).hello() for _ in range(64)]  # a session each
    return peer.flood(lambda number: peer.say(hellos[number % 64]))


def fault(peer: Peer) -> Told:
    peer.join()
    said = Fault(code="trainer", detail="d" * 2000)
    return peer.flood(lambda _: peer.say(said))


def ready(peer: Peer) -> Told:
    peer.join()
    said = [
        Ready(exit=0, reason="r" * 2000),
        Heartbeat(),
        Ready(exit=1),
        Heartbeat(),
        Ready(exit=0),
    ]
    return peer.flood(lambda number: peer.say(said[number % 5]))


def nested(peer: Peer) -> Told:
    peer.join()

    def say(_: int) -> bool:
        with suppress(zmq.Again):
            peer.socket.send(WIDE, zmq.NOBLOCK, copy=False)
            return True
        peer.socket.poll(10, zmq.POLLOUT)
        return False

    return peer.flood(say)


def handshakes(peer: Peer) -> Told:
    """Strangers, each with a key of its own, who are refused and come again."""
    sockets: deque[zmq.Socket[bytes]] = deque()
    sent = 0
    while peer.is_time():
        if len(sockets) == STRANGERS:
            sockets.popleft().close(linger=0)
        try:
            sockets.append(peer.connect(KeyPair(*zmq.curve_keypair())))
        except zmq.ZMQError:  # those that were closed are not gone yet
            time.sleep(0.01)
            continue
        sent += 1
    return {"sent": sent}


def budget(peer: Peer) -> Told:
    """It asks for the same parts again and again, and never says that one came."""
    peer.join()
    peer.say(Ready(exit=2))
    parts, round = 0, 0
    beat = time.monotonic()
    while peer.is_time():
        for message, _ in peer.heard(100):
            round = message.round if isinstance(message, Job) else round
            parts += isinstance(message, Part)
            if isinstance(message, Fault) and message.round:
                peer.say(Ready(exit=2))
        if round and time.monotonic() - beat > 0.1:
            beat = time.monotonic()
            peer.say(Heartbeat(round=round))
            peer.say(Fetch(round=round, have=0, first=0, count=1024))
    return {"sent": parts}


def endless(peer: Peer) -> Told:
    """One message of a gigabyte and a half."""
    sent = 0
    peer.socket.set(zmq.SNDTIMEO, 2000)
    with suppress(zmq.Again):
        for _ in range(MOST_FRAMES):
            peer.socket.send(FRAME, zmq.SNDMORE, copy=False)
            sent += 1
        peer.socket.send(b"")
    while peer.is_time():
        time.sleep(0.1)
    return {"sent": sent}


def metrics(peer: Peer) -> Told:
    """Connections that never end their request, beside a scrape every second."""
    raise_file_limit()
    port = int((peer.folder / "metrics").read_text())
    slow: list[socket.socket] = []
    good = bad = 0
    while peer.is_time():
        while len(slow) < SCRAPERS:
            slow.append(socket.create_connection(("127.0.0.1", port), 5.0))
            slow[-1].sendall(b"GET /metrics HT")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=2.0) as answer:
                good += bool(answer.read())
        except (OSError, urllib.error.URLError):
            bad += 1
        time.sleep(1.0)
    held = sum(is_open(connection) for connection in slow)
    return {"sent": SCRAPERS, "told": f"{held} of {SCRAPERS} held, {good} of {good + bad} scrapes"}


def descriptors(peer: Peer) -> Told:
    """Connections that say nothing, more than the coordinator may open files."""
    raise_file_limit()
    host, _, port = peer.endpoint.removeprefix("tcp://").rpartition(":")
    silent: list[socket.socket] = []
    while peer.is_time():
        with suppress(OSError):
            while len(silent) < CONNECTIONS:
                silent.append(socket.create_connection((host, int(port)), 1.0))
        time.sleep(0.5)
    peer.until += 5
    is_in = peer.join()
    return {
        "sent": len(silent),
        "told": f"a device that comes is {'let in' if is_in else 'not heard'}",
    }


def join_after_hello(peer: Peer) -> Told:
    """Somebody else's key in the place of its own."""
    peer.join()
    key = zmq.curve_keypair()[0].decode()
    sent = 0
    while peer.is_time():
        sent += peer.say(Join(client_id="bad", public_key=key))
        for _ in peer.heard(500):
            pass
    peer.until += 5
    return {"sent": sent, "told": f"the device is {'in' if peer.join() else 'shut out'}"}


def harmful(peer: Peer) -> Told:
    """An honest device's updates, but 1e20 everywhere, for as many examples as can be said."""
    peer.join(changed(peer.client.hello(), num_examples=NUM_HUGE))
    peer.say(Ready(exit=2))
    sent, worst, beat = 0, 0.0, time.monotonic()
    while peer.is_time():
        for message, payload in peer.heard(100):
            if isinstance(message, Part):
                worst = max(worst, abs(struct.unpack("<f", bytes(payload[:4]))[0]))
            for answer, data in peer.client.on_message(message, payload):
                if isinstance(answer, Part):
                    peer.say(answer, struct.pack("<f", HUGE) * (len(data or b"") // 4))
                    continue
                is_update = isinstance(answer, Update)
                sent += is_update
                peer.say(changed(answer, num_examples=NUM_HUGE) if is_update else answer, data)
        if time.monotonic() - beat > 1:
            beat = time.monotonic()
            peer.say(peer.client.heartbeat())
    return {"sent": sent, "told": f"largest weight sent down {worst:.3g}"}


def changed(message: Any, **fields: Any) -> Any:
    return msgspec.structs.replace(message, **fields)


def is_open(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return bool(connection.recv(1))
    except BlockingIOError:
        return True
    except OSError:
        return False


ATTACKS: dict[str, tuple[Callable[[Peer], Told], str]] = {  # and whose key it has
    "hello": (hello, "bad"),
    "fault": (fault, "bad"),
    "ready": (ready, "bad"),
    "nested": (nested, "bad"),
    "handshakes": (handshakes, "bad"),
    "budget": (budget, "bad"),
    "endless-invited": (endless, "invited"),
    "endless-admitted": (endless, "bad"),
    "metrics": (metrics, "bad"),
    "descriptors": (descriptors, "bad"),
    "join": (join_after_hello, "bad"),
    "harmful": (harmful, "bad"),
}


def main() -> int:
    name, folder, seconds = sys.argv[1:]
    attack, key = ATTACKS[name]
    print(json.dumps(attack(Peer(Path(folder), float(seconds), key))), flush=True)
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    import os

    os._exit(status)  # a context with a message that does not end never ends either
