"""Descriptors are left whatever connects, and no message without an end is kept."""

from __future__ import annotations

import re
import resource
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress

import pytest

from coordinator.fleet import connections
from coordinator.fleet.connections import OWN_FILES, allow_connections
from coordinator.fleet.rate_limit import RateLimits
from coordinator.fleet.router import Received, Router
from edge_sdk.errors import ConfigError
from edge_sdk.protocol.codec import encode
from edge_sdk.protocol.messages import Heartbeat
from tests.support.devices import ANY_PORT, WAIT_S, ScriptedDevice
from tools.zmtp import RawPeer

FRAME = bytes(512 * 1024)


@pytest.fixture
def router(monkeypatch) -> Iterator[Router]:
    monkeypatch.setattr(connections, "LOOK_MS", 20)
    monkeypatch.setattr(connections, "LOOK_S", 0.02)
    with closing(Router(ANY_PORT, None, None, RateLimits())) as router:
        yield router


@pytest.fixture
def connect(router) -> Iterator[Callable[[], socket.socket]]:
    """Opens a connection that says nothing."""
    port = int(router.endpoint.rpartition(":")[2])
    with ExitStack() as stack:
        yield lambda: stack.enter_context(socket.create_connection(("127.0.0.1", port), WAIT_S))


def hears(router: Router, device: ScriptedDevice) -> None:
    device.send(Heartbeat(round=1))
    until = time.monotonic() + WAIT_S
    while time.monotonic() < until:
        _, received = router.receive(100)
        if isinstance(received, Received):
            assert received.message == Heartbeat(round=1)
            return
    raise AssertionError("not heard")


def is_ended(connection: socket.socket) -> bool:
    """Whether the other side has hung up; it greets first."""
    try:
        while connection.recv(1024):
            pass
    except ConnectionError:
        pass
    return True


def test_connections_that_say_nothing_make_room_for_those_that_do(router, connect, caplog):
    device = ScriptedDevice(router.endpoint, "good")
    hears(router, device)
    router._connections._most = 5
    silent = [connect() for _ in range(12)]
    assert all(is_ended(connection) for connection in silent[:8])  # 12 + 1 - 5, the oldest
    hears(router, device)
    late = ScriptedDevice(router.endpoint, "late")
    hears(router, late)
    assert router.link_counts().connections_ended == 9
    (line,) = caplog.messages  # of nine
    assert "too many open files: 6 connections with a limit of" in line
    assert "ulimit -Hn" in line
    assert "LimitNOFILE=" in line
    device.close()
    late.close()


def test_where_all_are_known_the_newest_is_ended(router):
    devices = [ScriptedDevice(router.endpoint, f"d{number}") for number in range(3)]
    router._connections._most = 3
    for device in devices:
        hears(router, device)
    one_more = ScriptedDevice(router.endpoint, "one more")
    one_more.loses_connection()
    for device in devices:
        hears(router, device)
        device.close()
    one_more.close()


def send_without_end(peer: RawPeer) -> None:
    """Until the other side hangs up."""
    until = time.monotonic() + WAIT_S
    with suppress(OSError):
        while time.monotonic() < until:
            peer.send(FRAME, has_more=True)
        raise AssertionError("it takes whatever comes")


def test_a_message_without_an_end_is_not_kept(router, caplog):
    """It is nobody's that is known: more than one frame would be none of the protocol's."""
    device = ScriptedDevice(router.endpoint, "good")
    hears(router, device)
    with closing(RawPeer(router.endpoint, WAIT_S)) as endless:
        send_without_end(endless)
    hears(router, device)
    assert router.link_counts().connections_ended == 1
    (line,) = caplog.messages
    assert re.fullmatch(r"a device sent \d+ bytes of a message without an end, and .*", line)
    device.close()


def test_a_known_peer_may_have_a_queue_but_no_message_without_an_end(router, monkeypatch):
    monkeypatch.setattr(connections, "MOST_BYTES", 6 * len(FRAME))
    with closing(RawPeer(router.endpoint, WAIT_S)) as endless:
        endless.send(encode(Heartbeat(round=1)))
        assert isinstance(router.receive(int(1000 * WAIT_S))[1], Received)
        send_without_end(endless)
    assert router.link_counts().connections_ended == 1


def test_too_few_descriptors_for_the_fleet_are_said_before_it_begins():
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with pytest.raises(ConfigError, match=rf"needs {most + OWN_FILES} open files, .* ulimit -Hn"):
        allow_connections(most)
    allow_connections(most - OWN_FILES)
