"""What the log says of participants that keep a round open."""

from __future__ import annotations

import logging

import pytest

from coordinator.fleet import waiting
from coordinator.fleet.waiting import Waiting
from edge_sdk.protocol.messages import Fault
from tests.support.devices import WAIT_S
from tests.support.jobs_and_results import BOTH, expect_fault, give_jobs

AWAITED = {"evil"}


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, logger=waiting.__name__)
    return caplog


def tell_from(round: Waiting, moments, counts, *, may_close: bool, awaited=AWAITED) -> None:
    for now in moments:
        round.tell(counts, awaited, float(now), may_close=may_close)


def test_whom_a_round_waits_for_is_told_every_quarter_of_a_minute(said):
    round = Waiting(11, closes_at=600.0, now=0.0)
    tell_from(round, range(100), (0, 2, 1), may_close=False)
    assert not said.messages  # all train
    round.note_result(100.0)
    tell_from(round, range(101, 140), (1, 2, 1), may_close=True)
    assert said.messages == [
        "round 11: 1 of 2 returned, waiting for evil, at most 484 s more",
        "round 11: 1 of 2 returned, waiting for evil, at most 468 s more",
    ]


def test_a_round_that_needs_more_is_told_to_wait_also_beyond_its_end(said):
    round = Waiting(3, closes_at=30.0, now=0.0)
    tell_from(round, range(46), (0, 7, 4), may_close=False, awaited=set("gfedcba"))
    assert said.messages == [
        "round 3: 0 of 7 returned, waiting for a, b, c, d, e and 2 more, 4 needed"
    ]
    assert [record.levelname for record in said.records] == ["WARNING"]


def test_one_that_never_trains_is_named_while_the_round_waits(make_coordinator, said, monkeypatch):
    monkeypatch.setattr(waiting, "TELL_S", 0.0)
    coordinator = make_coordinator(*BOTH, quorum=0.5, grace_s=2.0)
    good, bad = coordinator.gather()
    round = give_jobs(coordinator, bad, good, deadline_s=0.1)
    bad.stays_quiet(0.6)
    assert not said.messages
    good.return_update()
    expect_fault(bad, "late")
    round.result(WAIT_S)
    assert said.messages[0] == "round 1: 1 of 2 returned, waiting for bad, at most 1 s more"


def test_a_result_that_failed_is_one_too(make_coordinator, said, monkeypatch):
    monkeypatch.setattr(waiting, "TELL_S", 0.0)
    coordinator = make_coordinator(*BOTH, quorum=0.5, grace_s=2.0)
    good, bad = coordinator.gather()
    round = give_jobs(coordinator, good, bad, deadline_s=0.1)
    bad.send(Fault(code="trainer", detail="killed", round=1))
    good.stays_quiet(0.8)
    assert "round 1: 0 of 2 returned, waiting for good, 1 needed" in said.messages
    good.return_update()
    round.result(WAIT_S)
