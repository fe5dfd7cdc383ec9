"""Who dawdles over HTTP holds up nobody."""

from __future__ import annotations

import socket
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, closing

import pytest

from coordinator.runs import http_server
from coordinator.runs.http_server import MOST, BoundedServer
from tests.support.devices import WAIT_S


def hello(environ: dict, start_response) -> list[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"hello"]


@pytest.fixture
def server() -> Iterator[BoundedServer]:
    with closing(BoundedServer("127.0.0.1", 0, hello)) as server:
        yield server


def scrape(server: BoundedServer) -> bytes:
    url = f"http://127.0.0.1:{server.server_port}/metrics"
    with urllib.request.urlopen(url, timeout=WAIT_S) as answer:
        return answer.read()


def dawdler(server: BoundedServer) -> socket.socket:
    """It has begun a request."""
    connection = socket.create_connection(("127.0.0.1", server.server_port), WAIT_S)
    connection.sendall(b"GET /metrics HT")
    return connection


def test_a_scrape_gets_through_beside_those_who_never_end_their_request(server):
    with ExitStack() as stack:
        slow = [stack.enter_context(dawdler(server)) for _ in range(3 * MOST)]
        assert scrape(server) == b"hello"
        for connection in slow[: 2 * MOST]:
            assert connection.recv(1) == b""  # cut off, the oldest first
        assert len(server._since) <= MOST


def test_one_that_drips_is_cut_off(monkeypatch):
    monkeypatch.setattr(http_server, "ANSWER_S", 0.3)
    with closing(BoundedServer("127.0.0.1", 0, hello)) as server, dawdler(server) as connection:
        connection.settimeout(0.05)
        for _ in range(int(WAIT_S / 0.05)):  # a byte at a time: no read times out
            try:
                connection.send(b"x")
                if connection.recv(1) == b"":
                    break
            except TimeoutError:
                continue
            except ConnectionError:
                break
        else:
            raise AssertionError("it may drip for ever")
        assert scrape(server) == b"hello"
