"""Each task's loss, metric, distance and confidence, worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from edge_sdk.tasks.metrics import METRICS
from edge_sdk.tasks.table import task_of

LN2, LN3 = math.log(2), math.log(3)


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float32)


def loss(task, outputs, labels):
    return task_of(task).loss(outputs, torch.tensor(labels)).item()


def figure(task, outputs, labels):
    rules = task_of(task)
    return rules.figure(rules.counts(rules.answers(np.array(outputs)), np.array(labels)).sum(0))


def test_losses():
    """Softmax of (ln 3, 0) is 3/4, 1/4; sigmoid of ln 3 is 3/4."""
    assert loss("classify", tensor([LN3, 0.0]), [1]) == pytest.approx(math.log(4))
    both = (math.log(4 / 3) + math.log(4)) / 2  # of a label that holds, and one that does not
    assert loss("multilabel", tensor([LN3, LN3]), [[1.0, 0.0]]) == pytest.approx(both)
    assert loss("regress", tensor([1.0, 5.0]), [[2.0, 2.0]]) == pytest.approx((1 + 9) / 2)
    text = tensor([[LN3, 0.0], [0.0, 0.0], [9.0, 0.0]])  # three places, of which two count
    assert loss("tokens", text, [[1, 0, -100]]) == pytest.approx((math.log(4) + LN2) / 2)


def test_a_text_without_a_counted_place_teaches_nothing():
    outputs = tensor([[1.0, 2.0]]).requires_grad_()
    found = task_of("tokens").loss(outputs, torch.tensor([[-100]]))
    found.backward()
    assert (found.item(), outputs.grad.abs().sum().item()) == (0.0, 0.0)
    assert task_of("tokens").weight(torch.tensor([[-100, 1], [-100, -100]])) == 1


def test_metrics():
    assert figure("classify", [[1.0, 0.0], [0.0, 1.0]], [0, 0]) == 1 / 2
    # told: a and b of the first, a of the second; true: a of both, c of the second. 2 * 2 / (3 + 3)
    outputs, labels = [[1.0, 1.0, -1.0], [2.0, -1.0, -1.0]], [[1, 0, 0], [1, 0, 1]]
    assert figure("multilabel", outputs, labels) == pytest.approx(4 / 6)
    assert figure("multilabel", [[-1.0, -1.0]], [[0, 0]]) == 1.0, "nothing to tell, nothing told"
    assert figure("regress", [[1.0, 5.0]], [[2.0, 2.0]]) == pytest.approx(math.sqrt(5))
    text = [[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]]
    assert figure("tokens", text, [[0, 1, -100]]) == 1 / 2
    assert figure("tokens", text, [[-100] * 3]) == 0.0


@pytest.mark.parametrize("task", METRICS)
def test_a_student_that_answers_alike_is_not_apart_and_one_that_does_not_is_drawn(task):
    rules = task_of(task)
    shape = (2, 3, 4) if task == "tokens" else (2, 4)
    teacher = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    student = (teacher + 1.0 * torch.arange(4)).requires_grad_()
    soft = rules.softened(teacher, 2.0)
    assert rules.distance(soft, soft).item() == pytest.approx(0, abs=1e-6)
    rules.distance(rules.softened(student, 2.0), soft).backward()
    step = student - 0.1 * student.grad
    before, after = (rules.distance(rules.softened(z, 2.0), soft).item() for z in (student, step))
    assert 0 < after < before


def test_distances_by_hand():
    even, sure = tensor([0.0]), tensor([LN3])
    # KL of (3/4, 1/4) to (1/2, 1/2) in nats
    apart = 3 / 4 * math.log(3 / 2) + 1 / 4 * math.log(1 / 2)
    assert task_of("multilabel").distance(even, sure).item() == pytest.approx(apart)
    assert task_of("regress").distance(tensor([1.0, 2.0]), tensor([3.0, 2.0])).item() == 2.0
    places = [[[0.0, 0.0], [0.0, 0.0]]], [[[LN3, 0.0], [0.0, 0.0]]]  # one of two is apart
    soft = [task_of("tokens").softened(torch.tensor(place), 1.0) for place in places]
    assert task_of("tokens").distance(*soft).item() == pytest.approx(apart / 2)


def confidence(task, outputs, measure, before=None, spread=(1.0,)):
    given = None if before is None else np.array(before, np.float32)
    found = task_of(task).confidence(
        np.array(outputs, np.float32), measure, given, np.array(spread, np.float32)
    )
    return pytest.approx(found.tolist(), abs=1e-6)


def test_confidences():
    assert confidence("classify", [[LN3, 0.0]], "softmax") == [0.75]
    # the least sure label has 3/4: half way from a guess to quite sure
    assert confidence("multilabel", [[LN3, 20.0]], "sigmoid") == [0.5]
    assert confidence("multilabel", [[0.0, 40.0]], "entropy") == [0.5]
    assert confidence("tokens", [[[LN3, 0.0], [0.0, 0.0]]], "softmax") == [(0.75 + 0.5) / 2]
    assert confidence("regress", [[5.0]], "agreement") == [0.0], "nothing to agree with"
    # apart by 2 and 0 spreads: their root mean square is the root of 2
    found = confidence("regress", [[4.0, 1.0]], "agreement", [[0.0, 1.0]], (2.0, 1.0))
    assert [1 / (1 + math.sqrt(2))] == found
    assert confidence("regress", [[4.0]], "agreement", [[4.0]]) == [1.0]


def test_errors_are_averaged_by_their_squares_and_lower_is_better():
    rmse, accuracy = METRICS["regress"], METRICS["classify"]
    assert rmse.of_mean((rmse.to_mean(3.0) + rmse.to_mean(4.0)) / 2) == math.sqrt(12.5)
    assert accuracy.of_mean(accuracy.to_mean(0.5)) == 0.5
    assert rmse.worse_by(2.0, than=1.5) == 0.5
    assert accuracy.worse_by(0.5, than=0.75) == 0.25
    assert (rmse.said(1.234567), accuracy.said(0.5)) == ("1.235", "50.0 %")
