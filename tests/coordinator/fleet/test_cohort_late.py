"""Updates of an earlier round, of an asynchronous one, and of before the coordinator's restart."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from coordinator.cohorts.base import Client, ClientUpdate
from coordinator.fleet import cohort as cohort_module
from coordinator.fleet import sessions as sessions_module
from coordinator.fleet.cohort import ZmqCohort
from coordinator.fleet.flow_control import Budget
from coordinator.fleet.jobs import Jobs
from coordinator.fleet.spool import Spool
from edge_sdk.errors import QuorumError
from edge_sdk.protocol.messages import Accepted, Fault, Job, Message, Part
from edge_sdk.protocol.tensors import Sender
from tests.support.devices import WAIT_S, ScriptedDevice
from tests.support.jobs import Mailbox
from tests.support.jobs_and_results import (
    BOTH,
    FLOATS_PER_PART,
    absence_of,
    assert_only_these_count,
    assignment,
    end,
    end_well,
    ended,
    expect_fault,
    give_jobs,
    talk_until_a_result,
    work,
)
from tests.support.real_coordinator import Coordinator

# -- late updates ----------------------------------------------------------------------------------


def late_pair(make_coordinator: Callable[..., Coordinator], **settings: Any) -> tuple[Any, ...]:
    """After a round that closed without the bad one, which has its job in hand still."""
    coordinator = make_coordinator(*BOTH, **{"quorum": 0.5, "grace_s": 0.1, "oldest": 2} | settings)
    good, bad = coordinator.gather()
    round = coordinator.train(work(*BOTH), deadline_s=0.1)
    bad.take_job()
    good.finish()
    ended(round, good, "straggler", "late")
    good.ready()
    return coordinator, good, bad


def test_late_update_counts_in_the_next_round(make_coordinator):
    coordinator, good, bad = late_pair(make_coordinator)
    assert [client.id for client in coordinator.clients().result(WAIT_S)] == ["good"]
    round = give_jobs(coordinator, good, round=2)
    bad.return_update()  # it was not told that it is late
    bad.send(bad.make_update())
    assert bad.expect(Accepted).round == 1  # told twice, counts once
    bad.ready()
    bad.ping()
    good.return_update()
    first, second = round.result(WAIT_S)
    assert (first.client.id, first.round, first.staleness) == ("bad", 1, 1)
    assert (second.client.id, second.round, second.staleness) == ("good", 2, 0)
    want = assignment().tensors
    assert {name: tensor.tolist() for name, tensor in first.sent.items()} == {
        name: tensor.tolist() for name, tensor in want.items()
    }
    assert torch.equal(first.tensors["stages.1.1.bias"], want["stages.1.1.bias"] + 1)
    assert {c.id for c in coordinator.clients().result(WAIT_S)} == {"good", "bad"}

    def begin_another(cohort: ZmqCohort) -> tuple[int, int]:
        cohort.expect([], 0)
        return cohort.snapshot().returned, cohort.snapshot().chosen

    assert coordinator.ask(begin_another).result(WAIT_S) == (0, 0), "of the round before"


def test_late_job_that_gets_too_old_is_given_up(make_coordinator):
    coordinator, good, bad = late_pair(make_coordinator)
    for number in (2, 3, 4):
        coordinator.clients().result(WAIT_S)
        round = give_jobs(coordinator, good, round=number)
        end_well(round, good)
        good.ready()
    assert expect_fault(bad, "late") == "this update comes too late"
    assert coordinator.ask(lambda cohort: cohort.num_busy).result(WAIT_S) == 0


def test_gone_device_that_comes_back_with_its_update_is_late(make_coordinator, short_silence):
    coordinator = make_coordinator(*BOTH, oldest=2)
    good, bad = coordinator.gather()
    round = give_jobs(coordinator, good, bad)
    talk_until_a_result(coordinator, good)
    end(round, good, "failed", "gone")
    good.ready()
    round = give_jobs(coordinator, good, round=2)
    bad.reconnect()
    bad.return_update()
    good.return_update()
    assert [(r.client.id, r.staleness) for r in round.result(WAIT_S)] == [("bad", 1), ("good", 0)]


def test_late_device_that_lost_its_job_is_free_again(make_coordinator, monkeypatch):
    monkeypatch.setattr(sessions_module, "PROBE_S", 0.0)
    coordinator, good, bad = late_pair(make_coordinator, min_clients=2)
    round = give_jobs(coordinator, good, round=2)
    bad.restart()
    bad.ready()
    bad.ping()
    good.return_update()
    assert len(round.result(WAIT_S)) == 1
    good.ready()
    assert [c.id for c in coordinator.clients().result(WAIT_S)] == ["bad", "good"]


def test_asynchronous_round_ends_with_its_quorum_and_the_others_go_on(make_coordinator):
    names = ("a", "b", "c", "d")
    coordinator = make_coordinator(*names, quorum=0.5, mode="async", oldest=8)
    a, b, c, d = coordinator.gather()
    round = give_jobs(coordinator, a, b, c, d)
    end_well(round, a, b)
    a.ready()
    b.ready()
    # four have a job now: two of before, two new ones; two returned are enough, whichever
    round = give_jobs(coordinator, a, b, round=2)
    c.return_update()
    a.return_update()
    results = round.result(WAIT_S)
    assert [(r.client.id, r.round, r.staleness) for r in results] == [("c", 1, 1), ("a", 2, 0)]
    assert coordinator.ask(lambda cohort: cohort.num_busy).result(WAIT_S) == 2


def test_asynchronous_run_does_not_wait_for_those_who_are_gone(make_coordinator, short_silence):
    """They may come back, but keep no other from getting a job: nobody would end their round."""
    coordinator = make_coordinator(*BOTH, quorum=0.5, mode="async", oldest=8)
    good, bad = coordinator.gather()
    round = give_jobs(coordinator, good, bad)
    talk_until_a_result(coordinator, good)
    end(round, good, "failed", "gone")
    assert coordinator.ask(lambda cohort: cohort.num_busy).result(WAIT_S) == 0


def test_device_that_failed_and_is_ready_while_nobody_takes_results(make_coordinator):
    names = ("a", "b", "c")
    coordinator = make_coordinator(*names, quorum=0.3, mode="async", oldest=8)
    a, b, c = coordinator.gather()
    round = give_jobs(coordinator, a, b, c)
    end_well(round, a)
    b.send(Fault(code="trainer", detail="its process died", round=1))
    b.ready()
    clients = coordinator.clients()
    while "b" not in [client.id for client in clients.result(WAIT_S)]:
        clients = coordinator.clients()
    round = give_jobs(coordinator, a, round=2)
    a.return_update()
    absence_of(round.result(WAIT_S), "b", "failed", "trainer")
    assert "b" in [client.id for client in coordinator.clients().result(WAIT_S)]


def test_an_update_that_comes_between_two_tries_of_a_round_counts_once(
    make_coordinator, short_silence
):
    """Its client was given up and is asked again, for the job that it has just returned."""
    coordinator = make_coordinator(*BOTH, oldest=4, quorum=0.5)
    good, bad = coordinator.gather()
    round = coordinator.train(work(*BOTH))
    bad.take_job()
    good.finish()
    absence_of(round.result(WAIT_S), "bad", "failed", "gone")
    rest = coordinator.ask(lambda cohort: cohort.rest(5))
    bad.reconnect()
    bad.return_update()
    rest.result(WAIT_S)
    bad.ready()
    assert "bad" in {client.id for client in coordinator.clients().result(WAIT_S)}
    again = coordinator.train(work("bad"))
    assert [result.message.job for result in again.result(WAIT_S)] == [bad.job.id]


# -- a coordinator that was restarted --------------------------------------------------------------


def test_update_that_had_arrived_before_the_stop_is_not_asked_for_again(tmp_path):
    """The coordinator is killed when one update is there and half of another."""
    job, names = assignment(FLOATS_PER_PART), ("whole", "half")

    def open_jobs() -> tuple[Jobs, list[tuple[str, Message]]]:
        sent: list[tuple[str, Message]] = []
        note = lambda name, message, _: sent.append((name, message)) or True  # noqa: E731
        jobs = Jobs("a run", Spool(tmp_path), Budget(), Mailbox(note))
        for name in names:
            jobs.give(Client(id=name, exit=3, num_examples=10), job, 1, 0.0)
        return jobs, sent

    jobs, sent = open_jobs()
    given = dict(sent)
    trained = {spec.name: job.tensors[spec.name] + 1 for spec in job.returns}
    sender = Sender(trained)
    for name, parts in (("whole", 2), ("half", 1)):
        device = SimpleNamespace(name=name, job=given[name], trained=trained)
        jobs.on_message(name, ScriptedDevice.make_update(device), None)
        for index in range(parts):
            jobs.on_message(name, Part(round=1, index=index), sender.part(index))
    (before,) = jobs.finished
    jobs, sent = open_jobs()  # the same state makes the same jobs
    assert [(name, type(message)) for name, message in sent] == [
        ("whole", Accepted),
        ("half", Job),
    ]
    assert sent[1][1] == given["half"]
    (again,) = jobs.finished
    assert again.client.id == "whole"
    assert again.message.digest == before.message.digest
    assert all(torch.equal(again.tensors[name], trained[name]) for name in trained)


def come_back(coordinator: Coordinator, before: ScriptedDevice) -> ScriptedDevice:
    """The same program, with its job in hand, at a coordinator that was restarted."""
    device = coordinator.device(before.name)
    device.session, device.job, device.trained = before.session, before.job, before.trained
    assert before.job is not None
    device.hello(round=before.job.round, job=before.job.id)
    return device


def test_restarted_coordinator_goes_on_with_what_devices_have(make_coordinator, tmp_path):
    names, spool = ("done", "held", "lost"), tmp_path / "spool"
    first = make_coordinator(*names, is_insecure=True, spool=spool)
    done, held, lost = first.gather()
    clients = first.clients().result(WAIT_S)
    round = first.train(work(*names))
    done.finish()
    held.take_job()
    job = lost.take_job()
    first.close("coordinator stopped")
    assert isinstance(round.exception(WAIT_S), cohort_module.Stopped)

    second = make_coordinator(*names, is_insecure=True, spool=spool)
    second.ask(lambda cohort: cohort.expect(clients, 3)).result(WAIT_S)
    round = second.train(work(*names))
    assert second.arrived.get(timeout=WAIT_S).client.id == "done"  # it is not even connected
    held = come_back(second, held)
    held.return_update()  # no job is sent: it has it
    new = second.device("lost")
    new.join()
    assert new.take_job() == job  # given again, the same
    done = come_back(second, done)
    assert done.expect(Accepted).round == 1
    new.return_update()
    assert_only_these_count(round.result(WAIT_S), done, held, new)


def test_late_update_that_had_arrived_outlives_the_coordinator(make_coordinator, tmp_path):
    spool = tmp_path / "spool"
    settings = {"is_insecure": True, "spool": spool}
    first, good, bad = late_pair(make_coordinator, **settings)
    round = first.train(work("good"), round=2)
    good.take_job()
    bad.return_update()
    first.close("coordinator stopped")
    assert isinstance(round.exception(WAIT_S), cohort_module.Stopped)

    second = make_coordinator(*BOTH, quorum=0.5, oldest=2, next_round=2, **settings)
    second.ask(lambda cohort: cohort.expect([Client(id="good", exit=3, num_examples=10)], 1))
    round = second.train(work("good"), round=2)
    again = come_back(second, good)
    again.return_update()
    late, own = sorted(round.result(WAIT_S), key=lambda result: result.client.id)
    assert (late.client.id, late.round, late.staleness) == ("bad", 1, 1)
    assert (own.client.id, own.round, own.staleness) == ("good", 2, 0)
    want = assignment().tensors["stages.1.1.bias"]
    assert torch.equal(late.tensors["stages.1.1.bias"], want + 1)
    assert torch.equal(late.sent["stages.1.1.bias"], want)


def test_late_update_that_had_not_arrived_outlives_the_coordinator_too(make_coordinator, tmp_path):
    """It comes before the first round that the new coordinator opens."""
    settings = {"is_insecure": True, "spool": tmp_path / "spool"}
    first, good, bad = late_pair(make_coordinator, **settings)
    first.close("coordinator stopped")

    second = make_coordinator(*BOTH, quorum=1.0, oldest=2, next_round=2, **settings)
    waiting = second.clients()
    bad = come_back(second, bad)
    bad.return_update()
    bad.ready()
    good = second.device("good")
    good.join()
    assert len(waiting.result(WAIT_S)) == 2
    round = second.train(work("good"), round=2)
    good.finish()
    late, own = sorted(round.result(WAIT_S), key=lambda result: result.client.id)
    assert (late.client.id, late.round, late.staleness) == ("bad", 1, 1)
    assert (own.client.id, own.round) == ("good", 2)


@pytest.mark.parametrize("next_round", [1, 2])
def test_resumed_run_goes_on_with_a_quorum_a_new_one_needs_all(
    make_coordinator, next_round, monkeypatch
):
    """After it had waited for the others for as long as a device may be silent."""
    monkeypatch.setattr(cohort_module, "SILENCE_S", 0.3)
    settings = {"is_insecure": True, "quorum": 0.5, "give_up_after_s": 1.0}
    coordinator = make_coordinator(*BOTH, next_round=next_round, **settings)
    waiting = coordinator.clients()
    coordinator.device("good").join()
    if next_round == 1:
        assert isinstance(waiting.exception(WAIT_S), QuorumError)
    else:
        assert [client.id for client in waiting.result(WAIT_S)] == ["good"]


def test_resumed_run_waits_for_all_at_first(make_coordinator):
    coordinator = make_coordinator(*BOTH, next_round=2, is_insecure=True, quorum=0.5)
    waiting = coordinator.clients()
    coordinator.device("good").join()
    coordinator.device("bad").join()
    assert len(waiting.result(WAIT_S)) == 2


def test_resumed_round_needs_a_quorum_of_those_who_were_chosen(make_coordinator):
    """Two were, one is needed; both had failed, and a third was asked. One of the two still trains
    when the third has returned: that ends the round, as it had without the kill."""
    names = ("a", "b", "c")
    settings = {"quorum": 0.5, "grace_s": 0.2, "give_up_after_s": 3.0}
    coordinator = make_coordinator(*names, is_insecure=True, **settings)
    known = [Client(id=name, exit=3, num_examples=10) for name in names]
    coordinator.ask(lambda cohort: cohort.expect(known, 2)).result(WAIT_S)
    round = coordinator.train(work(*names), deadline_s=0.1)
    for name in ("a", "c"):
        device = coordinator.device(name)
        device.join()
        device.take_job()
    device.return_update()
    results = round.result(WAIT_S)
    assert [r.client.id for r in results if isinstance(r, ClientUpdate)] == ["c"]


def test_run_killed_in_its_first_round_needs_a_quorum_for_the_second(make_coordinator, monkeypatch):
    monkeypatch.setattr(cohort_module, "SILENCE_S", 0.3)
    settings = {"quorum": 0.5, "give_up_after_s": 3.0, "grace_s": 0.1}
    coordinator = make_coordinator(*BOTH, is_insecure=True, **settings)
    known = [Client(id=name, exit=3, num_examples=10) for name in BOTH]
    coordinator.ask(lambda cohort: cohort.expect(known, 2)).result(WAIT_S)
    round = coordinator.train(work(*BOTH))
    good = coordinator.device("good")
    good.join()
    good.finish()
    good.ready()
    round.result(WAIT_S)  # the other one is not there any more
    assert [client.id for client in coordinator.clients().result(WAIT_S)] == ["good"]


@pytest.mark.parametrize("oldest", [0, 2])
def test_gone_device_that_is_back_after_its_round(make_coordinator, short_silence, oldest):
    """Where nothing is taken late its job is over; it is told so, and is ready for the next."""
    coordinator = make_coordinator(*BOTH, oldest=oldest)
    good, bad = coordinator.gather()
    round = give_jobs(coordinator, good, bad)
    talk_until_a_result(coordinator, good)
    end(round, good, "failed", "gone")
    coordinator.ask(lambda cohort: cohort.expect([], 0)).result(WAIT_S)
    waiting = coordinator.clients()
    bad.reconnect()
    if not oldest:
        assert bad.expect(Fault).code == "round"
        bad.ready()
    good.ready()
    ready = ["good"] if oldest else ["bad", "good"]
    assert [client.id for client in waiting.result(WAIT_S)] == ready
