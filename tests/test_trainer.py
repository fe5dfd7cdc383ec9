"""Local training: joint loss, segments, frozen prefixes, what comes back."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from edge_sdk.errors import ConfigError, DataError, ShapeError, TrainerError
from edge_sdk.losses import joint_exit_loss, proximal_term
from edge_sdk.models import build, initial_tensors
from edge_sdk.optim import Optimizer
from edge_sdk.trainer import Cancelled, train
from edge_sdk.wire import Plan, Segment
from tests.helpers import cnn, examples

PREFIX = (Segment(first=1, last=3),)


def test_joint_exit_loss_is_the_weighted_sum():
    # equal logits of 2 classes cost ln 2; logits (ln 3, 0) give p = 3/4 for class 0: ln(4/3)
    even, sure = torch.zeros(1, 2), torch.tensor([[math.log(3.0), 0.0]])
    loss = joint_exit_loss([even, sure], torch.tensor([0]), [1.0, 2.0])
    assert loss.item() == pytest.approx(math.log(2) + 2 * math.log(4 / 3))


def test_joint_exit_loss_wants_a_weight_per_exit():
    with pytest.raises(ShapeError, match="1 exit weights for 2 exits"):
        joint_exit_loss([torch.zeros(1, 2)] * 2, torch.tensor([0]), [1.0])


def test_proximal_term_is_squared():
    # (3 - 1)^2 + (0 - 4)^2 = 20; published code uses the norm itself
    term = proximal_term({"w": torch.tensor([3.0, 0.0])}, {"w": torch.tensor([1.0, 4.0])})
    assert term.item() == pytest.approx(20.0)


@pytest.mark.parametrize("changes", [
    {"optimizer": "adam"},
    {"optimizer": "adam", "weight_decay": 0.1},
    {"optimizer": "sgd"},
    {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.01},
], ids=str)  # fmt: skip
def test_optimizer_equals_torch(changes):
    plan = Plan(segments=PREFIX, lr=0.05, **changes)
    start = [torch.randn(3, 4, dtype=torch.float64), torch.randn(5, dtype=torch.float64)]
    ours = [t.clone().requires_grad_() for t in start]
    theirs = [t.clone().requires_grad_() for t in start]
    kinds = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
    extra = {"momentum": plan.momentum} if plan.optimizer == "sgd" else {}
    peer = kinds[plan.optimizer](theirs, lr=0.05, weight_decay=plan.weight_decay, **extra)
    optimizer = Optimizer(ours, plan)
    for step in range(7):
        for parameters in (ours, theirs):
            sum(((p - step).square() * p.cos()).sum() for p in parameters).backward()
        optimizer.step_()
        peer.step()
        peer.zero_grad()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)
        assert a.grad is None


def test_one_sgd_step_by_hand():
    """One full batch, one step: w <- w - lr * gradient of the summed cross entropies."""
    spec, data = cnn(), examples(6)
    tensors = initial_tensors(spec, 0)
    plan = Plan(segments=PREFIX, batch_size=6, lr=0.1, optimizer="sgd")
    result = train(spec, plan, tensors, data)
    model = build(spec)
    model.load(tensors)
    model.train()
    logits = model(torch.from_numpy(data.x))
    loss = sum(torch.nn.functional.cross_entropy(z, torch.from_numpy(data.y)) for z in logits)
    loss.backward()
    for name, parameter in model.named_parameters():
        want = tensors[name] - 0.1 * parameter.grad
        assert torch.allclose(result.tensors[name], want, atol=1e-6), name
    assert result.num_steps == 1
    assert sum(r.loss for r in result.exits) == pytest.approx(loss.item(), rel=1e-5)


def test_deep_segment_trains_alone_over_the_frozen_prefix():
    spec, data = cnn(), examples()
    tensors = initial_tensors(spec, 0)
    plan = Plan(segments=(Segment(first=3, last=3),), epochs=2, batch_size=8, lr=0.05)
    result = train(spec, plan, tensors, data)
    assert {name.split(".")[1] for name in result.tensors} == {"2"}
    assert [r.exit for r in result.exits] == [3]
    # by hand: features of the frozen stages in evaluation mode, then ordinary training
    model = build(spec)
    model.load(tensors)
    model.eval()
    with torch.no_grad():
        features = model.stages[1](model.stages[0](torch.from_numpy(data.x)))
    stage, head = model.stages[2].train(), model.exits[2].train()
    parameters = [*stage.parameters(), *head.parameters()]
    optimizer = Optimizer(parameters, plan)
    order = torch.Generator().manual_seed(plan.seed)
    for _ in range(2):
        for batch in torch.randperm(24, generator=order).split(8):
            logits = head(stage(features[batch]))
            labels = torch.from_numpy(data.y)[batch]
            torch.nn.functional.cross_entropy(logits, labels).backward()
            optimizer.step_()
    for name, tensor in result.tensors.items():
        assert torch.allclose(tensor, model.tensors()[name], atol=1e-6), name


def test_segments_are_independent():
    """Stage 3 trains over the received prefix, not over the one trained in the same job."""
    spec, data, tensors = cnn(), examples(), initial_tensors(cnn(), 0)
    deep = (Segment(first=3, last=3),)
    both = train(spec, Plan(segments=((Segment(first=1, last=1)), *deep)), tensors, data)
    alone = train(spec, Plan(segments=deep), tensors, data)
    shallow = train(spec, Plan(segments=(Segment(first=1, last=1),)), tensors, data)
    for name, tensor in (alone.tensors | shallow.tensors).items():
        assert torch.equal(both.tensors[name], tensor), name


def test_training_is_a_function_of_its_arguments():
    spec, data, tensors = cnn(), examples(), initial_tensors(cnn(), 0)
    plan = Plan(segments=PREFIX, epochs=2, batch_size=8, seed=5)
    torch.manual_seed(1)
    a = train(spec, plan, tensors, data).tensors
    torch.manual_seed(2)
    b = train(spec, plan, tensors, data).tensors
    c = train(spec, replace(plan, seed=6), tensors, data).tensors
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], c[name]) for name in a)


def test_training_does_not_change_what_was_received():
    spec, data, tensors = cnn(), examples(), initial_tensors(cnn(), 0)
    before = {name: t.clone() for name, t in tensors.items()}
    train(spec, Plan(segments=PREFIX), tensors, data)
    assert all(torch.equal(before[name], tensors[name]) for name in before)


def test_training_learns():
    spec, data = cnn(), examples(60)
    plan = Plan(segments=PREFIX, epochs=20, batch_size=10, lr=0.01)
    result = train(spec, plan, initial_tensors(spec, 0), data)
    assert all(r.accuracy > 0.9 for r in result.exits)
    assert all(r.loss < math.log(3) / 2 for r in result.exits)


def test_exit_weights_choose_what_is_trained():
    spec, data, tensors = cnn(), examples(), initial_tensors(cnn(), 0)
    plan = Plan(segments=PREFIX, exit_weights=(1.0, 0.0, 0.0), optimizer="sgd")
    result = train(spec, plan, tensors, data)
    parameters = dict(build(spec).named_parameters())
    for name, tensor in result.tensors.items():
        if name in parameters:
            assert torch.equal(tensor, tensors[name]) != (name.split(".")[1] == "0"), name
    deepest = train(spec, replace(plan, exit_weights=(0.0, 0.0, 1.0)), tensors, data)
    heads = {name for name in deepest.tensors if name.startswith("exits")}
    changed = {n for n in heads if not torch.equal(deepest.tensors[n], tensors[n])}
    assert changed == {"exits.2.2.weight", "exits.2.2.bias"}


def test_a_rest_too_small_for_batchnorm_is_left_out():
    data = examples(9)  # batches of 8 and 1
    result = train(cnn(), Plan(segments=PREFIX, batch_size=8), initial_tensors(cnn(), 0), data)
    assert result.num_steps == 1
    assert result.num_examples == 9


def test_phases_and_peak_are_measured():
    result = train(cnn(), Plan(segments=PREFIX), initial_tensors(cnn(), 0), examples())
    assert set(result.phases) == {"load", "train"}
    assert result.phases["train"].wall_s > 0
    assert result.peak_memory_bytes > 50 * 1024**2  # torch alone is more


def test_bad_jobs_say_what_is_wrong():
    spec, data, tensors = cnn(), examples(), initial_tensors(cnn(), 0)
    plan = Plan(segments=PREFIX)
    with pytest.raises(ShapeError, match=r"lacks tensors stages\.2\.0\.weight"):
        part = {n: t for n, t in tensors.items() if n != "stages.2.0.weight"}
        train(spec, plan, part, data)
    with pytest.raises(ShapeError, match="NaN"):
        name = "stages.0.0.weight"
        train(spec, plan, tensors | {name: tensors[name] * math.nan}, data)
    with pytest.raises(ConfigError, match="segment"):
        train(spec, Plan(segments=(Segment(first=1, last=4),)), tensors, data)
    with pytest.raises(ConfigError, match="overlaps"):
        twice = (Segment(first=1, last=2), Segment(first=2, last=3))
        train(spec, Plan(segments=twice), tensors, data)
    with pytest.raises(ConfigError, match="empty"):
        train(spec, Plan(segments=(Segment(first=3, last=2),)), tensors, data)
    with pytest.raises(DataError, match="takes"):
        train(spec, plan, tensors, examples(shape=(1, 9, 9)))
    with pytest.raises(DataError, match="at least 3"):
        train(spec, plan, tensors, examples(2))
    with pytest.raises(DataError, match="labels reach 2"):
        two = replace(spec, num_classes=2)
        train(two, plan, initial_tensors(two, 0), data)


def test_diverging_training_is_an_error():
    plan = Plan(segments=PREFIX, lr=1e30, optimizer="sgd", epochs=3)
    with pytest.raises((TrainerError, ShapeError), match="finite|NaN"):
        train(cnn(), plan, initial_tensors(cnn(), 0), examples())


def test_cancelling_stops_training():
    calls = iter([False, False, True])
    with pytest.raises(Cancelled):
        train(
            cnn(),
            Plan(segments=PREFIX, epochs=50),
            initial_tensors(cnn(), 0),
            examples(),
            should_stop=lambda: next(calls),
        )


def test_data_are_not_changed():
    data = examples()
    x = data.x.copy()
    train(cnn(), Plan(segments=PREFIX), initial_tensors(cnn(), 0), data)
    assert np.array_equal(x, data.x)
