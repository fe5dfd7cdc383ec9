"""What every aggregation rule must do, its kernel alone; test_methods.py runs each in a method."""

from __future__ import annotations

import pytest
import torch

from coordinator.aggregation.registry import RULES, make_kernel
from coordinator.config import AggregationOptions
from edge_sdk.errors import ShapeError

SENT = {
    "stages.0.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
    "stages.0.count": torch.tensor(3),
    "exits.0.bias": torch.tensor([0.5, -0.5], dtype=torch.float16),
}
NAMES = list(SENT)


@pytest.fixture(params=RULES)
def kernel(request):
    return make_kernel(AggregationOptions(rule=request.param))


def moved(by: float, names=NAMES):
    return {name: SENT[name] + torch.tensor(by).to(SENT[name].dtype) for name in names}


def test_nobody_changes_nothing(kernel):
    found = kernel.result(SENT)
    assert all(found[name] is SENT[name] for name in NAMES)
    assert [kernel.weight(name) for name in NAMES] == [0, 0, 0]


def test_identical_updates_give_themselves_to_the_last_bit(kernel):
    for weight in (1.0, 3.0, 7.0):
        kernel.add_(moved(0.1), weight)
    found = kernel.result(SENT)
    assert list(found) == NAMES
    for name, tensor in moved(0.1).items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_one_owner_gives_its_value_and_the_rest_stays(kernel):
    kernel.add_(moved(1.0, NAMES[:1]), 2.0)
    kernel.add_(moved(9.0, NAMES[2:]), 0.0)  # nobody
    found = kernel.result(SENT)
    assert torch.equal(found[NAMES[0]], SENT[NAMES[0]] + 1)
    assert found[NAMES[1]] is SENT[NAMES[1]]
    assert found[NAMES[2]] is SENT[NAMES[2]]
    assert [kernel.weight(name) for name in NAMES] == [2, 0, 0]


def test_the_result_lies_between_the_owners_whatever_their_order(kernel, request):
    other = make_kernel(AggregationOptions(rule=request.node.callspec.params["kernel"]))
    for one, two in ((0.0, 2.0), (1.0, 1.0), (2.0, 0.0)):
        kernel.add_(moved(one), 1.0)
        other.add_(moved(two), 1.0)
    found, again = kernel.result(SENT), other.result(SENT)
    for name in NAMES:
        assert torch.allclose(found[name].float(), again[name].float(), atol=1e-3), name
        assert (found[name] >= SENT[name]).all()
        assert (found[name] <= SENT[name] + 2).all()
    assert found["stages.0.count"].item() == 5, "counters take the largest"


def test_what_comes_after_the_result_is_folded_in_as_into_a_mean(kernel):
    """4 with a weight of 3 beside 0 of two owners that weigh 1 in all: (0 + 12) / 4 = 3."""
    for _ in range(2):
        kernel.add_({"w": torch.zeros(1)}, 0.5)
    sent = {"w": torch.zeros(1)}
    assert kernel.result(sent)["w"].item() == 0
    kernel.add_({"w": torch.full((1,), 4.0)}, 3.0)
    assert kernel.result(sent)["w"].item() == pytest.approx(3.0)
    assert kernel.weight("w") == 4.0


def test_wrong_shapes_and_weights_are_refused(kernel):
    with pytest.raises(ValueError, match="negative"):
        kernel.add_(moved(1.0), -1.0)
    with pytest.raises(ShapeError, match=r"w is \(2,\), expected \(3,\)"):
        for size in (3, 2):
            kernel.add_({"w": torch.zeros(size)}, 1.0)
        kernel.result({"w": torch.zeros(3)})


def test_a_kernel_is_of_one_round():
    options = AggregationOptions()
    make_kernel(options).add_(moved(5.0), 1.0)
    assert make_kernel(options).result(SENT)[NAMES[0]] is SENT[NAMES[0]]
