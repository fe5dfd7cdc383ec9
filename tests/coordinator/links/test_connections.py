"""Descriptors are left whatever connects, who sends more than is read is ended, no reset harms."""

from __future__ import annotations

import math
import re
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import pytest
import zmq

from coordinator.links import connections
from coordinator.links.connections import OWN_FILES, allow_connections
from coordinator.links.rate_limit import RateLimits
from coordinator.links.router import Received, Router, wire_bytes
from edge_sdk.errors import ConfigError
from edge_sdk.protocol.codec import encode
from edge_sdk.protocol.messages import Heartbeat
from tests.support.devices import ANY_PORT, WAIT_S, ScriptedDevice
from tools.zmtp import RawPeer

FRAME = bytes(512 * 1024)
BEAT = encode(Heartbeat(round=1))
ROOT = Path(__file__).parents[3]


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


def send_without_end(peer: RawPeer, *, has_more: bool = True) -> None:
    """Until the other side hangs up."""
    until = time.monotonic() + WAIT_S
    with suppress(OSError):
        while time.monotonic() < until:
            peer.send(FRAME, has_more=has_more)
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
    assert re.fullmatch(
        r"a device sent \d+ bytes that are unread or no whole message, and .*", line
    )
    device.close()


def test_a_known_peer_may_have_a_queue_but_no_message_without_an_end(router, monkeypatch):
    monkeypatch.setattr(connections, "MOST_BYTES", 6 * len(FRAME))
    with closing(RawPeer(router.endpoint, WAIT_S)) as endless:
        endless.send(BEAT)
        assert isinstance(router.receive(int(1000 * WAIT_S))[1], Received)
        send_without_end(endless)
    assert router.link_counts().connections_ended == 1


def test_who_sends_more_than_is_read_is_ended(router, monkeypatch):
    """Each of its messages is whole; only the first is read."""
    monkeypatch.setattr(connections, "MOST_BYTES", 6 * len(FRAME))
    with closing(RawPeer(router.endpoint, WAIT_S)) as peer:
        peer.send(BEAT)
        assert isinstance(router.receive(int(1000 * WAIT_S))[1], Received)
        send_without_end(peer, has_more=False)
    assert router.link_counts().connections_ended == 1


def test_all_together_may_not_hold_too_much(router, monkeypatch):
    """Three hold a frame each, which one may, and 2.5 frames is the most: the fullest goes."""
    peers = [RawPeer(router.endpoint, WAIT_S) for _ in range(3)]
    for number, peer in enumerate(peers):
        peer.send(FRAME + bytes(number))
    monkeypatch.setattr(connections, "MOST_BYTES_OF_ALL", 5 * len(FRAME) // 2)
    assert peers[2].is_ended()
    assert router.link_counts().connections_ended == 1
    for peer in peers:
        peer.close()


def test_what_was_read_does_not_count_though_more_always_waits(router, monkeypatch):
    """Ten frames go through, two of them here at a time; more than three would be too much."""
    monkeypatch.setattr(connections, "MOST_UNKNOWN_BYTES", 3 * len(FRAME))
    monkeypatch.setattr(router._connections, "note_drained", lambda: None)
    with closing(RawPeer(router.endpoint, WAIT_S)) as peer:
        peer.send(FRAME)
        for _ in range(10):
            peer.send(FRAME)
            assert router.receive(int(1000 * WAIT_S))[0]
        assert router.receive(int(1000 * WAIT_S))[0]
    assert router.link_counts().connections_ended == 0


def test_bytes_of_a_message_on_the_network():
    """By hand: a header of 2 bytes, of 9 from 256 on; CURVE adds 33 to what it is the header of."""
    frames = [zmq.Frame(bytes(size)) for size in (5, 100, 223, 255)]
    assert wire_bytes(frames, is_secure=False) == 100 + 223 + 255 + 3 * 2
    assert wire_bytes(frames, is_secure=True) == (100 + 33 + 2) + (223 + 33 + 9) + (255 + 33 + 9)


def test_only_a_connection_of_the_peer_itself_is_ended_for_it(router):
    """What is read late may name the descriptor of a connection that was closed meanwhile."""
    device = ScriptedDevice(router.endpoint, "good")
    hears(router, device)
    (descriptor,), (connection,) = zip(*router._connections._open.items(), strict=True)
    router._connections.end(descriptor, "another", before=math.inf)
    router._connections.end(descriptor, connection.peer, before=connection.since - 1.0)
    hears(router, device)
    router._connections.end(descriptor, connection.peer, before=connection.since)
    device.loses_connection()
    device.close()


def test_a_descriptor_that_has_become_another_is_left_alone(router, connect):
    connection = connect()
    connection.recv(1)
    (known,) = router._connections._open.values()
    known.name = ("127.0.0.1", 1)
    router._connections.end(next(iter(router._connections._open)), None, before=math.inf)
    assert not router._connections._open, "it is as if it were gone"
    connection.settimeout(0.1)
    with pytest.raises(TimeoutError):
        is_ended(connection)


def test_a_connection_may_be_reset_at_any_moment():
    """Full queues on both sides, pings between; a process of its own, as it could abort."""
    command = [sys.executable, "-m", "tests.support.resets", "5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=4 * WAIT_S)
    assert (done.returncode, done.stdout) == (0, "lives\n"), done.stderr[-1000:]


OLD = {  # greeting and empty identity, then the header of a message of one frame
    "ZMTP 1": (b"\x01\x00", lambda size: bytes([size + 1, 0])),
    "ZMTP 2": (b"\xff" + bytes(8) + b"\x7f\x01\x05" + bytes(2), lambda size: bytes([0, size])),
}


@pytest.mark.parametrize("version", OLD)
def test_a_peer_of_an_old_zmtp_does_no_harm(router, connect, version):
    """Its messages do not tell over which connection they came."""
    greeting, header = OLD[version]
    connection = connect()
    connection.sendall(greeting + header(len(BEAT)) + BEAT)
    received = router.receive(int(1000 * WAIT_S))[1]
    assert isinstance(received, Received)
    assert received.message == Heartbeat(round=1)
    with suppress(OSError):
        while True:
            connection.sendall((header(len(BEAT)) + BEAT) * 10_000)
    assert router.link_counts().connections_ended == 1


def test_too_few_descriptors_for_the_fleet_are_said_before_it_begins():
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with pytest.raises(ConfigError, match=rf"needs {most + OWN_FILES} open files, .* ulimit -Hn"):
        allow_connections(most)
    allow_connections(most - OWN_FILES)
