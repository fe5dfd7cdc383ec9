"""Time at the coordinator: who is silent, what stalls, when a round ends, what is late."""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from coordinator import cohort_zmq
from coordinator import desk as desk_module
from coordinator import devices as devices_module
from coordinator.cohort import Absence, Client, ClientUpdate
from coordinator.cohort_zmq import Terms, ZmqCohort
from coordinator.credit import Credit
from coordinator.desk import MOST_STALLS, Desk
from coordinator.hub import Received
from coordinator.spool import Spool
from edge_sdk.errors import QuorumError
from edge_sdk.tensors import Sender
from edge_sdk.wire import (
    PART_BYTES,
    Accepted,
    Fault,
    Fetch,
    Heartbeat,
    Job,
    Message,
    Part,
    Ready,
)
from tests.cohort_work import (
    BOTH,
    FLOATS_PER_PART,
    STAGE_2,
    absence_of,
    assert_about_round,
    assert_only_these_count,
    assignment,
    end,
    end_well,
    ended,
    expect_fault,
    give_jobs,
    heard_until_now,
    talk_until_a_result,
    work,
)
from tests.helpers import cnn
from tests.scripted import (
    WAIT_S,
    Coordinator,
    ScriptedDevice,
)

# -- the caller takes its time ---------------------------------------------------------------------


def count_updates() -> int:
    gc.collect()
    return sum(type(held) is ClientUpdate for held in gc.get_objects())


def test_updates_that_waited_for_the_caller_come_one_at_a_time(make_coordinator):
    """Whole updates that the caller has not taken are in no budget."""
    names = ("a", "b", "c", "d")
    coordinator = make_coordinator(*names, quorum=0.25, grace_s=0.1)
    devices = coordinator.gather()
    is_over, alive = threading.Event(), [count_updates()]

    def pause():
        alive.append(count_updates())
        is_over.wait(WAIT_S)

    round = coordinator.train(work(*names), deadline_s=0.1, pause=pause)
    for device in devices:
        device.take_job()
        assert device.announce().first == 0
    devices[0].send_parts([0])
    coordinator.arrived.get(timeout=WAIT_S)
    for device in devices[1:]:
        device.send_parts([0])
        device.stays_quiet(0.2)
    is_over.set()
    assert_only_these_count(round.result(WAIT_S), *devices)
    assert np.diff(alive).tolist() == [1, 1, 1, 1], "this test keeps what it was given"


# -- silence, stalls and deadlines -----------------------------------------------------------------


class TalkingHub:
    """Two devices of which one says nothing after it is ready, and the other never stops."""

    def __init__(self) -> None:
        self.said: list[Received] = []
        for name in BOTH:
            hello = ScriptedDevice.make_hello(SimpleNamespace(name=name, session="1"))
            for message in (hello, Ready(exit=3)):
                self.said.append(Received(name.encode(), None, message, None))

    def receive(self, timeout_ms: int) -> tuple[bool, Received]:
        chatter = Received(b"bad", None, Heartbeat(), None)
        return True, self.said.pop(0) if self.said else chatter

    def send(self, route: bytes, message: object, payload: object = None) -> bool:
        return True

    def is_admitted(self, name: str) -> bool:
        return True


@pytest.fixture
def short_silence(monkeypatch):
    for module in (cohort_zmq, devices_module):
        monkeypatch.setattr(module, "SILENCE_S", 1.0)


def test_silent_device_is_dropped_though_messages_never_end(short_silence, tmp_path):
    until = time.monotonic() + WAIT_S
    terms = Terms("a run", cnn(), STAGE_2, 0.0, 600.0, 1.0, 2)
    cohort = ZmqCohort(TalkingHub(), terms, Spool(tmp_path), lambda: time.monotonic() > until)
    assert [client.id for client in cohort.clients()] == ["bad", "good"]
    results = list(cohort.train(work("good"), 1, 0.0))
    assert "said nothing for " in absence_of(results, "good", "failed", "gone").detail


def test_silent_device_is_dropped(coordinator, devices, short_silence):
    good, bad = devices
    round = coordinator.train(work(*BOTH))
    bad.take_job()
    good.finish()
    assert "said nothing for " in ended(round, good, "failed", "gone").detail


def test_silent_device_is_dropped_while_others_talk(coordinator, devices, short_silence):
    good, bad = devices
    round = give_jobs(coordinator, bad, good)
    talk_until_a_result(coordinator, good)
    assert end(round, good, "failed", "gone").client.id == "bad"


def test_device_is_not_silent_while_a_part_is_on_its_way(coordinator, devices, short_silence):
    """A part may take longer over its link than anything else may take."""
    good, slow = devices
    round = give_jobs(coordinator, slow, good)
    slow.announce()  # a part takes LINK_S and more
    until = time.monotonic() + 3.0
    while time.monotonic() < until:  # twice as long as others may be silent
        good.ping(1)
    slow.send_parts([0])
    slow.expect(Accepted)
    good.return_update()
    assert_only_these_count(round.result(WAIT_S), good, slow)


def test_long_pause_of_the_caller_drops_nobody(coordinator, devices, short_silence):
    good, slow = devices
    is_over = threading.Event()
    round = coordinator.train(work(*BOTH), pause=lambda: is_over.wait(WAIT_S))
    slow.take_job()
    good.finish()
    coordinator.arrived.get(timeout=WAIT_S)
    slow.stays_quiet(1.5)  # nobody listens for longer than SILENCE_S
    is_over.set()
    slow.return_update()
    assert_only_these_count(round.result(WAIT_S), good, slow)


def test_upload_that_waited_for_the_caller_has_not_stalled(coordinator, devices, impatient):
    good, slow = devices
    is_over = threading.Event()
    round = coordinator.train(work(*BOTH), pause=lambda: is_over.wait(WAIT_S))
    slow.take_job()
    slow.announce()
    good.finish()
    coordinator.arrived.get(timeout=WAIT_S)
    good.send(Heartbeat())
    slow.send_parts([0])
    slow.stays_quiet(1.5)
    is_over.set()
    slow.expect(Accepted)  # not asked again
    assert_only_these_count(round.result(WAIT_S), good, slow)


def test_straggler_with_quorum_met(make_coordinator):
    coordinator = make_coordinator(*BOTH, quorum=0.5, grace_s=0.1)
    good, bad = coordinator.gather()
    round = coordinator.train(work(*BOTH), deadline_s=0.1)
    bad.take_job()
    good.finish()
    expect_fault(bad, "late")
    ended(round, good, "straggler", "late")
    # the next round goes on without it, and does not take the old update
    assert [client.id for client in coordinator.clients().result(WAIT_S)] == ["good"]
    round = give_jobs(coordinator, good, round=2)
    bad.send(bad.make_update())
    expect_fault(bad, "round")
    end_well(round, good)


def test_straggler_with_quorum_not_met(make_coordinator):
    coordinator = make_coordinator(*BOTH, quorum=0.5, grace_s=0.1)
    good, bad = coordinator.gather()
    round = give_jobs(coordinator, bad, good, deadline_s=0.1)
    bad.stays_quiet(1.0)  # late already, but nobody has returned
    assert not round.done()
    good.return_update()
    expect_fault(bad, "late")
    ended(round, good, "straggler", "late")


def test_nobody_begins_to_upload_when_the_round_closes(tmp_path, quick_links):
    sent: list[tuple[str, Message]] = []
    spool, credit = Spool(tmp_path), Credit(2 * PART_BYTES)
    note = lambda name, message, _: sent.append((name, message)) or True  # noqa: E731
    desk = Desk("a run", spool, credit, note, takes_late=False)
    job = assignment(FLOATS_PER_PART)  # two parts
    for name in BOTH:
        device = SimpleNamespace(name=name)
        desk.give(Client(id=name, exit=3, num_examples=10), job, 1, 0.0)
        device.job = sent[-1][1]
        device.trained = {spec.name: job.tensors[spec.name] for spec in job.returns}
        desk.on_message(name, ScriptedDevice.make_update(device), None)
    assert [type(message) for _, message in sent] == [Job, Fetch, Job]
    sent.clear()
    desk.close(1)
    assert [(name, type(message)) for name, message in sent] == [("bad", Fault), ("good", Fault)]
    assert [type(result) for result in desk.finished] == [Absence, Absence]
    assert (desk.num_open, desk.seats, credit.bytes_under_way) == (0, {}, 0)
    assert not list(tmp_path.iterdir())  # nothing is left of what will not count


def test_round_whose_quorum_is_out_of_reach_does_not_wait(make_coordinator):
    coordinator = make_coordinator(*BOTH, quorum=1.0, grace_s=0.1)
    late, bad = coordinator.gather()
    round = give_jobs(coordinator, late, bad, deadline_s=0.1)
    bad.send(Fault(code="trainer", detail="killed", round=1))
    expect_fault(late, "late")
    results = round.result(WAIT_S)
    absence_of(results, "good", "straggler", "late")
    absence_of(results, "bad", "failed", "trainer")


def test_stalled_upload_is_asked_again_then_failed(coordinator, devices, impatient):
    good, bad = devices
    round = give_jobs(coordinator, bad, good, num_floats=FLOATS_PER_PART)
    fetch = bad.announce()
    assert (fetch.have, fetch.first, fetch.count) == (0, 0, 2)
    bad.send_parts([0])
    for _ in range(MOST_STALLS - 1):
        assert bad.expect(Fetch) == Fetch(round=1, have=1, first=1, count=1)
    assert "after 524288 bytes" in expect_fault(bad, "stalled")
    assert end(round, good, "failed", "stalled").bytes_up == 524288


def test_repeated_part_is_no_progress_and_holds_nobody_up(make_coordinator, impatient, quick_links):
    coordinator = make_coordinator(*BOTH, budget_bytes=2 * PART_BYTES)
    good, bad = coordinator.gather()
    round = give_jobs(coordinator, bad, good, num_floats=FLOATS_PER_PART)
    good.ping(1)  # that it has everything has been heard: nothing is under way
    assert bad.announce().count == 2
    good.send(good.make_update())
    assert not heard_until_now(good)  # all of the budget is under way
    bad.send_parts([0])  # of which half is left now
    assert isinstance(good.upload(), Accepted)
    heard: list[Message] = []
    until = time.monotonic() + WAIT_S / 3
    while not (heard and isinstance(heard[-1], Fault)) and time.monotonic() < until:
        bad.send_parts([0])
        bad.send(Heartbeat(round=1))
        message, _ = bad.receive()
        heard += [message] if not isinstance(message, Heartbeat) else []
    again = Fetch(round=1, have=1, first=1, count=1)
    assert heard[:-1] == [again] * (MOST_STALLS - 1)
    assert_about_round(heard[-1], "stalled")
    assert ended(round, good, "failed", "stalled").bytes_up == PART_BYTES  # once


def test_stalled_upload_that_goes_on_counts(coordinator, devices, impatient):
    good, bad = devices
    round = give_jobs(coordinator, bad, good, num_floats=FLOATS_PER_PART)
    bad.announce()
    assert bad.expect(Fetch).have == 0  # the second
    bad.send_parts([0])  # progress: the count of stalls begins anew
    for _ in range(MOST_STALLS - 1):
        assert bad.expect(Fetch).have == 1
    bad.send_parts([1])
    assert isinstance(bad.upload(), Accepted)
    good.return_update()
    assert_only_these_count(round.result(WAIT_S), good, bad)


def test_lost_job_is_sent_again(coordinator, devices, monkeypatch):
    good, bad = devices
    round = coordinator.train(work(*BOTH))
    good.take_job()
    bad.expect(Job)  # but say that it was lost
    bad.ping()
    bad.stays_quiet()  # it may still be on its way
    monkeypatch.setattr(desk_module, "RESEND_S", 0.0)
    bad.ping()
    bad.take_job()
    bad.ping(1)
    bad.stays_quiet()  # it has it now
    end_well(round, bad, good)


# -- late updates and rounds that end ----------------------------------------------------------


def late_pair(make_coordinator: Callable[..., Coordinator], **terms: Any) -> tuple[Any, ...]:
    """After a round that closed without the bad one, which has its job in hand still."""
    coordinator = make_coordinator(*BOTH, **{"quorum": 0.5, "grace_s": 0.1, "oldest": 2} | terms)
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
    monkeypatch.setattr(devices_module, "PROBE_S", 0.0)
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
    coordinator = make_coordinator(*names, quorum=0.5, is_async=True, oldest=8)
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
    coordinator = make_coordinator(*BOTH, quorum=0.5, is_async=True, oldest=8)
    good, bad = coordinator.gather()
    round = give_jobs(coordinator, good, bad)
    talk_until_a_result(coordinator, good)
    end(round, good, "failed", "gone")
    assert coordinator.ask(lambda cohort: cohort.num_busy).result(WAIT_S) == 0


def test_device_that_failed_and_is_ready_while_nobody_takes_results(make_coordinator):
    names = ("a", "b", "c")
    coordinator = make_coordinator(*names, quorum=0.3, is_async=True, oldest=8)
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


def test_too_few_devices_for_too_long(make_coordinator):
    coordinator = make_coordinator(*BOTH, give_up_after_s=1.0)
    clients = coordinator.clients()
    coordinator.device("good").join()
    with pytest.raises(QuorumError, match="1 of the 2 devices .* nothing changed for 1 s"):
        clients.result(WAIT_S)


def test_round_without_its_quorum_gives_up(make_coordinator):
    coordinator = make_coordinator(*BOTH, give_up_after_s=1.0, grace_s=0.1, min_updates=2)
    good, bad = coordinator.gather()
    round = coordinator.train(work(*BOTH), deadline_s=0.1)
    bad.take_job()
    good.finish()
    with pytest.raises(QuorumError, match="1 of 2 needed returned in round 1, and nothing changed"):
        round.result(WAIT_S)


def test_needed_updates_of_a_round():
    terms = Terms("r", cnn(), STAGE_2, 0.0, 1.0, quorum=0.5, min_clients=1, min_updates=3)
    assert [terms.needed(chosen) for chosen in (1, 2, 4, 6, 9)] == [1, 2, 3, 3, 5]


def test_update_that_had_arrived_before_the_stop_is_not_asked_for_again(tmp_path):
    """The coordinator is killed when one update is there and half of another."""
    job, names = assignment(FLOATS_PER_PART), ("whole", "half")

    def open_desk() -> tuple[Desk, list[tuple[str, Message]]]:
        sent: list[tuple[str, Message]] = []
        note = lambda name, message, _: sent.append((name, message)) or True  # noqa: E731
        desk = Desk("a run", Spool(tmp_path), Credit(), note)
        for name in names:
            desk.give(Client(id=name, exit=3, num_examples=10), job, 1, 0.0)
        return desk, sent

    desk, sent = open_desk()
    jobs = dict(sent)
    trained = {spec.name: job.tensors[spec.name] + 1 for spec in job.returns}
    sender = Sender(trained)
    for name, parts in (("whole", 2), ("half", 1)):
        device = SimpleNamespace(name=name, job=jobs[name], trained=trained)
        desk.on_message(name, ScriptedDevice.make_update(device), None)
        for index in range(parts):
            desk.on_message(name, Part(round=1, index=index), sender.part(index))
    (before,) = desk.finished
    desk, sent = open_desk()  # the same state makes the same jobs
    assert [(name, type(message)) for name, message in sent] == [
        ("whole", Accepted),
        ("half", Job),
    ]
    assert sent[1][1] == jobs["half"]
    (again,) = desk.finished
    assert again.client.id == "whole"
    assert again.digest == before.digest
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
    assert isinstance(round.exception(WAIT_S), cohort_zmq.Stopped)

    second = make_coordinator(*names, is_insecure=True, spool=spool)
    second.ask(lambda cohort: cohort.expect(clients)).result(WAIT_S)
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
    terms = {"is_insecure": True, "spool": spool}
    first, good, bad = late_pair(make_coordinator, **terms)
    round = first.train(work("good"), round=2)
    good.take_job()
    bad.return_update()
    first.close("coordinator stopped")
    assert isinstance(round.exception(WAIT_S), cohort_zmq.Stopped)

    second = make_coordinator(*BOTH, quorum=0.5, oldest=2, **terms)
    second.ask(lambda cohort: cohort.expect([Client(id="good", exit=3, num_examples=10)]))
    round = second.train(work("good"), round=2)
    again = come_back(second, good)
    again.return_update()
    late, own = sorted(round.result(WAIT_S), key=lambda result: result.client.id)
    assert (late.client.id, late.round, late.staleness) == ("bad", 1, 1)
    assert (own.client.id, own.round, own.staleness) == ("good", 2, 0)
    want = assignment().tensors["stages.1.1.bias"]
    assert torch.equal(late.tensors["stages.1.1.bias"], want + 1)
    assert torch.equal(late.sent["stages.1.1.bias"], want)


# -- logs --------------------------------------------------------------------------------------


def test_job_has_one_line_of_log_per_event(coordinator, devices, caplog):
    caplog.set_level(logging.INFO)
    good, bad = devices
    round = give_jobs(coordinator, good, bad)
    bad.trained["exits.1.2.bias"] = torch.full((3,), torch.nan)
    bad.send(bad.make_update())
    bad.upload()
    end(round, good, "failed", "tensors")
    lines = [r.getMessage() for r in caplog.records if r.name.startswith("coordinator")]
    assert [line for line in lines if line.startswith("round 1: bad failed: tensors: ")]
    assert all("\n" not in line for line in lines)


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
    assert [result.job for result in again.result(WAIT_S)] == [bad.job.id]
