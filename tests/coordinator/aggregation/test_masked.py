"""Updates of a weight of six entries, of which the job's mask keeps 0, 2, 3 and 5."""

from __future__ import annotations

import pytest
import torch

from coordinator.aggregation.border import Border
from coordinator.cohorts.base import Client
from edge_sdk.errors import UpdateError
from edge_sdk.models.masks import packed
from edge_sdk.models.staged import StagedModel
from edge_sdk.protocol.messages import Segment
from tests.support.examples import client_update

NAME = "stages.0.weight"
WEIGHT = torch.tensor([[1.0, 0.0, 2.0], [2.0, 0.0, 4.0]])
MASK = torch.tensor([[True, False, True], [True, False, True]])
SENT = packed({NAME: WEIGHT}, {NAME: MASK})  # values 1, 2, 2, 4: of norm 5


def border():
    return Border(
        StagedModel([torch.nn.Linear(3, 2, bias=False)], [torch.nn.Flatten()]),
        10.0,
        epochs=1,
        seed=0,
    )


def returned(bits, values):
    tensors = {
        f"mask/{NAME}": torch.tensor([bits], dtype=torch.uint8),
        f"packed/{NAME}": torch.tensor(values),
    }
    return client_update(Client(id="a", exit=1), tensors, (Segment(first=1, last=1),), round=1)


def test_movement_is_that_of_the_entries_that_are_kept():
    """Entries 2 and 5 stay: 2 and 4 became 5 and 8, a movement of 5; from zero it would be
    sqrt(89)."""
    guard = border()
    list(guard.screened(1, [returned(0b100100, [5.0, 8.0])], {"a": SENT}, ()))
    assert guard.memory.medians() == {(0, 0): pytest.approx(5.0)}


def test_mask_and_values_as_they_were_sent_count():
    border().check(returned(0b101101, [1.0, 2.0, 2.0, 4.0]), SENT)


@pytest.mark.parametrize(
    ("bits", "values", "said"),
    [
        (0b101111, [0.0] * 5, "keeps 1 entries that its job's did not; a mask "),
        (0b010010, [0.0] * 2, "keeps 2 entries"),
        (0b11101101, [0.0] * 6, "keeps 2 entries"),  # behind the last one
        (0b100101, [0.0] * 4, r"\(4,\) values under 3 bits"),
        (0b100101, [0.0] * 2, r"\(2,\) values under 3 bits"),
        (0b100101, [[0.0] * 3], r"\(1, 3\) values under 3 bits"),
    ],
)
def test_a_mask_that_grows_or_does_not_fit_its_values_is_refused(bits, values, said):
    with pytest.raises(UpdateError, match=said) as refused:
        border().check(returned(bits, values), SENT)
    assert str(refused.value).startswith("update from a, round 1: ")


@pytest.mark.parametrize("lacking", ["returned", "sent", "longer"])
def test_values_without_the_mask_of_their_job_are_refused(lacking):
    update, sent = returned(0b100101, [0.0] * 3), dict(SENT)
    if lacking == "returned":
        del update.tensors[f"mask/{NAME}"]
    elif lacking == "sent":
        del sent[f"mask/{NAME}"]
    else:
        update.tensors[f"mask/{NAME}"] = torch.tensor([0b100101, 0], dtype=torch.uint8)
    with pytest.raises(UpdateError, match="without the mask that its job had"):
        border().check(update, sent)
