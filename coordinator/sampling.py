"""Who takes part in a round, and the seed of each job: functions of (seed, round, client), so a
resumed run repeats them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from coordinator.cohort import Client


def job_seed(seed: int, round: int, client_id: str) -> int:
    """A seed in [0, 2**62) for one client's job."""
    digest = hashlib.sha256(f"{seed}/{round}/{client_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2


def sample(clients: Sequence[Client], count: int | None, *, seed: int, round: int) -> list[Client]:
    """`count` clients, spread over the groups (deepest exit) in proportion to their sizes.

    Seats left by rounding down go to the largest remainders, ties by lot. None or a count of at
    least all clients: everybody. Sorted by id; independent of the order of `clients`."""
    ordered = sorted(clients, key=lambda client: client.id)
    if count is None or count >= len(ordered):
        return ordered
    rng = np.random.default_rng([seed, round, 0x5A11])
    groups: dict[int, list[Client]] = {}
    for client in ordered:
        groups.setdefault(client.exit, []).append(client)
    exact = {exit: count * len(group) / len(ordered) for exit, group in sorted(groups.items())}
    seats = {exit: int(share) for exit, share in exact.items()}
    lot = {exit: rng.random() for exit in exact}
    by_remainder = sorted(exact, key=lambda exit: (seats[exit] - exact[exit], lot[exit]))
    for exit in by_remainder[: count - sum(seats.values())]:
        seats[exit] += 1
    chosen: list[Client] = []
    for exit, group in sorted(groups.items()):
        picks = rng.choice(len(group), size=seats[exit], replace=False)
        chosen += [group[i] for i in sorted(picks)]
    return sorted(chosen, key=lambda client: client.id)
