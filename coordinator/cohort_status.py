"""The state of a cohort of real devices, read off its links, its round's seats and its tally."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from coordinator.seats import Seat
from coordinator.status import ClientPhase, ClientState, CohortState
from coordinator.tally import Counts, Tally
from edge_sdk.wire import Ready


class Live(Protocol):
    """One client's live link. ready: None while it has not said what it can train."""

    ready: Ready | None
    seen: float  # as time.monotonic() says


def cohort_state(
    tally: Tally,
    live: Mapping[str, Live],
    seats: Mapping[str, Seat],
    *,
    round: int,
    needed: int,
    budget_bytes: int,
    strangers: int,
    now: float,
) -> CohortState:
    """seats: of the round in progress, of every participant; none between rounds."""
    waited_for = {name: seat for name, seat in seats.items() if not seat.outcome}
    clients = tuple(
        _client_state(name, counts, live.get(name), waited_for.get(name), round, now)
        for name, counts in sorted(tally.clients.items())
    )
    return CohortState(
        clients=clients,
        chosen=len(seats),
        needed=needed,
        returned=sum(seat.outcome == "ok" for seat in seats.values()),
        bytes_in_flight=sum(s.receiver.total_bytes for s in waited_for.values() if s.receiver),
        budget_bytes=budget_bytes,
        bytes_down=tally.bytes_down + sum(seat.bytes_down for seat in waited_for.values()),
        bytes_up=tally.bytes_up + sum(seat.bytes_up for seat in waited_for.values()),
        updates_accepted=tally.updates["accepted"],
        updates_late=tally.updates["late"],
        updates_failed=tally.updates["failed"],
        faults=dict(tally.faults),
        strangers=strangers,
    )


def client_phase(link: Live | None, seat: Seat | None) -> ClientPhase:
    """link: None for one that is away. seat: its own that is waited for, if it has one."""
    if link is None:
        return "away"
    if seat is not None:
        if seat.receiver is not None:
            return "upload"
        if seat.update is not None:
            return "queued"
        return "train" if seat.bytes_down >= seat.sender.total_bytes else "download"
    if link.ready is None:
        return "connected"
    return "ready" if link.ready.exit else "resting"


def _client_state(
    name: str, counts: Counts, link: Live | None, seat: Seat | None, round: int, now: float
) -> ClientState:
    ready = link.ready if link else None
    return ClientState(
        name=name,
        phase=client_phase(link, seat),
        address=counts.address,
        platform=counts.platform,
        exit=ready.exit if ready else 0,
        round=round if seat else 0,
        bytes_down=counts.bytes_down + (seat.bytes_down if seat else 0),
        bytes_up=counts.bytes_up + (seat.bytes_up if seat else 0),
        last_seen_s=max(0.0, now - (link.seen if link else counts.seen)),
        updates=counts.updates,
        faults=dict(counts.faults),
        duplicates=counts.duplicates,
    )
