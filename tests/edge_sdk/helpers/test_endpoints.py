"""Addresses of coordinators, as people write them."""

from __future__ import annotations

import pytest

from edge_sdk.errors import ConfigError
from edge_sdk.helpers.text import checked_endpoint, split_endpoint


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("tcp://pi.local:5555", ("pi.local", "5555", False)),
        ("tcp://192.168.1.5:5555", ("192.168.1.5", "5555", False)),
        ("tcp://[::1]:5555", ("::1", "5555", True)),
        ("tcp://[2001:db8::5]:1", ("2001:db8::5", "1", True)),
        ("tcp://[fe80::1%eth0]:65535", ("fe80::1%eth0", "65535", True)),
    ],
)
def test_endpoints(text, parts):
    assert checked_endpoint(text, "--coordinator") == text
    assert checked_endpoint(text, "--listen") == text
    assert split_endpoint(text) == parts


@pytest.mark.parametrize("text", ["tcp://*:5555", "tcp://[::]:0", "tcp://eth0:*", "tcp://[::1]:*"])
def test_endpoints_to_listen_on(text):
    assert checked_endpoint(text, "--listen") == text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tcp://::1:5555", "in brackets: tcp://[::1]:5555"),
        ("tcp://2001:db8::5:5555", "in brackets"),
        ("tcp://::1", "in brackets"),
        ("tcp://fe80::1%eth0:5555", "in brackets"),
        ("tcp://[::1]", "is not tcp://HOST:PORT"),
        ("tcp://[::1]5555", "is not tcp://HOST:PORT"),
        ("tcp://[]:5555", "is not tcp://HOST:PORT"),
        ("tcp://[::1]:70000", "port outside 1 to 65535"),
        ("tcp://[::1]:*", "is not tcp://HOST:PORT"),
        ("tcp://[pi.local]:5555", "has no IPv6 address in its brackets"),
        ("tcp://[127.0.0.1]:5555", "has no IPv6 address in its brackets"),
        ("tcp://[1::2::3]:5555", "has no IPv6 address in its brackets"),
        ("tcp://[fe80::1]:5555", "needs its network interface behind a %"),
        ("tcp://[fe80::1%]:5555", "has no IPv6 address in its brackets"),
        ("[::1]:5555", "is not tcp://HOST:PORT"),
        ("tcp://pi:5555:5555", "is not tcp://HOST:PORT"),
        ("tcp://256.1.1.1:5555", "has no IPv4 address: Octet 256"),
        ("tcp://192.168.1:5555", "has no IPv4 address: Expected 4 octets"),
        ("tcp://5:5555", "expected four numbers from 0 to 255, or a name"),
        ("tcp://pi.local", "is not tcp://HOST:PORT"),
        ("tcp://pi.local:0", "port outside"),
    ],
)
def test_what_is_no_endpoint_is_one_line(text, said):
    with pytest.raises(ConfigError) as caught:
        checked_endpoint(text, "--coordinator")
    assert str(caught.value).startswith(f"--coordinator {text!r} ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
