"""The digest of a stream that is hashed while its parts come."""

from __future__ import annotations

import hashlib

import pytest

from coordinator.fleet.digests import MOST_WAITING, Digests
from edge_sdk.protocol.stream import PART_BYTES, digest_of


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 0, 2), (), (0,)])
def test_parts_in_any_order(order):
    stream = memoryview(bytes(range(256)) * (2 * PART_BYTES // 256) + b"end")
    running = Digests().begin()
    for index in order:
        running.add(index, stream[index * PART_BYTES : (index + 1) * PART_BYTES])
    assert running.of_whole(stream) == hashlib.sha256(stream).hexdigest()[:32]
    assert running.of_whole(stream) == digest_of([stream])  # asked again


def test_a_stream_of_nothing():
    assert Digests().begin().of_whole(memoryview(b"")) == "e3b0c44298fc1c149afbf4c8996fb924"


def test_many_streams_at_once_are_told_apart():
    digests, parts = Digests(), [bytes([n]) * PART_BYTES for n in range(3 * MOST_WAITING)]
    running = [digests.begin() for _ in parts]
    for one, part in zip(running, parts, strict=True):
        one.add(0, part)
    found = [one.of_whole(memoryview(part)) for one, part in zip(running, parts, strict=True)]
    assert found == [digest_of([part]) for part in parts]
