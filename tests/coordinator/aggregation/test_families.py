from __future__ import annotations

import pytest
import torch

from coordinator.aggregation.families import (
    CAP,
    Slot,
    aligned,
    common_step,
    family_weights,
    slots,
)

EVEN = {"a": 0.5, "b": 0.5}


def vectors(**values: list[float]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value) for name, value in values.items()}


def test_blocks_have_slots_by_depth():
    """Of 2 and 4 blocks: floor(l * 4 / 2) is 0 and 2. Stage and place of a block do not count."""
    found = slots(
        {
            "small": ["stages.0.1.adapter.gate", "stages.1.0.adapter.gate"],
            "large": [f"stages.{n}.0.adapter.gate" for n in range(4)],
        }
    )
    assert found == {
        Slot("adapter.gate", 0): {
            "small": "stages.0.1.adapter.gate",
            "large": "stages.0.0.adapter.gate",
        },
        Slot("adapter.gate", 1): {"large": "stages.1.0.adapter.gate"},
        Slot("adapter.gate", 2): {
            "small": "stages.1.0.adapter.gate",
            "large": "stages.2.0.adapter.gate",
        },
        Slot("adapter.gate", 3): {"large": "stages.3.0.adapter.gate"},
    }


def test_layers_of_a_block_are_apart_and_a_stage_is_a_block():
    names = ["stages.0.0.attention.q.adapter.p", "stages.0.0.feed_forward.0.adapter.p"]
    parts = {slot.part for slot in slots({"a": names})}
    assert parts == {"attention.q.adapter.p", "feed_forward.0.adapter.p"}
    assert set(slots({"a": ["stages.2.adapter.gate"]})) == {Slot("adapter.gate", 0)}


@pytest.mark.parametrize(
    ("numbers", "most", "count"), [((2, 3), 3, 2), ((3, 7), 7, 3), ((1, 5), 5, 1)]
)
def test_no_two_blocks_of_a_family_have_one_slot(numbers, most, count):
    """A second would take the first's place, silently."""
    shared = {
        f"f{number}": [f"stages.{n}.adapter.gate" for n in range(number)] for number in numbers
    }
    found = slots(shared)
    assert len(found) == most
    assert sum(len(owners) == 2 for owners in found.values()) == count


def test_a_family_counts_by_examples_but_for_no_more_than_three_of_another():
    assert family_weights({"a": 10.0, "b": 20.0}) == pytest.approx({"a": 1 / 3, "b": 2 / 3})
    assert family_weights({"a": 100.0, "b": 1.0}) == pytest.approx({"a": 0.75, "b": 0.25})
    assert CAP == 3


def test_orthogonal_and_agreeing_movements_stay():
    moved = vectors(a=[2.0, 0.0], b=[0.0, -3.0], c=[1.0, -1.0])
    found = aligned(moved, dict.fromkeys("abc", 1 / 3), "abc")
    assert all(torch.equal(found[name], moved[name]) for name in "abc")


def test_only_what_conflicts_is_taken_away():
    """<a, b> = -1, |a|^2 = 5, |b|^2 = 2: a + b / 2 = (1.5, 1.5), b + a / 5 = (-0.6, 1.2)."""
    moved = vectors(a=[2.0, 1.0], b=[-1.0, 1.0])
    found = aligned(moved, EVEN, "ab")
    assert torch.allclose(found["a"], torch.tensor([1.5, 1.5]))
    assert torch.allclose(found["b"], torch.tensor([-0.6, 1.2]))
    assert torch.allclose(common_step(found, EVEN), torch.tensor([0.45, 1.35]))
    for name, other in ("ab", "ba"):
        assert float(found[name] @ moved[other]) == pytest.approx(0, abs=1e-6)


def test_opposite_movements_cancel_in_that_component_alone():
    moved = vectors(a=[3.0, 4.0, 0.0], b=[-3.0, 0.0, 0.0])
    found = aligned(moved, EVEN, "ab")
    assert torch.allclose(found["a"], torch.tensor([0.0, 4.0, 0.0]))
    mean = common_step(moved, EVEN)
    assert torch.allclose(mean, torch.tensor([0.0, 2.0, 0.0]))


def test_a_small_family_has_no_veto():
    """Of 1 in 100 the small one's opposite takes a third of the other's movement, and the step
    still goes the large one's way: 0.75 * (1 - 1/3) + 0.25 * 0 = 0.5."""
    weights = family_weights({"large": 100.0, "small": 1.0})
    moved = vectors(large=[1.0, 0.0], small=[-1.0, 0.0])
    found = aligned(moved, weights, ["small", "large"])
    assert torch.allclose(common_step(found, weights), torch.tensor([0.5, 0.0]))


def test_the_order_of_families_in_a_dictionary_changes_nothing():
    generator = torch.Generator().manual_seed(0)
    moved = {name: torch.randn(4, 5, generator=generator) for name in "abc"}
    weights = {"a": 0.2, "b": 0.3, "c": 0.5}
    turned = dict(reversed(list(moved.items())))
    for one, other in ((moved, turned), *([aligned(m, weights, "bca") for m in (moved, turned)],)):
        assert torch.equal(common_step(one, weights), common_step(other, weights))


def test_nothing_moved_is_no_division_by_zero():
    found = aligned(vectors(a=[0.0, 0.0], b=[1.0, 0.0]), EVEN, "ab")
    assert torch.equal(found["a"], torch.zeros(2))
