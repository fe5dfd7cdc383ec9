"""The device's end of the link: one DEALER socket, CURVE unless refused, control and raw frames.

Liveness is ZeroMQ's own heartbeat in its I/O thread plus the agent's Heartbeat messages, so neither
waits for training. Nothing is queued for an absent coordinator (IMMEDIATE), so a send that finds no
connection says so and the agent starts again with Hello."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import Protocol, TypeAlias

import zmq
from zmq.utils.monitor import parse_monitor_message

from edge_sdk.errors import LinkError, ProtocolError, VersionError
from edge_sdk.helpers.text import split_endpoint
from edge_sdk.protocol.codec import decode, encode
from edge_sdk.protocol.keys import KeyPair
from edge_sdk.protocol.messages import MAX_FRAME_BYTES, Fault, Message, Part
from edge_sdk.protocol.reach import TRY_S, Search, is_numeric
from edge_sdk.protocol.timing import DEAD_MS

log = logging.getLogger(__name__)
PING_MS = 5_000  # ZeroMQ heartbeats, both ends
RECONNECT_MAX_MS = 5_000  # between attempts to connect, doubled up to it
PING_TIMEOUT_MS = 120_000  # a part of a slow link may take so long, and no PONG comes beside it
HIGH_WATER = 32  # messages queued for a peer: a window of parts and some control
MOST_AT_ONCE = 64  # messages read without a look at anything else
LOOK_S = 3.0  # without a connection until it is looked into why; the pause then doubles
LOOK_MAX_S = 60.0
SEARCHED_MS = 50  # between looks at a search that runs
ZERO_COPY_BYTES = 64 * 1024  # below it copying is cheaper than tracking the buffer
Payload: TypeAlias = bytes | memoryview
REFUSALS: dict[int, str] = {
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: "the coordinator does not know this device's key; "
    "add its public key to the coordinator's list",
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: "the handshake failed; the coordinator's public key here "
    "is probably not the one it runs with, or it runs with --insecure",
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: "the two sides do not agree on encryption; use keys on "
    "both or --insecure on both",
}


def set_common_options(socket: zmq.Socket[bytes]) -> None:
    """Set the options that both ends of a link have."""
    socket.set(zmq.LINGER, 0)
    socket.set(zmq.SNDHWM, HIGH_WATER)
    # No bound: once a queue is full, a reset of its connection aborts the process at the next PING
    # of either side (libzmq 4.3.5). What comes is bounded by what was asked for, and by the
    # coordinator (coordinator/links/connections.py).
    socket.set(zmq.RCVHWM, 0)
    socket.set(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
    socket.set(zmq.HEARTBEAT_IVL, PING_MS)
    socket.set(zmq.HEARTBEAT_TIMEOUT, PING_TIMEOUT_MS)
    socket.set(zmq.HEARTBEAT_TTL, PING_TIMEOUT_MS)
    socket.set(zmq.TCP_KEEPALIVE, 1)
    # Behind a full send buffer no ping leaves, and none is missed: the kernel sees what is not
    # acknowledged.
    socket.set(zmq.TCP_MAXRT, DEAD_MS)


def send_frames(
    socket: zmq.Socket[bytes], head: list[bytes], message: Message, payload: Payload | None
) -> None:
    """Send without blocking. Raises zmq.ZMQError: EAGAIN, EHOSTUNREACH."""
    frames: list[Payload] = [*head, encode(message)]
    if payload is None:
        socket.send_multipart(frames, zmq.NOBLOCK, copy=True)
        return
    socket.send_multipart(frames, zmq.NOBLOCK | zmq.SNDMORE, copy=True)
    socket.send(payload, zmq.NOBLOCK, copy=len(payload) < ZERO_COPY_BYTES)


def parse_frames(frames: list[zmq.Frame]) -> tuple[Message, Payload | None]:
    """A control frame and, after a Part only, its raw frame. Raises ProtocolError."""
    if not frames:
        raise ProtocolError("message without frames")
    message = decode(frames[0].buffer)
    expected = 2 if isinstance(message, Part) else 1
    if len(frames) != expected:
        wanted = f"expected {expected}"
        raise ProtocolError(f"{type(message).__name__} came with {len(frames)} frames, {wanted}")
    return message, frames[1].buffer if expected == 2 else None


class Other(Protocol):
    """What is waited for beside the link."""

    @property
    def has_unsent(self) -> bool: ...
    def fileno(self) -> int: ...


class Link:
    """A connection that may be down. endpoint: "tcp://host:port", which was checked."""

    def __init__(self, endpoint: str, keys: KeyPair | None, server_key: bytes | None) -> None:
        self.endpoint = endpoint
        self._keys = keys
        self._server_key = server_key
        self._context = zmq.Context()
        self.socket: zmq.Socket[bytes] | None = None
        self.monitor: zmq.Socket[bytes] | None = None
        self._search: Search | None = None
        self._target = ""  # the numeric endpoint that the socket connects to
        self._is_connected = False
        self.heard_at = time.monotonic()  # when a message came last
        self._absence, self._num_mute = "", 0
        self._look_at, self._look_pause_s = 0.0, LOOK_S
        self.open()

    def open(self) -> None:
        """Make a new socket, which ZeroMQ connects and reconnects in the background; to a name once
        that is resolved, which events() and wait() see."""
        self.close()
        socket = self._context.socket(zmq.DEALER)
        set_common_options(socket)
        socket.set(zmq.IMMEDIATE, 1)
        socket.set(zmq.RECONNECT_IVL, 200)
        socket.set(zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS)
        socket.set(zmq.CONNECT_TIMEOUT, 5_000)
        if self._keys and self._server_key:
            socket.set(zmq.CURVE_PUBLICKEY, self._keys.public)
            socket.set(zmq.CURVE_SECRETKEY, self._keys.secret)
            socket.set(zmq.CURVE_SERVERKEY, self._server_key)
        events = int(zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED)
        for refusal in REFUSALS:
            events |= refusal
        self.socket, self.monitor = socket, socket.get_monitor_socket(events)
        self._mark_absent()
        if is_numeric(self.endpoint):
            self._connect(self.endpoint)
        else:
            self._search = Search(self.endpoint, is_tried=False)

    def close(self, *, is_final: bool = False) -> None:
        """Close the socket. is_final: for good, with up to half a second for what was sent."""
        if self.socket is not None and self.monitor is not None:
            self.socket.disable_monitor()
            self.monitor.close()  # an open one would keep the context from ending
            self.socket.close(linger=500 if is_final else 0)
        self.socket = self.monitor = self._search = None
        self._target = ""
        if is_final:
            self._context.term()

    def send(self, message: Message, payload: Payload | None = None) -> bool:
        """Send without blocking; whether there is a connection: without one nothing is sent."""
        if self.socket is None:
            return False
        try:
            send_frames(self.socket, [], message, payload)
        except zmq.Again:
            return False
        return True

    def receive(self) -> tuple[Message, Payload | None] | None:
        """The next message, None when there is none now. Raises ProtocolError."""
        if self.socket is None:
            return None
        try:
            frames = self.socket.recv_multipart(zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return None
        self.heard_at = time.monotonic()
        return parse_frames(frames)

    def messages(self) -> Iterator[tuple[Message | ProtocolError, Payload | None]]:
        """The messages that are there now, at most MOST_AT_ONCE of them: the caller has more to
        look at. In the place of one that breaks the protocol is the error, which is answered with.
        Raises LinkError for another version."""
        for _ in range(MOST_AT_ONCE):
            try:
                received: tuple[Message | ProtocolError, Payload | None] | None = self.receive()
            except VersionError as error:
                raise LinkError(f"coordinator {self.endpoint}: {error}") from error
            except ProtocolError as error:
                self.send(Fault(code=error.code, detail=str(error)))
                received = error, None
            if received is None:
                return
            yield received

    def wait(
        self, timeout_ms: int, other: Other | None = None, *, wants_to_send: bool = False
    ) -> None:
        """Wait until a message, an event of the link, or `other` is there to be read, or written if
        it has something unsent, or the link if `wants_to_send`."""
        poller = zmq.Poller()
        if other is not None:
            poller.register(other, zmq.POLLIN | (zmq.POLLOUT if other.has_unsent else 0))
        for end in (self.socket, self.monitor):
            if end is not None:
                is_written = wants_to_send and end is self.socket
                poller.register(end, zmq.POLLIN | (zmq.POLLOUT if is_written else 0))
        poller.poll(min(timeout_ms, SEARCHED_MS) if self._search else timeout_ms)

    def events(self) -> tuple[bool, str]:
        """Whether the connection was lost since the last call, and why it was refused or ""."""
        is_lost, refusal = False, ""
        self._follow_search()
        while self.monitor is not None and self.monitor.poll(0):
            event = parse_monitor_message(self.monitor.recv_multipart())["event"]
            if event == zmq.EVENT_DISCONNECTED:
                is_lost = True
                self._mark_absent()
            self._is_connected = event == zmq.EVENT_HANDSHAKE_SUCCEEDED
            if event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL and not self._keys:
                event = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL  # a coordinator with keys just hangs up
            refusal = REFUSALS.get(event, refusal)
        return is_lost, refusal

    def absence(self) -> str:
        """Why there is no connection, in one line; "" while there is one or the reason is not known
        yet. It is looked into after LOOK_S, and again as the pause grows; an address that answers
        is connected to."""
        self._follow_search()
        if self._is_connected or self.socket is None:
            return ""
        now, search = time.monotonic(), self._search
        if search is None and now >= self._look_at:
            self._search = Search(self.endpoint, is_tried=True)
            self._look_at = now + self._look_pause_s
            self._look_pause_s = min(LOOK_MAX_S, 2 * self._look_pause_s)
        elif search is not None and now - search.since > TRY_S + 1.0:
            return "its name is being looked up; no name server answers"
        return self._absence

    def _mark_absent(self) -> None:
        self._is_connected, self._absence, self._num_mute = False, "", 0
        self._look_at, self._look_pause_s = time.monotonic() + LOOK_S, LOOK_S

    def _follow_search(self) -> None:
        """Do what a search that has ended found."""
        if self._search is None or (found := self._search.result) is None:
            return
        self._search, self._absence = None, found.problem
        if found.endpoint and not self._is_connected and found.endpoint != self._target:
            self._connect(found.endpoint)
        elif found.endpoint:  # once it may just have come up
            self._num_mute += 1
            mute = "it takes a connection and makes no handshake; is it an edge-coordinator?"
            self._absence = mute if self._num_mute > 1 else ""

    def _connect(self, endpoint: str) -> None:
        """Let ZeroMQ connect to this numeric endpoint, to no other any more. Raises LinkError."""
        assert self.socket is not None
        try:
            if self._target:
                self.socket.disconnect(self._target)
            self.socket.set(zmq.IPV6, int(split_endpoint(endpoint)[2]))
            self.socket.connect(endpoint)
        except zmq.ZMQError as error:
            self.close()
            wanted = "expected tcp://HOST:PORT"
            raise LinkError(f"cannot connect to {endpoint!r}: {error}; {wanted}") from error
        self._target = endpoint
