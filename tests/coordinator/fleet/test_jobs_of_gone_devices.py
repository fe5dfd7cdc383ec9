"""Devices that are gone for a while, came back with more data, or send slower than they receive."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from coordinator.fleet.flow_control import SLOW_RATE, SLOW_WINDOW, UNKNOWN_RATE
from edge_sdk.protocol.messages import Fault, Fetch, Ready
from edge_sdk.protocol.stream import PART_BYTES
from tests.support.jobs import JobsBed, assert_is_the_update


@pytest.fixture
def bed(tmp_path):
    return JobsBed(tmp_path)


def test_an_upload_begins_at_the_pace_of_its_own_way(bed):
    """What comes down in a blink may go up in minutes."""
    bed.give()
    bed.jobs.open["a"].link_rate.note_moved(PART_BYTES, 0.001)
    bed.announce()
    open_job = bed.jobs.open["a"]
    assert open_job.link_rate.rate == 0.0
    assert bed.to("a", Fetch)[-1].count == SLOW_WINDOW
    open_job.link_rate.note_moved(PART_BYTES, 60.0)
    assert open_job.link_rates.down.rate > SLOW_RATE > open_job.link_rates.up.rate


def test_who_is_gone_with_parts_on_their_way_was_slower_than_expected(bed):
    bed.give()
    bed.announce()
    open_job = bed.jobs.open["a"]
    open_job.link_rate.rate = 10 * SLOW_RATE
    bed.jobs.on_gone("a", "gone", "said nothing for 94 s")
    assert open_job.link_rate.rate == UNKNOWN_RATE
    bed.jobs.on_gone("a", "gone", "with nothing on its way")
    assert open_job.link_rate.rate == UNKNOWN_RATE


@pytest.mark.parametrize("num_examples", [11, 10, 0])
def test_device_that_restarted_with_more_data(tmp_path, num_examples):
    bed = JobsBed(tmp_path)
    bed.give()
    bed.jobs.on_return("a", 0, None, num_examples)
    bed.jobs.on_ready("a", Ready(exit=3))
    told = replace(bed.update(bed.job()), num_examples=11)
    bed.jobs.on_message("a", told, None)
    faults = [fault.detail for fault in bed.to("a", Fault)]
    said = [] if num_examples == 11 else ["update from a, round 1: 11 examples, hello said 10"]
    assert faults == said


def test_gone_device_that_is_back_in_the_same_round_counts_where_none_is_taken_late(tmp_path):
    bed = JobsBed(tmp_path, takes_late=False)
    bed.give()
    bed.jobs.on_gone("a", "gone", "said nothing for 45 s")
    bed.jobs.on_return("a", 1, bed.job().id)
    assert not bed.to("a", Fault)
    bed.finish()
    assert_is_the_update(bed, bed.jobs.finished[1])


def test_gone_device_that_is_back_after_its_round_does_not_count_there(tmp_path):
    bed = JobsBed(tmp_path, takes_late=False)
    bed.give()
    bed.jobs.on_gone("a", "gone", "said nothing for 45 s")
    bed.jobs.close()
    bed.jobs.expire(2)  # as at the beginning of the next round
    bed.jobs.on_return("a", 1, bed.job().id)
    bed.announce()
    assert {fault.code for fault in bed.to("a", Fault)} == {"late", "round"}
    assert len(bed.jobs.finished) == 1
    # a coordinator that was killed before it cleared up
    after = JobsBed(tmp_path, takes_late=False)
    after.jobs.resume(2)
    assert not after.jobs.open
