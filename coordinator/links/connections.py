"""The router's connections: never so many that no descriptor is left, and none over which more
comes than is read.

ZeroMQ tries busily to take a connection for which no descriptor is left, and holds the parts of a
message until the last is there. It has no bound for whole messages either: RCVHWM would be one, but
the reset of a connection whose queue is full aborts the process (libzmq 4.3.5). So this thread,
which waits for neither rounds nor messages, counts the bytes that came over each connection and
those that were read, and ends one with too many between them. It also ends connections before the
limit of descriptors is reached: those that have not said anything first, the oldest of them first,
as an honest device speaks at once. ZeroMQ has no call for it: the socket is connected to nowhere,
which resets the connection and drops what has come. After a shutdown() it would be read for as long
as the other side sends.
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
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import zmq
from zmq.utils.monitor import parse_monitor_message

from coordinator.links.rate_limit import Repeats
from edge_sdk.errors import ConfigError

log = logging.getLogger(__name__)
T = TypeVar("T")
OWN_FILES = 96  # that the coordinator opens for itself: 60 at most, its data and libraries included
LOOK_MS, LOOK_S = 250, 1.0  # between looks at connections that have said nothing yet, at all
# Bytes that came over a connection and were not read: of one who has said nothing, of others (a
# window of parts is 4 MiB), of all together.
MOST_UNKNOWN_BYTES, MOST_BYTES, MOST_BYTES_OF_ALL = 2 * 1024**2, 16 * 1024**2, 512 * 1024**2
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


@dataclass(slots=True)
class _Connection:
    """name: address and port of its other side, None if it is gone already. since: seconds of the
    monotonic clock. read: bytes of its messages that were read. other: bytes that came beside them
    (handshake, pings). peer: who spoke last, None: nobody yet, or over another connection since."""

    name: Any
    since: float
    looked: float = 0.0
    read: int = 0
    other: int = 0
    is_heard: bool = False  # since it was looked at
    peer: Hashable = None


class Connections:
    """Watches a ROUTER before it is bound, until close()."""

    def __init__(self, socket: zmq.Socket[bytes], most: float | None = None) -> None:
        self.num_ended = 0
        self._most = most_connections() if most is None else most
        self._socket = socket
        self._monitor = socket.get_monitor_socket(EVENTS)
        self._lock = threading.Lock()
        self._open: dict[int, _Connection] = {}  # by descriptor
        self._mute: dict[int, None] = {}  # those of nobody that is known, the oldest first
        self._newest: dict[Hashable, int] = {}  # of each peer
        self._drained = 0.0  # when all whole messages had been read
        self._repeats = Repeats(most=1)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def note_drained(self) -> None:
        """There is no message to be read."""
        self._drained = time.monotonic()

    def note_read(self, descriptor: int, num_bytes: int) -> None:
        """A message that took so many bytes on the network was read."""
        if (connection := self._open.get(descriptor)) is not None:
            connection.read += num_bytes
            connection.is_heard = True

    def note_peer(self, descriptor: int, peer: Hashable) -> None:
        """This peer may speak and did: of its connections the last to speak is kept."""
        connection = self._open.get(descriptor)
        if connection is None or connection.peer == peer:
            return
        with self._lock:
            if self._open.get(descriptor) is not connection:
                return
            self._mute.pop(descriptor, None)
            connection.peer = peer
            old = self._newest.get(peer, descriptor)
            self._newest[peer] = descriptor
            if old != descriptor and self._peer_of(old) == peer:
                self._open[old].peer = None
                self._mute[old] = None

    def end(self, descriptor: int, peer: Hashable, before: float) -> None:
        """End a connection over which this peer spoke, but for one that began later than `before`
        or is another's: its descriptor was this peer's once."""
        with self._lock:
            connection = self._open.get(descriptor)
            if connection is None or connection.since > before:
                return
            if connection.peer in (None, peer):
                self._end(descriptor)

    def close(self) -> None:
        """Before the socket is; for its thread."""
        self._socket.disable_monitor()
        self._thread.join()

    def _run(self) -> None:
        looked = mute_at = all_at = 0.0  # when to look next
        while True:
            if self._monitor.poll(LOOK_MS):
                event = parse_monitor_message(self._monitor.recv_multipart())
                if event["event"] == zmq.EVENT_MONITOR_STOPPED:
                    break
                with self._lock:
                    self._on_event(event["event"], int(event["value"]))
            if (now := time.monotonic()) < mute_at:
                continue
            is_due = now >= all_at or self._drained < looked  # more comes while nobody reads
            looked, mute_at = now, now + LOOK_MS / 1000
            with self._lock:
                self._end_unread(list(self._open if is_due else self._mute))
            all_at = now + LOOK_S if is_due else all_at
        self._monitor.close()

    def _on_event(self, kind: int, value: int) -> None:
        """value: a descriptor, or the error of one that could not be had."""
        if kind == zmq.EVENT_ACCEPTED:
            self._forget(value)
            self._open[value] = _Connection(_name_of(value), time.monotonic())
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

    def _end_unread(self, descriptors: Iterable[int]) -> None:
        """End each of these over which more came than is read, and if all together hold too much,
        those that hold most."""
        unread = {descriptor: self._unread(descriptor) for descriptor in descriptors}
        total = sum(unread.values())
        for descriptor in sorted(unread, key=unread.__getitem__, reverse=True):
            peer, waiting = self._peer_of(descriptor), unread[descriptor]
            most = MOST_UNKNOWN_BYTES if peer is None else MOST_BYTES
            if waiting <= most and total <= MOST_BYTES_OF_ALL:
                continue
            total -= waiting
            if (behind := self._repeats.note("unread", peer)) is not None:
                who = peer if isinstance(peer, str) else "a device"
                said = "%s sent %d bytes that are unread or no whole message, and is disconnected%s"
                log.warning(said, who, waiting, behind)
            self.num_ended += 1
            self._end(descriptor)

    def _unread(self, descriptor: int) -> int:
        """Bytes that wait to be read or belong to a message that is not whole."""
        connection = self._open[descriptor]
        looked, connection.looked = connection.looked, time.monotonic()
        unread = _received(descriptor) - connection.read - connection.other
        if unread < 0 or (connection.is_heard and self._drained > looked):
            connection.other += unread
            unread = 0
        connection.is_heard = False
        return unread

    def _peer_of(self, descriptor: int) -> Hashable:
        connection = self._open.get(descriptor)
        return None if connection is None else connection.peer

    def _end(self, descriptor: int) -> None:
        """Unless the descriptor has become another's, which its event will tell."""
        name = self._open[descriptor].name
        self._forget(descriptor)
        if name is None or _name_of(descriptor) != name:
            return
        if DISCONNECT(descriptor, NOWHERE, len(NOWHERE)):
            _of_socket(descriptor, lambda connection: connection.shutdown(sockets.SHUT_RDWR), None)

    def _forget(self, descriptor: int) -> None:
        connection = self._open.pop(descriptor, None)
        self._mute.pop(descriptor, None)
        if connection is not None and self._newest.get(connection.peer) == descriptor:
            del self._newest[connection.peer]


def _of_socket(descriptor: int, act: Callable[[sockets.socket], T], otherwise: T) -> T:
    """What the act gives, on a socket of ZeroMQ's that it may have closed just now."""
    try:
        connection = sockets.socket(sockets.AF_INET6, sockets.SOCK_STREAM, 0, fileno=descriptor)
        try:
            return act(connection)
        finally:
            connection.detach()
    except OSError:
        return otherwise


def _name_of(descriptor: int) -> Any:
    """Address and port of this connection's other side; None if it has none any more."""
    return _of_socket(descriptor, lambda connection: connection.getpeername(), None)


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
