"""Late updates, numbers by hand."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from coordinator.aggregation.staleness import rebase_late_updates
from coordinator.cohorts.base import ClientUpdate
from coordinator.config import RunConfig
from edge_sdk.protocol.messages import Segment
from tests.support.examples import client, client_update, config

CURRENT = {
    "w": torch.tensor([10.0, 20.0]),
    "mean": torch.tensor([4.0]),
    "count": torch.tensor(7),
}
SENT = {"w": torch.tensor([1.0, 2.0]), "mean": torch.tensor([0.0]), "count": torch.tensor(3)}
RETURNED = {"w": torch.tensor([5.0, 0.0]), "mean": torch.tensor([8.0]), "count": torch.tensor(5)}
PARAMETERS = {"w"}


def update(staleness: int) -> ClientUpdate:
    return client_update(
        client("a", 1),
        dict(RETURNED),
        (Segment(first=1, last=1),),
        num_examples=10,
        round=3,
        staleness=staleness,
        sent=dict(SENT),
        digest="d" * 32,
    )


def forward(staleness: int, half_life: float) -> ClientUpdate:
    (found,) = rebase_late_updates([update(staleness)], CURRENT, PARAMETERS, half_life)
    return found


def test_update_of_the_round_at_hand_stays_as_it_is():
    before = update(0)
    (found,) = rebase_late_updates([before], CURRENT, PARAMETERS, 2.0)
    assert found is before


@pytest.mark.parametrize(
    ("staleness", "half_life", "share"),
    [(2, 2.0, 0.5), (4, 2.0, 0.25), (1, 1.0, 0.5), (3, 1.0, 0.125), (1, 2.0, 0.5**0.5)],
)
def test_movement_counts_half_after_the_half_life(staleness, half_life, share):
    found = forward(staleness, half_life)
    # it moved (5 - 1, 0 - 2) = (4, -2); from (10, 20) that is (10 + 4 share, 20 - 2 share)
    assert found.tensors["w"].tolist() == pytest.approx([10 + 4 * share, 20 - 2 * share])
    # statistics: from 4 that share of the way to 8
    assert found.tensors["mean"].tolist() == pytest.approx([4 + 4 * share])
    assert found.tensors["count"].item() == 5  # a counter, as it came
    assert (found.num_examples, found.round, found.staleness) == (10, 3, staleness)
    assert found.message.digest == "d" * 32


def test_nothing_that_came_in_is_changed():
    kept = [{k: v.clone() for k, v in tensors.items()} for tensors in (CURRENT, SENT, RETURNED)]
    forward(2, 2.0)
    for tensors, copies in zip((CURRENT, SENT, RETURNED), kept, strict=True):
        assert all(torch.equal(tensors[name], copies[name]) for name in copies)


def test_only_one_update_is_alive_at_a_time():
    alive: list[weakref.ref[torch.Tensor]] = []

    def source():
        for staleness in (1, 0, 2):
            gc.collect()
            assert not [ref for ref in alive if ref() is not None]
            late = update(staleness)
            late.tensors["w"] = torch.zeros(2)
            alive.append(weakref.ref(late.tensors["w"]))
            yield late
            del late

    for found in rebase_late_updates(source(), CURRENT, PARAMETERS, 2.0):
        assert found.tensors["w"].shape == (2,)
        del found


@pytest.mark.parametrize(
    ("changes", "oldest"),
    [
        ({}, 8),  # 0.5^(8 / 2) is a sixteenth
        ({"staleness_half_life": 0.6}, 3),  # 2.4, rounded up
        ({"late": "drop"}, 0),
        ({"late": "drop", "mode": "async"}, 8),  # whose rounds have late ones always
    ],
)
def test_oldest_update_that_counts(changes, oldest):
    settings: RunConfig = config("owners-mean", **changes)
    assert settings.oldest == oldest


def test_what_is_no_tensor_of_the_model_comes_with_what_was_sent():
    """A vector (1, 2) that came back as (5, 0), half: (1 + 2, 2 - 1). A correction is what the
    client's own moved by, so it counts whole. The model's own need no `sent` any more."""
    late = client_update(
        client("a", 1),
        dict(RETURNED) | {"flat/all": RETURNED["w"], "correction/w": torch.tensor([6.0])},
        (Segment(first=1, last=1),),
        staleness=2,
        sent=dict(SENT) | {"flat/all": SENT["w"]},
    )
    (found,) = rebase_late_updates([late], CURRENT, PARAMETERS, 2.0)
    assert found.tensors["flat/all"].tolist() == [3.0, 1.0]
    assert found.tensors["correction/w"].tolist() == [6.0]
    assert {name: t.tolist() for name, t in found.sent.items()} == {"flat/all": [1.0, 2.0]}
    assert found.tensors["w"].tolist() == [12.0, 19.0]


@pytest.mark.parametrize(
    "part",
    [
        {"w": torch.tensor([5.0])},
        {"mask/w": torch.tensor([1], dtype=torch.uint8), "packed/w": torch.tensor([5.0])},
    ],
    ids=["narrow", "masked"],
)
def test_parts_of_tensors_are_left_to_their_method(part):
    late = client_update(
        client("a", 1), part, (Segment(first=1, last=1),), staleness=2, sent=dict(part)
    )
    (found,) = rebase_late_updates([late], CURRENT, PARAMETERS, 2.0)
    assert found is late
