"""The labels' loss and a client's own class frequencies."""

import math

import pytest
import torch
from msgspec.structs import replace

from edge_sdk.models import build, initial_tensors
from edge_sdk.protocol.messages import Plan, Segment
from edge_sdk.training.terms.labels import LogitAdjustment, MaskAbsent
from edge_sdk.training.trainer import train
from tests.support.examples import cnn, examples
from tests.support.terms import context

PLAN = Plan(segments=(Segment(first=1, last=1),), batch_size=12, optimizer="sgd", lr=0.1)


def test_logit_adjustment_of_three_classes_by_hand():
    # 3 examples of class 0, 1 of class 2: (n_k + 1/2) / (4 + 3/2) = 7/11, 1/11, 3/11
    term = LogitAdjustment(context([0, 0, 2, 0], logit_adjustment=2.0))
    want = [[1 + 2 * math.log(7 / 11), 2 * math.log(1 / 11), -1 + 2 * math.log(3 / 11)]]
    assert term.adjusted(torch.tensor([[1.0, 0.0, -1.0]])).tolist() == [pytest.approx(want[0])]


def test_absent_classes_get_no_gradient():
    term = MaskAbsent(context([0, 0, 2]))
    logits = torch.tensor([[1.0, 5.0, -1.0]], requires_grad=True)
    adjusted = term.adjusted(logits)
    assert adjusted.tolist() == [[1.0, 0.0, -1.0]]  # HeteroFL sets them to 0
    torch.nn.functional.cross_entropy(adjusted, torch.tensor([0])).backward()
    assert logits.grad is not None
    assert logits.grad[0, 1] == 0
    assert logits.grad[0, 2] > 0


@pytest.mark.parametrize("changes", [{"logit_adjustment": 1.0}, {"mask_absent": True}], ids=str)
def test_one_step_by_hand_and_figures_of_the_plain_logits(changes):
    """One full batch without class 1: the step is along the adjusted loss, the loss that is told is
    the plain one's."""
    spec, data = cnn(exit=1), examples(12)
    data = data.take(torch.tensor([i for i in range(12) if data.y[i] != 1]).numpy())
    sent, y = initial_tensors(spec, 0), torch.from_numpy(data.y)
    plan = replace(PLAN, batch_size=len(y), **changes)
    result = train(spec, plan, sent, data)
    model = build(spec)
    model.load(sent)
    (logits,) = model.train()(torch.from_numpy(data.x))
    counts = torch.bincount(y, minlength=3)
    if plan.mask_absent:
        adjusted = logits.masked_fill(counts == 0, 0.0)
    else:
        adjusted = logits + ((counts + 0.5) / (len(y) + 1.5)).log()
    plain = torch.nn.functional.cross_entropy(logits, y).item()
    torch.nn.functional.cross_entropy(adjusted, y).backward()
    for name, parameter in model.named_parameters():
        want = sent[name] - 0.1 * parameter.grad
        assert torch.allclose(result.tensors[name], want, atol=1e-6), name
    assert result.exits[0].loss == pytest.approx(plain, rel=1e-5)


def test_equal_frequencies_change_nothing():
    spec, data, sent = cnn(exit=1), examples(12), initial_tensors(cnn(exit=1), 0)
    assert data.label_counts().tolist() == [4, 4, 4]
    plain = train(spec, PLAN, sent, data).tensors
    adjusted = train(spec, replace(PLAN, logit_adjustment=1.0), sent, data).tensors
    assert all(torch.allclose(plain[n], adjusted[n], atol=1e-6) for n in plain)


@pytest.mark.parametrize(
    "changes",
    [
        {"weight_decay": 0.1, "momentum": 0.9},
        {"optimizer": "adam", "weight_decay": 0.1, "clip_norm": 1.0},
        {"distill": "mutual", "distill_weight": 1.0},
    ],
    ids=str,
)
def test_rows_of_absent_classes_come_back_as_they_were_sent(changes):
    spec, data = cnn(exit=2), examples(12)
    data = data.take(torch.tensor([i for i in range(12) if data.y[i] != 1]).numpy())
    segments = (Segment(first=1, last=2),)
    plan = replace(PLAN, segments=segments, epochs=3, batch_size=4, mask_absent=True, **changes)
    sent = initial_tensors(spec, 0)
    trained = train(spec, plan, sent, data).tensors
    for name in ("exits.0.2.weight", "exits.0.2.bias", "exits.1.2.weight", "exits.1.2.bias"):
        is_same = [torch.equal(a, b) for a, b in zip(trained[name], sent[name], strict=True)]
        assert is_same == [False, True, False], name
