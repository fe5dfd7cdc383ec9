"""The coordinator's end of all links: one ROUTER socket.

Routes are ZeroMQ's own random ids, one per connection, so nobody can take another's by name; who is
on a route follows from its CURVE key, checked against the admission list before a byte is read. The
key of an invitation may send `join` and nothing else, which is answered here.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import resource
from dataclasses import dataclass

import zmq
from zmq.auth.thread import ThreadAuthenticator

from coordinator.admission import join as joining
from coordinator.admission.client_list import Admission
from edge_sdk.errors import ConfigError, ProtocolError
from edge_sdk.helpers.logs import event
from edge_sdk.helpers.text import split_endpoint
from edge_sdk.protocol.keys import KeyPair
from edge_sdk.protocol.link import Payload, parse_frames, send_frames, set_common_options
from edge_sdk.protocol.messages import Fault, Hello, Join, Message

log = logging.getLogger(__name__)
OWN_FILES = 64  # that the coordinator opens for itself
NOT_ADMITTED = (
    "this key is not admitted any more; if keys --rotate replaced it, start the agent again, else "
    "ask for an invitation"
)
STOP_TRIES, STOP_S = 20, 0.5  # to end the authenticator's thread


@dataclass(frozen=True)
class Received:
    """A checked message. name: the admitted client whose key this is, None when the link is
    insecure. address: where a Hello came from, "" if not known."""

    route: bytes
    name: str | None
    message: Message
    payload: Payload | None
    address: str = ""
    key: bytes = b""


@dataclass(frozen=True)
class Outcast:
    """A message came over this route, which may have been a client's, under a key that is not
    admitted any more."""

    route: bytes


class _Credentials:
    """Tells the authenticator, at every new connection, whether its key may come in."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self.num_refused = 0

    def callback(self, domain: str, public_key: bytes) -> bool:
        """public_key: Z85 text."""
        if self._admission.name_of(public_key) or self._admission.invitations.find(public_key):
            return True
        self.num_refused += 1
        key = public_key.decode()
        extra = event("stranger", key=key)
        log.warning("refused a device with unknown public key %s", key, extra=extra)
        self._admission.pending.note(public_key)
        return False


class Router:
    """endpoint: "tcp://HOST:PORT", port 0 or * for any free one. Without keys nothing is encrypted
    and nobody is checked."""

    def __init__(self, endpoint: str, keys: KeyPair | None, admission: Admission | None) -> None:
        self._admission = admission
        self._context = zmq.Context()
        self._authenticator: ThreadAuthenticator | None = None
        self._credentials: _Credentials | None = None
        self.socket: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
        set_common_options(self.socket)
        self.socket.set(zmq.ROUTER_MANDATORY, 1)
        if keys is not None:
            assert admission is not None, "CURVE without a client list admits nobody"
            self._authenticator = ThreadAuthenticator(self._context)
            self._authenticator.start()
            self._credentials = _Credentials(admission)
            self._authenticator.configure_curve_callback("*", self._credentials)
            self.socket.set(zmq.CURVE_SERVER, 1)
            self.socket.set(zmq.CURVE_PUBLICKEY, keys.public)
            self.socket.set(zmq.CURVE_SECRETKEY, keys.secret)
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

    def receive(self, timeout_ms: int) -> tuple[bool, Received | Outcast | None]:
        """Whether there was a message, and the message if it was good and is not done with here. A
        bad one, or one of a device that is no longer admitted, is answered with a Fault."""
        admission = self._admission
        if admission is not None:
            admission.pending.write_if_due(self._is_client)
        if timeout_ms and not self.socket.poll(timeout_ms):
            return False, None
        try:
            frames = self.socket.recv_multipart(zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return False, None
        route, key, name = frames[0].bytes, b"", None
        if admission is not None:
            key = str(frames[-1].get("User-Id")).encode()
            name = admission.name_of(key)
            if name is None and admission.invitations.find(key) is None:
                self._refuse(route, NOT_ADMITTED)
                return True, Outcast(route)
        try:
            message, payload = parse_frames(frames[1:])
        except ProtocolError as error:
            said = "message from %s refused: %s"
            extra = event("refused", client=name, code=error.code)
            log.warning(said, name or "a device", error, extra=extra)
            self.send(route, Fault(code=error.code, detail=str(error)))
            return True, None
        if isinstance(message, Join):
            self._on_join(route, key, message)
            return True, None
        if admission is not None and name is None:
            self._refuse(route, "an invitation's key may send join and nothing else")
            return True, None
        address = _address(frames[-1]) if isinstance(message, Hello) else ""
        return True, Received(route, name, message, payload, address, key)

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
        elif reply := joining.answer(self._admission, key, join):
            self.send(route, reply)

    def _refuse(self, route: bytes, detail: str) -> None:
        self.send(route, Fault(code="admission", detail=detail))

    def close(self) -> None:
        self.socket.close()
        if self._admission is not None:
            self._admission.pending.write_if_due(self._is_client, is_last=True)
        if self._authenticator is None or _stopped(self._authenticator):
            self._context.term()
        else:  # it would wait for the sockets of that thread, which ends with the process
            log.warning("the thread that checks keys did not end")


def allow_connections(devices: int) -> None:
    """Raise the limit of open files as far as it goes: a connection is one, and ZeroMQ busily tries
    again to take one that it may not open. Raises ConfigError if that is too few."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if most != resource.RLIM_INFINITY and most < devices + OWN_FILES:
        raise ConfigError(
            f"--min-clients {devices} needs {devices + OWN_FILES} open files, the limit is {most}; "
            "raise it with ulimit -Hn, or LimitNOFILE= of a service"
        )


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
