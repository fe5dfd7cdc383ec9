"""The phases of an open job: the table by itself, and that open jobs go by it."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace

import pytest

from coordinator.fleet.job_phases import (
    COUNTED,
    GIVEN_UP,
    OPEN,
    TABLE,
    JobEvent,
    JobPhase,
    phase_after,
)
from coordinator.fleet.state import client_phase
from edge_sdk.protocol.messages import Fetch, Ready
from tests.support.jobs import PARTS, JobsBed

WAITED_FOR = set(OPEN) - {JobPhase.LATE, JobPhase.LATE_LOST}
ENDS = {JobEvent.ACCEPTED, JobEvent.ABANDONED}
SHOWN = {
    JobPhase.DOWNLOAD: "download",
    JobPhase.TRAIN: "train",
    JobPhase.UPLOAD: "upload",
    JobPhase.LOST: "download",
    JobPhase.LATE: "late",
    JobPhase.LATE_LOST: "late",
}


def test_every_event_has_a_row_and_every_phase_is_reached():
    assert list(TABLE) == list(JobEvent)
    assert {len(row) for row in TABLE.values()} == {len(OPEN)}
    assert {to for row in TABLE.values() for to in row if to} == set(JobPhase)
    assert set(JobPhase) - set(OPEN) == {COUNTED, GIVEN_UP}


@pytest.mark.parametrize(("phase", "event"), list(product(JobPhase, JobEvent)))
def test_only_what_can_be_leads_anywhere(phase, event):
    """An ended job is ended; a job in training has no update that could be accepted; a late one is
    neither given again nor waited for, and stays late."""
    if phase not in OPEN or (
        (phase, event) == (JobPhase.TRAIN, JobEvent.ACCEPTED)
        or (phase not in WAITED_FOR and event in (JobEvent.GIVEN_AGAIN, JobEvent.WAITING_ENDED))
    ):
        with pytest.raises(AssertionError, match=f"{event.name} of a job in phase {phase.name}"):
            phase_after(phase, event)
        return
    found = phase_after(phase, event)
    assert (found in OPEN) != (event in ENDS)
    if event not in ENDS:
        assert (found in WAITED_FOR) == (
            phase in WAITED_FOR and event is not JobEvent.WAITING_ENDED
        )


@pytest.mark.parametrize(("phase", "shown"), list(SHOWN.items()))
def test_status_page_shows_every_phase(phase, shown):
    session, job = SimpleNamespace(rival=None), SimpleNamespace(phase=phase)
    assert client_phase(session, job, parts_under_way=1) == shown
    assert client_phase(session, job, 0) == ("queued" if shown == "upload" else shown)
    assert client_phase(None, job, 0) == "away"


@pytest.fixture
def bed(tmp_path):
    made = JobsBed(tmp_path)
    made.give()
    return made


def phase(bed: JobsBed) -> JobPhase:
    return bed.jobs.open["a"].phase


def has(bed: JobsBed, parts: int) -> None:
    bed.jobs.on_message("a", Fetch(round=1, have=parts, first=parts, count=0), None)


def test_a_job_is_downloaded_trained_uploaded_and_counted(bed):
    open_job = bed.jobs.open["a"]
    seen = [open_job.phase]
    for parts in (1, PARTS + 1):  # one more goes down: stage 1 is in a part of its own
        has(bed, parts)
        seen.append(open_job.phase)
    bed.announce()
    seen.append(open_job.phase)
    bed.parts(range(PARTS))
    seen.append(open_job.phase)
    assert seen == [
        JobPhase.DOWNLOAD,
        JobPhase.DOWNLOAD,
        JobPhase.TRAIN,
        JobPhase.UPLOAD,
        JobPhase.COUNTED,
    ]


def test_a_lost_job_begins_anew_or_goes_on_where_it_was(bed):
    bed.announce()
    bed.parts([0])
    bed.jobs.on_return("a", 0, None)  # its program was started again
    assert phase(bed) is JobPhase.LOST
    bed.jobs.on_return("a", 1, bed.job().id)  # and had kept the update
    assert phase(bed) is JobPhase.UPLOAD
    bed.jobs.on_return("a", 0, None)
    bed.jobs.on_ready("a", Ready(exit=3))
    assert phase(bed) is JobPhase.DOWNLOAD


def test_a_late_job_stays_late_and_a_lost_one_is_given_up_then(bed):
    open_job = bed.jobs.open["a"]
    bed.jobs.on_message("a", bed.update(bed.job(), None), None)
    bed.jobs.close()
    assert open_job.phase is JobPhase.LATE
    bed.jobs.on_return("a", 1, bed.job().id)
    assert open_job.phase is JobPhase.LATE
    bed.jobs.on_return("a", 0, None)
    assert open_job.phase is JobPhase.GIVEN_UP
    bed.give(round=2)
    again = bed.jobs.open["a"]
    bed.jobs.on_return("a", 0, None)
    bed.jobs.close()
    assert again.phase is JobPhase.LATE_LOST
    bed.jobs.on_ready("a", Ready(exit=3))
    assert again.phase is JobPhase.GIVEN_UP
