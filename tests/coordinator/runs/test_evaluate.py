"""Figures about a global model, each worked out by hand or in numpy beside the assertion."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from msgspec.structs import replace as replace_plan

from coordinator.cohorts.sampling import job_seed
from coordinator.runs.evaluate import (
    figures_of,
    linear_cka,
    metric_per_exit,
    personalised,
)
from edge_sdk.data.loading import Examples
from edge_sdk.errors import ConfigError, DataError, ShapeError
from edge_sdk.models import initial_tensors
from edge_sdk.protocol.messages import Plan, Segment
from edge_sdk.training.trainer import train
from tests.support.examples import cnn, examples, two_exits

PLAN = Plan(segments=(Segment(first=1, last=3),), batch_size=4, lr=0.01, seed=5)


@pytest.mark.parametrize(("scale", "of_mean"), [(1.0, 1.0), (2.0, 0.0)])
def test_the_mean_of_the_exits_logits_by_hand(scale, of_mean):
    """Of (1, 0) exit 1 says (scale ln 3, 0), exit 2 (0, ln 4): class 0 against class 1, and the
    mean what the surer of both says."""
    spec, tensors = two_exits()
    tensors["exits.0.weight"] = scale * tensors["exits.0.weight"]
    x = np.array([[1.0, 0.0]] * 2, dtype=np.float32)
    found = figures_of(spec, tensors, Examples(x=x, y=np.array([1, 1]), num_classes=2))
    assert (found.by_exit, found.of_mean) == ([0.0, 1.0], of_mean)


def test_cka_by_hand():
    # centred x: (-1, 0, 1); centred y: (-1, -1, 2); |y'x|^2 = 3^2, |x'x| = 2, |y'y| = 6
    x, y = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[0.0], [0.0], [3.0]])
    assert linear_cka(x, y) == pytest.approx(9 / 12)


def test_cka_is_the_feature_form_and_ignores_scale_turn_and_shift():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, 6)), rng.normal(size=(20, 4))
    cx, cy = x - x.mean(0), y - y.mean(0)
    by_features = np.linalg.norm(cy.T @ cx) ** 2 / (
        np.linalg.norm(cx.T @ cx) * np.linalg.norm(cy.T @ cy)
    )
    turn = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    assert linear_cka(torch.tensor(x), torch.tensor(y)) == pytest.approx(by_features)
    assert linear_cka(torch.tensor(x), torch.tensor(3 * x @ turn + 7)) == pytest.approx(1.0)


def test_cka_takes_feature_maps_and_refuses_other_examples():
    maps = torch.randn(5, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    assert linear_cka(maps, maps.flatten(1)) == pytest.approx(1.0)
    assert math.isnan(linear_cka(maps, torch.ones(5, 1)))
    with pytest.raises(ShapeError, match="of 5 and of 4 examples"):
        linear_cka(maps, maps[:4])


def test_personalised_accuracy_is_that_of_the_tuned_subnetwork():
    """Client 2 holds exit 1 only: the same as training and measuring that prefix by hand."""
    spec, tensors = cnn(), initial_tensors(cnn(), 0)
    given = {name: tensor.clone() for name, tensor in tensors.items()}
    shards, holdouts = [examples(12, 1), examples(12, 2)], [examples(9, 3), examples(9, 4)]
    got = personalised(spec, tensors, shards, holdouts, PLAN, epochs=3, exits=[3, 1])
    small = cnn(exit=1)
    prefix = {name: tensors[name] for name in initial_tensors(small, 0)}
    plan = Plan(
        segments=(Segment(first=1, last=1),),
        epochs=3,
        batch_size=4,
        lr=0.01,
        seed=job_seed(5, 0, "personalise/2"),
    )
    tuned = train(small, plan, prefix, shards[1]).tensors
    assert got[1].before == metric_per_exit(small, prefix, holdouts[1])[0]
    assert got[1].after == metric_per_exit(small, tuned, holdouts[1])[0]
    assert got[0].before == metric_per_exit(spec, tensors, holdouts[0])[2]
    assert all(torch.equal(tensors[name], given[name]) for name in given)


def test_what_is_frozen_stays_in_a_tuned_model():
    """An update lacks it: the tuned model has it from the one that it began from."""
    spec, shard = cnn(), examples(40, 1)
    learned = train(spec, replace_plan(PLAN, epochs=40), initial_tensors(spec, 0), shard).tensors
    plan = replace_plan(PLAN, frozen=("stages",), lr=1e-9)
    (got,) = personalised(spec, learned, [shard], [shard], plan, epochs=1)
    assert got.after == got.before > 0.9


def test_personalising_helps_a_client_of_one_class():
    """Every example is of class 2, which this start never predicts and a few epochs learn."""
    single = replace(examples(12), y=np.full(12, 2, dtype=np.int64))
    tensors = initial_tensors(cnn(), 0)
    (got,) = personalised(cnn(), tensors, [single], [single], PLAN, epochs=20)
    assert (got.before, got.after) == (0.0, 1.0)


def test_personalised_accuracy_refuses_what_does_not_fit():
    tensors, shard = initial_tensors(cnn(), 0), examples(9)
    with pytest.raises(ConfigError, match="1 training parts, 2 hold-outs and 1 exits"):
        personalised(cnn(), tensors, [shard], [shard, shard], PLAN, 1)
    none = shard.take(np.array([], dtype=np.int64))
    with pytest.raises(DataError, match="client 1 has no hold-out"):
        personalised(cnn(), tensors, [shard], [none], PLAN, 1)
