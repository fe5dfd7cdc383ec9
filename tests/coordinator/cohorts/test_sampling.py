"""Who is drawn for a round: groups by their share, everybody in turn, those that failed last."""

from __future__ import annotations

from collections import Counter

import pytest

from coordinator.cohorts.sampling import job_seed, sample
from tests.support.examples import client

CLIENTS = [client(f"c{i:02d}", 1 + (i >= 17) + (i >= 34)) for i in range(50)]  # 17, 17, 16


def test_sample_spreads_over_groups():
    # 10 of 50: 3.4 + 3.4 + 3.2 places, so 3 or 4 each
    total = Counter()
    for round in range(1, 201):
        groups = Counter(c.exit for c in sample(CLIENTS, 10, seed=0, round=round))
        assert sum(groups.values()) == 10
        assert set(groups.values()) <= {3, 4}
        total += groups
    for exit, share in ((1, 3.4), (2, 3.4), (3, 3.2)):
        assert total[exit] / 200 == pytest.approx(share, abs=0.1)


def test_small_groups_get_their_share():
    # 1 of 12 clients has exit 3; of 3 places it gets 3 / 12 on average, not none for ever
    clients = [client(f"c{i:02d}", 1 + (i >= 9) + (i >= 11)) for i in range(12)]
    drawn = sum(c.exit == 3 for r in range(400) for c in sample(clients, 3, seed=1, round=r))
    assert drawn / 400 == pytest.approx(0.25, abs=0.06)


def test_an_absent_client_changes_its_own_place_only():
    full = sample(CLIENTS, 10, seed=0, round=3)
    missing = full[0]
    rest = sample([c for c in CLIENTS if c != missing], 10, seed=0, round=3)
    assert len({c.id for c in rest} & {c.id for c in full}) >= 8


def test_sample_is_a_function_of_seed_and_round():
    one = sample(CLIENTS, 10, seed=1, round=5)
    assert one == sample(list(reversed(CLIENTS)), 10, seed=1, round=5)
    assert one != sample(CLIENTS, 10, seed=1, round=6)
    assert one != sample(CLIENTS, 10, seed=2, round=5)


def test_everybody_gets_a_turn():
    seen = Counter(c.id for r in range(1, 101) for c in sample(CLIENTS, 10, seed=0, round=r))
    assert len(seen) == 50
    assert max(seen.values()) < 45  # 20 expected


def test_sample_of_none_or_too_many_is_everybody():
    assert len(sample(CLIENTS, None, seed=0, round=1)) == 50
    assert len(sample(CLIENTS, 80, seed=0, round=1)) == 50


def test_those_that_failed_get_the_places_that_others_leave():
    first = {c.id for c in sample(CLIENTS, 10, seed=0, round=1)}
    others = [c for c in CLIENTS if c.id not in first]
    again = sample(CLIENTS, 10, seed=0, round=1, failed=first)
    assert again == sample(others, 10, seed=0, round=1)
    assert len(again) == 10
    # 3 have not failed: the other 7 places are drawn from the 47 that have
    left = {c.id for c in CLIENTS[::20]}
    failed = {c.id for c in CLIENTS} - left
    filled = {c.id for c in sample(CLIENTS, 10, seed=0, round=1, failed=failed)}
    assert len(filled) == 10
    assert left < filled
    for count in (None, 80):
        assert len(sample(CLIENTS, count, seed=0, round=1, failed=failed)) == 50


def test_job_seed_depends_on_every_part():
    seeds = {job_seed(s, r, c) for s in (0, 1) for r in (1, 2) for c in ("a", "b")}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**62 for seed in seeds)
