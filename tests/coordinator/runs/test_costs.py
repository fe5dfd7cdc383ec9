"""What clients of an emulation take, against the costs that a device counts."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from coordinator.cohorts.base import Client, Offer
from coordinator.methods.base import Metrics
from coordinator.runs.costs import BOARD, client_costs
from coordinator.store.store import Store
from edge_sdk.capacity.costs import peak_bytes
from edge_sdk.capacity.counting import each_variant_cost, segment_costs
from edge_sdk.hardware.boards import board
from edge_sdk.protocol.messages import Plan, Segment
from tests.support.examples import client, client_update, cnn, config

PREFIX, WHOLE, LAST = Segment(first=1, last=1), Segment(first=1, last=3), Segment(first=3, last=3)
PLAN = Plan(segments=(WHOLE,), batch_size=4)


def costs_of(folder, offer, *updates):
    store = Store.create(folder, config("owners-mean", epochs=2), "emulate")
    store.record_clients(update.client for update in updates)
    list(store.record_results(1, updates))
    store.commit(1, Metrics(), {}, "2026-01-01T00:00:00+00:00", 1.0)
    try:
        return client_costs(store, offer, {"a": 1, "b": 3})
    finally:
        store.close()


def test_of_prefixes_and_of_a_stage_alone(tmp_path):
    """Client a trains stage 1 and, alone, stage 3 with 10 examples, b all stages with 20."""
    rounds, groups = costs_of(
        tmp_path,
        Offer(cnn(), PLAN),
        client_update(client("a", 1), {}, (PREFIX, LAST), num_examples=10, bytes_up=1_000_000),
        client_update(client("b", 3), {}, (WHOLE,), num_examples=20),
    )
    cost = {(c.first, c.last): c for c in segment_costs(cnn(), PLAN, 15, 0)}
    first, alone, whole = cost[1, 1], cost[3, 3], cost[1, 3]
    of_a = 10 * (2 * first.flops_per_example + 2 * alone.flops_per_example)
    of_a += 10 * alone.frozen_flops_per_example
    of_b = 20 * 2 * whole.flops_per_example
    pi = board(BOARD)
    assert rounds[1]["stages_trained"] == 2 * (10 * 2 + 20 * 3)
    assert rounds[1]["operations"] == pytest.approx(of_a + of_b)
    slowest_s = max(
        of_a / (pi.gflops * 1e9) + 8e6 / (pi.link_mbit_s * 1e6), of_b / (pi.gflops * 1e9)
    )
    assert rounds[1]["emulated_s"] == pytest.approx(slowest_s)
    assert rounds[1]["peak_memory_bytes"] == groups["exit 1"]["peak_memory_bytes"]
    assert groups["exit 1"]["peak_memory_bytes"] >= peak_bytes(alone)
    assert groups["exit 3"] == {
        "clients": 1,
        "variant": 0,
        "peak_memory_bytes": peak_bytes(whole),
    }


def test_of_variants_each_by_its_own_model(tmp_path):
    offer = Offer(cnn(), PLAN, (replace(cnn(), width=0.25), cnn()))
    narrow, whole = each_variant_cost(offer.variants, PLAN, 10, 0)
    told = {"num_examples": 10}
    _, groups = costs_of(
        tmp_path,
        offer,
        client_update(Client(id="a", exit=3, variant=1), {}, (WHOLE,), **told),
        client_update(Client(id="b", exit=3, variant=2), {}, (WHOLE,), **told),
    )
    assert peak_bytes(narrow) < peak_bytes(whole)
    assert [(g["variant"], g["peak_memory_bytes"]) for g in groups.values()] == [
        (1, peak_bytes(narrow)),
        (2, peak_bytes(whole)),
    ]


def test_a_run_of_which_nothing_counted_has_none(tmp_path):
    store = Store.create(tmp_path, config("owners-mean"), "emulate")
    assert client_costs(store, Offer(cnn(), PLAN), {"a": 1}) == ({}, {})
    store.close()


def test_a_group_that_takes_no_part_is_told(tmp_path):
    """As where no variant fits its memory."""
    of_b = client_update(client("b", 3), {}, (WHOLE,), num_examples=10)
    rounds, groups = costs_of(tmp_path, Offer(cnn(), PLAN), of_b)
    assert groups["exit 1"] == {"clients": 0, "variant": 0, "peak_memory_bytes": None}
    assert rounds[1]["peak_memory_bytes"] == groups["exit 3"]["peak_memory_bytes"]
