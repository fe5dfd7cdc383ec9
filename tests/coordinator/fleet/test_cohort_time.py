"""Time at the coordinator: who is silent, what stalls, when a round ends."""

from __future__ import annotations

import gc
import math
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from coordinator.cohorts.base import Absence, Client, ClientUpdate
from coordinator.fleet import jobs as jobs_module
from coordinator.fleet.flow_control import Budget
from coordinator.fleet.jobs import MOST_STALLS, Jobs
from coordinator.fleet.spool import Spool
from coordinator.links.rate_limit import RateLimits
from coordinator.links.router import Received
from coordinator.links.unfit import UnfitDevices
from edge_sdk.errors import QuorumError
from edge_sdk.protocol.messages import Accepted, Fault, Fetch, Heartbeat, Job, Message, Ready
from edge_sdk.protocol.stream import PART_BYTES
from tests.support.devices import WAIT_S, ScriptedDevice
from tests.support.examples import client
from tests.support.jobs import Mailbox
from tests.support.jobs_and_results import (
    BOTH,
    FLOATS_PER_PART,
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
from tests.support.real_coordinator import make_cohort

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

    limits = RateLimits(burst=math.inf)
    num_refused = 0

    def __init__(self) -> None:
        self.unfit = UnfitDevices()
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

    def is_still(self, received: Received) -> bool:
        return True


def test_silent_device_is_dropped_though_messages_never_end(short_silence, tmp_path):
    until = time.monotonic() + WAIT_S
    cohort = make_cohort(
        TalkingHub(), tmp_path, min_clients=2, should_stop=lambda: time.monotonic() > until
    )
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
    until = time.monotonic() + 1.5
    while time.monotonic() < until:  # three times as long as others may be silent
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
    slow.stays_quiet(1.0)  # nobody listens for longer than SILENCE_S
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
    slow.stays_quiet(1.0)
    is_over.set()
    slow.expect(Accepted)  # not asked again
    assert_only_these_count(round.result(WAIT_S), good, slow)


def test_quarter_of_an_hour_with_the_caller_is_nobodys_silence(coordinator, devices):
    """As the clocks have it: a device that says nothing stays, and its upload has not stalled."""

    def be_away() -> None:
        cohort, away_s = coordinator._cohort, 900.0
        for device in cohort.sessions.all.values():
            device.seen -= away_s
        for open_job in cohort.jobs.open.values():
            open_job.moved -= away_s
        cohort._listened -= away_s
        cohort._looked -= away_s

    good, slow = devices
    round = coordinator.train(work(*BOTH), pause=be_away)
    slow.take_job()
    slow.announce()
    good.finish()
    coordinator.arrived.get(timeout=WAIT_S)
    good.ping(0)
    good.ping(0)  # now it has looked after everybody
    slow.send_parts([0])
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
    spool, budget = Spool(tmp_path), Budget(2 * PART_BYTES)
    note = lambda name, message, _: sent.append((name, message)) or True  # noqa: E731
    jobs = Jobs("a run", spool, budget, Mailbox(note), takes_late=False)
    job = assignment(FLOATS_PER_PART)  # two parts
    for name in BOTH:
        device = SimpleNamespace(name=name)
        jobs.give(Client(id=name, exit=3, num_examples=10), job, 1, 0.0)
        device.job = sent[-1][1]
        device.trained = {spec.name: job.tensors[spec.name] for spec in job.returns}
        jobs.on_message(name, ScriptedDevice.make_update(device), None)
    assert [type(message) for _, message in sent] == [Job, Fetch, Job]
    sent.clear()
    jobs.close()
    assert [(name, type(message)) for name, message in sent] == [("bad", Fault), ("good", Fault)]
    assert [type(result) for result in jobs.finished] == [Absence, Absence]
    assert (len(jobs.awaited), jobs.open, budget.bytes_under_way) == (0, {}, 0)
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
    monkeypatch.setattr(jobs_module, "RESEND_S", 0.0)
    bad.ping()
    bad.take_job()
    bad.ping(1)
    bad.stays_quiet()  # it has it now
    end_well(round, bad, good)


# -- rounds that give up ---------------------------------------------------------------------------


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


def test_rest_listens_and_looks_at_the_time_though_a_result_is_there(tmp_path):
    """Else who waits for the next round would turn in circles, and never give up."""
    router = TalkingHub()
    cohort = make_cohort(router, tmp_path, give_up_after_s=60.0)
    cohort.jobs.miss(client("a", 2), assignment())
    assert len(router.said) == 4
    assert cohort.rest(1)
    assert len(router.said) < 4
    cohort._patience.since -= 61
    with pytest.raises(QuorumError, match="too few devices or updates after 2 tries of a round"):
        cohort.rest(2)
