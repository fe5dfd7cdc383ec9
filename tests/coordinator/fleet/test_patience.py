"""One device that holds what others need, or gets on with nothing: for how long, at whose cost."""

from __future__ import annotations

import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from coordinator.fleet.flow_control import WINDOW, Budget
from coordinator.fleet.job_phases import JobPhase
from coordinator.fleet.patience import (
    IDLE_S,
    LEAST_TRAIN_S,
    MOST_TRAIN_S,
    Patience,
    training_limit_s,
)
from edge_sdk.errors import QuorumError
from edge_sdk.protocol.messages import Fetch, Part, Plan, Segment
from edge_sdk.protocol.stream import PART_BYTES
from tests.support.examples import client, config
from tests.support.jobs import PARTS, JobsBed

PREFIX = Plan(segments=(Segment(first=1, last=2),))
LIMIT_S = 60.0  # --give-up-after


@pytest.fixture
def bed(tmp_path) -> JobsBed:
    return JobsBed(tmp_path)


def fetch(bed: JobsBed, have: int, count: int = 0, name: str = "a") -> None:
    first = 0 if have == 0 else PARTS + 1
    bed.jobs.on_message(name, Fetch(round=1, have=have, first=first, count=count), None)


def patience(bed: JobsBed, **seen: float) -> Patience:
    links = {name: SimpleNamespace(seen=at) for name, at in seen.items()}
    sessions = SimpleNamespace(all=links, lacking=lambda: "")
    return Patience(config("fedavg-l"), bed.jobs, sessions, LIMIT_S)  # type: ignore[arg-type]


def test_who_does_not_say_what_came_gets_one_window(bed):
    """Of 128 parts that may be under way, however often it asks: others get on."""
    bed.give("a")
    for _ in range(10):
        fetch(bed, 0, PARTS + 1)
    assert bed.jobs.budget.held("a") == len(bed.to("a", Part)) == WINDOW
    bed.give("b")
    fetch(bed, 0, PARTS + 1, name="b")
    fetch(bed, PARTS + 1, name="b")
    assert [part.index for part in bed.to("b", Part)] == list(range(PARTS + 1))


def test_a_measured_link_has_two_windows_at_most(bed):
    bed.give()
    open_job = bed.jobs.open["a"]
    assert open_job.most_under_way == WINDOW
    open_job.link_rate.note_moved(PART_BYTES, 0.01)
    assert open_job.most_under_way == 2 * WINDOW
    assert Budget().share == 32  # of 128
    assert Budget(8 * PART_BYTES).share == 2


def test_one_part_said_again_and_again_is_no_progress(bed):
    """`have` that goes down and up again frees no credit, and is no sign of getting on."""
    bed.give()
    fetch(bed, 0, PARTS + 1)
    fetch(bed, 1)
    open_job = bed.jobs.open["a"]
    held, progressed = bed.jobs.budget.held("a"), open_job.progressed
    for have in (0, 1, 0, 1):
        fetch(bed, have)
    assert bed.jobs.budget.held("a") == held > 0
    assert open_job.progressed == progressed
    fetch(bed, 2)
    assert bed.jobs.budget.held("a") == held - 1
    assert open_job.progressed > progressed


def test_who_never_moved_anything_has_failed_at_the_first_stall(bed):
    bed.give()
    fetch(bed, 0, PARTS + 1)
    open_job = bed.jobs.open["a"]
    bed.jobs.check_stalls()
    assert "a" in bed.jobs.open
    open_job.moved -= 30 + 4 * 32 + 1  # 30 s, and 4 times a part at 16 KiB/s
    bed.jobs.check_stalls()
    (absence,) = bed.jobs.finished
    assert (absence.outcome, absence.code) == ("failed", "stalled")
    assert absence.detail == f"it has said of 0 of the job's {PARTS + 1} parts"
    assert bed.jobs.budget.bytes_under_way == 0


def ended_by(bed: JobsBed, told: Patience) -> list[tuple[str, str]]:
    told.end_holdups(1.0)
    return [(result.outcome, result.code) for result in bed.jobs.finished]


@pytest.mark.parametrize(
    ("phase", "limit_s", "end"),
    [
        (JobPhase.DOWNLOAD, IDLE_S, ("failed", "stalled")),
        (JobPhase.TRAIN, MOST_TRAIN_S, ("straggler", "late")),
        (JobPhase.LOST, LEAST_TRAIN_S, ("failed", "stalled")),
    ],
)
def test_a_participant_that_only_says_it_is_there(bed, phase, limit_s, end):
    bed.give()
    open_job, told = bed.jobs.open["a"], patience(bed)
    open_job.phase = phase
    open_job.progressed -= limit_s - 5
    assert ended_by(bed, told) == []
    open_job.progressed -= 6
    assert ended_by(bed, told) == [end]


def test_a_turn_that_has_not_come_is_nobodys_fault(bed):
    bed.give()
    open_job = bed.jobs.open["a"]
    bed.jobs.budget.ask("a", is_slow=False)
    open_job.progressed -= IDLE_S - 0.5
    before = open_job.progressed
    assert ended_by(bed, patience(bed)) == []
    assert open_job.progressed == pytest.approx(before + 1.0)


@pytest.mark.parametrize(
    ("predicted_s", "deadline_s", "limit_s"),
    [
        (0.0, 0.0, MOST_TRAIN_S),  # nothing is known
        (100.0, 0.0, 1000.0),
        (1e9, 0.0, MOST_TRAIN_S),  # whatever it says
        (1.0, 0.0, LEAST_TRAIN_S),
        (0.0, 300.0, 3000.0),
        (100.0, 3000.0, 3600.0),  # with the grace of 600 s
        (1000.0, 300.0, 3000.0),
    ],
)
def test_how_long_a_device_may_train(bed, predicted_s, deadline_s, limit_s):
    bed.give(plan=PREFIX)
    open_job = bed.jobs.open["a"]
    open_job.client = replace(client("a", 3), prefix_s=predicted_s)
    assert training_limit_s(open_job, config("fedavg-l", deadline_s=deadline_s)) == limit_s


# -- whether a run gives up ----------------------------------------------------------------------


def test_a_run_does_not_give_up_while_a_device_gets_on_or_trains(bed):
    bed.give()
    open_job, now = bed.jobs.open["a"], time.monotonic()
    told = patience(bed, a=now)
    told.since -= LIMIT_S + 1
    told.check("waits")  # the job was given just now
    open_job.progressed -= LIMIT_S + 1
    with pytest.raises(QuorumError, match="waits, and nothing changed for 60 s"):
        told.check("waits")  # its heartbeats say nothing of a download
    open_job.phase = JobPhase.TRAIN
    told.check("waits")
    bed.jobs.on_gone("a", "gone", "for a while")  # it is late, and at work
    told.check("waits")
    told._sessions.all["a"].seen -= LIMIT_S + 1
    with pytest.raises(QuorumError):
        told.check("waits")


def test_heartbeats_of_one_who_trains_for_too_long_keep_no_run_up(bed):
    bed.give()
    open_job, now = bed.jobs.open["a"], time.monotonic()
    open_job.phase = JobPhase.TRAIN
    open_job.progressed -= MOST_TRAIN_S + LIMIT_S + 1
    told = patience(bed, a=now)
    told.since -= LIMIT_S + 1
    with pytest.raises(QuorumError):
        told.check("waits")


def test_who_held_others_up_keeps_no_run_up_when_it_is_asked_again(bed):
    bed.give()
    told = patience(bed, a=time.monotonic())
    told.since -= LIMIT_S + 1
    told.note_absence("a", "trainer")  # one that fails may train for long the next time
    told.check("waits")
    told.note_absence("a", "stalled")
    with pytest.raises(QuorumError):
        told.check("waits")
    told.note_change()
    told.since -= LIMIT_S + 1
    told.check("waits")
