"""What docs/security.md says that an update tells: the coordinator can count labels, not estimate
them, and from usual training it still learns which are many."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edge_sdk.data.loading import load_dataset
from edge_sdk.models import initial_tensors
from edge_sdk.protocol.messages import ModelSpec, Plan, Segment
from edge_sdk.training.trainer import train

WEIGHT, BIAS = "exits.0.2.weight", "exits.0.2.bias"
CLASSES = 10


def counted(num_examples, *, zero_exit, **plan):
    """The labels of a device's digits, and what its update says of them: with softmax p and n
    examples the gradient of the bias is the mean of p minus each class's share."""
    digits = load_dataset("digits", 0).train
    shares = np.random.default_rng(0).dirichlet([0.3] * CLASSES)
    numbers = np.random.default_rng(0).multinomial(num_examples, shares)
    places = [np.flatnonzero(digits.y == label)[:n] for label, n in enumerate(numbers)]
    shard = digits.take(np.concatenate(places))
    spec = ModelSpec(family="cnn", input_shape=digits.input_shape, num_classes=CLASSES, exit=1)
    sent = initial_tensors(spec, 0)
    if zero_exit:
        sent |= {name: torch.zeros_like(sent[name]) for name in (WEIGHT, BIAS)}
    settings = Plan(segments=(Segment(first=1, last=1),), **plan)
    done = train(spec, settings, dict(sent), shard)
    step = (sent[BIAS] - done.tensors[BIAS]).double() / settings.lr / done.num_steps
    told = len(shard) * (1 / CLASSES - step)
    return np.bincount(shard.y, minlength=CLASSES), told.numpy()


def test_one_step_from_an_exit_of_zeros_tells_every_label():
    true, told = counted(60, zero_exit=True, batch_size=60, lr=0.1, optimizer="sgd")
    assert told == pytest.approx(true, abs=1e-3)
    assert sum(true) == 60
    assert max(true) > 15


def test_usual_training_still_tells_which_labels_are_many():
    true, told = counted(200, zero_exit=False, batch_size=20, epochs=5, lr=0.001, optimizer="adam")
    assert np.corrcoef(true, told)[0, 1] > 0.8
