"""On which addresses a coordinator listens: IPv4, IPv6, both by one socket, IPv4 alone where there
is no IPv6."""

from __future__ import annotations

import subprocess
import sys
from contextlib import closing

import pytest

from coordinator.links.router import Received, Router
from edge_sdk.errors import ConfigError
from tests.support.addresses import KERNELS, needs_ipv6, printed_without_ipv6
from tests.support.devices import WAIT_S, ScriptedDevice
from tests.support.processes import ROOT, free_port

LISTENED = """
from coordinator.links.router import Router
from edge_sdk.errors import ConfigError
from edge_sdk.protocol.link import Link
from edge_sdk.protocol.reach import reach
from tests.support.devices import ScriptedDevice
for listen in ("tcp://*:*", "tcp://[::]:*", "tcp://127.0.0.1:*"):
    router = Router(listen, None, None)
    port = router.endpoint.rpartition(":")[2]
    for host in ("127.0.0.1", "localhost"):
        device = ScriptedDevice("tcp://" + host + ":" + port, "pi")
        while not device.link.send(device.make_hello()):
            device.link.wait(50)
            device.link.events()
        print(listen, router.receive(20_000)[1].address)
        device.close()
    router.close()
try:
    Router("tcp://[::1]:*", None, None)
except ConfigError as error:
    print(str(error).partition(":*")[2].partition(": ")[2])
link = Link("tcp://[::1]:5", None, None)
link.close(is_final=True)
print(reach("tcp://[::1]:5").problem.partition(": ")[2])
"""


def heard_from(router: Router, host: str) -> str:
    """The address that a device had, as the coordinator tells it, which connected to this one."""
    device = ScriptedDevice(f"tcp://{host}:{router.endpoint.rpartition(':')[2]}", "pi")
    try:
        device.send(device.make_hello())
        _, received = router.receive(int(1000 * WAIT_S))
        assert isinstance(received, Received)
        return received.address
    finally:
        device.close()


@needs_ipv6
@pytest.mark.parametrize("listen", ["tcp://*:*", "tcp://*:0", "tcp://[::]:*"])
def test_one_socket_takes_ipv6_and_ipv4(listen):
    with closing(Router(listen, None, None)) as router:
        assert heard_from(router, "127.0.0.1") == "127.0.0.1"
        assert heard_from(router, "[::1]") == "::1"


@needs_ipv6
def test_an_ipv6_address_alone():
    with closing(Router("tcp://[::1]:*", None, None)) as router:
        assert router.endpoint.startswith("tcp://[::1]:")
        assert heard_from(router, "[::1]") == "::1"


def test_an_ipv4_address_is_told_as_it_was_given():
    with closing(Router("tcp://127.0.0.1:*", None, None)) as router:
        assert router.endpoint.startswith("tcp://127.0.0.1:")
        assert heard_from(router, "127.0.0.1") == "127.0.0.1"


@pytest.mark.parametrize("there", ["tcp://*:{}", "tcp://127.0.0.1:{}"])
@pytest.mark.parametrize("listen", ["tcp://*:{}", "tcp://127.0.0.1:{}"])
def test_a_port_is_taken_for_all_addresses(there, listen):
    """No second coordinator begins beside the first, on an address that the first one left."""
    port = free_port()
    with (
        closing(Router(there.format(port), None, None)),
        pytest.raises(ConfigError, match="is another coordinator running there"),
    ):
        Router(listen.format(port), None, None)


@pytest.mark.parametrize("address", ["203.0.113.7", "[2001:db8::7]"])
def test_an_address_of_another_host(address):
    with pytest.raises(ConfigError, match="is that an address of this host"):
        Router(f"tcp://{address}:5555", None, None)


@pytest.mark.parametrize("kernel", [KERNELS[0], pytest.param(KERNELS[1], marks=pytest.mark.root)])
def test_a_host_without_ipv6_listens_on_ipv4(kernel):
    refused = {
        "without the family": "Address family not supported by protocol",
        "switched off": "Cannot assign requested address",
    }[kernel]
    *heard, listening, connecting = printed_without_ipv6(LISTENED, kernel)
    listens = ("tcp://*:*", "tcp://[::]:*", "tcp://127.0.0.1:*")
    assert heard == [f"{listen} 127.0.0.1" for listen in listens for _ in range(2)]
    assert connecting == refused
    assert "is that an address of this host" in listening


@pytest.mark.root
@needs_ipv6
def test_an_invitation_on_a_host_with_ipv6_alone():
    """Of the interface by which packets leave; in a namespace whose only address is this one."""
    setup = "ip link set lo up && ip -6 addr add 2001:db8::7/32 dev lo nodad"
    program = "from coordinator.cli.clients import own_address; print(own_address())"
    command = f'{setup} && ip -6 route add default dev lo && exec "$@"'
    done = subprocess.run(
        ["unshare", "-n", "sh", "-c", command, "sh", sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("[2001:db8::7]\n", "")
