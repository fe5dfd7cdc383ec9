"""What the coordinator says to devices, and what it takes from them."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest

from coordinator.cohorts.base import Absence
from coordinator.fleet.flow_control import Budget
from coordinator.fleet.jobs import MOST_GIVEN, MOST_STALLS, RESEND_S
from edge_sdk.errors import StoreError
from edge_sdk.protocol.messages import Accepted, Fault, Fetch, Job, Part, Ready
from edge_sdk.protocol.stream import PART_BYTES
from tests.support.devices import floats
from tests.support.jobs import PARTS, JobsBed, assert_is_the_update


@pytest.fixture
def bed(tmp_path):
    return JobsBed(tmp_path)


def test_update_counts_once_however_often_it_is_told(bed):
    bed.give()
    bed.announce()
    bed.parts([0, 2])
    bed.announce()  # again, as after a reconnect
    bed.parts([1])
    bed.jobs.on_message("a", bed.update(bed.job()), None)  # accepted was lost
    assert len(bed.to("a", Accepted)) == 2
    (result,) = bed.jobs.finished
    assert_is_the_update(bed, result)
    assert bed.jobs.budget.bytes_under_way == 0


def test_parts_of_two_trainings_are_not_mixed(bed):
    """A device that restarted and trained its job again announces another digest."""
    bed.give()
    other = {name: tensor + 5 for name, tensor in bed.trained.items()}
    bed.announce(tensors=other)
    bed.parts([0, 1], tensors=other)
    bed.announce()
    bed.parts([2])
    assert not bed.jobs.finished
    bed.parts([0, 1])
    assert_is_the_update(bed, bed.jobs.finished[0])


def test_late_update_is_taken_after_its_round(bed):
    bed.give()
    bed.announce()
    bed.parts([0])
    bed.jobs.close()
    (absence,) = bed.jobs.finished
    assert isinstance(absence, Absence)
    assert (absence.outcome, absence.code) == ("straggler", "late")
    assert not bed.to("a", Fault)
    assert len(bed.jobs.awaited) == 0
    bed.jobs.clear_spool(2)
    bed.parts([1, 2])
    assert_is_the_update(bed, bed.jobs.finished[1])
    assert bed.jobs.finished[1].sent.keys() == bed.assignment().tensors.keys()


def test_late_update_is_dropped_where_that_is_wanted(tmp_path):
    bed = JobsBed(tmp_path, takes_late=False)
    bed.give()
    bed.announce()
    bed.jobs.close()
    assert [fault.code for fault in bed.to("a", Fault)] == ["late"]
    assert not bed.jobs.open
    assert not list(tmp_path.iterdir())


def test_late_update_expires(bed):
    bed.give(round=1)
    bed.jobs.close()
    bed.jobs.expire(1)
    assert "a" in bed.jobs.open
    bed.jobs.expire(2)
    assert "a" not in bed.jobs.open
    assert len(bed.jobs.finished) == 1  # its absence was told before
    bed.jobs.on_message("a", bed.update(bed.job()), None)
    assert [fault.code for fault in bed.to("a", Fault)] == ["late", "round"]


def test_spool_is_cleared_of_what_counts_no_more(bed, tmp_path):
    bed.give("a")
    bed.give("b")
    bed.finish("a")
    bed.announce("b")
    bed.jobs.close()
    bed.jobs.finished.clear()
    bed.jobs.clear_spool(2)
    assert {path.name for path in tmp_path.iterdir()} == {
        "0000000001-b.base",
        "0000000001-b.data",
        "0000000001-b.seat",
        "free-0000000001-a.data",
    }


def test_freed_files_are_used_again(bed, tmp_path):
    bed.give("a", round=1)
    bed.finish("a")
    bed.jobs.finished.clear()
    bed.jobs.clear_spool(2)
    bed.trained = {"stages.1.0.weight": floats(3, start=7.0)}
    bed.give("a", round=2)
    bed.announce("a")
    assert [path.name for path in tmp_path.iterdir()] == ["0000000002-a.data"]
    bed.parts([0])
    assert_is_the_update(bed, bed.jobs.finished[0], 2)


def test_device_that_is_gone_may_come_back_with_its_update(bed):
    bed.give()
    bed.announce()
    bed.parts([1])
    bed.jobs.on_gone("a", "gone", "said nothing for 45 s")
    assert bed.jobs.budget.bytes_under_way == 0
    assert [r.outcome for r in bed.jobs.finished] == ["failed"]
    bed.jobs.on_return("a", 1, bed.job().id)
    asked = [(f.have, f.first, f.count) for f in bed.to("a", Fetch)[-2:]]
    assert asked == [(1, 0, 1), (1, 2, 1)]
    bed.parts([0, 2])
    assert_is_the_update(bed, bed.jobs.finished[1])


def test_device_that_restarted_gets_its_job_again_when_it_is_ready(bed):
    bed.give()
    for times in range(2, MOST_GIVEN + 1):
        bed.jobs.on_return("a", 0, None)
        assert len(bed.to("a", Job)) == times - 1
        bed.jobs.on_ready("a", Ready(exit=1, stages=(2,)))
        assert len(bed.to("a", Job)) == times
    bed.jobs.on_return("a", 0, None)
    bed.jobs.on_ready("a", Ready(exit=1, stages=(2,)))
    (absence,) = bed.jobs.finished
    assert absence.code == "restarted"


def test_device_that_came_back_smaller_fails(bed):
    bed.give()
    bed.jobs.on_return("a", 0, None)
    bed.jobs.on_ready("a", Ready(exit=1))  # cannot hold stage 2 any more
    (absence,) = bed.jobs.finished
    assert absence.code == "capacity"


def test_job_goes_out_when_the_device_can_be_reached(bed):
    bed.unreachable.add("a")
    bed.give()
    bed.unreachable.clear()
    assert not bed.to("a", Job)
    bed.jobs.on_return("a", 0, None)  # on its new connection
    bed.jobs.on_ready("a", Ready(exit=3))
    assert bed.to("a", Job)


def test_stalled_upload_is_asked_for_again_then_given_up(bed, monkeypatch):
    bed.give()
    bed.announce()
    bed.parts([1])
    open_job = bed.jobs.open["a"]
    for _ in range(MOST_STALLS):
        assert "a" in bed.jobs.open
        open_job.moved -= open_job.patience_s(bed.jobs.budget.held("a")) + 1
        bed.jobs.check_stalls()
    (absence,) = bed.jobs.finished
    assert (absence.outcome, absence.code) == ("failed", "stalled")
    again = [(0, 1), (2, 1)]  # what is missing
    assert [(f.first, f.count) for f in bed.to("a", Fetch)] == [(0, 2), (2, 1), *again, *again]


def test_repeated_part_is_no_progress(bed):
    bed.give()
    bed.announce()
    bed.parts([0])
    moved = bed.jobs.open["a"].moved
    bed.parts([0])
    assert bed.jobs.open["a"].moved == moved


def test_full_disk_ends_the_run_and_keeps_what_is_whole(bed, monkeypatch, tmp_path):
    bed.give("a")
    bed.give("b")
    bed.finish("a")
    bed.announce("b")

    def full(*args: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StoreError, match=r"b\.data cannot be written: .*No space.*--resume"):
        bed.parts([0], "b")
    monkeypatch.undo()
    after = JobsBed(tmp_path)
    after.give("a")
    assert_is_the_update(after, after.jobs.finished[0])


def test_budget_bounds_what_is_under_way(tmp_path):
    bed = JobsBed(tmp_path, budget=Budget(2 * PART_BYTES))
    for name in "abc":
        bed.give(name)
        bed.announce(name)
    assert bed.jobs.budget.bytes_under_way == 2 * PART_BYTES
    assert [who for who, m in bed.said if isinstance(m, Fetch)] == ["a"]
    bed.jobs.on_gone("a", "gone", "gone")  # frees it
    assert [who for who, m in bed.said if isinstance(m, Fetch)] == ["a", "b"]
    assert bed.jobs.budget.bytes_under_way == 2 * PART_BYTES


def test_time_in_which_nobody_listens_is_nobodys(bed):
    bed.give()
    bed.announce()
    open_job = bed.jobs.open["a"]
    open_job.given -= 100.0
    open_job.moved -= 100.0
    moved = open_job.moved
    bed.jobs.forgive_pause(60.0)
    assert open_job.moved == moved + 60.0
    bed.jobs.forgive_pause(60.0)  # a job given at the end of the pause was not given after now
    assert max(open_job.given, open_job.moved) <= time.monotonic()


def test_part_that_meets_a_full_queue_is_sent_later(bed):
    """As on a slow link, whose queue also holds answers to heartbeats."""
    bed.give()
    bed.unreachable.add("a")  # with its connection as it is
    bed.jobs.on_message("a", Fetch(round=1, have=0, first=0, count=PARTS + 1), None)
    assert not bed.to("a", Part)
    assert bed.jobs.budget.bytes_under_way == 0
    bed.unreachable.clear()
    bed.jobs.on_heartbeat("a", 1)
    assert [part.index for part in bed.to("a", Part)] == list(range(PARTS + 1))


def test_fetch_that_meets_a_full_queue_is_sent_later(bed):
    bed.give()
    bed.unreachable.add("a")
    bed.announce()
    assert not bed.to("a", Fetch)
    bed.unreachable.clear()
    bed.jobs.on_heartbeat("a", 1)
    assert bed.to("a", Fetch)
    bed.parts(range(PARTS))
    assert_is_the_update(bed, bed.jobs.finished[0])


def test_job_that_meets_a_full_queue_is_given_again(bed):
    """A live link: the device stays idle, says nothing of the job, and is not asked to be ready."""
    bed.unreachable.add("a")
    bed.give()
    bed.unreachable.clear()
    bed.jobs.on_heartbeat("a", 0)
    assert not bed.to("a", Job)
    bed.jobs.open["a"].mismatched_since -= RESEND_S + 1
    bed.jobs.on_heartbeat("a", 0)
    assert len(bed.to("a", Job)) == 1
    bed.finish()
    assert_is_the_update(bed, bed.jobs.finished[0])


def test_device_that_never_keeps_its_job_is_not_given_it_for_ever(bed):
    bed.give()
    for _ in range(3 * MOST_GIVEN):
        bed.jobs.on_heartbeat("a", 0)
        if (open_job := bed.jobs.open.get("a")) and open_job.mismatched_since:
            open_job.mismatched_since -= RESEND_S + 1
    assert len(bed.to("a", Job)) == MOST_GIVEN
    (absence,) = bed.jobs.finished
    assert (absence.outcome, absence.code) == ("failed", "restarted")
    assert [fault.round for fault in bed.to("a", Fault)] == [1], "it says it is ready then"


def test_late_device_that_never_got_its_job_is_free(bed):
    """The job met a full queue, and the round is over. Told so, the device says what it can do."""
    bed.unreachable.add("a")
    bed.give()
    bed.unreachable.clear()
    bed.jobs.close()
    bed.jobs.on_heartbeat("a", 0)
    assert "a" in bed.jobs.open
    bed.jobs.open["a"].mismatched_since -= RESEND_S + 1
    bed.jobs.on_heartbeat("a", 0)
    assert "a" not in bed.jobs.open
    assert [(fault.code, fault.round) for fault in bed.to("a", Fault)] == [("late", 1)]
    assert not bed.to("a", Job)


@pytest.mark.parametrize("counts", [True, False])
def test_end_of_a_job_that_met_a_full_queue_is_said_again(bed, counts):
    trained = bed.trained if counts else {n: t + float("inf") for n, t in bed.trained.items()}
    bed.give()
    bed.announce(tensors=trained)
    bed.parts([0, 1], tensors=trained)
    bed.unreachable.add("a")
    bed.parts([2], tensors=trained)
    bed.unreachable.clear()
    assert not bed.to("a", Accepted) + bed.to("a", Fault)
    for _ in range(3):
        bed.jobs.on_heartbeat("a", 1)
    assert len(bed.to("a", Accepted)) == counts
    assert len(bed.to("a", Fault)) == (not counts), "once, as it was heard"


def test_end_of_a_job_is_not_told_to_who_has_another(bed):
    bed.give()
    bed.announce()
    bed.parts([0, 1])
    bed.unreachable.add("a")
    bed.parts([2])
    bed.unreachable.clear()
    bed.give(round=2)
    bed.jobs.on_heartbeat("a", 1)
    assert not bed.to("a", Accepted)


def test_device_whose_job_and_its_end_met_a_full_queue_hears_of_it(tmp_path):
    """It says then what it can do, and is given jobs again."""
    bed = JobsBed(tmp_path, takes_late=False)
    bed.unreachable.add("a")
    bed.give()
    bed.jobs.close()
    bed.unreachable.clear()
    bed.jobs.on_heartbeat("a", 0)
    assert [(fault.code, fault.round) for fault in bed.to("a", Fault)] == [("late", 1)]


def test_answer_that_meets_a_full_queue_is_not_kept(bed):
    """What is refused changes nothing; only ends of jobs are said again."""
    bed.give()
    job = bed.job()
    bed.give(round=2)
    bed.unreachable.add("a")
    bed.jobs.on_message("a", bed.update(job), None)  # of round 1
    bed.unreachable.clear()
    bed.jobs.on_heartbeat("a", 2)
    assert not bed.to("a", Fault)
