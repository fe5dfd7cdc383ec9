"""How many updates a round needs, by hand: the quorum's share, and min_updates of them."""

from __future__ import annotations

import pytest

from coordinator.cohorts.quorum import clients_needed, updates_needed
from tests.support.examples import config

PARTICIPANTS = (0, 1, 2, 4, 6, 9)


@pytest.mark.parametrize(
    ("quorum", "min_updates", "needed"),
    [
        (0.5, 3, (1, 1, 2, 3, 3, 5)),  # of 9: 4.5 are 5; of 4: 2, but 3 at least; of 2: both
        (0.0, 1, (1, 1, 1, 1, 1, 1)),  # an update is needed in any case
        (1.0, 1, (1, 1, 2, 4, 6, 9)),
        (0.25, 5, (1, 1, 2, 4, 5, 5)),
    ],
)
def test_updates_that_a_round_needs(quorum, min_updates, needed):
    settings = config("owners-mean", quorum=quorum, min_updates=min_updates)
    assert tuple(updates_needed(settings, n) for n in PARTICIPANTS) == needed


@pytest.mark.parametrize(
    ("quorum", "min_clients", "needed"), [(0.5, 5, 3), (0.0, 5, 1), (1.0, 4, 4), (0.3, 1, 1)]
)
def test_clients_that_a_round_begins_with(quorum, min_clients, needed):
    settings = config("owners-mean", quorum=quorum, min_clients=min_clients)
    assert clients_needed(settings) == needed
