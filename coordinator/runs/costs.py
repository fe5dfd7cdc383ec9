"""What clients of an emulation take: counted and predicted as for a device (capacity/), because the
one process that emulates all of them says nothing of one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec.structs import replace

from coordinator.cohorts.base import Offer
from coordinator.store.reader import ClientRow, client_rows
from coordinator.store.store import Store
from edge_sdk.capacity.costs import SegmentCost, in_model, peak_bytes, seconds
from edge_sdk.capacity.counting import each_variant_cost, segment_costs
from edge_sdk.hardware.boards import board
from edge_sdk.hardware.measure import emulated
from edge_sdk.hardware.speed import torch_threads
from edge_sdk.protocol.messages import DeviceProfile

BOARD = "raspberry-pi-4"  # whose compute and link emulated seconds are of, for every client alike


def client_costs(
    store: Store, offer: Offer, exits: Mapping[str, int]
) -> tuple[dict[int, dict[str, float]], dict[str, Any]]:
    """By round, and by group of clients ("exit 1", ...). offer: of the run's method. exits: of each
    client the exit that tells its group, whatever model it trains; of others that of their model.

    Of a round: `stages_trained`, the sum over participants of examples x stages x epochs;
    `operations`, of their training in all; `emulated_s`, what the slowest takes on BOARD for its
    training and what it was sent and sent back; `peak_memory_bytes`, the largest of the shallowest
    group. Of a group: clients that took part, the variant that they trained (0: none), and their
    largest peak, None of nobody. Peaks leave runtime and data out."""
    rows = [row for row in client_rows(store.folder) if row.outcome == "ok"]
    if not rows:
        return {}, {}
    epochs, profile = store.config.epochs, emulated(board(BOARD), 0.0)
    numbers = {name: client.variant for name, client in store.client_models().items()}
    found = _costs(offer, max(2, sum(row.num_examples for row in rows) // len(rows)))
    exits = {row.client_id: row.exit for row in rows} | dict(exits)
    shallowest = min(exits[row.client_id] for row in rows)
    rounds: dict[int, dict[str, float]] = {}
    groups: dict[int, dict[str, Any]] = {}
    for row in rows:
        number = numbers[row.client_id] if offer.variants else 0
        costs = [found[number, segment] for segment in row.segments.split(",")]
        deepest = max(costs, key=lambda cost: cost.last)
        peak = max(peak_bytes(in_model(cost, deepest)) for cost in costs)
        entry = rounds.setdefault(
            row.round,
            {"stages_trained": 0, "operations": 0.0, "emulated_s": 0.0, "peak_memory_bytes": 0},
        )
        entry["stages_trained"] += (
            sum(row.num_examples * (c.last - c.first + 1) for c in costs) * epochs
        )
        entry["operations"] += row.num_examples * sum(
            epochs * c.flops_per_example + c.frozen_flops_per_example for c in costs
        )
        entry["emulated_s"] = max(entry["emulated_s"], _seconds(costs, row, epochs, profile))
        if exits[row.client_id] == shallowest:
            entry["peak_memory_bytes"] = max(entry["peak_memory_bytes"], peak)
        group = groups.setdefault(
            exits[row.client_id], {"clients": set(), "variants": set(), "peak_memory_bytes": 0}
        )
        group["clients"].add(row.client_id)
        group["variants"].add(number)
        group["peak_memory_bytes"] = max(group["peak_memory_bytes"], peak)
    nobody: dict[str, Any] = {"clients": (), "variants": (0,), "peak_memory_bytes": None}
    every = sorted(set(exits.values()))
    return rounds, {f"exit {exit}": _told(groups.get(exit, nobody)) for exit in every}


def _costs(offer: Offer, num_examples: int) -> Mapping[tuple[int, str], SegmentCost]:
    """By the number of the variant (0 without variants) and the segment, as "1-3"."""
    if not offer.variants:
        costs = segment_costs(offer.model, offer.plan, num_examples, 0)
        return {(0, f"{cost.first}-{cost.last}"): cost for cost in costs}
    with torch_threads(1):
        made = list(each_variant_cost(offer.variants, offer.plan, num_examples, 0))
    return {(n, f"{cost.first}-{cost.last}"): cost for n, cost in enumerate(made, 1)}


def _seconds(
    costs: list[SegmentCost], row: ClientRow, epochs: int, profile: DeviceProfile
) -> float:
    """Of a participant's job, by what really travelled."""
    told = [replace(cost, upload_bytes=0, download_bytes=0) for cost in costs]
    told[0] = replace(told[0], upload_bytes=row.bytes_up, download_bytes=row.bytes_down)
    return sum(seconds(cost, profile, row.num_examples, epochs) for cost in told)


def _told(group: Mapping[str, Any]) -> dict[str, Any]:
    variants = sorted(group["variants"])
    return {
        "clients": len(group["clients"]),
        "variant": variants[0] if len(variants) == 1 else variants,
        "peak_memory_bytes": group["peak_memory_bytes"],
    }
