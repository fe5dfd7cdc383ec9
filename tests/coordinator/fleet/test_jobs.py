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
from tests.support.jobs import PARTS, Room, assert_is_the_update


@pytest.fixture
def room(tmp_path):
    return Room(tmp_path)


def test_update_counts_once_however_often_it_is_told(room):
    room.give()
    room.announce()
    room.parts([0, 2])
    room.announce()  # again, as after a reconnect
    room.parts([1])
    room.jobs.on_message("a", room.update(room.job()), None)  # accepted was lost
    assert len(room.to("a", Accepted)) == 2
    (result,) = room.jobs.finished
    assert_is_the_update(room, result)
    assert room.jobs.budget.bytes_under_way == 0


def test_parts_of_two_trainings_are_not_mixed(room):
    """A device that restarted and trained its job again announces another digest."""
    room.give()
    other = {name: tensor + 5 for name, tensor in room.trained.items()}
    room.announce(tensors=other)
    room.parts([0, 1], tensors=other)
    room.announce()
    room.parts([2])
    assert not room.jobs.finished
    room.parts([0, 1])
    assert_is_the_update(room, room.jobs.finished[0])


def test_late_update_is_taken_after_its_round(room):
    room.give()
    room.announce()
    room.parts([0])
    room.jobs.close(1)
    (absence,) = room.jobs.finished
    assert isinstance(absence, Absence)
    assert (absence.outcome, absence.code) == ("straggler", "late")
    assert not room.to("a", Fault)
    assert room.jobs.num_open == 0
    room.jobs.clear_spool(2)
    room.parts([1, 2])
    assert_is_the_update(room, room.jobs.finished[1])
    assert room.jobs.finished[1].sent.keys() == room.assignment().tensors.keys()


def test_late_update_is_dropped_where_that_is_wanted(tmp_path):
    room = Room(tmp_path, takes_late=False)
    room.give()
    room.announce()
    room.jobs.close(1)
    assert [fault.code for fault in room.to("a", Fault)] == ["late"]
    assert not room.jobs.open
    assert not list(tmp_path.iterdir())


def test_late_update_expires(room):
    room.give(round=1)
    room.jobs.close(1)
    room.jobs.expire(1)
    assert "a" in room.jobs.open
    room.jobs.expire(2)
    assert "a" not in room.jobs.open
    assert len(room.jobs.finished) == 1  # its absence was told before
    room.jobs.on_message("a", room.update(room.job()), None)
    assert [fault.code for fault in room.to("a", Fault)] == ["late", "round"]


def test_spool_is_cleared_of_what_counts_no_more(room, tmp_path):
    room.give("a")
    room.give("b")
    room.finish("a")
    room.announce("b")
    room.jobs.close(1)
    room.jobs.finished.clear()
    room.jobs.clear_spool(2)
    assert {path.name for path in tmp_path.iterdir()} == {
        "0000000001-b.base",
        "0000000001-b.data",
        "0000000001-b.seat",
        "free-0000000001-a.data",
    }


def test_freed_files_are_used_again(room, tmp_path):
    room.give("a", round=1)
    room.finish("a")
    room.jobs.finished.clear()
    room.jobs.clear_spool(2)
    room.trained = {"stages.1.0.weight": floats(3, start=7.0)}
    room.give("a", round=2)
    room.announce("a")
    assert [path.name for path in tmp_path.iterdir()] == ["0000000002-a.data"]
    room.parts([0])
    assert_is_the_update(room, room.jobs.finished[0], 2)


def test_device_that_is_gone_may_come_back_with_its_update(room):
    room.give()
    room.announce()
    room.parts([1])
    room.jobs.on_gone("a", "gone", "said nothing for 45 s")
    assert room.jobs.budget.bytes_under_way == 0
    assert [r.outcome for r in room.jobs.finished] == ["failed"]
    room.jobs.on_return("a", 1, room.job().id)
    asked = [(f.have, f.first, f.count) for f in room.to("a", Fetch)[-2:]]
    assert asked == [(1, 0, 1), (1, 2, 1)]
    room.parts([0, 2])
    assert_is_the_update(room, room.jobs.finished[1])


def test_device_that_restarted_gets_its_job_again_when_it_is_ready(room):
    room.give()
    for times in range(2, MOST_GIVEN + 1):
        room.jobs.on_return("a", 0, None)
        assert len(room.to("a", Job)) == times - 1
        room.jobs.on_ready("a", Ready(exit=1, stages=(2,)))
        assert len(room.to("a", Job)) == times
    room.jobs.on_return("a", 0, None)
    room.jobs.on_ready("a", Ready(exit=1, stages=(2,)))
    (absence,) = room.jobs.finished
    assert absence.code == "restarted"


def test_device_that_came_back_smaller_fails(room):
    room.give()
    room.jobs.on_return("a", 0, None)
    room.jobs.on_ready("a", Ready(exit=1))  # cannot hold stage 2 any more
    (absence,) = room.jobs.finished
    assert absence.code == "capacity"


def test_job_goes_out_when_the_device_can_be_reached(room):
    room.unreachable.add("a")
    room.give()
    room.unreachable.clear()
    assert not room.to("a", Job)
    room.jobs.on_return("a", 0, None)  # on its new connection
    room.jobs.on_ready("a", Ready(exit=3))
    assert room.to("a", Job)


def test_stalled_upload_is_asked_for_again_then_given_up(room, monkeypatch):
    room.give()
    room.announce()
    room.parts([1])
    open_job = room.jobs.open["a"]
    for _ in range(MOST_STALLS):
        assert "a" in room.jobs.open
        open_job.moved -= open_job.patience_s(room.jobs.budget.held("a")) + 1
        room.jobs.check_stalls()
    (absence,) = room.jobs.finished
    assert (absence.outcome, absence.code) == ("failed", "stalled")
    again = [(0, 1), (2, 1)]  # what is missing
    assert [(f.first, f.count) for f in room.to("a", Fetch)] == [(0, 2), (2, 1), *again, *again]


def test_repeated_part_is_no_progress(room):
    room.give()
    room.announce()
    room.parts([0])
    moved = room.jobs.open["a"].moved
    room.parts([0])
    assert room.jobs.open["a"].moved == moved


def test_full_disk_ends_the_run_and_keeps_what_is_whole(room, monkeypatch, tmp_path):
    room.give("a")
    room.give("b")
    room.finish("a")
    room.announce("b")

    def full(*args: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StoreError, match=r"b\.data cannot be written: .*No space.*--resume"):
        room.parts([0], "b")
    monkeypatch.undo()
    after = Room(tmp_path)
    after.give("a")
    assert_is_the_update(after, after.jobs.finished[0])


def test_budget_bounds_what_is_under_way(tmp_path):
    room = Room(tmp_path, budget=Budget(2 * PART_BYTES))
    for name in "abc":
        room.give(name)
        room.announce(name)
    assert room.jobs.budget.bytes_under_way == 2 * PART_BYTES
    assert [who for who, m in room.said if isinstance(m, Fetch)] == ["a"]
    room.jobs.on_gone("a", "gone", "gone")  # frees it
    assert [who for who, m in room.said if isinstance(m, Fetch)] == ["a", "b"]
    assert room.jobs.budget.bytes_under_way == 2 * PART_BYTES


def test_time_in_which_nobody_listens_is_nobodys(room):
    room.give()
    room.announce()
    open_job = room.jobs.open["a"]
    open_job.given -= 100.0
    open_job.moved -= 100.0
    moved = open_job.moved
    room.jobs.paused(60.0)
    assert open_job.moved == moved + 60.0
    room.jobs.paused(60.0)  # a job given at the end of the pause was not given after now
    assert max(open_job.given, open_job.moved) <= time.monotonic()


def test_part_that_meets_a_full_queue_is_sent_later(room):
    """As on a slow link, whose queue also holds answers to heartbeats."""
    room.give()
    room.unreachable.add("a")  # with its connection as it is
    room.jobs.on_message("a", Fetch(round=1, have=0, first=0, count=PARTS + 1), None)
    assert not room.to("a", Part)
    assert room.jobs.budget.bytes_under_way == 0
    room.unreachable.clear()
    room.jobs.on_heartbeat("a", 1)
    assert [part.index for part in room.to("a", Part)] == list(range(PARTS + 1))


def test_fetch_that_meets_a_full_queue_is_sent_later(room):
    room.give()
    room.unreachable.add("a")
    room.announce()
    assert not room.to("a", Fetch)
    room.unreachable.clear()
    room.jobs.on_heartbeat("a", 1)
    assert room.to("a", Fetch)
    room.parts(range(PARTS))
    assert_is_the_update(room, room.jobs.finished[0])


def test_job_that_meets_a_full_queue_is_given_again(room):
    """A live link: the device stays idle, says nothing of the job, and is not asked to be ready."""
    room.unreachable.add("a")
    room.give()
    room.unreachable.clear()
    room.jobs.on_heartbeat("a", 0)
    assert not room.to("a", Job)
    room.jobs.open["a"].mismatched_since -= RESEND_S + 1
    room.jobs.on_heartbeat("a", 0)
    assert len(room.to("a", Job)) == 1
    room.finish()
    assert_is_the_update(room, room.jobs.finished[0])


def test_device_that_never_keeps_its_job_is_not_given_it_for_ever(room):
    room.give()
    for _ in range(3 * MOST_GIVEN):
        room.jobs.on_heartbeat("a", 0)
        if (open_job := room.jobs.open.get("a")) and open_job.mismatched_since:
            open_job.mismatched_since -= RESEND_S + 1
    assert len(room.to("a", Job)) == MOST_GIVEN
    (absence,) = room.jobs.finished
    assert (absence.outcome, absence.code) == ("failed", "restarted")
    assert [fault.round for fault in room.to("a", Fault)] == [1], "it says it is ready then"


def test_late_device_that_never_got_its_job_is_free(room):
    """The job met a full queue, and the round is over. Told so, the device says what it can do."""
    room.unreachable.add("a")
    room.give()
    room.unreachable.clear()
    room.jobs.close(1)
    room.jobs.on_heartbeat("a", 0)
    assert "a" in room.jobs.open
    room.jobs.open["a"].mismatched_since -= RESEND_S + 1
    room.jobs.on_heartbeat("a", 0)
    assert "a" not in room.jobs.open
    assert [(fault.code, fault.round) for fault in room.to("a", Fault)] == [("late", 1)]
    assert not room.to("a", Job)


@pytest.mark.parametrize("counts", [True, False])
def test_end_of_a_job_that_met_a_full_queue_is_said_again(room, counts):
    trained = room.trained if counts else {n: t + float("inf") for n, t in room.trained.items()}
    room.give()
    room.announce(tensors=trained)
    room.parts([0, 1], tensors=trained)
    room.unreachable.add("a")
    room.parts([2], tensors=trained)
    room.unreachable.clear()
    assert not room.to("a", Accepted) + room.to("a", Fault)
    for _ in range(3):
        room.jobs.on_heartbeat("a", 1)
    assert len(room.to("a", Accepted)) == counts
    assert len(room.to("a", Fault)) == (not counts), "once, as it was heard"


def test_end_of_a_job_is_not_told_to_who_has_another(room):
    room.give()
    room.announce()
    room.parts([0, 1])
    room.unreachable.add("a")
    room.parts([2])
    room.unreachable.clear()
    room.give(round=2)
    room.jobs.on_heartbeat("a", 1)
    assert not room.to("a", Accepted)


def test_device_whose_job_and_its_end_met_a_full_queue_hears_of_it(tmp_path):
    """It says then what it can do, and is given jobs again."""
    room = Room(tmp_path, takes_late=False)
    room.unreachable.add("a")
    room.give()
    room.jobs.close(1)
    room.unreachable.clear()
    room.jobs.on_heartbeat("a", 0)
    assert [(fault.code, fault.round) for fault in room.to("a", Fault)] == [("late", 1)]


def test_answer_that_meets_a_full_queue_is_not_kept(room):
    """What is refused changes nothing; only ends of jobs are said again."""
    room.give()
    job = room.job()
    room.give(round=2)
    room.unreachable.add("a")
    room.jobs.on_message("a", room.update(job), None)  # of round 1
    room.unreachable.clear()
    room.jobs.on_heartbeat("a", 2)
    assert not room.to("a", Fault)
