"""Parts that may come, and fetches that ask for more than once."""

from __future__ import annotations

import pytest

from edge_sdk.agent.transfer import Transfer
from edge_sdk.errors import ProtocolError
from edge_sdk.protocol.messages import Fetch, Part, TensorSpec, Update
from edge_sdk.protocol.stream import PART_BYTES

# two whole parts and one of 4 bytes
SPECS = (TensorSpec(name="w", shape=(2 * PART_BYTES // 4 + 1,), dtype="float32"),)


def fetch(first: int, count: int, have: int = 0) -> Fetch:
    return Fetch(round=1, have=have, first=first, count=count)


def part(index: int) -> Part:
    return Part(round=1, index=index)


def test_a_part_comes_once_and_when_it_was_asked_for():
    transfer = Transfer(SPECS)
    assert not transfer.take(part(0), PART_BYTES)
    assert not transfer.expect(fetch(0, 8))
    assert transfer.num_awaited == 3
    assert transfer.take(part(0), PART_BYTES)
    assert not transfer.take(part(0), PART_BYTES)  # repeated
    assert transfer.take(part(2), 4)
    assert transfer.num_awaited == 1
    assert not transfer.expect(fetch(0, 1, have=2))  # after a lost link
    assert transfer.take(part(0), PART_BYTES)
    assert transfer.expect(fetch(3, 0, have=3))


@pytest.mark.parametrize(
    ("index", "size"), [(0, 5), (0, PART_BYTES + 1), (2, PART_BYTES), (3, 4), (2**48, 0), (1, 0)]
)
def test_a_part_of_a_wrong_size(index, size):
    transfer = Transfer(SPECS)
    transfer.expect(fetch(0, 8))
    if index == 2**48:
        assert not transfer.take(part(index), size)  # no such part, and nothing in it
        return
    with pytest.raises(ProtocolError, match=f"part {index} has {size} bytes, expected"):
        transfer.take(part(index), size)


def test_fetches_of_the_update():
    update = Update(
        job="a" * 32,
        digest="b" * 32,
        round=1,
        num_examples=1,
        num_steps=1,
        exits=(),
        phases={},
        peak_memory_bytes=0,
        tensors=SPECS,
    )
    transfer = Transfer()
    assert transfer.num_asked_again(fetch(0, 1)) == 1  # there is nothing yet
    transfer.announce(update)
    assert transfer.num_asked_again(fetch(0, 2)) == 0
    assert transfer.num_asked_again(fetch(1, 2)) == 1  # part 1 again, part 2 anew
    assert transfer.num_asked_again(fetch(0, 1024)) == 3
    assert transfer.num_asked_again(fetch(2**48, 1024)) == 1  # beyond the end
    assert transfer.num_asked_again(fetch(0, 0)) == 1  # for nothing
    transfer.announce(update)  # on a new connection
    assert transfer.num_asked_again(fetch(0, 1024)) == 0
