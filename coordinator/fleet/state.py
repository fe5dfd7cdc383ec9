"""The state of a cohort of real devices, read off its links, its desk and its tally."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from coordinator.fleet.counters import Counts, Tally
from coordinator.fleet.jobs import Desk
from coordinator.fleet.open_job import Seat
from coordinator.fleet.sessions import Device
from coordinator.store.status import ClientPhase, ClientState, CohortState


def cohort_state(
    tally: Tally,
    devices: Mapping[str, Device],
    desk: Desk,
    *,
    chosen: int,
    needed: int,
    returned: int,
    budget_bytes: int,
    spool_bytes: int,
    strangers: int,
    now: float,
) -> CohortState:
    """devices: that are connected. chosen, needed, returned: of the round, see CohortState."""
    seats = desk.seats
    clients = []
    for name, counts in sorted(tally.clients.items()):
        device, seat = devices.get(name), seats.get(name)
        phase = client_phase(device, seat, desk.credit.held(name))
        clients.append(_client_state(name, phase, counts, device, seat, now))
    return CohortState(
        clients=tuple(clients),
        chosen=chosen,
        needed=needed,
        returned=returned,
        bytes_in_flight=desk.credit.bytes_under_way,
        budget_bytes=budget_bytes,
        spool_bytes=spool_bytes,
        bytes_down=tally.bytes_down + sum(seat.bytes_down for seat in seats.values()),
        bytes_up=tally.bytes_up + sum(seat.bytes_up for seat in seats.values()),
        updates_accepted=tally.updates["accepted"],
        updates_late=tally.updates["late"],
        updates_stale=tally.updates["stale"],
        updates_failed=tally.updates["failed"],
        faults=dict(tally.faults),
        strangers=strangers,
    )


def client_phase(device: Device | None, seat: Seat | None, parts_under_way: int) -> ClientPhase:
    """device: None for one that is away. seat: of the job that it has in hand, if it has one."""
    if device is None:
        return "away"
    if device.rival is not None:
        return "duplicate"
    if seat is not None:
        if seat.is_late:
            return "late"
        if seat.update is not None:
            return "upload" if parts_under_way else "queued"
        return "train" if seat.phase == "train" else "download"
    if device.ready is None:
        return "connected"
    return "ready" if device.ready.exit else "resting"


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
    counts: Counts,
    device: Device | None,
    seat: Seat | None,
    now: float,
) -> ClientState:
    ready = device.ready if device else None
    return ClientState(
        name=name,
        phase=phase,
        address=counts.address,
        platform=counts.platform,
        exit=ready.exit if ready else 0,
        round=seat.round if seat else 0,
        bytes_down=counts.bytes_down + (seat.bytes_down if seat else 0),
        bytes_up=counts.bytes_up + (seat.bytes_up if seat else 0),
        last_seen_s=max(0.0, now - (device.seen if device else counts.seen)),
        updates=counts.updates,
        faults=dict(counts.faults),
        duplicates=counts.duplicates,
    )
