"""Encoding and decoding of good messages, versions, and how tensors lie in parts."""

from __future__ import annotations

import msgpack
import pytest

from edge_sdk.errors import ProtocolError, VersionError
from edge_sdk.protocol.codec import decode, encode
from edge_sdk.protocol.messages import (
    PROTOCOL,
    Accepted,
    Bye,
    Fault,
    Fetch,
    Job,
    ModelSpec,
    Plan,
    Ready,
    Segment,
    TensorSpec,
)
from edge_sdk.protocol.stream import MAX_TRANSFER_BYTES, PART_BYTES, layout, num_parts, part_size
from tests.support.frames import GOOD, HEX, NAN, frame, refused

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
    result = b"\x83\xa4exit\x01\xa4loss\xca\x3f\0\0\0\xa6metric\x01"
    exits = msgpack.unpackb(result)
    assert decode(frame("update", exits=[exits])).exits[0].metric == 1.0
    assert decode(frame("update", exits=[exits])).exits[0].loss == 0.5


def test_the_last_of_a_repeated_key_counts():
    data = b"\x83\xa4type\xa8accepted\xa5round\x01\xa5round\x02"
    assert decode(data) == Accepted(round=2)


def test_frames_may_be_memoryviews():
    assert decode(memoryview(encode(Bye(reason="x")))) == Bye(reason="x")


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


@pytest.mark.parametrize("version", [0, 1, 2, 3, 4, -1, 1.5, "3", None, NAN, [], {}, 2**64 - 1])
@pytest.mark.parametrize("tag", ["hello", "welcome"])
def test_other_versions_are_told_apart(tag, version):
    with pytest.raises(VersionError, match=f"'{tag}' speaks .*, this side {PROTOCOL}; install"):
        decode(frame(tag, protocol=version))


def test_version_is_looked_at_before_the_fields():
    with pytest.raises(VersionError):
        decode(frame("hello", protocol=99, brand_new_field=1))


def test_a_version_must_be_an_integer():
    refused(frame("hello", protocol=float(PROTOCOL)))  # equal to it, and still not an int
    refused(frame("hello", protocol=True))


# -- encode ------------------------------------------------------------------------------------


def test_encode_refuses_what_no_peer_would_take():
    # A spec takes 249 bytes: the map 1, keys 5 + 6 + 6 + 5 + 7, the name 202, shape 1, dtype 8,
    # role 7, digest 1; 6000 of them 1494000, below the limit on tensors and above the frame's.
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
    assert layout(specs) == (offsets, total, (0, 0))


def test_layout_has_a_largest_transfer():
    assert layout((spec(2**30),)).total_bytes == 4 * 2**30 == MAX_TRANSFER_BYTES
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
