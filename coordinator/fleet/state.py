"""The state of a cohort of real devices, read off its links, its open jobs and its counters."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from coordinator.fleet.counters import ClientCounts, Counters
from coordinator.fleet.job_phases import JobPhase
from coordinator.fleet.jobs import Jobs
from coordinator.fleet.open_job import OpenJob
from coordinator.fleet.sessions import Session
from coordinator.store.status import (
    ClientPhase,
    ClientState,
    CohortState,
    LinkCounts,
    UnfitDevice,
)


@dataclass
class RoundAtHand:
    """Who was asked in the round (asynchronous: or was at work), and who of them has returned;
    needed: updates."""

    round: int = 0
    asked: set[str] = field(default_factory=set)
    returned: set[str] = field(default_factory=set)
    needed: int = 0


def cohort_state(
    counters: Counters,
    sessions: Mapping[str, Session],
    jobs: Jobs,
    at_hand: RoundAtHand,
    *,
    budget_bytes: int,
    spool_bytes: int,
    strangers: int,
    links: LinkCounts,
    unfit: tuple[UnfitDevice, ...],
    now: float,
) -> CohortState:
    """The state as the status page tells it. sessions: of the clients that are connected."""
    open_jobs = jobs.open
    clients = []
    for name, counts in sorted(counters.clients.items()):
        session, open_job = sessions.get(name), open_jobs.get(name)
        phase = client_phase(session, open_job, jobs.budget.held(name))
        clients.append(_client_state(name, phase, counts, session, open_job, now))
    return CohortState(
        clients=tuple(clients),
        chosen=len(at_hand.asked),
        needed=at_hand.needed,
        returned=len(at_hand.returned),
        bytes_in_flight=jobs.budget.bytes_under_way,
        budget_bytes=budget_bytes,
        spool_bytes=spool_bytes,
        bytes_down=counters.bytes_down
        + sum(open_job.bytes_down for open_job in open_jobs.values()),
        bytes_up=counters.bytes_up + sum(open_job.bytes_up for open_job in open_jobs.values()),
        updates_accepted=counters.updates["accepted"],
        updates_late=counters.updates["late"],
        updates_stale=counters.updates["stale"],
        updates_failed=counters.updates["failed"],
        faults=dict(counters.faults),
        strangers=strangers,
        links=links,
        unfit=unfit,
    )


def client_phase(
    session: Session | None, open_job: OpenJob | None, parts_under_way: int
) -> ClientPhase:
    """What the status page says of a client. session: None for one that is away. open_job: the job
    that it has in hand, if any."""
    if session is None:
        return "away"
    if session.rival is not None:
        return "duplicate"
    if open_job is None:
        if session.ready is None:
            return "connected"
        return "ready" if session.ready.exit else "resting"
    match open_job.phase:
        case JobPhase.LATE | JobPhase.LATE_LOST:
            return "late"
        case JobPhase.UPLOAD:
            return "upload" if parts_under_way else "queued"
        case JobPhase.TRAIN:
            return "train"
        case _:
            return "download"


def folder_bytes(folder: Path) -> int:
    """Bytes of the files in it, but for those that vanish meanwhile."""
    total = 0
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(OSError):
                total += entry.stat().st_size
    return total


def _client_state(
    name: str,
    phase: ClientPhase,
    counts: ClientCounts,
    session: Session | None,
    open_job: OpenJob | None,
    now: float,
) -> ClientState:
    ready = session.ready if session else None
    return ClientState(
        name=name,
        phase=phase,
        address=counts.address,
        platform=counts.platform,
        exit=ready.exit if ready else 0,
        variant=ready.variant if ready else 0,
        round=open_job.round if open_job else 0,
        bytes_down=counts.bytes_down + (open_job.bytes_down if open_job else 0),
        bytes_up=counts.bytes_up + (open_job.bytes_up if open_job else 0),
        last_seen_s=max(0.0, now - (session.seen if session else counts.seen)),
        updates=counts.updates,
        exits=counts.exits,
        faults=dict(counts.faults),
        failure=counts.failure,
        duplicates=counts.duplicates,
    )
