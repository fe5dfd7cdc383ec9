"""Losses against numbers worked out by hand."""

import math

import pytest
import torch

from edge_sdk.errors import ConfigError, ShapeError
from edge_sdk.models.losses import distillation, exit_weights, joint_exit_loss
from edge_sdk.protocol.messages import Plan, Segment

LN3 = math.log(3.0)


def test_joint_exit_loss_is_the_weighted_sum():
    # equal logits of 2 classes cost ln 2; logits (ln 3, 0) give p = 3/4 for class 0: ln(4/3)
    even, sure = torch.zeros(1, 2), torch.tensor([[math.log(3.0), 0.0]])
    loss = joint_exit_loss([even, sure], torch.tensor([0]), [1.0, 2.0])
    assert loss.item() == pytest.approx(math.log(2) + 2 * math.log(4 / 3))


def test_joint_exit_loss_wants_a_weight_per_exit():
    with pytest.raises(ShapeError, match="1 exit weights for 2 exits"):
        joint_exit_loss([torch.zeros(1, 2)] * 2, torch.tensor([0]), [1.0])


@pytest.mark.parametrize(
    ("weights", "first", "last", "want"),
    [
        ((), 1, 2, [1, 1]),
        ((1, 0, 2), 2, 3, [0, 2]),
        ((1, 0, 2), 2, 2, [1]),
        ((0, 0, 2), 1, 2, [1, 1]),
    ],
)
def test_exit_weights_of_a_segment(weights, first, last, want):
    plan = Plan(segments=(Segment(first=1, last=3),), exit_weights=weights)
    assert list(exit_weights(plan, first, last)) == want


def test_exit_weights_must_reach_the_segment():
    plan = Plan(segments=(Segment(first=1, last=3),), exit_weights=(1.0,))
    with pytest.raises(ShapeError, match="1 exit weights, trains up to exit 3"):
        exit_weights(plan, 3, 3)


# Two classes. EVEN gives (1/2, 1/2), SURE (3/4, 1/4), so with their logarithms
# KL(EVEN || SURE) = 1/2 ln(2/3) + 1/2 ln 2 = 1/2 ln(4/3)
# KL(SURE || EVEN) = 3/4 ln(3/2) + 1/4 ln(1/2) = 3/4 ln 3 - ln 2
EVEN, SURE = [0.0, 0.0], [LN3, 0.0]
EVEN_TEACHES_SURE = math.log(4 / 3) / 2
SURE_TEACHES_EVEN = 0.75 * LN3 - math.log(2)


def exits(*logits: list[float]) -> list[torch.Tensor]:
    """One example, trainable."""
    return [torch.tensor([row], requires_grad=True) for row in logits]


@pytest.mark.parametrize(
    ("direction", "expected"),
    [
        ("shallow-to-deep", EVEN_TEACHES_SURE),  # exit 1 is even, exit 2 is sure
        ("deep-to-shallow", SURE_TEACHES_EVEN),
        ("mutual", EVEN_TEACHES_SURE + SURE_TEACHES_EVEN),
    ],
)
def test_distillation_between_two_exits(direction, expected):
    assert distillation(exits(EVEN, SURE), direction, 1.0).item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("direction", "expected"),
    [
        # exits even, sure, even: exit 2 learns from 1; exit 3 from the mean of 1 (0) and 2
        ("shallow-to-deep", EVEN_TEACHES_SURE + SURE_TEACHES_EVEN / 2),
        # exit 1 learns from the mean of 2 and 3 (0); exit 2 from 3
        ("deep-to-shallow", SURE_TEACHES_EVEN / 2 + EVEN_TEACHES_SURE),
        # exit 3 alone teaches: exit 1 from 3 (0); exit 2 from 3
        ("deepest-to-shallow", EVEN_TEACHES_SURE),
        # 1 and 3 from each other (0) and from 2; 2 from both
        ("mutual", SURE_TEACHES_EVEN + EVEN_TEACHES_SURE),
    ],
)
def test_distillation_averages_over_the_teachers_of_an_exit(direction, expected):
    loss = distillation(exits(EVEN, SURE, EVEN), direction, 1.0)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_distillation_averages_over_the_batch():
    # one example apart, one alike: half
    shallow, deep = torch.tensor([EVEN, SURE]), torch.tensor([SURE, SURE])
    loss = distillation([shallow, deep], "shallow-to-deep", 1.0)
    assert loss.item() == pytest.approx(EVEN_TEACHES_SURE / 2)


def test_distillation_divides_logits_by_t_and_scales_with_its_square():
    # logits 2 ln 3 over T = 2 are ln 3: the same distributions, 4 times the term
    twice = exits(EVEN, [2 * LN3, 0.0])
    assert distillation(twice, "shallow-to-deep", 2.0).item() == pytest.approx(
        4 * EVEN_TEACHES_SURE
    )


def test_distillation_moves_students_only():
    shallow, deep = exits(EVEN, SURE)
    distillation([shallow, deep], "deep-to-shallow", 1.0).backward()
    assert deep.grad is None or not deep.grad.any()
    # of KL(p || softmax(z)) by z: softmax(z) - p = (1/2 - 3/4, 1/2 - 1/4)
    assert torch.allclose(shallow.grad, torch.tensor([[-0.25, 0.25]]))
    shallow, deep = exits(EVEN, [2 * LN3, 0.0])
    distillation([shallow, deep], "deep-to-shallow", 2.0).backward()
    # T^2 times a derivative that T divides: T * (-1/4, 1/4)
    assert torch.allclose(shallow.grad, torch.tensor([[-0.5, 0.5]]))


@pytest.mark.parametrize("direction", ["shallow-to-deep", "deep-to-shallow", "mutual"])
def test_distillation_of_equal_logits_is_nothing(direction):
    rows = [[0.3, -2.0, 1.1]] * 3
    assert distillation(exits(*rows), direction, 3.0).item() == 0.0
    assert distillation(exits(SURE), direction, 1.0).item() == 0.0  # one exit: nobody to learn from


def test_distillation_of_certain_teachers_is_finite():
    # probabilities (1, 0) in float32; KL = ln 2 to an even student, 500 to one as sure of the other
    loss = distillation(exits([1000.0, 0.0], EVEN, [0.0, 500.0]), "shallow-to-deep", 1.0)
    # exit 2 learns from 1; exit 3 from 1 and from 2, which is 1/2 ln(1/2) + 1/2 (ln(1/2) + 500)
    assert loss.item() == pytest.approx(math.log(2) + (500 + 250 - math.log(2)) / 2)


def test_unknown_distillation_names_the_known():
    with pytest.raises(ConfigError, match="'none'; known: deep-to-shallow, deepest-to"):
        distillation(exits(EVEN, SURE), "none", 1.0)
