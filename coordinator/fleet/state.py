"""The state of a cohort of real devices, read off its links, its open jobs and its counters."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from coordinator.fleet.counters import ClientCounts, Counters
from coordinator.fleet.jobs import Jobs
from coordinator.fleet.open_job import OpenJob
from coordinator.fleet.sessions import Session
from coordinator.store.status import ClientPhase, ClientState, CohortState


def cohort_state(
    counters: Counters,
    sessions: Mapping[str, Session],
    jobs: Jobs,
    *,
    chosen: int,
    needed: int,
    returned: int,
    budget_bytes: int,
    spool_bytes: int,
    pending: int,
    now: float,
) -> CohortState:
    """devices: that are connected. chosen, needed, returned: of the round, see CohortState."""
    open_jobs = jobs.open
    clients = []
    for name, counts in sorted(counters.clients.items()):
        session, open_job = sessions.get(name), open_jobs.get(name)
        phase = client_phase(session, open_job, jobs.budget.held(name))
        clients.append(_client_state(name, phase, counts, session, open_job, now))
    return CohortState(
        clients=tuple(clients),
        chosen=chosen,
        needed=needed,
        returned=returned,
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
        strangers=pending,
    )


def client_phase(
    session: Session | None, open_job: OpenJob | None, parts_under_way: int
) -> ClientPhase:
    """session: None for one that is away. open_job: what it has in hand, if anything."""
    if session is None:
        return "away"
    if session.rival is not None:
        return "duplicate"
    if open_job is not None:
        if open_job.is_late:
            return "late"
        if open_job.update is not None:
            return "upload" if parts_under_way else "queued"
        return "train" if open_job.phase == "train" else "download"
    if session.ready is None:
        return "connected"
    return "ready" if session.ready.exit else "resting"


def folder_bytes(folder: Path) -> int:
    """Of its files, those that vanish meanwhile left out."""
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
        round=open_job.round if open_job else 0,
        bytes_down=counts.bytes_down + (open_job.bytes_down if open_job else 0),
        bytes_up=counts.bytes_up + (open_job.bytes_up if open_job else 0),
        last_seen_s=max(0.0, now - (session.seen if session else counts.seen)),
        updates=counts.updates,
        faults=dict(counts.faults),
        duplicates=counts.duplicates,
    )
