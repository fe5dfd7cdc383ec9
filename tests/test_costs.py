"""Costs against hand counts, against the real graph, and against the peak of a real trainer."""

import json
import os
import subprocess
import sys

import msgspec
import pytest
import torch
from msgspec.structs import replace
from torch import nn

from edge_sdk.capacity import TRAINER_ENVIRONMENT, SegmentCost, peak_bytes
from edge_sdk.errors import ConfigError
from edge_sdk.models import build, costs
from edge_sdk.models.costs import segment_costs, segment_costs_apart
from edge_sdk.models.lstm_cost import count_as_fused
from edge_sdk.wire import ModelSpec, Plan, Segment

CNN = ModelSpec(
    family="cnn", input_shape=(1, 4, 4), num_classes=2, exit=2, options={"channels": (2, 3)}
)
PLAN = Plan(segments=(Segment(first=1, last=2),), batch_size=4, optimizer="sgd")


def by_segment(
    spec: ModelSpec, plan: Plan = PLAN, num_examples: int = 10
) -> dict[tuple[int, int], SegmentCost]:
    found = segment_costs(spec, plan, num_examples, runtime_bytes=1000)
    return {(cost.first, cost.last): cost for cost in found}


def test_prefixes_then_single_stages():
    assert list(by_segment(replace(CNN, exit=3, options={}))) == [
        (1, 1), (1, 2), (1, 3), (2, 2), (3, 3)
    ]  # fmt: skip


def test_tensors_counted_by_hand():
    found = by_segment(CNN)
    # stage 1: conv 1->2 of 18 and conv 2->2 of 36 weights, two norms of 2 * 2 trained and 2 * 2
    # running: 62 trained, 70 held. Exit 1: 2 * 2 * 2 inputs to 2 classes: 16 + 2 = 18.
    # Stage 2: conv 2->3 of 54, norm of 6 + 6: 60, 66. Exit 2: 3 * 2 * 2 to 2: 24 + 2 = 26.
    one, both, alone = found[1, 1], found[1, 2], found[2, 2]
    assert one.gradient_bytes == 4 * (62 + 18)
    assert one.upload_bytes == one.download_bytes == 4 * (70 + 18)
    # the model, what was received, and a kernel's copy of the largest weight, the 36 (54)
    assert one.parameter_bytes == 2 * one.download_bytes + 4 * 36
    assert both.gradient_bytes == 4 * (62 + 18 + 60 + 26)
    assert alone.gradient_bytes == 4 * (60 + 26)
    assert alone.upload_bytes == 4 * (66 + 26)
    assert alone.download_bytes == 4 * (70 + 66 + 26)  # no exit 1
    assert alone.parameter_bytes == 4 * (70 + 18 + 66 + 26) + alone.download_bytes + 4 * 54
    assert {cost.runtime_bytes for cost in found.values()} == {1000}


def test_flops_counted_by_hand():
    found = by_segment(CNN)
    # multiply-adds on 4 * 4 positions: 16 * 18 = 288 and 16 * 36 = 576; exit 1: 16. Two operations
    # each; backward twice forward, but no gradient for the input of the first convolution.
    assert found[1, 1].flops_per_example == 2 * (2 * 288 + 3 * 576 + 3 * 16)
    assert found[1, 1].frozen_flops_per_example == 0
    # stage 2 alone, on 2 * 2 positions: 4 * 54 = 216, and its features get no gradient; exit 2: 24
    assert found[2, 2].flops_per_example == 2 * (2 * 216 + 3 * 24)
    assert found[2, 2].frozen_flops_per_example == 2 * (288 + 576)


def test_cache_is_the_features_of_all_examples():
    # 10 examples, features (2, 2, 2) of 4 bytes, held in chunks and joined for a moment
    assert by_segment(CNN)[2, 2].cache_bytes == costs.CACHE_COPIES * 10 * 8 * 4
    assert by_segment(CNN)[1, 2].cache_bytes == 0


@pytest.mark.parametrize(
    ("plan", "copies"),
    [
        (PLAN, 0),
        (replace(PLAN, momentum=0.9), 1),
        (replace(PLAN, prox_mu=0.1), 1),
        (replace(PLAN, optimizer="adam"), 3),  # two moments, and a root during the step
        (replace(PLAN, optimizer="adam", prox_mu=0.1), 4),
    ],
)
def test_optimizer_copies(plan, copies):
    found = by_segment(CNN, plan)[1, 1]
    assert found.optimizer_bytes == copies * found.gradient_bytes


def test_the_proximal_term_saves_a_difference_per_parameter():
    plain, pulled = by_segment(CNN), by_segment(CNN, replace(PLAN, prox_mu=0.1))
    for key in [(1, 1), (1, 2)]:
        assert pulled[key].saved_bytes - plain[key].saved_bytes >= plain[key].gradient_bytes


@pytest.mark.parametrize("family", ["cnn", "mlp", "resnet18", "vgg"])
def test_saved_bytes_on_meta_equal_those_of_the_real_graph(family):
    spec = ModelSpec(family=family, input_shape=(3, 18, 25), num_classes=5, exit=2)
    model = build(spec)
    real = costs._step(
        model.stages,
        model.exits,
        dict(model.named_parameters()),
        torch.randn(8, *spec.input_shape),
        [1.0, 1.0],
        0.0,
    )
    counted = by_segment(spec, replace(PLAN, batch_size=8), num_examples=100)[1, 2]
    assert counted.saved_bytes == real


@pytest.mark.parametrize(("shape", "hidden"), [((3, 51), 64), ((9, 40), 24), ((20, 30), 16)])
def test_saved_bytes_of_lstm_bound_those_of_the_real_graph(shape, hidden):
    spec = ModelSpec(
        family="lstm", input_shape=shape, num_classes=5, exit=2, options={"hidden": hidden}
    )
    model = build(spec)
    real = costs._step(
        model.stages,
        model.exits,
        dict(model.named_parameters()),
        torch.randn(8, *shape),
        [1.0, 1.0],
        0.0,
    )
    counted = by_segment(spec, replace(PLAN, batch_size=8), num_examples=100)[1, 2]
    assert real <= counted.saved_bytes <= 1.4 * real


def test_flops_of_lstm_counted_by_hand():
    spec = ModelSpec(
        family="lstm", input_shape=(3, 7), num_classes=2, exit=2, options={"hidden": 5}
    )
    found = by_segment(spec)
    # per step 4 gates of 5 from 3 inputs and 5 states: 60 + 100 multiply-adds of two operations;
    # backward twice forward, but no gradient for the input. The exit: 5 * 2 = 10.
    assert found[1, 1].flops_per_example == 2 * (7 * (2 * 60 + 3 * 100) + 3 * 10)
    assert found[2, 2].frozen_flops_per_example == 2 * 7 * (60 + 100)


@pytest.mark.parametrize("batch_first", [True, False])
def test_an_lstm_counted_has_the_shapes_of_the_real_one(batch_first):
    x = torch.randn(2, 7, 3)
    with torch.device("meta"):
        counted = nn.LSTM(3, 5, batch_first=batch_first)
    count_as_fused(counted)
    real_out, real_state = nn.LSTM(3, 5, batch_first=batch_first)(x)
    out, state = counted(x.to("meta"))
    assert out.shape == real_out.shape
    assert [s.shape for s in state] == [s.shape for s in real_state]
    assert counted(x[0].to("meta"))[0].shape == (7, 5)  # one example, step by step


def test_an_lstm_of_two_directions_is_counted_step_by_step():
    lstm = nn.LSTM(3, 5, bidirectional=True, device="meta")
    count_as_fused(lstm)
    assert "forward" not in vars(lstm)


def test_a_wide_frozen_prefix_counts_where_it_exceeds_the_trained_stage():
    # one example through the frozen stage: 64 channels in and out of a 16 x 16 layer, 4 bytes
    spec = ModelSpec(
        family="cnn", input_shape=(1, 16, 16), num_classes=2, exit=2, options={"channels": (64, 1)}
    )
    assert by_segment(spec)[2, 2].saved_bytes == 4 * 2 * 64 * 16 * 16 * 4


def test_a_batch_is_no_larger_than_the_data():
    few = by_segment(CNN, replace(PLAN, batch_size=64), num_examples=4)[1, 2]
    assert few.saved_bytes == by_segment(CNN)[1, 2].saved_bytes


def test_an_exit_without_weight_costs_no_backward_pass():
    deepest = by_segment(CNN, replace(PLAN, exit_weights=(0.0, 1.0)))
    assert deepest[1, 2].flops_per_example == by_segment(CNN)[1, 2].flops_per_example - 2 * 2 * 16


def test_counted_apart_is_the_same():
    assert segment_costs_apart(CNN, PLAN, 10, 1000) == segment_costs(CNN, PLAN, 10, 1000)
    with pytest.raises(ConfigError, match="unknown model family 'none'"):
        segment_costs_apart(replace(CNN, family="none"), PLAN, 10, 1000)


TRAINER = """
import json, sys
import msgspec, numpy, psutil
from edge_sdk.data import Examples
from edge_sdk.models import initial_tensors
from edge_sdk.models.costs import segment_costs_apart, warm_resident_bytes
from edge_sdk.models.staged import needed_names
from edge_sdk.trainer import train
from edge_sdk.wire import ModelSpec, Plan

spec = msgspec.json.decode(sys.argv[1], type=ModelSpec)
plan = msgspec.json.decode(sys.argv[2], type=Plan)
count = 2 * plan.batch_size
x = numpy.ones((count, *spec.input_shape), dtype=numpy.float32)
examples = Examples(x, numpy.arange(count) % spec.num_classes, spec.num_classes)
runtime_bytes = warm_resident_bytes()
costs = segment_costs_apart(spec, plan, count, runtime_bytes)
after_bytes = psutil.Process().memory_info().rss
tensors = initial_tensors(spec, 0)
tensors = {name: tensors[name] for name in needed_names(tensors, plan.segments)}
result = train(spec, plan, tensors, examples)
found = [runtime_bytes, after_bytes, result.peak_memory_bytes, msgspec.to_builtins(costs)]
print(json.dumps(found))
"""


@pytest.mark.parametrize(("first", "batch_size", "optimizer"), [(1, 32, "adam"), (3, 16, "sgd")])
def test_predicted_peak_covers_a_real_trainer(first, batch_size, optimizer):
    """vgg of 64..512 channels, 4.7 M parameters: the model the allowance was measured on."""
    spec = ModelSpec(
        family="vgg",
        input_shape=(3, 18, 25),
        num_classes=10,
        exit=3,
        options={"channels": (64, 128, 256, 512)},
    )
    plan = Plan(
        segments=(Segment(first=first, last=3),), batch_size=batch_size, optimizer=optimizer
    )
    run = subprocess.run(
        [sys.executable, "-c", TRAINER, msgspec.json.encode(spec), msgspec.json.encode(plan)],
        env={**os.environ, **TRAINER_ENVIRONMENT},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    runtime_bytes, after_bytes, peak, counted = json.loads(run.stdout)
    if not peak:
        pytest.skip("this kernel does not tell a process's peak memory")
    assert after_bytes < runtime_bytes + 8e6  # counting apart left this process as it was
    found = msgspec.convert(counted, list[SegmentCost])
    predicted = next(peak_bytes(c) for c in found if (c.first, c.last) == (first, 3))
    print(f"predicted {predicted / 1e6:.1f} MB, measured {peak / 1e6:.1f} MB")
    assert peak <= predicted <= 1.3 * peak
