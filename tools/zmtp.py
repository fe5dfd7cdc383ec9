"""A peer that speaks ZMTP 3.0 by hand, without encryption: libzmq sends no message before all of it
is there, so it cannot be made to send one without an end."""

from __future__ import annotations

import socket
import struct

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
MORE, LONG, COMMAND = 1, 2, 4  # flags of a frame


class RawPeer:
    """A connection that has done its handshake. endpoint: "tcp://HOST:PORT"."""

    def __init__(self, endpoint: str, timeout_s: float = 10.0) -> None:
        host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
        self.socket = socket.create_connection((host, int(port)), timeout_s)
        kind = _property(b"Socket-Type", b"DEALER") + _property(b"Identity", b"")
        self.socket.sendall(GREETING)
        self._receive(len(GREETING))
        self.socket.sendall(frame(b"\x05READY" + kind, COMMAND))
        _, size = self._receive(2)
        self._receive(size)

    def send(self, data: bytes, *, has_more: bool = False) -> None:
        """One frame. Raises OSError when the other side has hung up."""
        self.socket.sendall(frame(data, MORE if has_more else 0))

    def _receive(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            if not (more := self.socket.recv(size - len(data))):
                raise ConnectionError(f"ended after {len(data)} of {size} bytes")
            data += more
        return data

    def is_ended(self) -> bool:
        """Wait until the other side hangs up. Raises TimeoutError."""
        try:
            while self.socket.recv(65536):
                pass
        except ConnectionError:
            pass
        return True

    def close(self) -> None:
        self.socket.close()


def frame(data: bytes, flags: int = 0) -> bytes:
    if len(data) < 256:
        return bytes([flags, len(data)]) + data
    return bytes([flags | LONG]) + struct.pack("!Q", len(data)) + data


def _property(name: bytes, value: bytes) -> bytes:
    return bytes([len(name)]) + name + struct.pack("!I", len(value)) + value
