"""Rules of robust aggregation: numbers by hand, properties."""

from __future__ import annotations

import math
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.aggregation import robust
from coordinator.aggregation.registry import make_kernel
from coordinator.config import AggregationOptions
from edge_sdk.errors import ShapeError
from tests.support.examples import ROBUST, options_of

TRIMMED = AggregationOptions(rule="trimmed-mean", trim=0.25)


def aggregate(options, updates, sent):
    """updates: (values, weight) of the only tensor."""
    kernel = make_kernel(options)
    for values, weight in updates:
        kernel.add_({"w": torch.tensor(values)}, weight)
    return kernel.result({"w": torch.tensor(sent)})["w"].tolist()


# --- rules, by hand ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "trim", "want"),
    [
        (5, 0.0, 220.0),  # (1 + 2 + 3 + 94 + 1000) / 5
        (5, 0.1, 33.0),  # one at each end: (2 + 3 + 94) / 3
        (5, 0.4, 3.0),  # two at each end
        (5, 0.49, 3.0),  # three would leave nothing: the median
        (4, 0.4, 2.5),  # two would leave nothing: (2 + 3) / 2
        (2, 0.1, 1.5),
        (1, 0.49, 1.0),
    ],
)
def test_trimmed_mean_by_hand(n, trim, want):
    values = [1.0, 2.0, 3.0, 94.0, 1000.0][:n]
    found = aggregate(options_of("trimmed-mean", trim), [([v], 1.0) for v in values], [0.0])
    assert found == [want]


def test_coordinates_are_trimmed_each_by_itself():
    # columns: 1 2 9 -> 2; 7 -5 0 -> 0
    updates = [([1.0, 7.0], 1.0), ([2.0, -5.0], 1.0), ([9.0, 0.0], 1.0)]
    assert aggregate(TRIMMED, updates, [0.0, 0.0]) == [2.0, 0.0]


def test_shares_that_are_no_binary_numbers_are_not_rounded_up():
    # 0.07 * 100 is 7.000000000000001 in floats: 7 at each end, so 8 large ones of 100 shine through
    updates = [([0.0], 1.0)] * 92 + [([86.0], 1.0)] * 8
    assert aggregate(options_of("trimmed-mean", 0.07), updates, [0.0]) == [1.0]  # 86 / 86


def test_median_by_hand():
    three = [([1.0, 5.0], 1.0), ([1e30, 4.0], 1.0), ([2.0, -1e30], 1.0)]
    assert aggregate(options_of("median"), three, [0.0, 0.0]) == [2.0, 4.0]
    assert aggregate(options_of("median"), [*three, ([4.0, 6.0], 1.0)], [0.0, 0.0]) == [3.0, 4.5]
    assert aggregate(options_of("median"), three[:2], [0.0, 0.0]) == pytest.approx([5e29, 4.5])


def test_norm_bounded_by_hand():
    # sent (1, 1); movements (3, 4), (0, 5), (600, 800): norms 5, 5, 1000, the median 5, so the last
    # becomes (3, 4). Weights 1, 2, 1: (3 + 0 + 3, 4 + 10 + 4) / 4 = (1.5, 4.5)
    updates = [([4.0, 5.0], 1.0), ([1.0, 6.0], 2.0), ([601.0, 801.0], 1.0)]
    found = aggregate(options_of("norm-bounded"), updates, [1.0, 1.0])
    assert found == pytest.approx([2.5, 5.5])


def test_one_of_two_owners_does_not_lift_the_bound():
    # norms 1 and 1000: both to 1
    updates = [([1.0], 1.0), ([-1000.0], 1.0)]
    assert aggregate(options_of("norm-bounded"), updates, [0.0]) == pytest.approx([0.0])
    assert aggregate(options_of("mean"), updates, [0.0]) == [-499.5]


@pytest.mark.parametrize("rule", ROBUST)
def test_an_infinite_value_that_came_after_the_border_has_no_influence(rule):
    """A late update brought forward may overflow: what moved infinitely far counts as unmoved, or
    is left out."""
    updates = [([1.0, 1.0], 1.0), ([math.inf, 1.0], 1.0), ([1.0, 1.0], 1.0)]
    want = 2 / 3 if rule == "norm-bounded" else 1.0
    assert aggregate(options_of(rule), updates, [0.0, 0.0]) == pytest.approx([want, want])


@pytest.mark.parametrize("rule", ["trimmed-mean", "median"])
def test_coordinate_wise_rules_ignore_weights_but_report_them(rule):
    kernel = make_kernel(options_of(rule))
    for value, weight in ((1.0, 1.0), (2.0, 1.0), (1e6, 1e6)):
        kernel.add_({"w": torch.tensor([value])}, weight)
    kernel.add_({"other": torch.zeros(1)}, 5.0)
    for _ in range(2):  # before and after the first result
        assert (kernel.weight("w"), kernel.weight("other"), kernel.weight("?")) == (1e6 + 2, 5, 0)
        found = kernel.result({"w": torch.zeros(1), "other": torch.ones(1)})
        assert (found["w"].item(), found["other"].item()) == (2.0, 0.0)


@pytest.mark.parametrize("rule", ROBUST)
def test_tensors_have_only_their_owners(rule):
    """One owner gives its value, nobody keeps the old one, whatever those without it bring."""
    kernel = make_kernel(options_of(rule))
    kernel.add_({"a": torch.tensor([7.0]), "b": torch.tensor([0.1])}, 3)
    for value in (8.0, 9.0):
        kernel.add_({"a": torch.tensor([value])}, 1)
    old = {"a": torch.tensor([7.5]), "b": torch.tensor([5.0]), "c": torch.tensor([6.0])}
    new = kernel.result(old)
    assert torch.equal(new["b"], torch.tensor([0.1]))
    assert new["c"] is old["c"]
    assert list(new) == list(old)


@pytest.mark.parametrize("rule", ROBUST)
def test_counters_take_the_largest_and_halves_are_wide(rule):
    kernel = make_kernel(options_of(rule))
    for number, half in ((3, 2048.0), (9, 2050.0), (4, 2050.0)):
        kernel.add_({"n": torch.tensor(number), "h": torch.tensor([half]).half()}, 1)
    new = kernel.result({"n": torch.tensor(0), "h": torch.tensor([2048.0]).half()})
    assert new["n"].item() == 9
    assert new["h"].dtype == torch.float16
    assert new["h"].item() == (2050.0 if rule == "median" else pytest.approx(2049, abs=1))


@pytest.mark.parametrize("rule", ROBUST)
def test_refusals_and_weight_zero(rule):
    kernel = make_kernel(options_of(rule))
    with pytest.raises(ValueError, match="negative"):
        kernel.add_({"w": torch.zeros(1)}, -1)
    kernel.add_({"w": torch.ones(1)}, 0)
    old = {"w": torch.zeros(1)}
    assert kernel.result(old)["w"] is old["w"]
    kernel = make_kernel(options_of(rule))
    kernel.add_({"w": torch.zeros(2)}, 1)
    with pytest.raises(ShapeError, match=r"w is \(2,\), expected \(1,\)"):
        kernel.result(old)


@pytest.mark.parametrize("rule", ROBUST)
def test_generated_tensors_are_folded_into_the_result_with_the_owners_weight(rule):
    # aggregate 2 of owners that weigh 3 in all; 10 with weight 1 on top: (3 * 2 + 10) / 4 = 4
    kernel = make_kernel(options_of(rule))
    for value in (1.0, 2.0, 3.0):
        kernel.add_({"w": torch.tensor([value])}, 1)
    sent = {"w": torch.zeros(1)}
    owners = kernel.result(sent)["w"].item()
    kernel.add_({"w": torch.tensor([10.0])}, 1)
    assert kernel.result(sent)["w"].item() == pytest.approx((3 * owners + 10) / 4)
    assert kernel.weight("w") == 4
    assert owners == pytest.approx(5 / 3 if rule == "norm-bounded" else 2.0)  # 1 + 2 + 2 over 3


def test_chunks_do_not_show(monkeypatch):
    rng = torch.Generator().manual_seed(0)
    tensors = [torch.randn(7, 13, generator=rng) for _ in range(5)]
    sent = {"w": torch.zeros(7, 13)}

    def all_rules():
        found = []
        for rule in ROBUST:
            kernel = make_kernel(options_of(rule))
            for tensor in tensors:
                kernel.add_({"w": tensor}, 1)
            found.append(kernel.result(sent)["w"])
        return found

    whole = all_rules()
    monkeypatch.setattr(robust, "CHUNK_BYTES", 100)  # 5 columns of 5 owners
    monkeypatch.setattr(robust, "COLUMNS", 10)
    for one, other in zip(whole, all_rules(), strict=True):
        assert torch.allclose(one, other, rtol=1e-6, atol=0)
    assert torch.equal(whole[1], torch.stack(tensors).median(0).values)


@pytest.mark.parametrize("rule", ROBUST)
def test_updates_may_be_freed_after_the_result(rule):
    kernel = make_kernel(options_of(rule))
    tensor = torch.ones(3)
    kernel.add_({"w": tensor}, 1)
    freed = weakref.ref(tensor)
    del tensor
    assert freed() is not None
    kernel.result({"w": torch.zeros(3)})
    assert freed() is None


def test_memory_beside_the_updates_is_a_chunk(monkeypatch):
    """No array of all owners' entries is made: the largest stack has CHUNK_BYTES."""
    stacked, stack = [], torch.stack

    def watched(rows, *args):
        made = stack(rows, *args)
        stacked.append(made.nbytes)
        return made

    monkeypatch.setattr(robust.torch, "stack", watched)
    monkeypatch.setattr(robust, "CHUNK_BYTES", 4096)
    for n in (3, 50):
        robust.median([torch.zeros(10_000)] * n, [1.0] * n, torch.zeros(10_000))
    assert max(stacked) <= 4096
    assert len(stacked) > 100


# --- rules, properties ------------------------------------------------------------------------

finite = st.floats(-(2.0**100), 2.0**100, width=32)
cohorts = st.integers(1, 9).flatmap(
    lambda n: st.lists(st.lists(finite, min_size=3, max_size=3), min_size=n, max_size=n)
)


def value_of(options, rows, sent=(0.0, 0.0, 0.0)):
    return np.array(aggregate(options, [(row, 1.0) for row in rows], list(sent)), np.float32)


every_coordinate_wise = st.one_of(
    st.floats(0, 0.49).map(lambda trim: options_of("trimmed-mean", trim)),
    st.just(options_of("median")),
)


@settings(deadline=None)
@given(cohorts, every_coordinate_wise, st.randoms())
def test_coordinate_wise_rules_have_no_order_and_stay_in_the_range(rows, options, random):
    found = value_of(options, rows)
    mixed = random.sample(rows, len(rows))
    assert np.array_equal(found, value_of(options, mixed))
    values = np.array(rows, np.float32)
    assert (values.min(0) <= found).all()
    assert (found <= values.max(0)).all()


@settings(deadline=None)
@given(st.lists(finite, min_size=3, max_size=3), st.integers(1, 9), st.sampled_from(ROBUST))
def test_identical_owners_give_themselves_to_the_bit(row, n, rule):
    assert value_of(options_of(rule), [row] * n).tolist() == row
    assert value_of(options_of(rule), [row] * n, sent=(1.0, -2.0, 3.0)).tolist() == row


@settings(deadline=None)
@given(
    st.lists(st.lists(st.floats(-1, 1, width=32), min_size=3, max_size=3), min_size=5, max_size=9),
    st.lists(st.lists(finite, min_size=3, max_size=3), min_size=1, max_size=2),
    st.sampled_from(["trimmed-mean", "median"]),
)
def test_a_minority_cannot_leave_the_honest_range(honest, harmful, rule):
    """Harmful ones are at most `trim` of all, so at each end at least as many are left out."""
    trim = len(harmful) / (len(honest) + len(harmful))
    found = value_of(options_of(rule, trim), honest + harmful)
    values = np.array(honest, np.float32)
    assert (values.min(0) <= found).all()
    assert (found <= values.max(0)).all()


@settings(deadline=None)
@given(
    st.lists(st.lists(st.floats(-1, 1, width=32), min_size=3, max_size=3), min_size=5, max_size=9),
    st.lists(st.lists(finite, min_size=3, max_size=3), min_size=1, max_size=2),
)
def test_a_minority_moves_no_further_than_the_honest_with_bounded_norms(honest, harmful):
    found = value_of(options_of("norm-bounded"), honest + harmful)
    assert np.linalg.norm(found) <= 1.0001 * max(map(np.linalg.norm, honest)) + 1e-30


@pytest.mark.parametrize("rule", ROBUST)
def test_identical_doubles_give_themselves_too(rule):
    """(0.1 + 0.1 + 0.1) / 3 is 0.10000000000000002 in float64."""
    tensor = torch.tensor([0.1], dtype=torch.float64)
    kernel = make_kernel(options_of(rule, 0.0))
    for _ in range(3):
        kernel.add_({"w": tensor.clone()}, 1)
    assert torch.equal(kernel.result({"w": torch.zeros_like(tensor)})["w"], tensor)


def test_the_plain_mean_breaks_down():
    honest, harmful = [[1.0, 2.0, 3.0]] * 9, [[1e30, -1e30, 1e30]]
    assert abs(value_of(options_of("mean"), honest + harmful)).max() > 1e28
    for rule in ROBUST:
        assert abs(value_of(options_of(rule), honest + harmful)).max() < 4
