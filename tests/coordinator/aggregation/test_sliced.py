"""The mean of each element over those who hold it, by hand and against a loop over elements."""

from __future__ import annotations

import itertools

import pytest
import torch

from coordinator.aggregation.sliced import SlicedMean, cut
from edge_sdk.errors import ShapeError


def at(*indices):
    return tuple(None if i is None else torch.tensor(i, dtype=torch.int64) for i in indices)


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Two axes cut, one, none, prefixes, windows that wrap around, axes with others between them.
PARTS = {
    "prefix": at([0, 1], [0, 1, 2]),
    "wrapped": at([3, 0], [4, 0, 1]),
    "one axis": at(None, [1, 3]),
    "apart": at([0, 2], None, [2, 0]),
    "whole": (),
    "mask": drawn(4, 5, 3) > 0,
}


def test_worked_example_of_widths():
    # 2 x 2, sent zeros. a (weight 1) holds all: 4; b (weight 3) holds the first row and column: 8
    mean = SlicedMean({"w": torch.zeros(2, 2)})
    mean.add_({"w": torch.full((2, 2), 4.0)}, 1, {})
    mean.add_({"w": torch.full((1, 1), 8.0)}, 3, {"w": at([0], [0])})
    assert mean.result()["w"].tolist() == [[7.0, 4.0], [4.0, 4.0]]  # (1*4 + 3*8) / 4


def test_mean_is_that_of_a_loop_over_elements():
    sent = drawn(4, 5, 3)
    mean, sums, weights = SlicedMean({"w": sent}), torch.zeros(4, 5, 3), torch.zeros(4, 5, 3)
    for number, part in enumerate(PARTS.values(), 1):
        tensor = cut({"w": drawn(4, 5, 3, seed=number)}, {"w": part})["w"]
        mean.add_({"w": tensor}, number, {"w": part})
        if isinstance(part, torch.Tensor):
            places = part.nonzero().tolist()
        else:
            axes = [*part, *[None] * (3 - len(part))]
            kept = [
                range(n) if i is None else i.tolist() for i, n in zip(axes, (4, 5, 3), strict=True)
            ]
            places = itertools.product(*kept)
        for place, value in zip(places, tensor.flatten().tolist(), strict=True):
            sums[tuple(place)] += number * value
            weights[tuple(place)] += number
    assert torch.allclose(mean.result()["w"], sums / weights, atol=1e-6)


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_who_does_not_hold_an_element_has_no_influence_on_it(part):
    sent = {"w": drawn(4, 5, 3)}
    one, other = SlicedMean(sent), SlicedMean(sent)
    mine = cut({"w": drawn(4, 5, 3, seed=1)}, {"w": part})["w"]
    for mean, theirs in ((one, mine), (other, mine + 100)):
        mean.add_({"w": drawn(2, 3, 3, seed=2)}, 2, {"w": at([1, 2], [0, 2, 4])})
        mean.add_({"w": theirs}, 1000, {"w": part})
    held = torch.zeros(4, 5, 3, dtype=torch.bool)
    probe = SlicedMean({"w": torch.zeros(4, 5, 3)})
    probe.add_({"w": torch.ones_like(mine)}, 1, {"w": part})
    held |= probe.result()["w"] == 1
    assert int(held.sum()) == mine.numel()
    assert torch.equal(one.result()["w"] != other.result()["w"], held)


def test_identical_clients_come_out_bit_by_bit():
    whole = drawn(4, 5, 3, seed=9)
    mean = SlicedMean({"w": torch.zeros(4, 5, 3)})
    for weight, part in zip((3, 7, 1, 11, 0.1, 49), PARTS.values(), strict=True):
        mean.add_(cut({"w": whole}, {"w": part}), weight, {"w": part})
    assert torch.equal(mean.result()["w"], whole)


@pytest.mark.parametrize("weight", [1, 3, 49, 1e-3, 2**31])
def test_one_owner_gives_its_value_bit_by_bit(weight):
    """(1 / 49) * 49 is not 1 in float32."""
    value = drawn(1000)
    mean = SlicedMean({"w": drawn(2000, seed=1)})
    mean.add_({"w": value}, weight, {"w": at(range(500, 1500))})
    assert torch.equal(mean.result()["w"][500:1500], value)


def test_an_element_without_owner_keeps_its_value_bit_by_bit():
    sent = {"w": drawn(4, 5, 3), "b": drawn(4).half(), "n": torch.tensor([3, 4]), "u": drawn(2)}
    mean = SlicedMean(sent)
    for number in range(5):
        updates = {"w": drawn(2, 5, 3, seed=number), "b": drawn(2).half(), "n": torch.tensor([9])}
        mean.add_(updates, 1 + number, {"w": at([0, 1]), "b": at([1, 2]), "n": at([0])})
    result = mean.result()
    assert torch.equal(result["w"][2:], sent["w"][2:])
    assert torch.equal(result["b"][[0, 3]], sent["b"][[0, 3]])
    assert result["n"].tolist() == [9, 4]
    assert result["u"] is sent["u"], "a tensor that nobody brought is the very same"
    assert list(result) == list(sent)


def test_order_does_not_matter():
    sent = {"w": drawn(4, 5, 3)}
    one, other = SlicedMean(sent), SlicedMean(sent)
    jobs = [
        (cut({"w": drawn(4, 5, 3, seed=i)}, {"w": p}), i + 1, {"w": p})
        for i, p in enumerate(PARTS.values())
    ]
    for mean, order in ((one, jobs), (other, jobs[::-1])):
        for job in order:
            mean.add_(*job)
    assert torch.allclose(one.result()["w"], other.result()["w"], atol=1e-6)


def test_integers_take_the_largest_of_their_owners_and_halves_are_summed_wide():
    mean = SlicedMean({"n": torch.tensor([7, 7]), "h": torch.zeros(2).half()})
    for count, value in ((3, 2048.0), (5, 2050.0)):
        tensors = {"n": torch.tensor([count]), "h": torch.tensor([value]).half()}
        mean.add_(tensors, 1, {"n": at([1]), "h": at([1])})
    assert mean.result()["n"].tolist() == [7, 5], "7 was nobody's"
    assert mean._means["h"][1].item() == 2049.0  # not a float16 number
    assert mean.result()["h"].dtype == torch.float16


def test_memory_does_not_grow_with_clients_and_weights_are_those_of_cut_axes():
    mean = SlicedMean({"conv": torch.zeros(8, 6, 3, 3), "bias": torch.zeros(8)})
    for count in range(1, 9):
        tensors = {"conv": torch.ones(count, 6, 3, 3), "bias": torch.ones(8)}
        mean.add_(tensors, 1, {"conv": at(range(count))})
    assert mean._weights["conv"].shape == (8, 1, 1, 1)
    assert mean._weights["bias"].shape == (1,)
    mean.add_({"conv": torch.ones(2, 2, 3, 3)}, 1, {"conv": at([0, 1], [0, 1])})
    assert mean._weights["conv"].shape == (8, 6, 1, 1)
    assert mean._weights["conv"][:, 0, 0, 0].tolist() == [9, 8, 6, 5, 4, 3, 2, 1]


def test_coverage_is_the_share_of_elements_that_somebody_held():
    mean = SlicedMean({"a": torch.zeros(2, 4), "b": torch.zeros(2)})
    assert mean.coverage("ab") == 0
    mean.add_({"a": torch.zeros(1, 2)}, 1, {"a": at([0], [0, 1])})
    assert mean.coverage("ab") == pytest.approx(2 / 10)
    assert mean.coverage("a") == pytest.approx(2 / 8)


def test_contributions_are_not_changed():
    tensor, sent = torch.ones(3), torch.zeros(3)
    mean = SlicedMean({"w": sent})
    mean.add_({"w": tensor}, 1, {})
    mean.add_({"w": torch.zeros(3)}, 1, {})
    assert tensor.tolist() == [1, 1, 1]
    assert sent.tolist() == [0, 0, 0]
    cut({"w": sent}, {"w": at([0, 1])})["w"] += 1
    assert sent.tolist() == [0, 0, 0]


def test_zero_weight_changes_nothing_negative_is_refused():
    mean = SlicedMean({"w": torch.zeros(2)})
    mean.add_({"w": torch.ones(2)}, 0, {})
    assert mean.result()["w"].tolist() == [0, 0]
    with pytest.raises(ValueError, match="negative"):
        mean.add_({"w": torch.ones(2)}, -1, {})


WRONG = {
    "w is (2, 5, 3), expected (2, 2, 3) of the model's (4, 5, 3)": at([0, 1], [0, 1]),
    "axis 1 reach 5": at(None, [4, 5]),
    "axis 0 reach 0": at([-1, 0]),
    "axis 0 are not a list of different int64": at([0, 0]),
    "axis 1 are not a list": (None, torch.tensor([0.0])),
    "axis 2 are not a list": (None, None, torch.tensor([[0]])),
    "indices of 4 axes": at(None, None, None, [0]),
    r"the mask is (4, 5) torch.bool": torch.ones(4, 5, dtype=torch.bool),
    "the mask is (4, 5, 3) torch.float32": torch.ones(4, 5, 3),
}


@pytest.mark.parametrize("said", WRONG)
def test_what_does_not_fit_is_refused(said):
    mean = SlicedMean({"w": torch.zeros(4, 5, 3)})
    with pytest.raises(ShapeError) as error:
        mean.add_({"w": torch.zeros(2, 5, 3)}, 1, {"w": WRONG[said]})
    assert said in str(error.value)
    with pytest.raises(ShapeError, match="'v' does not belong to the model"):
        mean.add_({"v": torch.zeros(1)}, 1, {})
