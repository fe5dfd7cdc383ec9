"""What a model makes of a client's hold-out."""

from __future__ import annotations

import math
from dataclasses import replace

import msgspec
import numpy as np
import pytest
import torch

from edge_sdk.models import build
from edge_sdk.protocol.messages import ModelSpec
from edge_sdk.tasks.table import answered_at_once
from edge_sdk.training.holdout import answers
from tests.support.examples import cnn, examples


def constant_model(logits):
    """Whose last exit answers the same to everything."""
    model = build(cnn())
    with torch.no_grad():
        *_, weight, bias = model.exits[-1].parameters()
        weight.zero_()
        bias.copy_(torch.tensor(logits))
    return model


def test_last_exit_by_hand():
    """Softmax of (ln 2, 0, 0): 1/2, 1/4, 1/4. Labels 0, 0, 1: two are right, the loss is
    (ln 2 + ln 2 + ln 4) / 3 = 4/3 ln 2."""
    found = answers(
        constant_model([math.log(2), 0, 0]), replace(examples(3), y=np.array([0, 0, 1])), 2
    )
    assert (found.num_examples, found.metric) == (3, 2 / 3)
    assert found.loss == pytest.approx(4 / 3 * math.log(2))


def test_every_example_counts_and_the_model_stays_as_it_was():
    model = build(cnn()).train()
    before = {name: tensor.clone() for name, tensor in model.tensors().items()}
    data = examples(250)
    with torch.no_grad():
        right = model.eval()(torch.from_numpy(data.x))[-1].argmax(1).numpy() == data.y
    found = answers(model.train(), data, 100)
    assert (found.num_examples, found.metric) == (250, right.mean())
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.tensors().items())
    assert answers(model, data.take(np.array([], dtype=np.int64)), 100) is None


def test_of_texts_fewer_are_answered_at_once():
    """256 places of 8192 tokens are 2 Mi outputs: two examples, of more places one."""
    texts = ModelSpec(
        family="llama", input_shape=(256,), num_classes=8192, exit=2, task="tokens", vocabulary=8192
    )
    assert answered_at_once(cnn()) == 100
    assert answered_at_once(texts) == 2
    assert answered_at_once(msgspec.structs.replace(texts, input_shape=(2048,))) == 1
