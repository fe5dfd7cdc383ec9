"""Encoding and decoding, good frames next to bad ones; a frame from the network never does worse
than raise ProtocolError in one line."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import msgpack
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdk.errors import ProtocolError, VersionError
from edge_sdk.transport import set_common_options
from edge_sdk.wire import (
    MAX_CONTROL_BYTES,
    MAX_TENSORS,
    MAX_TRANSFER_BYTES,
    PART_BYTES,
    PROTOCOL,
    Accepted,
    Bye,
    Fault,
    Fetch,
    Heartbeat,
    Job,
    ModelSpec,
    Part,
    Phase,
    Plan,
    Ready,
    Segment,
    TensorSpec,
    Update,
    decode,
    encode,
    layout,
    num_parts,
    part_size,
)

MODEL = {"family": "cnn", "input_shape": [1, 8, 8], "num_classes": 10, "exit": 3}
PLAN = {"segments": [{"first": 1, "last": 3}]}
SPEC = {"name": "stages.0.w", "shape": [2, 3], "dtype": "float32"}
PROFILE = {
    "platform": "generic",
    "memory_total_bytes": 2,
    "memory_available_bytes": 1,
    "cores": 1.0,
    "gflops": 0.0,
}
HEX = "0123456789abcdef" * 2  # an id or a digest
# One good message of each type as plain values, required fields only.
GOOD: dict[str, dict[str, Any]] = {
    "hello": {
        "protocol": PROTOCOL,
        "client_id": "a",
        "session": "s",
        "profile": PROFILE,
        "num_examples": 3,
        "input_shape": [1, 8, 8],
        "num_classes": 10,
    },
    "welcome": {
        "protocol": PROTOCOL,
        "run": "r",
        "model": MODEL,
        "plan": PLAN,
        "deadline_s": 0.0,
        "heartbeat_s": 5.0,
    },
    "ready": {"exit": 0},
    "job": {
        "id": HEX,
        "round": 1,
        "model": MODEL,
        "plan": PLAN,
        "tensors": [SPEC],
        "deadline_s": 0.0,
    },
    "fetch": {"round": 1, "have": 0, "first": 0, "count": 1},
    "part": {"round": 1, "index": 0},
    "update": {
        "job": HEX,
        "digest": HEX,
        "round": 1,
        "num_examples": 3,
        "num_steps": 0,
        "exits": [{"exit": 1, "loss": 0.5, "accuracy": 1.0}],
        "phases": {"train": {"wall_s": 1.0}},
        "peak_memory_bytes": 0,
        "tensors": [SPEC],
    },
    "accepted": {"round": 1},
    "fault": {"code": "round", "detail": ""},
    "heartbeat": {},
    "probe": {},
    "bye": {},
}
NAN, INF = math.nan, math.inf


def frame(tag: str, **changes: Any) -> bytes:
    """A good message of this type with some fields changed."""
    return msgpack.packb({"type": tag, **GOOD[tag], **changes})


def refused(data: bytes) -> str:
    """The one line that decode refuses `data` with."""
    with pytest.raises(ProtocolError) as caught:
        decode(data)
    return checked_line(caught.value)


def decoded_or_refused(data: bytes) -> None:
    try:
        decode(data)
    except ProtocolError as error:
        checked_line(error)


def checked_line(error: ProtocolError) -> str:
    line = str(error)
    assert line
    assert line.isprintable(), "not one printable line"
    assert len(line) < 1000, "a peer decides how long our log lines are"
    return line


# -- good --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tag", GOOD)
def test_required_fields_are_enough(tag):
    message = decode(frame(tag))
    assert type(message).__name__ == tag.capitalize()
    assert decode(encode(message)) == message


def test_other_encodings_of_the_same_values_are_read():
    # round 7 as uint 64, first 0 as uint 8, count 1 as uint 32, have 0 as uint 16; another order.
    data = (
        b"\x85\xa5round\xcf" + (7).to_bytes(8, "big") + b"\xa5count\xce\0\0\0\x01"
        b"\xa5first\xcc\0\xa4have\xcd\0\0\xa4type\xa5fetch"
    )
    assert decode(data) == Fetch(round=7, have=0, first=0, count=1)
    # 0.5 as float 32 (0x3f000000), 1 as an integer where a float is wanted
    result = b"\x83\xa4exit\x01\xa4loss\xca\x3f\0\0\0\xa8accuracy\x01"
    exits = msgpack.unpackb(result)
    assert decode(frame("update", exits=[exits])).exits[0].accuracy == 1.0
    assert decode(frame("update", exits=[exits])).exits[0].loss == 0.5


def test_the_last_of_a_repeated_key_counts():
    data = b"\x83\xa4type\xa8accepted\xa5round\x01\xa5round\x02"
    assert decode(data) == Accepted(round=2)


def test_frames_may_be_memoryviews():
    assert decode(memoryview(encode(Bye(reason="x")))) == Bye(reason="x")


# -- not msgpack, or too much of it ------------------------------------------------------------


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
    # msgspec 0.22 aborts at the end of the process over some unions; see wire.Option.
    code = "from edge_sdk import pipe, wire; wire.decode(wire.encode(wire.Bye()))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_limits_of_arrays_maps_and_strings():
    assert decode(frame("update", exits=[]))
    refused(frame("update", exits=[{"exit": 1, "loss": 0.5, "accuracy": 1.0}] * 10_001))
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


# -- fields ------------------------------------------------------------------------------------


@pytest.mark.parametrize("plain", [None, 1, "hello", [], [1], {}, {"round": 1}, {"type": None}])
def test_what_is_not_a_tagged_map_is_refused(plain):
    refused(msgpack.packb(plain))


@pytest.mark.parametrize("tag", ["", "helo", "Hello", "inspected", "cancel", 1, None, ["bye"]])
def test_unknown_types_are_refused(tag):
    assert "$.type" in refused(msgpack.packb({"type": tag}))


@pytest.mark.parametrize("tag", GOOD)
def test_unknown_fields_are_refused(tag):
    assert "unknown field `surprise`" in refused(frame(tag, surprise=1))


def test_unknown_fields_inside_are_refused():
    assert "$.plan" in refused(frame("job", plan={**PLAN, "surprise": 1}))
    assert "$.tensors[0]" in refused(frame("job", tensors=[{**SPEC, "surprise": 1}]))
    assert "$.profile" in refused(frame("hello", profile={**PROFILE, "surprise": 1}))


@pytest.mark.parametrize(("tag", "field"), [(t, f) for t, fields in GOOD.items() for f in fields])
def test_missing_fields_are_refused(tag, field):
    rest = {key: value for key, value in GOOD[tag].items() if key != field}
    assert f"missing required field `{field}`" in refused(msgpack.packb({"type": tag, **rest}))


@pytest.mark.parametrize(
    ("tag", "changes", "path"),
    [
        # wrong type
        ("accepted", {"round": "1"}, "$.round"),
        ("accepted", {"round": 1.0}, "$.round"),
        ("accepted", {"round": True}, "$.round"),
        ("accepted", {"round": None}, "$.round"),
        ("accepted", {"round": [1]}, "$.round"),
        ("bye", {"reason": b""}, "$.reason"),
        ("bye", {"reason": None}, "$.reason"),
        ("bye", {"reason": 1}, "$.reason"),
        ("hello", {"profile": []}, "$.profile"),
        ("hello", {"profile": {**PROFILE, "is_emulated": 1}}, "$.profile.is_emulated"),
        ("job", {"tensors": SPEC}, "$.tensors"),
        ("job", {"tensors": [{**SPEC, "shape": 6}]}, "$.tensors[0].shape"),
        ("job", {"tensors": [{**SPEC, "shape": [2.0]}]}, "$.tensors[0].shape[0]"),
        ("job", {"model": {**MODEL, "options": {"a": {}}}}, "$.model.options"),
        ("update", {"phases": []}, "$.phases"),
        ("ready", {"stages": msgpack.ExtType(1, b"")}, "$.stages"),
        # out of range
        ("accepted", {"round": 0}, "$.round"),
        ("accepted", {"round": -1}, "$.round"),
        ("accepted", {"round": 2**31 + 1}, "$.round"),
        ("accepted", {"round": 2**64 - 1}, "$.round"),
        ("fetch", {"first": -1}, "$.first"),
        ("fetch", {"count": -1}, "$.count"),
        ("fetch", {"have": -1}, "$.have"),
        ("job", {"id": "a" * 31}, "$.id"),
        ("job", {"id": "A" * 32}, "$.id"),
        ("job", {"id": HEX + "\n"}, "$.id"),
        ("update", {"job": ""}, "$.job"),
        ("update", {"digest": "a" * 33}, "$.digest"),
        ("hello", {"job": "none"}, "$.job"),
        ("fetch", {"count": 1025}, "$.count"),
        ("part", {"index": 2**48 + 1}, "$.index"),
        ("ready", {"exit": 101}, "$.exit"),
        ("ready", {"reason": "x" * 2001}, "$.reason"),
        ("hello", {"client_id": ""}, "$.client_id"),
        ("hello", {"client_id": "-a"}, "$.client_id"),
        ("hello", {"client_id": "a b"}, "$.client_id"),
        ("hello", {"client_id": "a" * 65}, "$.client_id"),
        ("hello", {"client_id": "../a"}, "$.client_id"),
        ("hello", {"client_id": "a\n"}, "$.client_id"),
        ("hello", {"num_examples": 0}, "$.num_examples"),
        ("hello", {"num_examples": 2**31 + 1}, "$.num_examples"),
        ("hello", {"input_shape": []}, "$.input_shape"),
        ("hello", {"input_shape": [1] * 5}, "$.input_shape"),
        ("hello", {"round": 2**31 + 1}, "$.round"),
        ("ready", {"stages": [1] * 101}, "$.stages"),
        ("update", {"exits": [{"exit": 1, "loss": 0.5, "accuracy": 1.0}] * 101}, "$.exits"),
        ("job", {"plan": {**PLAN, "exit_weights": [1.0] * 101}}, "$.plan.exit_weights"),
        ("job", {"plan": {**PLAN, "distill": "both"}}, "$.plan.distill"),
        ("job", {"plan": {**PLAN, "distill_weight": -0.5}}, "$.plan.distill_weight"),
        ("job", {"plan": {**PLAN, "distill_temperature": 0.0}}, "$.plan.distill_temperature"),
        ("job", {"plan": {**PLAN, "distill_temperature": 1001}}, "$.plan.distill_temperature"),
        ("ready", {"exit": 1, "stages": [2], "stage_s": [-1.0]}, "$.stage_s[0]"),
        ("hello", {"session": ""}, "$.session"),
        ("hello", {"session": "s" * 201}, "$.session"),
        ("welcome", {"heartbeat_s": 0.0}, "$.heartbeat_s"),
        ("welcome", {"heartbeat_s": 3601.0}, "$.heartbeat_s"),
        ("job", {"model": {**MODEL, "width": 0.0}}, "$.model.width"),
        ("job", {"model": {**MODEL, "width": 1.5}}, "$.model.width"),
        ("job", {"model": {**MODEL, "input_shape": []}}, "$.model.input_shape"),
        ("job", {"model": {**MODEL, "input_shape": [1] * 5}}, "$.model.input_shape"),
        ("job", {"plan": {"segments": []}}, "$.plan.segments"),
        ("job", {"plan": {**PLAN, "batch_size": 1}}, "$.plan.batch_size"),
        ("job", {"plan": {**PLAN, "lr": 0.0}}, "$.plan.lr"),
        ("job", {"plan": {**PLAN, "momentum": 1.0}}, "$.plan.momentum"),
        ("job", {"plan": {**PLAN, "seed": 2**62}}, "$.plan.seed"),
        ("job", {"plan": {**PLAN, "optimizer": "lion"}}, "$.plan.optimizer"),
        ("job", {"tensors": [{**SPEC, "shape": [1] * 9}]}, "$.tensors[0].shape"),
        ("job", {"tensors": [{**SPEC, "shape": [-1]}]}, "$.tensors[0].shape[0]"),
        ("job", {"tensors": [{**SPEC, "dtype": "complex64"}]}, "$.tensors[0].dtype"),
        ("job", {"tensors": [{**SPEC, "role": "gift"}]}, "$.tensors[0].role"),
        ("job", {"tensors": [{**SPEC, "name": "w" * 201}]}, "$.tensors[0].name"),
        ("update", {"phases": {"upload": {"wall_s": 1.0}}}, "$.phases"),
        # NaN and infinity
        ("welcome", {"deadline_s": NAN}, "$.deadline_s"),
        ("welcome", {"heartbeat_s": NAN}, "$.heartbeat_s"),
        ("welcome", {"heartbeat_s": INF}, "$.heartbeat_s"),
        ("job", {"deadline_s": NAN}, "$.deadline_s"),
        ("job", {"deadline_s": -1.0}, "$.deadline_s"),
        ("job", {"plan": {**PLAN, "lr": NAN}}, "$.plan.lr"),
        ("job", {"plan": {**PLAN, "prox_mu": NAN}}, "$.plan.prox_mu"),
        ("job", {"plan": {**PLAN, "exit_weights": [1.0, NAN]}}, "$.plan.exit_weights[1]"),
        ("update", {"phases": {"train": {"wall_s": NAN}}}, "$.phases[...].wall_s"),
        (
            "update",
            {"exits": [{"exit": 1, "loss": 0.5, "accuracy": NAN}]},
            "$.exits[0].accuracy",
        ),
        ("job", {"deadline_s": INF}, "$.deadline_s"),
        ("job", {"deadline_s": 1.1e9}, "$.deadline_s"),
        ("job", {"plan": {**PLAN, "lr": INF}}, "$.plan.lr"),
        ("job", {"plan": {**PLAN, "momentum": INF}}, "$.plan.momentum"),
        ("job", {"plan": {**PLAN, "weight_decay": INF}}, "$.plan.weight_decay"),
        ("job", {"plan": {**PLAN, "prox_mu": INF}}, "$.plan.prox_mu"),
        ("job", {"plan": {**PLAN, "exit_weights": [INF]}}, "$.plan.exit_weights[0]"),
        ("update", {"phases": {"train": {"wall_s": INF}}}, "$.phases[...].wall_s"),
        ("update", {"phases": {"train": {"wall_s": 1.0, "cpu_s": INF}}}, "$.phases[...].cpu_s"),
    ],
)
def test_wrong_values_are_refused_with_their_place(tag, changes, path):
    assert f"`{path}" in refused(frame(tag, **changes))


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        ("memory_total_bytes", [0, 2**53], [-1, 2**53 + 1, 1.0]),
        ("memory_available_bytes", [0, 2**53], [-1, 2**53 + 1]),
        ("cores", [0.25, 4096], [0.0, -1.0, 4097.0, INF, NAN]),
        ("gflops", [0.0, 1e9], [-1.0, 2e9, INF, NAN]),
        ("link_mbit_s", [None, 0.5, 1e6], [0.0, -1.0, 2e6, INF, NAN]),
        ("cpu_scale", [None, 0.5, 1e9], [0.0, -1.0, 2e9, INF, NAN]),
        ("platform", ["", "x" * 200], ["x" * 201, "a\nb", None]),
        ("board", ["", "é" * 200], ["x" * 201, "\x1b[2J"]),
        ("machine", ["", "aarch64"], ["x" * 201, "a\0"]),
    ],
)
def test_a_profile_holds_what_a_device_can_have(field, good, bad):
    for value in good:
        profile = decode(frame("hello", profile={**PROFILE, field: value})).profile
        assert getattr(profile, field) == value
    for value in bad:
        assert f"$.profile.{field}" in refused(frame("hello", profile={**PROFILE, field: value}))


def test_a_loss_that_is_no_number_can_be_reported():
    exits = [{"exit": 1, "loss": NAN, "accuracy": 0.0}, {"exit": 2, "loss": INF, "accuracy": 0.0}]
    losses = [result.loss for result in decode(frame("update", exits=exits)).exits]
    assert math.isnan(losses[0])
    assert losses[1] == INF


# C0, DEL, C1, and the separators that some terminals and str.splitlines take for a line's end.
@pytest.mark.parametrize(
    "char", ["\0", "\n", "\r", "\t", "\x1b", "\x7f", "\x85", "\u2028", "\u2029"]
)
@pytest.mark.parametrize(
    ("tag", "field"),
    [
        ("bye", "reason"),
        ("fault", "detail"),
        ("fault", "code"),
        ("ready", "reason"),
        ("hello", "session"),
        ("hello", "software"),
        ("hello", "client_id"),
        ("welcome", "run"),
    ],
)
def test_text_that_breaks_a_line_is_refused(tag, field, char):
    for text in (char, f"a{char}", f"{char}a", f"a{char}b"):
        assert f"$.{field}" in refused(frame(tag, **{field: text}))


def test_tensor_names_are_plain_text():
    for name in ["stages.0.weight", "exits.12.2.running_mean", "größe 1"]:
        job = decode(frame("job", tensors=[{**SPEC, "name": name}]))
        assert job.tensors[0].name == name
    assert "$.tensors[0].name" in refused(frame("job", tensors=[{**SPEC, "name": "a\nb"}]))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("plain", "plain"),
        ("", ""),
        ("two\nlines\t\x1b\u2028", r"two\nlines\t\x1b\u2028"),
        ("Daten größer", "Daten größer"),
        ("file \udcff", r"file \udcff"),  # a lone surrogate, of a file name that is not UTF-8
        ("x" * 3000, "x" * 1329 + " ... " + "x" * 666),  # 2000 in all
    ],
)
def test_details_become_one_line_where_they_are_made(text, line):
    assert Fault(code="data", detail=text).detail == line
    assert Ready(exit=0, reason=text).reason == line
    assert decode(encode(Fault(code="data", detail=text))).detail == line


def test_every_line_that_may_be_sent_can_be_read():
    message = Fault(code="data", detail="データ" * 600)  # 1800 characters, 5400 bytes
    assert decode(encode(message)) == message


# -- version -----------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [0, 1, 2, 3, -1, 1.5, "3", None, NAN, [], {}, 2**64 - 1])
@pytest.mark.parametrize("tag", ["hello", "welcome"])
def test_other_versions_are_told_apart(tag, version):
    with pytest.raises(VersionError, match=f"'{tag}' speaks .*, this side {PROTOCOL}; install"):
        decode(frame(tag, protocol=version))


def test_version_is_looked_at_before_the_fields():
    with pytest.raises(VersionError):
        decode(frame("hello", protocol=99, brand_new_field=1))


def test_a_version_must_be_an_integer():
    refused(frame("hello", protocol=4.0))  # equal to 4, and still not an int
    refused(frame("hello", protocol=True))


# -- encode ------------------------------------------------------------------------------------


def test_encode_refuses_what_no_peer_would_take():
    # A spec takes 241 bytes: the map 1, keys 5 + 6 + 6 + 5, the name 202, shape 1, dtype 8, role 7;
    # 6000 of them 1446000, below the limit on tensors and above that on the frame.
    specs = tuple(TensorSpec(name="w" * 200, shape=(), dtype="float32") for _ in range(6000))
    job = Job(
        id=HEX,
        round=1,
        model=ModelSpec(family="cnn", input_shape=(1, 8, 8), num_classes=2, exit=1),
        plan=Plan(segments=(Segment(first=1, last=1),)),
        tensors=specs,
        deadline_s=0.0,
    )
    with pytest.raises(ProtocolError, match="Job takes 14[0-9]{5} bytes, at most 1047552"):
        encode(job)


# -- layout and parts --------------------------------------------------------------------------


def spec(*shape: int, dtype: str = "float32") -> TensorSpec:
    return TensorSpec(name="w", shape=shape, dtype=dtype)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("specs", "offsets", "total"),
    [
        ((), (), 0),
        ((spec(),), (0,), 4),  # a scalar has one element
        ((spec(0),), (0,), 0),
        ((spec(2, 3),), (0,), 24),
        # 3 bytes, then 8: 16 bytes of float32, then 24: one int64 of 8 bytes
        ((spec(3, dtype="uint8"), spec(2, 2), spec(dtype="int64")), (0, 8, 24), 32),
        # 5 * 2 = 10 -> 16; 1 byte to 17 -> 24; 3 * 8 to 48
        (
            (spec(5, dtype="float16"), spec(1, dtype="bool"), spec(3, dtype="float64")),
            (0, 16, 24),
            48,
        ),
        # no padding behind the last; an empty tensor still begins at a multiple of 8
        ((spec(8, dtype="uint8"), spec(1, dtype="uint8")), (0, 8), 9),
        ((spec(9, dtype="uint8"), spec(0), spec(1, dtype="int32")), (0, 16, 16), 20),
        ((spec(1, dtype="uint8"), spec(4, 0)), (0, 8), 8),
        ((spec(2**48, 0), spec()), (0, 0), 4),
    ],
)
def test_layout(specs, offsets, total):
    assert layout(specs) == (offsets, total)


def test_layout_has_a_largest_transfer():
    assert layout((spec(2**30),)) == ((0,), 4 * 2**30) == ((0,), MAX_TRANSFER_BYTES)
    for specs in [
        (spec(2**30), spec(1, dtype="uint8")),
        (spec(2**30 + 1),),
        (spec(*[2**48] * 8),),  # 2^386 bytes
    ]:
        with pytest.raises(ProtocolError, match="at most 4294967296 are accepted"):
            layout(specs)


@pytest.mark.parametrize(
    ("total", "sizes"),
    [
        (0, []),
        (1, [1]),
        (524_287, [524_287]),
        (524_288, [524_288]),
        (524_289, [524_288, 1]),
        (1_572_864, [524_288] * 3),  # 3 * 512 * 1024
        (1_600_000, [524_288, 524_288, 524_288, 27_136]),  # 1600000 - 1572864
    ],
)
def test_parts(total, sizes):
    assert PART_BYTES == 524_288
    assert num_parts(total) == len(sizes)
    assert [part_size(total, index) for index in range(len(sizes))] == sizes
    assert part_size(total, len(sizes)) == part_size(total, 2**48) == 0


# -- properties --------------------------------------------------------------------------------

QUICK = settings(max_examples=150, deadline=None, database=None)
characters = st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"])
names = st.text(characters, min_size=1, max_size=200)
lines = st.text(characters, max_size=2000)
rounds = st.integers(1, 2**31)
counts = st.integers(0, 2**48)
seconds = st.floats(0, 1e9)
specs = st.builds(
    TensorSpec,
    name=names,
    shape=st.lists(counts, max_size=8).map(tuple),
    dtype=st.sampled_from(["float32", "float64", "float16", "int64", "int32", "uint8", "bool"]),
    role=st.sampled_from(["weight", "mask", "correction", "teacher"]),
)
options = st.dictionaries(
    names,
    st.one_of(
        st.integers(-(2**63), 2**64 - 1),
        st.floats(-1e9, 1e9),
        st.booleans(),
        st.text(max_size=2000),
        st.lists(st.integers(-(2**63), 2**63), max_size=4).map(tuple),
    ),
    max_size=4,
)
models = st.builds(
    ModelSpec,
    family=names,
    input_shape=st.lists(rounds, min_size=1, max_size=4).map(tuple),
    num_classes=st.integers(2, 1_000_000),
    exit=st.integers(1, 100),
    width=st.floats(0, 1, exclude_min=True),
    options=options,
)
segments = st.builds(Segment, first=st.integers(1, 100), last=st.integers(1, 100))
plans = st.builds(
    Plan,
    segments=st.lists(segments, min_size=1, max_size=4).map(tuple),
    lr=st.floats(0, 1e6, exclude_min=True),
    exit_weights=st.lists(st.floats(0, 1e6), max_size=4).map(tuple),
    distill=st.sampled_from(["none", "deep-to-shallow", "shallow-to-deep", "mutual"]),
    distill_weight=st.floats(0, 1e6),
    distill_temperature=st.floats(0, 1000, exclude_min=True),
    seed=st.integers(0, 2**62 - 1),
)
phases = st.dictionaries(
    st.sampled_from(["wait", "download", "load", "train"]),
    st.builds(Phase, wall_s=seconds, cpu_s=st.none() | seconds),
)
ids = st.binary(min_size=16, max_size=16).map(bytes.hex)
messages = st.one_of(
    st.builds(
        Job,
        id=ids,
        round=rounds,
        model=models,
        plan=plans,
        tensors=st.lists(specs, max_size=4).map(tuple),
        deadline_s=seconds,
    ),
    st.builds(
        Update,
        job=ids,
        digest=ids,
        round=rounds,
        num_examples=rounds,
        num_steps=counts,
        exits=st.just(()),
        phases=phases,
        peak_memory_bytes=counts,
        tensors=st.lists(specs, max_size=4).map(tuple),
    ),
    st.builds(
        Ready,
        exit=st.integers(0, 100),
        stages=st.lists(rounds).map(tuple),
        prefix_s=st.floats(0, 10**9),
        stage_s=st.lists(st.floats(0, 10**9), max_size=100).map(tuple),
        reason=lines,
    ),
    st.builds(Fetch, round=rounds, have=counts, first=counts, count=st.integers(0, 1024)),
    st.builds(Part, round=rounds, index=counts),
    st.builds(Fault, code=names, detail=lines, round=rounds),
    st.builds(Heartbeat, round=rounds),
    st.builds(Bye, reason=lines),
)


@QUICK
@given(messages)
def test_what_is_encoded_is_decoded(message):
    assert decode(encode(message)) == message


@QUICK
@given(st.binary(max_size=200))
def test_random_bytes_are_refused(data):
    refused(data)


plain_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


@QUICK
@given(st.sampled_from(sorted(GOOD)), st.data())
def test_a_good_message_with_one_field_replaced_is_decoded_or_refused(tag, data):
    field = data.draw(st.sampled_from(["type", "protocol", "surprise", *GOOD[tag]]))
    changed = {"type": tag, **GOOD[tag], field: data.draw(plain_values)}
    decoded_or_refused(msgpack.packb(changed))


@QUICK
@given(st.sampled_from(sorted(GOOD)), st.data())
def test_a_good_frame_with_bytes_changed_is_decoded_or_refused(tag, data):
    spoiled = bytearray(frame(tag))
    for _ in range(data.draw(st.integers(1, 4))):
        spoiled[data.draw(st.integers(0, len(spoiled) - 1))] = data.draw(st.integers(0, 255))
    decoded_or_refused(bytes(spoiled))


@QUICK
@given(st.lists(specs.filter(lambda spec: spec.num_bytes < 2**20), max_size=8).map(tuple))
def test_tensors_lie_aligned_one_after_the_other_and_parts_cover_them(specs):
    offsets, total = layout(specs)
    end = 0
    for spec, offset in zip(specs, offsets, strict=True):
        assert offset % 8 == 0
        assert end <= offset < end + 8
        end = offset + spec.num_bytes
    assert total == end
    assert sum(part_size(total, index) for index in range(num_parts(total))) == total
