"""The phases of an open job and what leads from one to another; section 5 of the protocol has the
same table.

In the first four phases the coordinator waits for the job's update. A late one it only takes if it
comes: whatever its device does with it, it stays late.
"""

from __future__ import annotations

from enum import Enum


class JobPhase(Enum):
    """The status page shows the first two, UPLOAD (or that it queues) and LATE under these names,
    LOST as a download: the device has not got what it is to train."""

    DOWNLOAD = "download"  # given; the device has not said that it has all of the job's parts
    TRAIN = "train"  # it has said so
    UPLOAD = "upload"  # the update is announced, and its parts come
    LOST = "lost"  # the device has not got the job, or no more: it is given again at its `ready`
    LATE = "late"
    LATE_LOST = "late and lost"  # given up at the `ready` of its device
    COUNTED = "counted"  # the end: the update arrived whole and good
    GIVEN_UP = "given up"  # the end: no update of this job will be taken


class JobEvent(Enum):
    HAS_ALL_PARTS = "the device says that it has all of the job's parts"
    LACKS_PARTS = "the device says that it has less"
    ANNOUNCED = "the device announces an update that is as asked for"
    LINK_CHANGED = "the link is lost, or the device is back with the job"
    LOST = "the device is back without the job, or has another one"
    GIVEN_AGAIN = "the job is sent again, to begin anew"
    WAITING_ENDED = "the round closes, or the device is gone"
    ACCEPTED = "the update is there, whole and good"
    ABANDONED = "the device fails, or the job comes too late"


OPEN = DOWNLOAD, TRAIN, UPLOAD, LOST, LATE, LATE_LOST = tuple(JobPhase)[:6]
COUNTED, GIVEN_UP, NEVER = JobPhase.COUNTED, JobPhase.GIVEN_UP, None
TABLE: dict[JobEvent, tuple[JobPhase | None, ...]] = {  # one column for each phase in OPEN
    JobEvent.HAS_ALL_PARTS: (TRAIN, TRAIN, UPLOAD, LOST, LATE, LATE_LOST),
    JobEvent.LACKS_PARTS: (DOWNLOAD, DOWNLOAD, UPLOAD, LOST, LATE, LATE_LOST),
    JobEvent.ANNOUNCED: (UPLOAD, UPLOAD, UPLOAD, UPLOAD, LATE, LATE),
    # an update that had been announced is so again at once: LOST goes on to UPLOAD
    JobEvent.LINK_CHANGED: (DOWNLOAD, DOWNLOAD, UPLOAD, DOWNLOAD, LATE, LATE),
    JobEvent.LOST: (LOST, LOST, LOST, LOST, LATE_LOST, LATE_LOST),
    JobEvent.GIVEN_AGAIN: (DOWNLOAD, DOWNLOAD, DOWNLOAD, DOWNLOAD, NEVER, NEVER),
    JobEvent.WAITING_ENDED: (LATE, LATE, LATE, LATE_LOST, NEVER, NEVER),
    # from DOWNLOAD: it had arrived before the coordinator was stopped; TRAIN ends with ANNOUNCED
    JobEvent.ACCEPTED: (COUNTED, NEVER, COUNTED, COUNTED, COUNTED, COUNTED),
    JobEvent.ABANDONED: (GIVEN_UP, GIVEN_UP, GIVEN_UP, GIVEN_UP, GIVEN_UP, GIVEN_UP),
}


def phase_after(phase: JobPhase, event: JobEvent) -> JobPhase:
    """An event that cannot be in this phase is a fault of the coordinator: AssertionError."""
    found = TABLE[event][OPEN.index(phase)] if phase in OPEN else NEVER
    assert found is not None, f"{event.name} of a job in phase {phase.name}"
    return found
