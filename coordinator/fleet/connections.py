"""The descriptors of the router's connections: never all of them, and none with a message that does
not end.

ZeroMQ tries busily to take a connection for which no descriptor is left, and holds the parts of a
message until the last is there. So this thread, which waits for neither rounds nor messages, ends
connections before the limit is reached: those that have not said anything first, the oldest of them
first, as an honest device speaks at once. ZeroMQ has no call for it: the socket is connected to
nowhere, which resets the connection and drops what has come. After a shutdown() it would be read
for as long as the other side sends.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import math
import resource
import socket as sockets
import struct
import threading
import time
from collections.abc import Callable, Hashable
from typing import TypeVar

import zmq
from zmq.utils.monitor import parse_monitor_message

from coordinator.fleet.rate_limit import Repeats
from edge_sdk.errors import ConfigError

log = logging.getLogger(__name__)
T = TypeVar("T")
OWN_FILES = 96  # that the coordinator opens for itself: 60 at most, its data and libraries included
LOOK_MS, LOOK_S = 250, 1.0  # between looks at connections that have said nothing yet, at all
# Bytes of messages that are not whole: of one who has said nothing, and of others, whose queue may
# hold 32 parts while nobody listens.
MOST_UNKNOWN_BYTES, MOST_BYTES = 2 * 1024**2, 64 * 1024**2
RECEIVED = struct.Struct("@128xQ")  # bytes_received of Linux's struct tcp_info
EVENTS = (
    zmq.EVENT_ACCEPTED
    | zmq.EVENT_ACCEPT_FAILED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_MONITOR_STOPPED
)
DISCONNECT = ctypes.CDLL(None).connect
NOWHERE = bytes(16)  # a sockaddr of AF_UNSPEC
WAY_OUT = "raise it with ulimit -Hn, or LimitNOFILE= of a service"


def allow_connections(devices: int) -> None:
    """Raise the limit of open files as far as it goes. Raises ConfigError if that is too few."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if most != resource.RLIM_INFINITY and most < devices + OWN_FILES:
        raise ConfigError(
            f"--min-clients {devices} needs {devices + OWN_FILES} open files, the limit is {most}; "
            f"{WAY_OUT}"
        )


def most_connections() -> float:
    """How many leave descriptors enough for everything else."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return math.inf if soft == resource.RLIM_INFINITY else max(1, soft - OWN_FILES)


class Connections:
    """Watches a ROUTER before it is bound, until close()."""

    def __init__(self, socket: zmq.Socket[bytes], most: float | None = None) -> None:
        self.num_ended = 0
        self._most = most_connections() if most is None else most
        self._socket = socket
        self._monitor = socket.get_monitor_socket(EVENTS)
        self._lock = threading.Lock()
        self._open: dict[int, int] = {}  # descriptor: bytes received when last heard of
        self._mute: dict[int, None] = {}  # those of nobody that is known, the oldest first
        self._known: dict[int, Hashable] = {}  # peer
        self._newest: dict[Hashable, int] = {}  # of each peer
        self._heard: set[int] = set()
        self._repeats = Repeats(most=1)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def note(self, descriptor: int, peer: Hashable) -> None:
        """A whole message of this peer came: of its connections the last to speak is kept."""
        self._heard.add(descriptor)
        if self._known.get(descriptor) == peer:
            return
        with self._lock:
            if descriptor not in self._open:
                return
            self._mute.pop(descriptor, None)
            self._known[descriptor] = peer
            old, self._newest[peer] = self._newest.get(peer, descriptor), descriptor
            if old != descriptor and self._known.get(old) == peer:
                del self._known[old]
                self._mute[old] = None

    def end(self, descriptor: int) -> None:
        """End a connection."""
        with self._lock:
            if descriptor in self._open:
                self._end(descriptor)

    def close(self) -> None:
        """Before the socket is; for its thread."""
        self._socket.disable_monitor()
        self._thread.join()

    def _run(self) -> None:
        mute_at = all_at = 0.0  # when to look next
        while True:
            if self._monitor.poll(LOOK_MS):
                event = parse_monitor_message(self._monitor.recv_multipart())
                if event["event"] == zmq.EVENT_MONITOR_STOPPED:
                    break
                with self._lock:
                    self._on_event(event["event"], int(event["value"]))
            if (now := time.monotonic()) < mute_at:
                continue
            mute_at = now + LOOK_MS / 1000
            with self._lock:
                self._end_endless(list(self._mute if now < all_at else self._open))
            all_at = now + LOOK_S if now >= all_at else all_at
        self._monitor.close()

    def _on_event(self, kind: int, value: int) -> None:
        """value: a descriptor, or the error of one that could not be had."""
        if kind == zmq.EVENT_ACCEPTED:
            self._forget(value)
            self._open[value] = 0
            self._mute[value] = None
            if len(self._open) > self._most:
                self._make_room(f"{len(self._open)} connections", value)
        elif kind == zmq.EVENT_DISCONNECTED:
            self._forget(value)
        elif value in (errno.EMFILE, errno.ENFILE):
            self._make_room(errno.errorcode[value], next(reversed(self._open), -1))

    def _make_room(self, why: str, last: int) -> None:
        oldest = next(iter(self._mute), last)
        if (behind := self._repeats.note("full")) is not None:
            soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            log.error(
                "too many open files: %s with a limit of %d, of which %d are kept for this run's "
                "own; connections that say nothing are ended, then new ones; %s%s",
                *(why, soft, OWN_FILES, WAY_OUT, behind),
            )
        if oldest in self._open:
            self.num_ended += 1
            self._end(oldest)

    def _end_endless(self, descriptors: list[int]) -> None:
        for descriptor in descriptors:
            received = _received(descriptor)
            if descriptor in self._heard:
                self._heard.discard(descriptor)
                self._open[descriptor] = received
                continue
            waiting = received - self._open[descriptor]
            if waiting <= (MOST_BYTES if descriptor in self._known else MOST_UNKNOWN_BYTES):
                continue
            peer = self._known.get(descriptor)
            if (behind := self._repeats.note("endless", peer)) is not None:
                who = peer if isinstance(peer, str) else "a device"
                said = "%s sent %d bytes of a message without an end, and is disconnected%s"
                log.warning(said, who, waiting, behind)
            self.num_ended += 1
            self._end(descriptor)

    def _end(self, descriptor: int) -> None:
        self._forget(descriptor)
        if DISCONNECT(descriptor, NOWHERE, len(NOWHERE)):
            _of_socket(descriptor, lambda connection: connection.shutdown(sockets.SHUT_RDWR), None)

    def _forget(self, descriptor: int) -> None:
        self._open.pop(descriptor, None)
        self._mute.pop(descriptor, None)
        peer = self._known.pop(descriptor, None)
        if self._newest.get(peer) == descriptor:
            del self._newest[peer]


def _of_socket(descriptor: int, act: Callable[[sockets.socket], T], otherwise: T) -> T:
    """What the act gives, on a socket of ZeroMQ's that it may have closed just now."""
    try:
        connection = sockets.socket(sockets.AF_INET, sockets.SOCK_STREAM, 0, fileno=descriptor)
        try:
            return act(connection)
        finally:
            connection.detach()
    except OSError:
        return otherwise


def _received(descriptor: int) -> int:
    """Bytes that have come over this connection; 0 where the system does not tell."""
    if not hasattr(sockets, "TCP_INFO"):
        return 0
    told = _of_socket(
        descriptor,
        lambda s: s.getsockopt(sockets.IPPROTO_TCP, sockets.TCP_INFO, RECEIVED.size),
        b"",
    )
    return int(RECEIVED.unpack(told)[0]) if len(told) == RECEIVED.size else 0
