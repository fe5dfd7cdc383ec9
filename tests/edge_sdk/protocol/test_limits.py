"""What is no frame or too much of one: a frame from the network never does worse than raise
ProtocolError in one line."""

from __future__ import annotations

import subprocess
import sys

import msgpack
import pytest
import zmq

from edge_sdk.protocol.codec import MAX_CONTROL_BYTES, decode, encode
from edge_sdk.protocol.link import set_common_options
from edge_sdk.protocol.messages import MAX_TENSORS, Accepted, Bye
from tests.support.frames import INF, MODEL, NAN, frame, refused


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\xc1" * 20, id="reserved byte"),
        pytest.param(b"GET / HTTP/1.1\r\n\r\n", id="another protocol"),
        pytest.param(encode(Accepted(round=1))[:-1], id="truncated"),
        pytest.param(encode(Accepted(round=1)) + b"\x00", id="bytes behind it"),
        pytest.param(b"\xdf\xff\xff\xff\xff", id="map of 4 billion"),
        pytest.param(b"\xdd\xff\xff\xff\xff", id="array of 4 billion"),
        pytest.param(b"\xdb\xff\xff\xff\xff", id="string of 4 GB"),
        pytest.param(b"\xc6\xff\xff\xff\xff", id="bin of 4 GB"),
        pytest.param(b"\xc9\xff\xff\xff\xff\x01", id="extension of 4 GB"),
        pytest.param(b"\x81\xa4type\xa2\xff\xfe", id="not UTF-8"),
        pytest.param(b"\x81\x01\x02", id="integer as key"),
        pytest.param(b"\x81\x91\x01\x02", id="array as key"),
        pytest.param(b"\x91" * 100_000 + b"\xc0", id="100 000 levels, never closed"),
        pytest.param(b"\x81\xa1a" * 100_000 + b"\xc0", id="100 000 maps"),
        pytest.param(msgpack.packb({"type": "bye", "reason": msgpack.Timestamp(1)}), id="time"),
    ],
)
def test_what_is_not_a_frame_is_refused(data):
    assert "is not msgpack" in refused(data)


def test_size_is_checked_before_anything_else():
    data = b"\xc0" * (MAX_CONTROL_BYTES + 1)
    assert refused(data) == (
        "control frame of 1047553 bytes, at most 1047552 are accepted"  # 1023 * 1024 + 1
    )


@pytest.mark.parametrize("is_encrypted", [False, True])
def test_the_largest_control_frame_fits_the_transport(is_encrypted):
    context = zmq.Context()
    router, dealer = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
    try:
        for socket in (router, dealer):
            set_common_options(socket)
        if is_encrypted:
            router.set(zmq.CURVE_SERVER, 1)
            public, secret = zmq.curve_keypair()
            for socket in (router, dealer):
                socket.set(zmq.CURVE_PUBLICKEY, public)
                socket.set(zmq.CURVE_SECRETKEY, secret)
            dealer.set(zmq.CURVE_SERVERKEY, public)
        port = router.bind_to_random_port("tcp://127.0.0.1")
        dealer.connect(f"tcp://127.0.0.1:{port}")
        dealer.send(bytes(MAX_CONTROL_BYTES))
        assert router.poll(10_000), "the connection was closed"
        assert len(router.recv_multipart()[-1]) == MAX_CONTROL_BYTES
    finally:
        context.destroy(linger=0)


def test_the_types_of_messages_can_be_dropped():
    # msgspec 0.22 aborts at the end of the process over some unions; see messages.Option.
    code = (
        "from edge_sdk.agent import pipe; from edge_sdk.protocol import codec, messages;"
        "codec.decode(codec.encode(messages.Bye()))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_limits_of_arrays_maps_and_strings():
    assert decode(frame("update", exits=[]))
    refused(frame("update", exits=[{"exit": 1, "loss": 0.5, "metric": 1.0}] * 10_001))
    refused(frame("bye", **{str(i): i for i in range(1000)}))  # 1002 pairs
    assert len(decode(frame("bye", reason="🛑" * 2000)).reason) == 2000  # 8000 bytes
    refused(frame("bye", reason="x" * 8001))


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ({str(i): i for i in range(50)}, {str(i): i for i in range(51)}),
        ({"x" * 200: 1}, {"x" * 201: 1}),
        ({"text": "x" * 2000}, {"text": "x" * 2001}),
        ({"channels": [1] * 100}, {"channels": [1] * 101}),
        ({"ratio": 1e9}, {"ratio": 1.1e9}),
        ({"ratio": -1e9}, {"ratio": INF}),
        ({"ratio": 0.0}, {"ratio": NAN}),
        ({"a b": 1}, {"a\n": 1}),
        ({"n": 2**64 - 1}, {"n": None}),
    ],
)
def test_options_are_limited(good, bad):
    assert len(decode(frame("job", model={**MODEL, "options": good})).model.options) == len(good)
    assert "$.model.options" in refused(frame("job", model={**MODEL, "options": bad}))


def test_number_of_tensors_is_limited():
    spec = {"name": "w", "shape": [], "dtype": "bool"}
    assert len(decode(frame("job", tensors=[spec] * MAX_TENSORS)).tensors) == 10_000
    refused(frame("job", tensors=[spec] * (MAX_TENSORS + 1)))


@pytest.mark.parametrize("levels", [10, 1000, 1023])
def test_nesting_that_msgpack_lets_through_is_refused(levels):
    nested = b"\x91" * levels + b"\xc0"
    refused(b"\x82\xa4type\xa8accepted\xa5round" + nested)
    refused(b"\x81\xa4type" + nested)
    refused(nested)


@pytest.mark.parametrize("levels", [700, 1000, 1020])
def test_nesting_in_the_version_is_refused(levels):
    refused(b"\x82\xa4type\xa5hello\xa8protocol" + b"\x91" * levels + b"\xc0")


def test_errors_stay_short_whatever_the_frame_holds():
    refused(encode(Bye()) + b"\x01" * 100_000)


def test_errors_stay_short_for_long_unknown_fields():
    refused(frame("bye", **{"x" * 4000: 1}))


def test_an_unknown_field_cannot_forge_a_log_line():
    refused(frame("bye", **{"x\n2030-01-01 INFO all is well": 1}))
