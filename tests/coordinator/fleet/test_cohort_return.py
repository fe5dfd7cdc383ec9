"""Devices that leave or fail in the middle of a round, and what those find that come back."""

from __future__ import annotations

import threading

import pytest

from coordinator.fleet import sessions as sessions_module
from coordinator.fleet.jobs import MOST_GIVEN
from edge_sdk.protocol.messages import Accepted, Bye, Fault, Fetch
from edge_sdk.protocol.stream import PART_BYTES
from edge_sdk.protocol.tensors import Receiver
from tests.support.devices import WAIT_S
from tests.support.jobs_and_results import (
    BOTH,
    FLOATS_PER_PART,
    absence_of,
    assert_only_these_count,
    assignment,
    end,
    end_well,
    expect_fault,
    give_jobs,
    work,
)


def test_bye_in_mid_round(coordinator, devices):
    good, bad = devices
    round = give_jobs(coordinator, good, bad)
    bad.send(Bye(reason="device stopped"))
    bad.send(bad.make_update())
    assert bad.expect(Fault).code == "hello"
    assert end(round, good, "failed", "gone").detail == "said bye"


def test_participant_that_left_before_its_job(coordinator, devices):
    good, _ = devices
    round = coordinator.train({**work("good"), "gone": assignment()})
    good.take_job()
    assert "before its job" in end(round, good, "failed", "gone", bad="gone").detail


def test_restarted_device_gets_its_job_again_when_it_is_ready(coordinator, devices, monkeypatch):
    monkeypatch.setattr(sessions_module, "PROBE_S", 0.0)
    good, bad = devices
    round = give_jobs(coordinator, good, bad)
    job = bad.job
    bad.announce()  # and this upload is forgotten
    bad.restart()
    bad.stays_quiet()  # it has to say what it can train
    bad.ready()
    assert bad.take_job() == job
    end_well(round, bad, good)


def test_device_that_restarts_again_and_again_fails(coordinator, devices, monkeypatch):
    monkeypatch.setattr(sessions_module, "PROBE_S", 0.0)
    good, bad = devices
    round = coordinator.train(work(*BOTH))
    good.take_job()
    for _ in range(MOST_GIVEN):
        bad.take_job()
        bad.restart()
        bad.ready()
    assert "restarted 4 times" in end(round, good, "failed", "restarted").detail


def test_device_that_comes_back_and_can_train_less_fails(coordinator, devices, monkeypatch):
    monkeypatch.setattr(sessions_module, "PROBE_S", 0.0)
    good, bad = devices
    round = give_jobs(coordinator, good, bad)
    bad.restart()
    bad.ready(1)  # the job trains stage 2
    detail = end(round, good, "failed", "capacity").detail
    assert detail == "came back and can train up to exit 1 only"


def test_reconnect_in_mid_download_goes_on_at_the_missing_part(coordinator, devices, quick_links):
    good, bad = devices
    round = coordinator.train(work(*BOTH, num_floats=11 * FLOATS_PER_PART))
    good.take_job()
    job = bad.expect_job()
    receiver = Receiver(job.tensors)
    assert receiver.num_parts == 12
    bad.fetch(receiver, 0, 8, take=5)  # what else is under way is lost
    bad.reconnect()
    bad.stays_quiet()  # the job is not sent again
    bad.fetch(receiver, receiver.next_missing, 7)
    assert bad.received == list(range(12))  # each part once
    bad.train(receiver)
    results = end_well(round, bad, good)
    for result in results:
        sent_parts = {"good": 12, "bad": 15}[result.client.id]  # 5, 6, 7 went out twice
        assert (result.bytes_down - 1) // PART_BYTES == sent_parts - 1, result.client.id


def test_reconnect_in_mid_upload_goes_on_at_the_missing_part(coordinator, devices, quick_links):
    good, bad = devices
    round = give_jobs(coordinator, good, bad, num_floats=11 * FLOATS_PER_PART)
    fetch = bad.announce()
    assert (fetch.first, fetch.count) == (0, 8)
    bad.send_parts(range(4))
    fetch = bad.expect(Fetch)  # so the four have arrived
    assert (fetch.first, fetch.count) == (8, 4)
    bad.reconnect()
    fetch = bad.expect(Fetch)
    assert (fetch.first, fetch.count) == (4, 8)
    bad.send(bad.make_update(retries=1))  # as the trainer does on Resume
    bad.send_parts(range(4, 12))
    assert isinstance(bad.upload(), Accepted)
    assert bad.sent == list(range(12))
    good.return_update()
    results = round.result(WAIT_S)
    assert_only_these_count(results, good, bad)
    sizes = {result.bytes_up for result in results}
    assert sizes == {11 * PART_BYTES + 16 + 12}  # each byte once


def test_reconnect_after_being_accepted(coordinator, devices):
    good, bad = devices
    round = coordinator.train(work(*BOTH))
    good.take_job()
    bad.finish()  # but say that accepted was lost
    bad.reconnect()
    assert bad.expect(Accepted).round == 1
    good.return_update()
    assert_only_these_count(round.result(WAIT_S), good, bad)


def test_reconnect_without_the_job_gets_it_again(coordinator, devices):
    good, bad = devices
    round = give_jobs(coordinator, good, bad)
    bad.announce()
    bad.job = None  # the job was dropped while the link was down
    bad.reconnect()
    bad.stays_quiet()
    bad.ready()
    bad.take_job()
    end_well(round, bad, good)


def test_job_of_an_older_round_is_refused_on_return(coordinator, devices):
    good, bad = devices
    round = give_jobs(coordinator, good, bad, round=2)
    bad.reconnect(round=1, job="1" * 32)
    expect_fault(bad, "round", 1)
    bad.ready()
    bad.finish()
    good.return_update()
    assert_only_these_count(round.result(WAIT_S), good, bad)


@pytest.mark.parametrize("code", ["trainer", "capacity", "data"])
def test_participant_that_reports_a_fault(coordinator, devices, code):
    good, bad = devices
    round = give_jobs(coordinator, good, bad)
    bad.send(Fault(code=code, detail="of another round", round=9))
    bad.send(Fault(code=code, detail="of no round"))
    bad.send(Fault(code=code, detail="that is it", round=1))
    assert end(round, good, "failed", code).detail == "that is it"


@pytest.mark.parametrize("code", ["protocol", "version"])
def test_participant_that_cannot_read_what_it_got(coordinator, devices, code):
    good, bad = devices
    round = coordinator.train(work(*BOTH))
    good.take_job()
    bad.expect_job()
    bad.send(Fault(code=code, detail="message refused"))  # it cannot say of which round
    assert end(round, good, "failed", code).detail == "message refused"


def test_failed_device_gets_no_job_until_it_is_ready(coordinator, devices):
    good, bad = devices
    round = give_jobs(coordinator, good, bad)
    bad.send(Fault(code="trainer", detail="killed", round=1))
    end(round, good, "failed", "trainer")
    clients = coordinator.clients()
    bad.ping()
    bad.stays_quiet()
    assert not clients.done()  # two are needed
    bad.ready(2)
    assert [(c.id, c.exit) for c in clients.result(WAIT_S)] == [("bad", 2), ("good", 3)]


def test_ready_in_the_same_round_counts_for_the_next(coordinator, devices):
    good, bad = devices
    round = give_jobs(coordinator, good, bad)
    bad.send(Fault(code="capacity", detail="too large", round=1))
    bad.ready(1)
    bad.ping()
    end(round, good, "failed", "capacity")
    exits = {client.id: client.exit for client in coordinator.clients().result(WAIT_S)}
    assert exits == {"good": 3, "bad": 1}


def test_ready_that_waited_for_the_caller_counts(make_coordinator):
    coordinator = make_coordinator(*BOTH, quorum=0.5, grace_s=0.1)
    good, bad = coordinator.gather()
    is_over = threading.Event()
    round = coordinator.train(work(*BOTH), deadline_s=0.1, pause=lambda: is_over.wait(WAIT_S))
    bad.take_job()
    good.finish()
    coordinator.arrived.get(timeout=WAIT_S)
    bad.send(Fault(code="trainer", detail="killed", round=1))
    bad.ready(2)
    bad.stays_quiet(0.5)  # both wait, past deadline and grace
    is_over.set()
    absence_of(round.result(WAIT_S), "bad", "failed", "trainer")
    exits = {client.id: client.exit for client in coordinator.clients().result(WAIT_S)}
    assert exits == {"good": 3, "bad": 2}


@pytest.mark.parametrize("how", ["capacity", "restarted"])
def test_device_that_failed_by_what_it_is_ready_for_is_ready_for_the_next_round(
    make_coordinator, monkeypatch, how
):
    monkeypatch.setattr(sessions_module, "PROBE_S", 0.0)
    coordinator = make_coordinator(*BOTH, is_insecure=True, quorum=0.5)
    good, bad = coordinator.gather()
    round = coordinator.train(work(*BOTH))
    good.take_job()
    for _ in range(1 if how == "capacity" else MOST_GIVEN):
        bad.take_job()
        bad.restart()
        bad.ready(1 if how == "capacity" else 3)
    end(round, good, "failed", how)
    assert [client.id for client in coordinator.clients().result(WAIT_S)] == ["bad", "good"]
