"""How a coordinator is found by its address or name, and what is told of one that is not."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import pytest

from coordinator.links.router import Router
from edge_sdk.protocol import link as link_module
from edge_sdk.protocol import reach as reach_module
from edge_sdk.protocol.link import Link
from edge_sdk.protocol.messages import Heartbeat
from edge_sdk.protocol.reach import Reached, is_numeric, reach
from tests.support.addresses import needs_ipv6, printed_with_hosts
from tests.support.devices import ANY_PORT, WAIT_S
from tests.support.processes import free_port

NO_NAME = "tcp://coordinator.invalid:5555"  # a domain that never exists (RFC 6761)
# Prints what of a device's link to each endpoint comes about.
LINKS = """
import sys, time
from coordinator.links.router import Router
from edge_sdk.protocol.link import Link
from edge_sdk.protocol.messages import Heartbeat
from edge_sdk.protocol.reach import reach

def is_reached(endpoint):
    link, until = Link(endpoint, None, None), time.monotonic() + 20
    while not (is_sent := link.send(Heartbeat())) and time.monotonic() < until:
        link.wait(100, wants_to_send=True)
        link.events()
    link.close(is_final=True)
    return is_sent
router = Router("tcp://[::1]:*", None, None)
port = router.endpoint.rpartition(":")[2]
print(is_reached("tcp://six.test:" + port))
print(is_reached("tcp://both.test:" + port))
print(reach("tcp://six.test:1").problem)
router.close()
"""


@contextmanager
def opened(endpoint: str) -> Iterator[Link]:
    link = Link(endpoint, None, None)
    try:
        yield link
    finally:
        link.close(is_final=True)


def wait_for(link: Link, told: Callable[[], object]) -> None:
    until = time.monotonic() + WAIT_S
    while not told():
        assert time.monotonic() < until
        link.wait(50)
        link.events()


@pytest.fixture
def deaf() -> Iterator[int]:
    """A port whose queue of connections is full: the kernel drops further ones, as a firewall."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server:
        port = server.getsockname()[1]
        waiting = [socket.socket() for _ in range(3)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(("127.0.0.1", port))
        yield port
        for one in waiting:
            one.close()


@pytest.fixture
def soon(monkeypatch):
    """What lacks is looked into at once, and again after a tenth of a second."""
    monkeypatch.setattr(link_module, "LOOK_S", 0.0)
    monkeypatch.setattr(link_module, "LOOK_MAX_S", 0.1)


def test_a_name_without_an_address():
    found = reach(NO_NAME)
    assert found.endpoint == ""
    assert found.problem.startswith("the name 'coordinator.invalid' does not resolve: ")


@pytest.mark.parametrize("endpoint", ["tcp://a..b:5", f"tcp://{'a' * 70}:5", "tcp://ä..b:5"])
def test_what_is_no_name_of_a_host(endpoint):
    assert "does not resolve: " in reach(endpoint).problem


def test_a_port_where_nobody_listens():
    port = free_port()
    assert reach(f"tcp://127.0.0.1:{port}") == Reached(
        problem=f"127.0.0.1:{port}: Connection refused"
    )


@needs_ipv6
def test_an_ipv6_port_where_nobody_listens():
    port = free_port()
    assert reach(f"tcp://[::1]:{port}").problem == f"[::1]:{port}: Connection refused"


def test_a_route_that_drops(deaf, monkeypatch):
    monkeypatch.setattr(reach_module, "TRY_S", 0.3)
    said = f"127.0.0.1:{deaf}: no answer within 0.3 s, does a firewall drop it?"
    assert reach(f"tcp://127.0.0.1:{deaf}") == Reached(problem=said)


def test_an_address_that_answers():
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        assert reach(endpoint) == Reached(endpoint)
        assert reach(endpoint.replace("127.0.0.1", "localhost")) == Reached(endpoint)


def test_a_single_address_is_taken_untried():
    port = free_port()
    assert reach(f"tcp://127.0.0.1:{port}", is_tried=False) == Reached(f"tcp://127.0.0.1:{port}")


@needs_ipv6
def test_an_interface_of_a_link_local_address():
    """lo has number 1 in every network namespace of Linux."""
    found = reach("tcp://[fe80::1%lo]:5555", is_tried=False)
    assert found == Reached("tcp://[fe80::1%1]:5555")
    wrong = reach("tcp://[fe80::1%nope0]:5555")
    assert wrong.problem.startswith("the address 'fe80::1%nope0' does not resolve: ")


def test_which_hosts_are_numbers():
    numeric = ["127.0.0.1", "[::1]", "[fe80::1%lo]"]
    assert all(is_numeric(f"tcp://{host}:5") for host in numeric)
    assert not any(is_numeric(f"tcp://{host}:5") for host in ("localhost", "pi.local", "1.2.3.4.5"))


# -- links -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "listen", [ANY_PORT, *(pytest.param("tcp://[::1]:*", marks=needs_ipv6),), "tcp://*:*"]
)
def test_a_link_to_an_address(listen):
    with closing(Router(listen, None, None)) as router:
        port = router.endpoint.rpartition(":")[2]
        host = "[::1]" if "::1" in listen else "127.0.0.1"
        with opened(f"tcp://{host}:{port}") as link:
            wait_for(link, lambda: link.send(Heartbeat()))
            assert link.absence() == ""


def test_a_link_to_a_name():
    with closing(Router(ANY_PORT, None, None)) as router:
        endpoint = router.endpoint.replace("127.0.0.1", "localhost")
        with opened(endpoint) as link:
            wait_for(link, lambda: link.send(Heartbeat()))


def test_a_link_tells_why_it_is_down_and_comes_up(soon):
    port = free_port()
    with opened(f"tcp://localhost:{port}") as link:
        wait_for(link, link.absence)
        assert f"127.0.0.1:{port}: Connection refused" in link.absence()
        with closing(Router(f"tcp://127.0.0.1:{port}", None, None)) as router:
            wait_for(link, lambda: link.send(Heartbeat()))
            link.events()
            assert link.absence() == ""
            router.socket.poll(1000)
        wait_for(link, link.absence)


def test_a_link_to_a_name_without_an_address(soon):
    with opened(NO_NAME) as link:
        wait_for(link, link.absence)
        assert "does not resolve" in link.absence()
        assert not link.send(Heartbeat())


def test_a_link_to_what_is_no_coordinator(soon):
    """It takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        with opened(endpoint) as link:
            wait_for(link, link.absence)
            assert link.absence() == (
                "it takes a connection and makes no handshake; is it an edge-coordinator?"
            )


@pytest.mark.root
@needs_ipv6
def test_names_with_ipv6_addresses_only_and_with_one_of_two_that_answers(tmp_path):
    hosts = "127.0.0.1 localhost\n::1 six.test both.test\n127.0.0.1 both.test\n"
    assert printed_with_hosts(LINKS, hosts, tmp_path) == [
        "True",
        "True",
        "[::1]:1: Connection refused",
    ]
