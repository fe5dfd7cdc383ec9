"""Examples that a plan sets aside: never trained on, and the received model's answers to them."""

import torch
from msgspec.structs import replace

from edge_sdk.data.partition import split_holdout
from edge_sdk.models import build, initial_tensors
from edge_sdk.protocol.messages import Plan, Segment
from edge_sdk.training.holdout import answers
from edge_sdk.training.trainer import train
from tests.support.examples import cnn, examples

PLAN = Plan(segments=(Segment(first=1, last=2),), batch_size=8, epochs=2, holdout=0.25, seed=3)


def test_they_are_not_trained_on_and_the_received_model_answers_them():
    spec, data, sent = cnn(exit=2), examples(24), initial_tensors(cnn(exit=2), 0)
    kept, held = split_holdout(data, 0.25)
    result = train(spec, PLAN, sent, data)
    alone = train(spec, replace(PLAN, holdout=0.0), sent, kept)
    assert result.num_examples == len(kept) == 18
    for name, tensor in alone.tensors.items():
        assert torch.equal(result.tensors[name], tensor), name
    model = build(spec)
    model.load(sent)
    assert result.holdout == answers(model, held, PLAN.batch_size)
    assert alone.holdout is None


def test_they_are_the_same_in_every_round():
    spec, data, sent = cnn(exit=2), examples(24), initial_tensors(cnn(exit=2), 0)
    first, later = (train(spec, replace(PLAN, seed=seed), sent, data) for seed in (1, 2))
    assert first.holdout == later.holdout


def test_cached_features_are_of_those_trained_on():
    spec, data, sent = cnn(exit=2), examples(24), initial_tensors(cnn(exit=2), 0)
    plan = replace(PLAN, segments=(Segment(first=2, last=2),))
    cached = train(spec, plan, sent, data)
    anew = train(spec, plan, sent, data, cache_bytes=0)
    for name, tensor in anew.tensors.items():
        assert torch.equal(cached.tensors[name], tensor), name


def test_too_few_to_set_any_aside():
    spec, data, sent = cnn(exit=2), examples(3), initial_tensors(cnn(exit=2), 0)
    result = train(spec, PLAN, sent, data)
    assert (result.holdout, result.num_examples) == (None, 3)
