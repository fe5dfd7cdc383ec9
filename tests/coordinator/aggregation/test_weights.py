"""How much one client may count, by hand."""

from __future__ import annotations

import math
import random

import pytest

from coordinator.aggregation.weights import most_examples


@pytest.mark.parametrize(
    ("asked", "most"),
    [
        ([], math.inf),
        ([10], math.inf),
        ([1000, 100], math.inf),  # of two an honest skew looks the same
        ([100, 100, 2**31], 200),  # no more than the others together
        ([100, 110, 90], 190),  # which is nobody's bound: the sum of the smaller two
        ([10] * 49 + [2**31], 30),  # three times the largest other
        ([10] * 48 + [90] + [2**31], 100),  # ten medians
        ([10] * 4 + [2**31] * 2, 100),  # two that lie together do not lift each other's
        ([1, 1, 1, 1, 1, 1, 9], 3),
    ],
)
def test_most_examples(asked, most):
    assert most_examples(asked) == most


def test_no_client_of_three_or_more_has_more_than_half():
    draw = random.Random(0)
    for _ in range(2000):
        asked = [int(10 ** draw.uniform(0, 9)) for _ in range(draw.randint(3, 12))]
        most = most_examples(asked)
        weights = [min(number, most) for number in asked]
        assert max(weights) <= sum(weights) / 2


def test_a_liar_among_equals_and_two_that_lie_together():
    asked = [10] * 5 + [2**31]
    assert most_examples(asked) / (50 + most_examples(asked)) == 3 / (6 + 2)
    asked = [10] * 4 + [2**31] * 2
    assert 2 * most_examples(asked) / (40 + 2 * most_examples(asked)) == 20 / (18 + 6)


def test_an_even_cohort_is_left_alone():
    """Up to three times another and half of all counts with all that it has."""
    draw = random.Random(1)
    for _ in range(500):
        asked = [draw.randint(100, 190) for _ in range(draw.randint(3, 12))]
        assert max(asked) <= most_examples(asked)
