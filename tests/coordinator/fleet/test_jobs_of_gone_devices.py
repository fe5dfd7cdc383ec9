"""Devices that are gone for a while, came back with more data, or send slower than they receive."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from coordinator.fleet.flow_control import SLOW_RATE, SLOW_WINDOW, UNKNOWN_RATE
from edge_sdk.protocol.messages import Fault, Fetch, Ready
from edge_sdk.protocol.stream import PART_BYTES
from tests.support.jobs import Room, assert_is_the_update


@pytest.fixture
def room(tmp_path):
    return Room(tmp_path)


def test_an_upload_begins_at_the_pace_of_its_own_way(room):
    """What comes down in a blink may go up in minutes."""
    room.give()
    room.jobs.open["a"].link_rate.moved(PART_BYTES, 0.001)
    room.announce()
    open_job = room.jobs.open["a"]
    assert open_job.link_rate.rate == 0.0
    assert room.to("a", Fetch)[-1].count == SLOW_WINDOW
    open_job.link_rate.moved(PART_BYTES, 60.0)
    assert open_job.link_rates.down.rate > SLOW_RATE > open_job.link_rates.up.rate


def test_who_is_gone_with_parts_on_their_way_was_slower_than_expected(room):
    room.give()
    room.announce()
    open_job = room.jobs.open["a"]
    open_job.link_rate.rate = 10 * SLOW_RATE
    room.jobs.on_gone("a", "gone", "said nothing for 94 s")
    assert open_job.link_rate.rate == UNKNOWN_RATE
    room.jobs.on_gone("a", "gone", "with nothing on its way")
    assert open_job.link_rate.rate == UNKNOWN_RATE


@pytest.mark.parametrize("num_examples", [11, 10, 0])
def test_device_that_restarted_with_more_data(tmp_path, num_examples):
    room = Room(tmp_path)
    room.give()
    room.jobs.on_return("a", 0, None, num_examples)
    room.jobs.on_ready("a", Ready(exit=3))
    told = replace(room.update(room.job()), num_examples=11)
    room.jobs.on_message("a", told, None)
    faults = [fault.detail for fault in room.to("a", Fault)]
    said = [] if num_examples == 11 else ["update from a, round 1: 11 examples, hello said 10"]
    assert faults == said


def test_gone_device_that_is_back_in_the_same_round_counts_where_none_is_taken_late(tmp_path):
    room = Room(tmp_path, takes_late=False)
    room.give()
    room.jobs.on_gone("a", "gone", "said nothing for 45 s")
    room.jobs.on_return("a", 1, room.job().id)
    assert not room.to("a", Fault)
    room.finish()
    assert_is_the_update(room, room.jobs.finished[1])


def test_gone_device_that_is_back_after_its_round_does_not_count_there(tmp_path):
    room = Room(tmp_path, takes_late=False)
    room.give()
    room.jobs.on_gone("a", "gone", "said nothing for 45 s")
    room.jobs.close(1)
    room.jobs.expire(2)  # as at the beginning of the next round
    room.jobs.on_return("a", 1, room.job().id)
    room.announce()
    assert {fault.code for fault in room.to("a", Fault)} == {"late", "round"}
    assert len(room.jobs.finished) == 1
    after = Room(tmp_path, takes_late=False)  # a coordinator that was killed before it cleared up
    after.jobs.resume(2)
    assert not after.jobs.open
