"""What a restarted coordinator finds of jobs and updates after the coordinator was killed."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import pytest
import torch
from msgspec.structs import replace

from coordinator.fleet import spool as spool_module
from coordinator.fleet.spool import Spool
from edge_sdk.protocol.messages import Accepted, Fault, Fetch, Job, Part
from tests.support.devices import floats
from tests.support.examples import client
from tests.support.jobs import PARTS, PLAN, JobsBed, assert_is_the_update


def test_whole_upload_outlives_the_coordinator(tmp_path):
    before = JobsBed(tmp_path)
    before.give("a")
    before.give("b")
    before.finish("a")
    before.announce("b")
    before.parts([0, 1], "b")
    after = JobsBed(tmp_path)  # nothing was closed: it was killed
    after.give("a")
    after.give("b")
    (result,) = after.jobs.finished
    assert result.client.id == "a"
    assert_is_the_update(after, result)
    assert not after.to("a", Job)
    after.jobs.on_return("a", 1, before.job("a").id)  # which never heard that it counts
    assert after.to("a", Accepted)
    # b goes on with the job that it has in hand
    after.jobs.on_return("b", 1, before.job("b").id)
    assert after.job("b") == before.job("b")
    after.finish("b")
    assert [r.client.id for r in after.jobs.finished] == ["a", "b"]


def test_upload_of_another_job_is_not_taken_from_the_spool(tmp_path):
    before = JobsBed(tmp_path)
    before.give()
    before.finish()
    after = JobsBed(tmp_path)
    after.give(plan=replace(PLAN, seed=1))
    assert not after.jobs.finished
    assert after.to("a", Job)


def test_late_update_outlives_the_coordinator_too(tmp_path):
    before = JobsBed(tmp_path)
    before.give("a")
    before.jobs.close()
    before.finish("a")
    after = JobsBed(tmp_path)
    after.jobs.resume(2)
    (result,) = after.jobs.finished
    assert_is_the_update(after, result)
    began = before.assignment().tensors
    assert torch.equal(result.sent["stages.1.0.weight"], began["stages.1.0.weight"])
    after.jobs.clear_spool(2)  # it is still wanted
    assert torch.equal(result.tensors["stages.1.0.weight"], after.trained["stages.1.0.weight"])


def test_late_update_of_a_committed_round_is_not_counted_again(tmp_path):
    before = JobsBed(tmp_path)
    before.give("a")
    before.jobs.close()
    before.finish("a")
    after = JobsBed(tmp_path, was_counted=lambda job: job == before.job("a").id)
    after.jobs.resume(3)
    assert not after.jobs.finished
    after.jobs.on_return("a", 1, before.job("a").id)
    assert after.to("a", Accepted)


def test_update_that_outlives_its_round_outlives_the_coordinator_too(tmp_path):
    """Asynchronous: nobody has closed its round, and nobody gives its job again."""
    before = JobsBed(tmp_path)
    before.give("a", round=1)
    before.jobs.leave_open()
    before.finish("a")
    assert before.to("a", Accepted)
    after = JobsBed(tmp_path)
    after.jobs.resume(2)
    (result,) = after.jobs.finished
    assert_is_the_update(after, result)
    assert not result.sent["stages.1.0.weight"].any()


@pytest.mark.parametrize("is_late", [True, False], ids=["late", "asynchronous"])
def test_job_in_hand_outlives_the_coordinator(tmp_path, is_late):
    """A device that was late, or goes on beyond its round, has its update ready only after the
    coordinator was killed: it counts."""
    before = JobsBed(tmp_path)
    before.give("a")
    before.jobs.close() if is_late else before.jobs.leave_open()
    before.announce("a")
    before.parts([0], "a")  # the rest is lost
    job = before.job("a")
    after = JobsBed(tmp_path)
    after.jobs.resume(2)
    after.jobs.expire(1)
    after.jobs.clear_spool(2)
    assert len(after.jobs.awaited) == (not is_late)
    after.jobs.on_return("a", 1, job.id)
    assert not after.to("a", Fault)
    after.jobs.on_message("a", after.update(job), None)
    after.parts(range(PARTS))
    (result,) = after.jobs.finished
    assert_is_the_update(after, result)
    assert torch.equal(result.sent["stages.0.0.weight"], floats(4))
    assert after.to("a", Accepted)


def test_late_job_whose_download_was_cut_goes_on_after_a_restart(tmp_path):
    before = JobsBed(tmp_path)
    before.give("a")
    before.jobs.close()
    after = JobsBed(tmp_path)
    after.jobs.resume(2)
    after.jobs.on_return("a", 1, before.job("a").id)
    after.jobs.on_message("a", Fetch(round=1, have=1, first=1, count=PARTS), None)
    assert [part.index for part in after.to("a", Part)] == list(range(1, PARTS + 1))


def test_late_job_that_is_too_old_after_a_restart_is_given_up(tmp_path):
    before = JobsBed(tmp_path)
    before.give("a")
    before.jobs.close()
    after = JobsBed(tmp_path)
    after.jobs.resume(4)
    after.jobs.expire(2)
    assert [fault.code for fault in after.to("a", Fault)] == ["late"]
    assert not after.jobs.open
    assert not list(tmp_path.iterdir())


def test_asynchronous_job_whose_device_has_gone_is_late_after_a_restart_too(tmp_path):
    before = JobsBed(tmp_path)
    before.give("a")
    before.jobs.leave_open()
    before.jobs.on_gone("a", "gone", "its link broke")
    job = before.job("a")
    after = JobsBed(tmp_path)
    after.jobs.resume(2)
    assert len(after.jobs.awaited) == 0, "nobody waits for it twice"
    after.jobs.on_return("a", 1, job.id)
    after.jobs.on_message("a", after.update(job), None)
    after.parts(range(PARTS))
    assert_is_the_update(after, after.jobs.finished[0])


def test_jobs_that_began_from_the_same_share_it_after_a_restart_too(tmp_path, monkeypatch):
    """Asynchronous; none of the devices is back in time."""
    before = JobsBed(tmp_path)
    job, names = before.assignment(), [f"d{number}" for number in range(9)]
    for name in names:
        before.jobs.give(dataclasses.replace(client(name, 3), num_examples=10), job, 1, 0.0)
    before.jobs.leave_open()
    read: list[int] = []
    real = spool_module.digest_of
    monkeypatch.setattr(spool_module, "digest_of", lambda parts: (read.append(1), real(parts))[1])
    after = JobsBed(tmp_path)
    after.jobs.resume(2)
    assert len(read) == 1, "read once"
    for name in names:
        after.jobs.on_gone(name, "gone", "is not connected")
    assert len({path.stat().st_ino for path in tmp_path.glob("*.base")}) == 1
    assert len(after.jobs.awaited) == 0


def test_time_to_come_back_begins_when_all_was_read(tmp_path, monkeypatch):
    before = JobsBed(tmp_path)
    before.give("a")
    before.jobs.leave_open()
    real, now = Spool.saved_jobs, time.monotonic()

    def slow(spool: Spool, round: int) -> Any:
        yield from real(spool, round)
        monkeypatch.setattr(time, "monotonic", lambda: now + 50.0)

    monkeypatch.setattr(Spool, "saved_jobs", slow)
    after = JobsBed(tmp_path)
    after.jobs.resume(2)
    assert after.jobs.open["a"].given == now + 50.0
