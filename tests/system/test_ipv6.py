"""Joining, training, watching and changing a key where all addresses are IPv6."""

from __future__ import annotations

import urllib.request
from contextlib import closing

import pytest

from coordinator.runs.prometheus import MetricsServer
from edge_sdk.cli import doctor
from edge_sdk.protocol.invitation import decode_line, encode_line
from edge_sdk.protocol.join import join, rotate
from edge_sdk.protocol.keys import read_keys
from tests.support.addresses import needs_ipv6
from tests.support.admission import Gate
from tests.support.processes import World

pytestmark = needs_ipv6


@pytest.fixture
def gate(tmp_path):
    gate = Gate(tmp_path / "keys", "tcp://[::1]:*")
    yield gate
    gate.close()


def test_a_device_joins_and_changes_its_key(gate, tmp_path):
    line = decode_line(encode_line(gate.invite("pi")))
    assert line.endpoint == gate.endpoint
    assert line.endpoint.startswith("tcp://[::1]:")
    first = join(line, tmp_path / "pi", "pi")
    assert list(gate.names()) == ["pi"]
    second = rotate(gate.endpoint, gate.keys.public, tmp_path / "pi", "pi")
    assert first != second == read_keys(tmp_path / "pi", "device")
    found = doctor.check_coordinator(gate.endpoint, (second, gate.keys.public), is_insecure=False)
    assert (found.outcome, found.found) == (
        "ok",
        f"{gate.endpoint} takes this device's connection",
    )


def test_metrics():
    with closing(MetricsServer("[::1]:0")) as server:
        url = f"http://[::1]:{server.port}/metrics"
        with urllib.request.urlopen(url, timeout=20) as answer:
            assert answer.status == 200


@pytest.mark.slow
@pytest.mark.parametrize("listen", ["tcp://[::1]:{}", "tcp://*:{}"])
def test_a_run(tmp_path, listen):
    with World(tmp_path, 2) as world:
        server = world.serve("--rounds", "1", "--listen", listen.format(world.port))
        six = ("--coordinator", f"tcp://[::1]:{world.port}")
        devices = [world.device("a", "--once", *six)]
        devices.append(world.device("b", "--once", *(six if "::1" in listen else ())))
        assert server.end() == 0
        assert [device.end() for device in devices] == [0, 0]
        assert world.outcomes("a") == world.outcomes("b") == {1: "ok"}
        assert server.said("a joined from raspberry-pi-4")
