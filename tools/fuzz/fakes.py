"""What stands in for the network and the clock around the fuzzer's coordinator."""

from __future__ import annotations

import hashlib
import logging
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import zmq
from zmq.utils import z85

from coordinator.admission.client_list import Admission
from edge_sdk.protocol.codec import decode
from edge_sdk.protocol.fields import PLAIN_TEXT
from edge_sdk.protocol.messages import Message

PART_BYTES = 64  # so that tensors of a few bytes travel in parts
HONEST = "honest"
# In the order of their routes. Each has two: its own connection and one it may open anew.
SENDERS = ("quiet", "idle", "told", "training", "uploading", "done", "stranger")


class Broken(Exception):
    """The coordinator did what it must not do."""


class Frame:
    """As much of zmq.Frame as is used of it."""

    def __init__(self, data: bytes, sender: str = "stranger") -> None:
        self.bytes, self.buffer, self._sender = data, memoryview(data), sender

    def __len__(self) -> int:
        return len(self.bytes)

    def get(self, name: str | int) -> str | int:
        known = {"User-Id": key_of(self._sender), "Peer-Address": "127.0.0.1", zmq.SRCFD: -1}
        return known[name]


@lru_cache
def key_of(name: str) -> str:
    """Its public key, as ZeroMQ tells it."""
    return z85.encode(hashlib.blake2b(name.encode(), digest_size=32).digest()).decode()


def admitted(folder: Path) -> Admission:
    """Everybody but the stranger."""
    names = (*SENDERS[:-1], HONEST)
    path = folder / "clients"
    path.write_text("".join(f"{name} {key_of(name)}\n" for name in names))
    return Admission(path)


class Socket:
    """What the coordinator believes to be its ROUTER: asks `listen` for the next message whenever
    it is polled."""

    def __init__(self, listen: Callable[[], list[Frame] | None]) -> None:
        self.sent: list[tuple[bytes, Message]] = []
        self.is_full = False
        self._listen = listen
        self._frames: list[Frame] | None = None

    def poll(self, timeout_ms: int = 0, flags: int = zmq.POLLIN) -> int:
        if self._frames is None:
            self._frames = self._listen()
        return zmq.POLLIN if self._frames else 0

    def recv_multipart(self, flags: int = 0, copy: bool = True) -> list[Frame]:
        if not self.poll():
            raise zmq.Again
        frames, self._frames = self._frames, None
        assert frames is not None
        return frames

    def send_multipart(self, frames: list[bytes], flags: int = 0, copy: bool = True) -> None:
        self.sent.append((frames[0], decode(frames[1])))
        if self.is_full:
            raise zmq.Again

    def send(self, payload: bytes | memoryview, flags: int = 0, copy: bool = True) -> None:
        if not 0 < len(payload) <= PART_BYTES:
            raise Broken(f"a part of {len(payload)} bytes was sent")

    def close(self) -> None:
        pass


class OneLine(logging.Handler):
    """Every line logged must be one, whatever devices say."""

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        if not re.search(PLAIN_TEXT, line) or len(line) > 5000:
            raise Broken(f"logged {line[:300]!r} ... ({len(line)} characters)")


class Clock:
    """The module `time`, but it goes on only when told: else every message would change a state."""

    now_s = 10_000.0  # seconds

    def monotonic(self) -> float:
        return self.now_s

    time = perf_counter = monotonic

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


CLOCK = Clock()


@contextmanager
def small_world() -> Iterator[None]:
    """Transfers are cut into parts of PART_BYTES and time stands still, in all of our modules that
    are loaded, for as long."""
    changed: list[tuple[Any, str, Any]] = []
    for module_name, module in list(sys.modules.items()):
        if not module_name.startswith(("edge_sdk", "coordinator")):
            continue
        if hasattr(module, "PART_BYTES"):
            changed.append((module, "PART_BYTES", module.PART_BYTES))
        if getattr(module, "time", None) is time:
            changed.append((module, "time", time))
    for module, name, _ in changed:
        setattr(module, name, CLOCK if name == "time" else PART_BYTES)
    try:
        yield
    finally:
        for module, name, value in changed:
            setattr(module, name, value)
