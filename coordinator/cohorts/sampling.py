"""Who takes part in a round, and the seed of each job: functions of (seed, round, client), so a
resumed run repeats them. Who is asked when a round is tried again also depends on who failed."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence

from coordinator.cohorts.base import Client


def job_seed(seed: int, round: int, client_id: str) -> int:
    """A seed in [0, 2**62) for one client's job."""
    digest = hashlib.sha256(f"{seed}/{round}/{client_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2


def sample(
    clients: Sequence[Client],
    count: int | None,
    *,
    seed: int,
    round: int,
    failed: Collection[str] = (),
) -> list[Client]:
    """`count` clients, spread over the groups (deepest exit, or variant) in proportion to their
    sizes.

    Systematic sampling: groups lie end to end on a line of `count` places, and a draw shifts where
    the places fall, so a group's expected places are its exact share, however small. Within a group
    the places go to the smallest draws of (seed, round, client): an absent client changes its own
    place only. None or a count of at least all clients: everybody. `failed`: who returned nothing
    when this round was tried before; they get the places that the others leave. Sorted by id;
    independent of the order of `clients`."""
    places = len(clients) if count is None else count
    others = [client for client in clients if client.id not in failed]
    again = [client for client in clients if client.id in failed]
    chosen = _spread(others, places, seed, round)
    chosen += _spread(again, places - len(chosen), seed, round)
    return sorted(chosen, key=lambda client: client.id)


def _spread(clients: Sequence[Client], count: int, seed: int, round: int) -> list[Client]:
    if count >= len(clients):
        return list(clients)
    groups: dict[tuple[int, int], list[Client]] = {}
    for client in clients:
        groups.setdefault((client.variant, client.exit), []).append(client)
    shift = job_seed(seed, round, "groups") / 2**62
    chosen: list[Client] = []
    seen = 0
    for _, group in sorted(groups.items()):
        before, seen = seen, seen + len(group)
        places = int(count * seen / len(clients) + shift) - int(
            count * before / len(clients) + shift
        )
        drawn = sorted(group, key=lambda client: job_seed(seed, round, f"sample/{client.id}"))
        chosen += drawn[:places]
    return chosen
