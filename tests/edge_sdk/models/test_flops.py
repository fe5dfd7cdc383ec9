"""Operations of single layers and whole models, against hand counts and torch's own counter."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from edge_sdk.models import build
from edge_sdk.models.flops import FlopCounter
from edge_sdk.protocol.messages import ModelSpec


@pytest.mark.parametrize("family", ["cnn", "mlp", "resnet18", "vgg"])
def test_flops_equal_those_that_torch_counts(family):
    spec = ModelSpec(family=family, input_shape=(3, 18, 25), num_classes=5, exit=2)
    model, x = build(spec), torch.randn(4, 3, 18, 25)
    with FlopCounterMode(display=False) as theirs:
        torch.stack(model(x)).sum().backward()
    with FlopCounter() as ours:
        torch.stack(model(x)).sum().backward()
    assert ours.total == theirs.get_total_flops()


@pytest.mark.parametrize(
    "product",
    [
        lambda a, b, c: a @ b,
        lambda a, b, c: torch.mm(a, b),
        lambda a, b, c: torch.addmm(c, a, b),
        lambda a, b, c: torch.bmm(a[None], b[None]),
        lambda a, b, c: torch.baddbmm(c[None], a[None], b[None]),
        lambda a, b, c: torch.nn.functional.linear(a, b.T),
    ],
)
def test_flops_of_products_by_hand(product):
    a, b, c = torch.ones(2, 3), torch.ones(3, 5, requires_grad=True), torch.ones(2, 5)
    with FlopCounter() as counter:
        product(a, b, c)
    assert counter.total == 2 * (2 * 3 * 5) * 2  # forward, and for the gradient of b
    with FlopCounter() as counter, torch.no_grad():
        product(a, b, c)
    assert counter.total == 2 * (2 * 3 * 5)


def test_flops_of_an_attention_layer_counted_by_hand():
    """Of 2 examples of 3 positions and 4 features: four products of 6 x 4 x 4, and 2 x 3 x 3 x 4
    multiply-adds for scores as for sums; with gradients of weights 2 times, 3 behind the first."""
    layer, x = torch.nn.MultiheadAttention(4, 2, batch_first=True), torch.zeros(2, 3, 4)
    with FlopCounter() as flops, torch.no_grad():
        layer(x, x, x)
    assert flops.total == 2 * (4 * 96 + 2 * 72)
    with FlopCounter() as flops:
        layer(x, x, x)
    assert flops.total == 2 * (3 * 96 * 2 + 96 * 3 + 72 * 7)
