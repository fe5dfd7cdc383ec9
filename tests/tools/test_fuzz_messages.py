"""Every message by its declaration, and spoilt ones, decoded; as tools.fuzz does it, in small."""

from __future__ import annotations

import tracemalloc
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdk.agent import pipe
from edge_sdk.errors import ProtocolError
from edge_sdk.protocol.codec import decode, encode
from edge_sdk.protocol.messages import Fetch, Message
from tests.support.mutations import FEW, MORE, mutate_bytes, numbers
from tools.fuzz.inputs import mutate_frame
from tools.fuzz.messages import drawn_frames, strategies
from tools.fuzz.targets import decode_one


@pytest.mark.parametrize("name", strategies())
def test_every_message_comes_back_as_it_was_sent(name):
    @FEW
    @given(strategies()[name])
    def check(message: Message) -> None:
        assert repr(decode_one(encode(message))) == repr(message)  # a NaN's repr equals itself

    check()


@pytest.mark.parametrize("name", strategies(pipe.PipeMessage))
def test_every_message_of_the_pipe_comes_back_as_it_was_sent(name):
    @FEW
    @given(strategies(pipe.PipeMessage)[name])
    def check(message: pipe.PipeMessage) -> None:
        (head,) = pipe.Pipe.blocks(message)
        assert repr(pipe._DECODER.decode(head[8:])) == repr(message)  # behind two lengths

    check()


def test_strategies_reach_the_limits_of_a_declaration():
    found: list[Any] = []

    @settings(FEW, max_examples=300)
    @given(strategies()["Fetch"])
    def check(message: Fetch) -> None:
        found.append(message)

    check()
    assert {message.count for message in found} >= {1, 1024}
    assert {message.first for message in found} >= {0, 2**48}


@MORE
@given(st.sampled_from(drawn_frames(20, 1)), numbers, st.integers(1, 4))
def test_a_spoilt_message_is_refused_or_is_another_valid_one(frame, rng, num_changes):
    for _ in range(num_changes):
        frame = mutate_frame(frame, rng, lambda data, most: mutate_bytes(data, most, rng))
    decode_one(frame)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\xdd\x00\x0f\xfb\xfb" + b"\xc0" * 1_047_547, id="an array of a million"),
        pytest.param(b"\xdc\x27\x10" + b"\xdc\x00\x66" * 10_000, id="arrays that never end"),
        pytest.param(b"\xdc\x27\x10" + (b"\xdc\x00\x64" + b"\x80" * 100) * 10_000, id="maps"),
        pytest.param(b"\x91" * 1_047_552, id="a million levels"),
        pytest.param(msgpack.packb({"type": "bye", "x": ["y" * 7990] * 130}), id="long texts"),
        pytest.param(
            msgpack.packb({"type": "job", "tensors": [{str(i): i for i in range(25)}] * 9_000}),
            id="tensors of unknown fields",
        ),
    ],
)
def test_what_a_frame_costs_is_bounded_by_its_size(data):
    """A megabyte of empty maps takes 64 bytes and a place in a list for each byte of it."""
    assert len(data) <= 1_047_552  # MAX_CONTROL_BYTES: no frame is larger
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError):
            decode(data)
        assert tracemalloc.get_traced_memory()[1] < 80 * len(data)
    finally:
        tracemalloc.stop()
