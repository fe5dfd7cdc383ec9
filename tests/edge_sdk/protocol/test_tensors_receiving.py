"""Parts of tensors as they arrive: in any order, too few, again; and which are asked for."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdk.errors import ProtocolError
from edge_sdk.protocol.messages import TensorSpec
from edge_sdk.protocol.stream import PART_BYTES
from edge_sdk.protocol.tensors import Receiver, Sender
from tests.support.streams import FLOATS_PER_PART, assert_same, parts_of, received


def five_parts() -> Sender:
    """4 whole parts and one of 40 bytes."""
    return Sender({"w": torch.arange(4 * FLOATS_PER_PART + 10, dtype=torch.float32)})


def test_parts_arrive_in_any_order_and_twice():
    sender, parts = five_parts(), parts_of(five_parts())
    receiver = Receiver(sender.specs)
    for count, index in enumerate([4, 2, 0, 3, 1], 1):
        receiver.add(index, parts[index])
        receiver.add(index, bytes(len(parts[index])))  # the same index again: ignored
        assert receiver.num_received == count
    assert receiver.is_complete
    assert_same(receiver.tensors(), {"w": torch.arange(4 * FLOATS_PER_PART + 10).float()})


def test_next_missing():
    sender, parts = five_parts(), parts_of(five_parts())
    receiver = Receiver(sender.specs)
    seen = []
    for index in [1, 0, 3, 4, 2]:
        seen.append(receiver.next_missing)
        receiver.add(index, parts[index])
    assert [*seen, receiver.next_missing] == [0, 0, 2, 2, 2, 5]


@pytest.mark.parametrize(
    ("index", "size", "expected"),
    [
        (0, PART_BYTES - 1, PART_BYTES),
        (0, PART_BYTES + 1, PART_BYTES),
        (0, 0, PART_BYTES),
        (4, 39, 40),
        (4, PART_BYTES, 40),
        (5, 40, 0),  # there is no part 5
        (5, 0, 0),
        (2**48, 1, 0),
    ],
)
def test_parts_of_a_wrong_size_are_refused(index, size, expected):
    receiver = Receiver(five_parts().specs)
    with pytest.raises(ProtocolError, match=f"part {index} has {size} bytes, expected {expected} "):
        receiver.add(index, bytes(size))
    assert receiver.num_received == 0


def test_nothing_is_used_while_a_part_lacks():
    sender, parts = five_parts(), parts_of(five_parts())
    receiver = Receiver(sender.specs)
    for index in [0, 1, 3, 4]:
        receiver.add(index, parts[index])
    with pytest.raises(ProtocolError, match="4 of 5 parts arrived; nothing is used"):
        receiver.tensors()


def twenty_parts() -> Receiver:
    return Receiver((TensorSpec(name="w", shape=(20 * PART_BYTES,), dtype="uint8"),))


def test_requests_keep_a_window_under_way():
    receiver, part = twenty_parts(), bytes(PART_BYTES)
    asked = [(0, receiver.next_request(8))]
    assert receiver.next_request(8) is None  # 8 under way
    for index in range(20):
        receiver.add(index, part)
        if request := receiver.next_request(8):
            asked.append((receiver.num_received, request))
            assert receiver.next_request(8) is None
    # 4 arrived: 8 - 4 = 4 under way, half of the window: ask for 8 - 4 more; and so on. After 16
    # all 20 have been asked for.
    assert asked == [(0, (0, 8)), (4, (8, 4)), (8, (12, 4)), (12, (16, 4))]


def test_requests_end_with_the_transfer():
    receiver = Receiver(five_parts().specs)
    assert receiver.next_request(3) == (0, 3)
    receiver.add(0, bytes(PART_BYTES))
    assert receiver.next_request(3) is None  # 2 under way are more than 3 // 2
    receiver.add(1, bytes(PART_BYTES))
    assert receiver.next_request(3) == (3, 2)
    for index, size in [(2, PART_BYTES), (3, PART_BYTES), (4, 40)]:
        receiver.add(index, bytes(size))
        assert receiver.next_request(3) is None


def test_restart_asks_again_from_the_first_missing_part():
    receiver, part = twenty_parts(), bytes(PART_BYTES)
    assert receiver.next_request(8) == (0, 8)
    for index in range(3):
        receiver.add(index, part)
    receiver.restart()
    assert receiver.next_request(8) == (3, 8)  # 3..7 were lost, 8..10 are new
    receiver.add(3, part)
    receiver.add(3, part)  # from before the link broke
    assert receiver.num_received == 4


def test_restart_skips_what_arrived_behind_a_gap():
    receiver, part = twenty_parts(), bytes(PART_BYTES)
    assert receiver.next_request(8) == (0, 8)
    for index in [0, 2, 3, 4]:
        receiver.add(index, part)
    receiver.restart()
    assert receiver.next_request(8) == (1, 1)  # 2, 3 and 4 are here
    assert receiver.next_request(8) == (5, 7)  # 1 is under way: 8 - 1
    assert receiver.next_request(8) is None
    for index in [1, *range(5, 12)]:
        receiver.add(index, part)
    assert receiver.next_request(8) == (12, 8)


def test_parts_that_nobody_asked_for_leave_the_window_as_it_is():
    receiver, part = twenty_parts(), bytes(PART_BYTES)
    assert receiver.next_request(8) == (0, 8)
    for index in range(10, 20):
        receiver.add(index, part)
    assert receiver.next_request(8) is None  # still 8 under way
    for index in range(4):
        receiver.add(index, part)
    assert receiver.next_request(8) == (8, 2)  # the rest is here
    assert receiver.next_request(8) is None
    for index in range(4, 10):
        receiver.add(index, part)
    assert receiver.is_complete


def test_restart_of_a_complete_transfer_asks_for_nothing():
    receiver = received(five_parts())
    receiver.restart()
    assert receiver.next_request(8) is None


@settings(max_examples=60, deadline=None, database=None)
@given(st.integers(1, 60), st.integers(1, 16), st.integers(0, 2**32 - 1))
def test_requests_ask_for_every_part_once_and_never_for_more_than_the_window(n, window, seed):
    receiver = Receiver((TensorSpec(name="w", shape=(n * PART_BYTES,), dtype="uint8"),))
    part, rng = bytes(PART_BYTES), random.Random(seed)
    under_way: list[int] = []
    asked: list[int] = []
    while not receiver.is_complete:
        if request := receiver.next_request(window):
            first, count = request
            under_way += range(first, first + count)
            asked += range(first, first + count)
        assert 0 < len(under_way) <= window
        receiver.add(under_way.pop(rng.randrange(len(under_way))), part)
    assert asked == list(range(n))


@settings(max_examples=60, deadline=None, database=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_a_transfer_survives_losses_and_gifts_within_its_window(n, window, seed):
    receiver = Receiver((TensorSpec(name="w", shape=(n * PART_BYTES,), dtype="uint8"),))
    part, rng = bytes(PART_BYTES), random.Random(seed)
    under_way: set[int] = set()
    here: set[int] = set()
    while not receiver.is_complete:
        event = rng.choice(["arrival", "arrival", "arrival", "arrival", "gift", "break"])
        if event == "break":
            receiver.restart()
            under_way.clear()
        elif event == "gift" or under_way:
            index = rng.randrange(n) if event == "gift" else rng.choice(sorted(under_way))
            receiver.add(index, part)
            here.add(index)
            under_way.discard(index)
        if request := receiver.next_request(window):
            first, count = request
            asked = set(range(first, first + count))
            assert not asked & (here | under_way), "asked for what is here or under way"
            under_way |= asked
        assert len(under_way) <= window
        assert under_way or len(here) == n, "nothing will ever come"
    assert here == set(range(n))
