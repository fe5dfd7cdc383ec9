"""A second model teaches and is trained beside the first: the loss by hand, and who moves."""

import math

import pytest
import torch
from msgspec.structs import replace

from edge_sdk.errors import ConfigError, ShapeError
from edge_sdk.models import initial_tensors
from edge_sdk.protocol.messages import Plan, Segment, Teacher
from edge_sdk.training.terms.base import Batch
from edge_sdk.training.terms.teacher import Taught
from edge_sdk.training.trainer import train
from tests.support.examples import cnn, examples, two_exits
from tests.support.terms import context

SPEC, LIGHT = cnn(exit=2), cnn(exit=1)
TEACHER = Teacher(model=LIGHT, weight=0.2, temperature=15.0, is_trained=True)
PLAN = Plan(segments=(Segment(first=1, last=2),), batch_size=8, lr=0.01, seed=3, teacher=TEACHER)
PLAIN = replace(PLAN, teacher=None)
SENT = initial_tensors(SPEC, 5)
BROUGHT = {f"teacher/{name}": tensor for name, tensor in initial_tensors(LIGHT, 6).items()}


def test_the_loss_by_hand():
    """The teacher of two_exits says (ln 3 f0, 0), f0 = ReLU of 2 times its input in units of the
    batch: of inputs 1 and 3, which lie 1 beside their mean, f0 is 0 and 2. At T = 2 that is
    (1, 1) / 2 and (3, 1) / 4; answers 0, 0 are (1, 1) / 2, from the second 3/4 ln 3/2 + 1/4 ln 1/2
    away. The running statistics that came play no part."""
    spec, tensors = two_exits()
    first = {n: t for n, t in tensors.items() if n.startswith(("stages.0.", "exits.0."))}
    first |= {"stages.0.2.weight": torch.full((2,), 2.0)}
    first |= {"stages.0.2.running_mean": torch.full((2,), 1e3)}
    held = {f"teacher/{name}": tensor for name, tensor in first.items()}
    told = Teacher(model=replace(spec, exit=1), weight=0.25, temperature=2.0)
    term = Taught(context(teacher=told))
    assert term.received(held | {"w": torch.zeros(1)}).keys() == {"w"}
    x, labels = torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.tensor([0, 0])
    logits = torch.zeros(2, 2, requires_grad=True)
    loss = term.loss(torch.tensor(8.0), Batch(x, [torch.ones(2, 2), logits], labels))
    apart = (0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 2
    assert loss.item() == pytest.approx(0.75 * 8 + 0.25 * 4 * apart, abs=1e-4)
    loss.backward()
    # of T^2 KL by z, the mean of two: T (p - q) / 2 = 2 (1/2 - 3/4) / 2
    assert logits.grad[0].tolist() == pytest.approx([0.0, 0.0], abs=1e-4)
    assert logits.grad[1].tolist() == pytest.approx([-0.0625, 0.0625], abs=1e-4)
    assert all(p.grad is None for p in term._teacher.parameters()), "P9: it has no backward pass"


@pytest.mark.parametrize("micro_batch", [0, 3])
def test_its_copy_is_trained_as_if_alone_and_the_teacher_stays_as_it_came(micro_batch):
    plan = replace(PLAN, micro_batch=micro_batch, optimizer="sgd")
    light = {name.removeprefix("teacher/"): tensor for name, tensor in BROUGHT.items()}
    segments = (Segment(first=1, last=1),)
    alone = train(LIGHT, replace(plan, teacher=None, segments=segments), light, examples(24))
    job = SENT | BROUGHT
    before = {name: tensor.clone() for name, tensor in job.items()}
    result = train(SPEC, plan, job, examples(24))
    for name, tensor in alone.tensors.items():
        torch.testing.assert_close(result.tensors[f"teacher/{name}"], tensor, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(job[name], tensor) for name, tensor in before.items())
    assert list(result.tensors) == list(job)


def test_without_weight_it_teaches_nothing():
    for is_trained in (True, False):
        told = replace(TEACHER, weight=0.0, is_trained=is_trained)
        result = train(SPEC, replace(PLAN, teacher=told), SENT | BROUGHT, examples(24))
        plain = train(SPEC, PLAIN, SENT, examples(24))
        for name, tensor in plain.tensors.items():
            torch.testing.assert_close(result.tensors[name], tensor, atol=1e-6, rtol=1e-5)
        assert len(result.tensors) == len(SENT) + (len(BROUGHT) if is_trained else 0)
    taught = train(SPEC, PLAN, SENT | BROUGHT, examples(24))
    assert not torch.equal(taught.tensors["exits.1.2.weight"], plain.tensors["exits.1.2.weight"])


def test_the_model_s_gradients_are_clipped_without_the_copy_s():
    """Published code clips the personal model's step only."""
    clipped = train(SPEC, replace(PLAN, clip_norm=1e-3), SENT | BROUGHT, examples(24))
    free = train(SPEC, PLAN, SENT | BROUGHT, examples(24))
    for name in BROUGHT:
        assert torch.equal(clipped.tensors[name], free.tensors[name]), name


def test_what_lacks_is_refused():
    with pytest.raises(ShapeError, match="lacks tensors teacher/"):
        train(SPEC, PLAN, SENT, examples(24))
    with pytest.raises(ConfigError, match="a teacher needs one segment from stage 1"):
        deep = replace(PLAN, segments=(Segment(first=2, last=2),))
        train(SPEC, deep, SENT | BROUGHT, examples(24))
