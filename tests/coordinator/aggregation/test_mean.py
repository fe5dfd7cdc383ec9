"""The aggregation kernel, the server's step, sampling."""

from __future__ import annotations

import pytest
import torch

from coordinator.aggregation.mean import OwnersMean
from edge_sdk.errors import ShapeError
from tests.support.examples import scalars


def test_mean_over_owners_with_weights():
    # a: (1*10 + 3*30) / 4 = 25; b has one owner: 7; c has none: stays
    mean = OwnersMean()
    mean.add_(scalars(a=10.0), 1)
    mean.add_(scalars(a=30.0, b=7.0), 3)
    result = mean.result(scalars(a=0.0, b=0.0, c=5.0))
    assert {name: t.item() for name, t in result.items()} == {"a": 25.0, "b": 7.0, "c": 5.0}


def test_identical_contributions_come_out_bit_by_bit():
    tensor = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    mean = OwnersMean()
    for weight in (3, 7, 1, 11, 0.1):
        mean.add_({"w": tensor}, weight)
    assert torch.equal(mean.result({"w": tensor})["w"], tensor)


def test_integers_take_the_largest_and_halves_are_summed_wide():
    mean = OwnersMean()
    mean.add_({"n": torch.tensor(3), "h": torch.tensor([2048.0]).half()}, 1)
    mean.add_({"n": torch.tensor(9), "h": torch.tensor([2050.0]).half()}, 1)
    result = mean.result({"n": torch.tensor(0), "h": torch.zeros(1).half()})
    assert result["n"].item() == 9
    assert result["h"].dtype == torch.float16
    assert mean._means["h"].item() == 2049.0  # not a float16 number


def test_contributions_are_not_changed_and_may_be_freed():
    tensor = torch.ones(3)
    mean = OwnersMean()
    mean.add_({"w": tensor}, 1)
    mean.add_({"w": torch.zeros(3)}, 1)
    assert tensor.tolist() == [1, 1, 1]


def test_zero_weight_changes_nothing_negative_is_refused():
    mean = OwnersMean()
    mean.add_(scalars(a=4.0), 0)
    assert mean.result(scalars(a=1.0))["a"].item() == 1.0
    with pytest.raises(ValueError, match="negative"):
        mean.add_(scalars(a=4.0), -1)


def test_other_shape_is_refused():
    mean = OwnersMean()
    mean.add_({"w": torch.zeros(2)}, 1)
    with pytest.raises(ShapeError, match="w is"):
        mean.add_({"w": torch.zeros(3)}, 1)
