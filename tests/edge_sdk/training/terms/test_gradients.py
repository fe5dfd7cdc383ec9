"""FedProx and clipping."""

import pytest
import torch

from edge_sdk.training.terms.clipping import Clipping
from edge_sdk.training.terms.proximal import Proximal
from tests.support.terms import context, trained


def test_the_proximal_pull_is_of_the_squared_distance():
    # of mu/2 (w - 1)^2 at w = 3 with mu = 0.5: 1; published code uses the norm itself
    segment = trained(w=[1.0, 4.0])
    term = Proximal(context(prox_mu=0.5))
    term.begin_(segment)
    w = segment.named["w"]
    w.data = torch.tensor([3.0, 4.0])
    w.grad = torch.tensor([0.25, 0.25])
    term.before_step_()
    assert w.grad.tolist() == [1.25, 0.25]


def test_gradients_are_clipped_by_value_and_then_together_by_norm():
    segment = trained(a=[0.0, 0.0], b=[0.0], unused=[1.0])
    term = Clipping(context(clip_value=4.0, clip_norm=2.5))
    term.begin_(segment)
    a, b = segment.named["a"], segment.named["b"]
    a.grad, b.grad = torch.tensor([3.0, 0.0]), torch.tensor([-9.0])  # by value (3, 0), (-4): norm 5
    term.before_step_()
    assert a.grad.tolist() == pytest.approx([1.5, 0.0])
    assert b.grad.tolist() == pytest.approx([-2.0])
    assert segment.named["unused"].grad is None


def test_small_gradients_are_left_alone():
    segment = trained(a=[0.0, 0.0])
    term = Clipping(context(clip_value=4.0, clip_norm=5.5))
    term.begin_(segment)
    segment.named["a"].grad = torch.tensor([3.0, -4.0])
    term.before_step_()
    assert segment.named["a"].grad.tolist() == [3.0, -4.0]
