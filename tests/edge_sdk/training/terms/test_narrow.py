"""Narrow models: the scaler, and norms whose statistics come at the end."""

import pytest
import torch
from msgspec.structs import replace
from torch.nn import functional

from edge_sdk.models import build, initial_tensors
from edge_sdk.protocol.messages import Plan, Segment
from edge_sdk.training.trainer import train
from tests.support.examples import cnn, examples

SPEC = cnn(exit=2)
PLAN = Plan(segments=(Segment(first=1, last=2),), batch_size=8, optimizer="sgd", lr=0.1)
STATIC = replace(PLAN, static_norm=True)


def statistics(tensors):
    return {name: tensor for name, tensor in tensors.items() if "running" in name}


@pytest.mark.parametrize("levers", [{}, {"recompute": True}, {"micro_batch": 4}], ids=str)
def test_statistics_are_the_mean_of_one_pass_with_the_trained_weights(levers):
    sent, data = initial_tensors(SPEC, 0), examples(24)
    result = train(SPEC, replace(STATIC, epochs=2, **levers), sent, data)
    model = build(SPEC)
    model.load(result.tensors)
    model.train()
    totals = {name: torch.zeros_like(t) for name, t in statistics(sent).items()}
    for batch in torch.from_numpy(data.x).split(8):
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 1.0  # the batch's own
        with torch.no_grad():
            model(batch)
        for name, tensor in statistics(model.tensors()).items():
            totals[name] += tensor / 3
    for name, total in totals.items():
        assert torch.allclose(result.tensors[name], total, atol=1e-5), name
    plain = train(SPEC, replace(PLAN, epochs=2, **levers), sent, data)
    for name, tensor in result.tensors.items():  # training itself is by the batch either way
        assert torch.equal(tensor, plain.tensors[name]) == ("running" not in name), name


def test_statistics_of_a_stage_alone_are_over_its_frozen_prefix():
    sent, data = initial_tensors(SPEC, 0), examples(24)
    plan = replace(STATIC, segments=(Segment(first=2, last=2),))
    result = train(SPEC, plan, sent, data)
    assert not any(name.startswith("stages.0.") for name in result.tensors)
    model = build(SPEC)
    model.load(sent | result.tensors)
    with torch.no_grad():
        prefix = model.stages[0].eval()(torch.from_numpy(data.x))
        convolved = model.stages[1][0](prefix)
    means = torch.stack([part.mean((0, 2, 3)) for part in convolved.split(8)]).mean(0)
    assert torch.allclose(result.tensors["stages.1.1.running_mean"], means, atol=1e-5)


def test_a_pass_without_dropout():
    spec = replace(
        SPEC,
        family="vgg",
        exit=1,
        input_shape=(1, 8, 8),
        options={"channels": (3, 4), "dropout": 0.9},
    )
    sent, data = initial_tensors(spec, 0), examples(24)
    plan = replace(STATIC, segments=(Segment(first=1, last=1),))
    made = [train(spec, replace(plan, lr=1e-12, seed=s), sent, data).tensors for s in (1, 2)]
    for name in statistics(sent):
        assert torch.allclose(made[0][name], made[1][name], atol=1e-5), name


@pytest.mark.parametrize("scaler", ["training", "always"])
def test_one_step_of_half_the_width_by_hand(scaler):
    """Every convolution of the stages puts out twice as much, the exits do not."""
    spec, data = replace(SPEC, width=0.5), examples(8)
    sent = initial_tensors(spec, 0)
    result = train(spec, replace(PLAN, scaler=scaler), sent, data)
    model = build(spec)
    doubled = [n for n in sent if n.startswith("stages.") and sent[n].ndim == 4]
    assert len(doubled) == 3
    model.load(sent | {name: 2 * sent[name] for name in doubled})
    logits = model.train()(torch.from_numpy(data.x))
    sum(functional.cross_entropy(z, torch.from_numpy(data.y)) for z in logits).backward()
    for name, parameter in model.named_parameters():
        factor = 2 if name in doubled else 1
        want = sent[name] - 0.1 * factor * parameter.grad
        assert torch.allclose(result.tensors[name], want, atol=1e-5), name
    means = model.tensors()["stages.0.1.running_mean"]  # of what was scaled
    assert torch.allclose(result.tensors["stages.0.1.running_mean"], means, atol=1e-6)


def test_whole_models_are_not_scaled():
    sent, data = initial_tensors(SPEC, 0), examples(24)
    plain, scaled = (train(SPEC, replace(PLAN, scaler=s), sent, data) for s in ("none", "always"))
    assert all(torch.equal(plain.tensors[name], scaled.tensors[name]) for name in sent)
