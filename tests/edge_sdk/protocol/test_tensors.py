"""Tensors to a stream of parts and back; the expected stream is put together in numpy."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdk.errors import ProtocolError, ShapeError
from edge_sdk.protocol.messages import TensorSpec
from edge_sdk.protocol.tensor_lists import check_specs
from edge_sdk.protocol.tensors import DTYPES, Receiver, Sender, check_finite, specs_of
from tests.support.streams import FLOATS_PER_PART, assert_same, parts_of, received, stream_of

# -- stream and parts ----------------------------------------------------------------------------


def test_a_small_stream_byte_by_byte():
    tensors = {
        "a": torch.tensor([1, 2, 255], dtype=torch.uint8),
        "b": torch.tensor([[1.0, -2.0], [0.5, 0.0]]),
        "c": torch.tensor(-2, dtype=torch.int64),
    }
    sender = Sender(tensors)
    assert sender.offsets == (0, 8, 24)
    assert (sender.total_bytes, sender.num_parts) == (32, 1)
    assert bytes(sender.part(0)) == bytes.fromhex(
        "0102ff0000000000"  # 3 bytes, 5 of padding
        "0000803f000000c00000003f00000000"  # 1.0, -2.0, 0.5, 0.0 little endian
        "feffffffffffffff"  # -2 in two's complement
    )
    assert_same(received(sender).tensors(), tensors)


def test_elements_travel_in_c_order():
    turned = torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.uint8).T
    assert not turned.is_contiguous()
    assert bytes(Sender({"turned": turned}).part(0)) == bytes([1, 4, 2, 5, 3, 6])


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_survives(dtype):
    values = torch.tensor([[0, 1, 2], [3, 4, 5]]).to(DTYPES[dtype])
    sender = Sender({"x": values})
    assert [spec.dtype for spec in sender.specs] == [dtype]
    assert_same(received(sender).tensors(), {"x": values})


def test_nan_infinity_and_negative_zero_keep_their_bits():
    tensors = {"x": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])}
    assert_same(received(Sender(tensors)).tensors(), tensors)


def test_parts_span_tensors_and_tensors_span_parts():
    # a: 524284 bytes at 0; b: 3 bytes at 524288 - a's end 524284 rounded up to 8 is 524288; so
    # part 0 is a and 4 zeros. c: begins at 524296, 600000 bytes, ends at 1124296 in part 2.
    rng = np.random.default_rng(0)
    tensors = {
        "a": torch.from_numpy(rng.standard_normal(131_071, dtype=np.float32)),
        "b": torch.tensor([7, 8, 9], dtype=torch.uint8),
        "c": torch.from_numpy(rng.standard_normal((300, 500), dtype=np.float32)),
    }
    sender = Sender(tensors)
    assert sender.offsets == (0, 524_288, 524_296)
    assert (sender.total_bytes, sender.num_parts) == (1_124_296, 3)
    parts = parts_of(sender)
    assert [len(part) for part in parts] == [524_288, 524_288, 75_720]  # 1124296 - 2 * 524288
    assert parts[0][-4:] == bytes(4)
    assert parts[1][:8] == bytes([7, 8, 9, 0, 0, 0, 0, 0])
    assert b"".join(parts) == stream_of(tensors)
    assert_same(received(sender).tensors(), tensors)


def test_parts_inside_a_tensor_are_views_of_it():
    weight = torch.zeros(3 * FLOATS_PER_PART)
    view = Sender({"w": weight}).part(1)
    weight[FLOATS_PER_PART] = 1.0  # 0x3f800000
    assert bytes(view[:4]) == bytes.fromhex("0000803f")


def test_received_tensors_are_views_of_one_buffer():
    tensors = received(Sender({"a": torch.ones(3), "b": torch.ones(2)})).tensors()
    assert tensors["b"].data_ptr() - tensors["a"].data_ptr() == 16  # 12 rounded up to 8
    assert tensors["a"].data_ptr() % 8 == 0


@pytest.mark.parametrize(
    "tensors",
    [
        pytest.param({}, id="no tensors"),
        pytest.param({"e": torch.ones(0)}, id="one empty"),
        pytest.param({"e": torch.ones(0, 3), "f": torch.ones(2, 0)}, id="two empty"),
    ],
)
def test_a_transfer_without_bytes_is_complete_at_once(tensors):
    sender, receiver = Sender(tensors), Receiver(specs_of(tensors))
    assert (sender.num_parts, sender.total_bytes) == (0, 0)
    assert receiver.is_complete
    assert receiver.next_request(8) is None
    assert_same(receiver.tensors(), tensors)


def test_empty_and_scalar_tensors_between_others():
    tensors = {
        "first": torch.ones(0),
        "scalar": torch.tensor(2.5),
        "gap": torch.ones(0, 4, dtype=torch.int64),
        "byte": torch.tensor([True]),
        "last": torch.ones(3, 0),
    }
    sender = Sender(tensors)
    assert sender.offsets == (0, 0, 8, 8, 16)
    assert sender.total_bytes == 16  # an empty tensor at the end still begins at a multiple of 8
    assert_same(received(sender).tensors(), tensors)


def test_an_empty_tensor_at_the_border_of_two_parts():
    tensors = {"a": torch.ones(FLOATS_PER_PART), "e": torch.ones(0), "b": torch.full((3,), 2.0)}
    sender = Sender(tensors)
    assert sender.offsets == (0, 524_288, 524_288)
    assert [len(part) for part in parts_of(sender)] == [524_288, 12]
    assert_same(received(sender).tensors(), tensors)


@pytest.mark.parametrize("index", [1, 2, 2**48])
def test_a_part_that_does_not_exist_is_not_sent(index):
    with pytest.raises(ProtocolError, match=f"part {index} asked for, the transfer has 1"):
        Sender({"w": torch.ones(3)}).part(index)


def test_dtypes_without_a_name_are_refused():
    with pytest.raises(ShapeError, match=r"tensor 'w' is torch.bfloat16; known: float32"):
        Sender({"w": torch.ones(3, dtype=torch.bfloat16)})


# -- checks --------------------------------------------------------------------------------------

A = TensorSpec(name="a", shape=(2, 3), dtype="float32")
B = TensorSpec(name="b", shape=(), dtype="int64")


def test_equal_lists_pass():
    check_specs((A, B), [A, B], "here")
    check_specs((), (), "here")


@pytest.mark.parametrize(
    ("got", "message"),
    [
        ((A,), "tensors missing: b; not expected: none; named 1, expected 2"),
        ((), "tensors missing: a, b; not expected: none; named 0, expected 2"),
        (
            (A, B, TensorSpec(name="c", shape=(), dtype="bool")),
            "tensors missing: none; not expected: c; named 3, expected 2",
        ),
        ((A, B, B), "tensors missing: none; not expected: none; named 3, expected 2"),
        ((A, A), "tensors missing: b; not expected: none; named 2, expected 2"),
        (
            (TensorSpec(name="a", shape=(3, 2), dtype="float32"), B),
            r"a is \(3, 2\) float32 weight, expected \(2, 3\) float32 weight",
        ),
        (
            (TensorSpec(name="a", shape=(2, 3), dtype="float16"), B),
            r"a is \(2, 3\) float16 weight, expected \(2, 3\) float32 weight",
        ),
        (
            (A, TensorSpec(name="b", shape=(), dtype="int64", role="mask")),
            r"b is \(\) int64 mask, expected \(\) int64 weight",
        ),
        ((B, A), "tensors are not in the order of the model"),
        (
            tuple(TensorSpec(name=f"x{i}", shape=(), dtype="bool") for i in range(9)),
            "tensors missing: a, b; not expected: x0, x1, x2, x3, x4 and 4 more; "
            "named 9, expected 2",
        ),
    ],
)
def test_other_lists_are_refused(got, message):
    with pytest.raises(ShapeError, match=f"^update from pi: {message}$"):
        check_specs(got, (A, B), "update from pi")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused(dtype, bad):
    good = {"a": torch.ones(3, dtype=dtype), "n": torch.tensor([2**60]), "e": torch.ones(0)}
    check_finite(good, "update from pi")
    spoiled = torch.ones(3, dtype=dtype)
    spoiled[1] = bad
    with pytest.raises(ShapeError, match="^update from pi: b holds NaN or infinite values"):
        check_finite({**good, "b": spoiled}, "update from pi")


def test_specs_follow_names_order_and_role():
    tensors = {"b": torch.tensor(1), "a": torch.ones(2, 3)}
    assert specs_of(tensors) == (B, A)
    named = specs_of({"mask/a": torch.ones(1), "teacher/stages.0.w": torch.ones(1)})
    assert [spec.role for spec in named] == ["mask", "teacher"]


# -- properties ----------------------------------------------------------------------------------

# Sizes around the borders of parts, in elements: of 8 bytes and of 4.
sizes = st.one_of(st.integers(0, 40), st.sampled_from([65_535, 65_536, 65_537, 131_071, 131_073]))
shapes = st.one_of(
    st.just(()), sizes.map(lambda n: (n,)), st.tuples(st.integers(0, 3), st.integers(0, 300))
)


@settings(max_examples=60, deadline=None, database=None)
@given(
    st.lists(st.tuples(shapes, st.sampled_from(sorted(DTYPES))), max_size=5),
    st.integers(0, 2**32 - 1),
)
def test_any_tensors_survive_the_trip_in_any_order(drawn, seed):
    rng = np.random.default_rng(seed)
    tensors = {}
    for number, (shape, dtype) in enumerate(drawn):
        raw = rng.integers(0, 2 if dtype == "bool" else 120, shape)
        tensors[f"stages.{number}.w"] = torch.from_numpy(np.asarray(raw)).to(DTYPES[dtype])
    sender, receiver = Sender(tensors), Receiver(specs_of(tensors))
    parts = parts_of(sender)
    assert b"".join(parts) == stream_of(tensors)
    order = [*range(len(parts)), *range(len(parts))]  # everything twice
    random.Random(seed).shuffle(order)
    for index in order:
        receiver.add(index, memoryview(parts[index]))
    assert receiver.is_complete
    assert_same(receiver.tensors(), tensors)
