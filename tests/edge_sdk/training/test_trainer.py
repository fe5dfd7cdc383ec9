"""Local training: joint loss, segments, frozen prefixes, what comes back."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from edge_sdk.errors import ConfigError, DataError, ShapeError, TrainerError
from edge_sdk.models import build, initial_tensors
from edge_sdk.models.losses import distillation
from edge_sdk.protocol.messages import ModelSpec, Plan, Segment
from edge_sdk.training.optim import Optimizer
from edge_sdk.training.segment import Cancelled, forward, parts
from edge_sdk.training.terms.base import Trained
from edge_sdk.training.trainer import train
from tests.support.examples import cnn, examples

PREFIX = (Segment(first=1, last=3),)


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "adam"},
        {"optimizer": "adam", "weight_decay": 0.1},
        {"optimizer": "sgd"},
        {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.01},
    ],
    ids=str,
)
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


def test_one_sgd_step_with_distillation_by_hand():
    spec, data = cnn(exit=2), examples(6)
    tensors = initial_tensors(spec, 0)
    plan = Plan(
        segments=(Segment(first=1, last=2),),
        batch_size=6,
        lr=0.1,
        optimizer="sgd",
        distill="mutual",
        distill_weight=0.5,
        distill_temperature=2.0,
    )
    result = train(spec, plan, tensors, data)
    model = build(spec)
    model.load(tensors)
    logits = model.train()(torch.from_numpy(data.x))
    loss = sum(torch.nn.functional.cross_entropy(z, torch.from_numpy(data.y)) for z in logits)
    (loss + 0.5 * distillation(logits, "mutual", 2.0)).backward()
    for name, parameter in model.named_parameters():
        want = tensors[name] - 0.1 * parameter.grad
        assert torch.allclose(result.tensors[name], want, atol=1e-6), name
    # the losses told are the cross entropies alone
    assert sum(r.loss for r in result.exits) == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("segments", "changes"),
    [
        ([(1, 1), (2, 2), (3, 3)], {"distill": "mutual", "distill_weight": 1.0}),
        ([(1, 3)], {"distill": "mutual", "distill_weight": 0.0}),
        ([(1, 3)], {"distill": "none", "distill_weight": 1.0}),
    ],
    ids=["one exit each", "no weight", "none"],
)
def test_nothing_to_distil(segments, changes):
    spec, data, tensors = cnn(), examples(), initial_tensors(cnn(), 0)
    plan = Plan(segments=tuple(Segment(first=a, last=b) for a, b in segments), batch_size=8)
    plain = train(spec, plan, tensors, data).tensors
    other = train(spec, replace(plan, **changes), tensors, data).tensors
    assert all(torch.equal(plain[name], other[name]) for name in plain)


def test_parts_of_a_batch_give_the_gradients_of_the_whole():
    """A model without BatchNorm; 24 examples in batches of 12, each in 3 parts, with every term of
    the loss."""
    spec = ModelSpec(
        family="lstm", input_shape=(2, 5), num_classes=3, exit=2, options={"hidden": 4}
    )
    data, tensors = examples(24, shape=(2, 5)), initial_tensors(spec, 0)
    plan = Plan(
        segments=(Segment(first=1, last=2),),
        batch_size=12,
        optimizer="sgd",
        lr=0.1,
        epochs=2,
        prox_mu=0.5,
        distill="mutual",
        distill_weight=0.5,
    )
    whole = train(spec, plan, tensors, data)
    parts = train(spec, replace(plan, micro_batch=5), tensors, data)
    assert parts.num_steps == whole.num_steps == 4
    for name, tensor in whole.tensors.items():
        assert torch.allclose(tensor, parts.tensors[name], atol=1e-6), name
        assert not torch.equal(tensor, tensors[name]), name
    for a, b in zip(whole.exits, parts.exits, strict=True):
        assert (a.loss, a.metric) == pytest.approx((b.loss, b.metric), rel=1e-5)


def test_parts_are_about_equal():
    sizes = [[len(part) for part in parts(torch.arange(n), 8)] for n in (8, 9, 17, 32)]
    assert sizes == [[8], [5, 4], [6, 6, 5], [8, 8, 8, 8]]
    assert [len(part) for part in parts(torch.arange(9), 0)] == [9]


def test_recomputing_keeps_less_of_the_graph():
    """Bytes that autograd saves for a step: of stage 1 its input only."""
    spec = cnn()
    model, x = build(spec), torch.randn(6, *spec.input_shape)
    segment = Segment(first=1, last=spec.exit)
    whole = Trained(segment, model.stages, model.exits, {}, 0, lambda rows: [x[rows]])
    saved = []
    for recompute in (False, True):
        storages = {}

        def keep(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logits = forward(whole, [x], recompute)
        saved.append(sum(storages.values()))
        del logits
    assert saved[1] < 0.6 * saved[0]


def test_distillation_teaches_an_exit_that_has_no_weight():
    spec, data, tensors = cnn(exit=2), examples(), initial_tensors(cnn(exit=2), 0)
    plan = Plan(
        segments=(Segment(first=1, last=2),),
        exit_weights=(0.0, 1.0),
        distill="deep-to-shallow",
        distill_weight=1.0,
    )
    result = train(spec, plan, tensors, data)
    assert not torch.equal(result.tensors["exits.0.2.weight"], tensors["exits.0.2.weight"])


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


# 24 examples; stage 2 takes (4, 4, 4) features of 4 bytes, stage 3 (5, 2, 2): 6144 and 1920 bytes
@pytest.mark.parametrize(
    ("stage", "cache_bytes", "is_kept"),
    [(2, 6144, True), (2, 6143, False), (3, 1920, True), (3, 1919, False), (3, 0, False)],
)
def test_features_beyond_the_bound_are_made_anew_and_train_alike(stage, cache_bytes, is_kept):
    spec, data, tensors = cnn(), examples(), initial_tensors(cnn(), 0)
    plan = Plan(segments=(Segment(first=stage, last=stage),), epochs=3, batch_size=7, lr=0.05)
    calls = CountAsked()
    kept = train(spec, plan, tensors, data)
    bounded = train(spec, plan, tensors, data, cache_bytes=cache_bytes, should_stop=calls)
    # asked before each of 4 chunks of 24 examples, and before each of 3 * 4 batches
    assert calls.count == (4 if is_kept else 0) + 12
    for name, tensor in kept.tensors.items():
        assert torch.allclose(tensor, bounded.tensors[name], rtol=0, atol=1e-6), name
    assert kept.num_steps == bounded.num_steps


def test_a_single_epoch_keeps_no_features():
    spec, tensors, calls = cnn(), initial_tensors(cnn(), 0), CountAsked()
    plan = Plan(segments=(Segment(first=3, last=3),), batch_size=8)
    train(spec, plan, tensors, examples(), should_stop=calls)
    assert calls.count == 3  # batches


class CountAsked:
    """A should_stop that says no and counts how often it was asked."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> bool:
        self.count += 1
        return False


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
    assert all(r.metric > 0.9 for r in result.exits)
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


def test_a_segment_whose_exits_weigh_nothing_is_trained_as_if_they_weighed_one():
    """Weights 0, 0, 1: stage 2 alone and the prefix of two count with 1, stage 3 with its own."""
    data, tensors = examples(), initial_tensors(cnn(), 0)
    for segments in ((Segment(first=2, last=2),), (Segment(first=1, last=2),)):
        ones = Plan(segments=segments, lr=0.1)
        want = train(cnn(), ones, tensors, data).tensors
        got = train(cnn(), replace(ones, exit_weights=(0.0, 0.0, 1.0)), tensors, data).tensors
        assert all(torch.equal(want[name], got[name]) for name in want)
        assert not torch.equal(got["exits.1.2.bias"], tensors["exits.1.2.bias"])


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
    with pytest.raises(DataError, match="labels from 0 to 2, expected 0 to 1"):
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
