"""The coordinator's end of all links: one ROUTER socket.

Routes are ZeroMQ's own random ids, one per connection, so nobody can take another's by name; who is
on a route follows from its CURVE key, checked against the admission list before a byte is read. The
key of an invitation may send `join` and nothing else, which is answered here.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import zmq
from msgspec.structs import replace
from zmq.auth.thread import ThreadAuthenticator

from coordinator.admission import join as joining
from coordinator.admission.client_list import Admission
from coordinator.links.connections import Connections
from coordinator.links.rate_limit import OUT_S, RateLimits, Repeats, Verdict, cost_of
from coordinator.links.unfit import UnfitDevices
from coordinator.store.status import LinkCounts
from edge_sdk.errors import ConfigError, ProtocolError, VersionError
from edge_sdk.helpers.logs import event
from edge_sdk.helpers.text import split_endpoint
from edge_sdk.protocol.codec import unpack
from edge_sdk.protocol.fields import CLIENT_NAME
from edge_sdk.protocol.keys import KeyPair
from edge_sdk.protocol.link import Payload, parse_frames, send_frames, set_common_options
from edge_sdk.protocol.messages import (
    Fault,
    Hello,
    Join,
    Message,
)

log = logging.getLogger(__name__)
TOO_MUCH = "this device says more than it is asked for; what is too much is dropped"
ENDED = "said too much, or nothing but what is refused"
BACKLOG = 1024  # connections that wait to be taken: a whole fleet may come back at once
NO_KEY = "its key is not admitted any more"
FLOOD = "flood"  # code of the fault of a peer that says too much
NOT_ADMITTED = (
    "this key is not admitted any more; if keys --rotate replaced it, start the agent again, else "
    "ask for an invitation"
)
MOST_STRANGERS = 100  # of whom a minute's log and the list of pending keys tell
CURVE_BYTES, SHORT_BYTES, LONG_BYTES = 33, 2, 9  # that CURVE and ZMTP add to a frame
LAG_S = 1.0  # until a connection is known of
STOP_TRIES, STOP_S = 20, 0.5  # to end the authenticator's thread


@dataclass(frozen=True)
class Received:
    """A checked message. name: the admitted client whose key this is, None when the link is
    insecure. address: where a Hello came from, "" if not
    known. peer: whose bucket it was paid from."""

    route: bytes
    name: str | None
    message: Message
    payload: Payload | None
    address: str = ""
    key: bytes = b""

    @property
    def peer(self) -> Hashable:
        return self.name or self.key or self.route


@dataclass(frozen=True)
class Outcast:
    """A message came over this route, which may have been a client's, from somebody who may not be
    heard. code: of the fault that it is."""

    route: bytes
    why: str
    code: str = "admission"
    may_return: bool = False


@dataclass(frozen=True)
class Refused:
    """A frame that breaks the protocol came over this route. code: of the fault."""

    route: bytes
    code: str


class _Credentials:
    """Tells the authenticator, at every new connection, whether its key may come in."""

    def __init__(self, admission: Admission, limits: RateLimits) -> None:
        self._admission = admission
        self._limits = limits
        self._repeats = Repeats(most=MOST_STRANGERS)
        self.num_refused = 0

    def callback(self, domain: str, public_key: bytes) -> bool:
        """public_key: Z85 text."""
        admission, peer = self._admission, self._admission.name_of(public_key) or public_key
        is_invited = peer is public_key and admission.invitations.is_open(public_key)
        if is_invited or peer is not public_key:
            if not self._limits.is_out(peer):
                return True
            self.num_refused += 1
            return False
        self.num_refused += 1
        if (behind := self._repeats.note()) is None:  # one bucket for all who are not known
            return False
        key = public_key.decode()
        why = admission.invitations.why_closed(public_key) or "unknown public key"
        extra = event("stranger", key=key)
        log.warning("refused a device with %s %s%s", why, key, behind, extra=extra)
        admission.pending.note(public_key)
        return False


class Router:
    """endpoint: "tcp://HOST:PORT", port 0 or * for any free one. Without keys nothing is encrypted
    and nobody is checked. limits: of what each peer may say."""

    def __init__(
        self,
        endpoint: str,
        keys: KeyPair | None,
        admission: Admission | None,
        limits: RateLimits | None = None,
    ) -> None:
        self._admission = admission
        self._context = zmq.Context()
        self._authenticator: ThreadAuthenticator | None = None
        self._credentials: _Credentials | None = None
        self.limits = limits or RateLimits()
        self._repeats = Repeats()
        self.counts = LinkCounts()
        self.unfit = UnfitDevices()
        self.is_session: Callable[[bytes], bool] = lambda route: False  # whether it has said hello
        self.socket: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
        set_common_options(self.socket)
        self.socket.set(zmq.ROUTER_MANDATORY, 1)
        self._is_secure = keys is not None
        if keys is not None:
            assert admission is not None, "CURVE without a client list admits nobody"
            self._authenticator = ThreadAuthenticator(self._context)
            self._authenticator.start()
            self._credentials = _Credentials(admission, self.limits)
            self._authenticator.configure_curve_callback("*", self._credentials)
            self.socket.set(zmq.CURVE_SERVER, 1)
            self.socket.set(zmq.CURVE_PUBLICKEY, keys.public)
            self.socket.set(zmq.CURVE_SECRETKEY, keys.secret)
        self.socket.set(zmq.BACKLOG, BACKLOG)
        self._connections = Connections(self.socket)
        try:
            self._bind(endpoint)
        except zmq.ZMQError as error:
            self.close()
            is_taken = error.errno == zmq.EADDRINUSE
            why = (
                "another coordinator running there" if is_taken else "that an address of this host"
            )
            raise ConfigError(
                f"cannot listen on {endpoint}: {error}; is {why}? choose another --listen"
            ) from error
        self.endpoint = bytes(self.socket.get(zmq.LAST_ENDPOINT)).rstrip(b"\0").decode()

    def _bind(self, endpoint: str) -> None:
        """Listen; for every address (*, [::]) on a socket of both IPv6 and IPv4, or of IPv4 alone
        where this host has no IPv6. Raises ZMQError."""
        host, port, is_ipv6 = split_endpoint(endpoint)
        is_any = host in ("*", "::")
        self.socket.set(zmq.IPV6, int(is_ipv6 or is_any))
        try:
            self.socket.bind(endpoint)
        except zmq.ZMQError as error:
            if not is_any or error.errno in (zmq.EADDRINUSE, errno.EACCES):
                raise
            self.socket.set(zmq.IPV6, 0)
            self.socket.bind(f"tcp://*:{port}")

    def send(self, route: bytes, message: Message, payload: Payload | None = None) -> bool:
        """Send a message. False if the route is gone or takes nothing now."""
        try:
            send_frames(self.socket, [route], message, payload)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            log.debug("%s not sent: %s", type(message).__name__, error)
            return False
        return True

    def receive(self, timeout_ms: int) -> tuple[bool, Received | Refused | Outcast | None]:
        """Whether there was a message, and what it was unless it was dropped. A bad one, or one of
        a device that is no longer admitted, is answered with a Fault."""
        admission = self._admission
        if admission is not None:
            admission.pending.write_if_due(self._is_client)
        if timeout_ms and not self.socket.poll(timeout_ms):
            self._connections.note_drained()
            return False, None
        try:
            frames = self.socket.recv_multipart(zmq.NOBLOCK, copy=False)
        except zmq.Again:
            self._connections.note_drained()
            return False, None
        route, key, name = frames[0].bytes, b"", None
        if admission is not None:
            key = str(frames[-1].get("User-Id")).encode()
            name = admission.name_of(key)
        peer, descriptor = name or key or route, _descriptor(frames[-1])
        self._connections.note_read(descriptor, wire_bytes(frames, is_secure=self._is_secure))
        verdict = self.limits.take(peer, cost_of(frames))
        if verdict != "hear":
            return True, self._drop(route, peer, descriptor, verdict)
        if admission is not None and name is None and admission.invitations.find(key) is None:
            self._refuse(route, NOT_ADMITTED)
            return True, Outcast(route, NO_KEY)
        self._connections.note_peer(descriptor, peer)
        try:
            message, payload = parse_frames(frames[1:])
        except ProtocolError as error:
            return True, self._on_bad(frames, peer, descriptor, error)
        self.limits.note_frame(peer, is_refused=False)
        if isinstance(message, Join):
            self._on_join(route, key, message)
            return True, None
        if admission is not None and name is None:
            self._refuse(route, "an invitation's key may send join and nothing else")
            return True, None
        address = _address(frames[-1]) if isinstance(message, Hello) else ""
        return True, Received(route, name, message, payload, address, key)

    def _drop(
        self, route: bytes, peer: Hashable, descriptor: int, verdict: Verdict
    ) -> Outcast | None:
        """What a peer says beyond its bucket, or while it is kept out."""
        self.counts.messages_dropped += 1
        if verdict == "warn":
            self.send(route, Fault(code=FLOOD, detail=TOO_MUCH))
        if verdict in ("drop", "warn"):
            return None
        return self._end(route, peer, descriptor, is_new=verdict == "end")

    def _on_bad(
        self, frames: list[zmq.Frame], peer: Hashable, descriptor: int, error: ProtocolError
    ) -> Refused | Outcast:
        route, name = frames[0].bytes, peer if isinstance(peer, str) else None
        self.counts.frames_refused += 1
        who, is_told = name or "a device", True
        if isinstance(error, VersionError):  # it can take no part at all
            who = name or claimed_name(frames[1:]) or _address(frames[-1])
            is_told = self.unfit.note(who, error.code, str(error))
        if is_told and (behind := self._repeats.note("refused", peer)) is not None:
            extra = event("refused", client=name, code=error.code)
            log.warning("message from %s refused: %s%s", who, error, behind, extra=extra)
        if self.limits.note_frame(peer, is_refused=True) == "end":
            return self._end(route, peer, descriptor, is_new=True)
        self.send(route, Fault(code=error.code, detail=str(error)))
        return Refused(route, error.code)

    def _end(self, route: bytes, peer: Hashable, descriptor: int, *, is_new: bool) -> Outcast:
        """Disconnect a peer that is out; the next handshake under its key fails for a while."""
        if is_new:
            self.counts.peers_ended += 1
            if (behind := self._repeats.note("ended", peer)) is not None:
                name = peer if isinstance(peer, str) else None
                extra = event("refused", client=name, code=FLOOD)
                said = "%s %s: disconnected for %.0f s%s"
                log.warning(said, name or "a device", ENDED, OUT_S, behind, extra=extra)
        # Who is out gets no new connection; without keys its route, a name of its own choice, does.
        before = self.limits.out_since(peer) + LAG_S if self._is_secure else math.inf
        self._connections.end(descriptor, peer, before)
        return Outcast(route, ENDED, FLOOD, may_return=True)

    def link_counts(self) -> LinkCounts:
        """What was not let in or heard since the start; a copy."""
        return replace(self.counts, connections_ended=self._connections.num_ended)

    @property
    def num_refused(self) -> int:
        """Connections refused for their key, since the start."""
        return self._credentials.num_refused if self._credentials else 0

    def is_admitted(self, name: str) -> bool:
        """Whether this client is in the list now; a look at the file's time, so ask often."""
        return self._admission is None or self._admission.is_admitted(name)

    def is_still(self, received: Received) -> bool:
        """Whether the key that said this is that client's now."""
        admission = self._admission
        return admission is None or admission.name_of(received.key) == received.name

    def _is_client(self, key: bytes) -> bool:
        return self._admission is not None and self._admission.name_of(key) is not None

    def _on_join(self, route: bytes, key: bytes, join: Join) -> None:
        if self._admission is None:
            self._refuse(route, "this coordinator runs with --insecure and has no list to join")
        elif self.is_session(route):  # a new key would shut its own client out
            detail = "join goes over a connection of its own, this one has said hello"
            self.send(route, Fault(code="protocol", detail=detail))
        elif reply := joining.answer(self._admission, key, join):
            self.send(route, reply)

    def _refuse(self, route: bytes, detail: str) -> None:
        self.send(route, Fault(code="admission", detail=detail))

    def close(self) -> None:
        self._connections.close()
        self.socket.close()
        if self._admission is not None:
            self._admission.pending.write_if_due(self._is_client, is_last=True)
        if self._authenticator is None or _stopped(self._authenticator):
            self._context.term()
        else:  # it would wait for the sockets of that thread, which ends with the process
            log.warning("the thread that checks keys did not end")


def claimed_name(frames: Sequence[zmq.Frame]) -> str:
    """The name that a message which is refused gives of its sender, if it is one; else ""."""
    with contextlib.suppress(ProtocolError):
        told = unpack(frames[0].buffer) if frames else None
        name = told.get("client_id") if isinstance(told, dict) else None
        return name if isinstance(name, str) and re.match(CLIENT_NAME, name) else ""
    return ""


def wire_bytes(frames: Sequence[zmq.Frame], *, is_secure: bool) -> int:
    """Bytes that a message took on the network. frames: its route, which took none, and more."""
    sizes = [len(frame) + (CURVE_BYTES if is_secure else 0) for frame in frames[1:]]
    return sum(size + (SHORT_BYTES if size < 256 else LONG_BYTES) for size in sizes)


def _descriptor(frame: zmq.Frame) -> int:
    """Of the connection over which it came, which may be closed by now; -1 of a peer that speaks
    ZMTP 1 or 2, as only one without keys may: its connection ends when 2 MiB have come."""
    with contextlib.suppress(zmq.ZMQError):
        return int(frame.get(zmq.SRCFD))
    return -1


def _address(frame: zmq.Frame) -> str:
    with contextlib.suppress(zmq.ZMQError):
        return str(frame.get("Peer-Address")).removeprefix("::ffff:")  # IPv4 on a socket of both
    return ""


def _stopped(authenticator: ThreadAuthenticator) -> bool:
    """End the authenticator's thread; whether it has ended. Its own stop() says so once, waits
    without end for a thread that does not hear it, and blocks at a thread that has died."""
    for _ in range(STOP_TRIES):
        if not authenticator.is_alive():
            break
        with contextlib.suppress(zmq.Again):
            authenticator.pipe.send(b"TERMINATE", zmq.NOBLOCK)
        authenticator.thread.join(STOP_S)
    if authenticator.is_alive():
        return False
    authenticator.pipe.close(linger=0)
    authenticator.pipe = None  # type: ignore[assignment]
    authenticator.stop()  # closes the socket that it answered on
    return True
