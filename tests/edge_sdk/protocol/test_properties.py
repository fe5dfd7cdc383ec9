"""Properties of encoding and decoding: what is encoded is decoded, and whatever is spoilt is
refused in one line."""

from __future__ import annotations

import msgpack
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdk.errors import ProtocolError
from edge_sdk.protocol.codec import decode, encode
from edge_sdk.protocol.messages import (
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
)
from edge_sdk.protocol.stream import layout, num_parts, part_size
from tests.support.frames import GOOD, checked_line, frame, refused


def decoded_or_refused(data: bytes) -> None:
    try:
        decode(data)
    except ProtocolError as error:
        checked_line(error)


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
    offsets, total, _ = layout(specs)
    end = 0
    for spec, offset in zip(specs, offsets, strict=True):
        assert offset % 8 == 0
        assert end <= offset < end + 8
        end = offset + spec.num_bytes
    assert total == end
    assert sum(part_size(total, index) for index in range(num_parts(total))) == total
