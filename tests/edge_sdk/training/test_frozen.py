"""Frozen parts of a model: not trained, not returned, run once where they come first."""

from __future__ import annotations

import pytest
import torch
from msgspec.structs import replace
from torch.nn.functional import cross_entropy

from edge_sdk.errors import ConfigError
from edge_sdk.models import build, initial_tensors
from edge_sdk.models.freezing import begin_training_, check_trainable, num_frozen_stages
from edge_sdk.protocol.messages import Plan, Segment
from edge_sdk.protocol.plan_tensors import check_plan
from edge_sdk.protocol.tensor_lists import frozen_prefixes, is_frozen, trained_names
from edge_sdk.training import segment as segments
from edge_sdk.training.trainer import train
from tests.support.examples import cnn, examples

WHOLE = Segment(first=1, last=3)
PLAN = Plan(segments=(WHOLE,), batch_size=8, epochs=3, lr=0.05, optimizer="sgd")


@pytest.mark.parametrize(
    ("freeze", "expected"),
    [
        ("", ()),
        ("backbone", ("stages",)),
        ("stages=1", ("stages.0",)),
        ("stages=3,1,3", ("stages.0", "stages.2")),
    ],
)
def test_what_is_frozen_is_told_as_prefixes(freeze, expected):
    assert frozen_prefixes(freeze, 3) == expected


@pytest.mark.parametrize("freeze", ["stages", "stages=", "stages=1,x", "exits=1", "stages=²"])
def test_what_cannot_be_frozen_is_one_line(freeze):
    with pytest.raises(ConfigError, match="--freeze is .*expected backbone, or stages as in"):
        frozen_prefixes(freeze, 3)


def test_all_but_adapters_needs_some():
    """And a backbone with adapters is frozen whole."""
    with pytest.raises(ConfigError, match="--freeze all leaves nothing to train; give --adapt too"):
        frozen_prefixes("all", 3)
    assert frozen_prefixes("all", 3, has_adapters=True) == ("stages", "exits")
    assert frozen_prefixes("", 3, has_adapters=True) == ("stages",)
    with pytest.raises(ConfigError, match="stages=1 with --adapt, expected backbone or all"):
        frozen_prefixes("stages=1", 3, has_adapters=True)


@pytest.mark.parametrize("freeze", ["stages=0", "stages=1,4"])
def test_a_stage_that_does_not_exist_is_told(freeze):
    with pytest.raises(ConfigError, match="the model has stages 1 to 3"):
        frozen_prefixes(freeze, 3)


def test_a_prefix_ends_at_a_dot():
    names = ["stages.1.w", "stages.10.w", "stages.1", "exits.1.w"]
    assert [is_frozen(name, ("stages.1",)) for name in names] == [True, False, True, False]


@pytest.mark.parametrize(
    ("frozen", "batch_norm"),
    [(("stages",), "3 of 3"), (("stages.0", "stages.2"), "2 of 3"), (("stages.1",), "1 of 3")],
)
@pytest.mark.parametrize("levers", [{}, {"recompute": True}, {"micro_batch": 4}], ids=str)
def test_frozen_tensors_stay_bit_identical_and_the_rest_moves(frozen, batch_norm, levers):
    spec, plan = cnn(), replace(PLAN, frozen=frozen, weight_decay=0.1, **levers)
    given = initial_tensors(spec, 0)
    result = train(spec, plan, {n: t.clone() for n, t in given.items()}, examples(20))
    assert list(result.tensors) == trained_names(given, [WHOLE], frozen)
    assert not any(is_frozen(name, frozen) for name in result.tensors)
    for name, tensor in result.tensors.items():
        assert not torch.equal(tensor, given[name]), name
    assert len(result.exits) == 3, "exits of frozen stages are trained, too"
    still = sum(f"stages.{n}.1.running_mean" not in result.tensors for n in range(3))
    assert batch_norm == f"{still} of 3"


def test_one_step_with_a_frozen_stage_by_hand():
    """Stage 2 of three: the gradient goes through it, its norm goes by its statistics."""
    spec, data, frozen = cnn(), examples(6), ("stages.1",)
    given = initial_tensors(spec, 0)
    plan = replace(PLAN, epochs=1, frozen=frozen)
    result = train(spec, plan, dict(given), data)
    model = build(spec)
    model.load(given)
    model.train()
    model.stages[1].eval()
    logits = model(torch.from_numpy(data.x))
    sum(cross_entropy(z, torch.from_numpy(data.y)) for z in logits).backward()
    for name, parameter in model.named_parameters():
        if not is_frozen(name, frozen):
            want = given[name] - 0.05 * parameter.grad
            assert torch.allclose(result.tensors[name], want, atol=1e-6), name


@pytest.mark.parametrize("frozen", [("stages",), ("stages.0", "stages.1")])
@pytest.mark.parametrize("first", [1, 2])
def test_kept_features_change_no_bit(monkeypatch, frozen, first):
    spec, runs = cnn(), []
    plan = replace(PLAN, segments=(Segment(first=first, last=3),), frozen=frozen)
    made = []
    real = segments._like
    monkeypatch.setattr(segments, "_like", lambda *given: made.append(given) or real(*given))
    for cache_bytes in (0, 2**20):
        given = {n: t.clone() for n, t in initial_tensors(spec, 0).items()}
        runs.append(train(spec, plan, given, examples(20), cache_bytes=cache_bytes))
    for name, tensor in runs[0].tensors.items():
        assert torch.equal(tensor, runs[1].tensors[name]), name
    # of each frozen stage that has an exit here; one where none of the segment's is frozen
    begin = (3 if frozen == ("stages",) else 2) - first + 1
    assert len(made) == max(1, begin)


def test_frozen_stages_run_once_for_every_example(monkeypatch):
    spec, given = cnn(), initial_tensors(cnn(), 0)
    seen = []
    real = torch.nn.functional.conv2d
    monkeypatch.setattr(
        torch.nn.Conv2d,
        "forward",
        lambda s, x: (seen.append(len(x)), real(x, s.weight, s.bias, s.stride, s.padding))[1],
    )
    train(spec, replace(PLAN, frozen=("stages",)), given, examples(20))
    convolutions = sum(isinstance(m, torch.nn.Conv2d) for m in build(spec).stages.modules())
    assert sum(seen) == convolutions * (20 + 1), "over 3 epochs; and one example for the size"


def test_dropout_and_norms_within_run_as_in_evaluation():
    model = build(cnn())
    model.stages[0].append(torch.nn.Dropout(0.9))
    begin_training_(model, WHOLE, ("stages.0", "exits.2"))
    training = {name for name, module in model.named_modules() if module.training and "." in name}
    assert {name.rpartition(".")[0] for name in training} >= {"stages.1", "stages.2", "exits.0"}
    assert not any(name.startswith(("stages.0", "exits.2")) for name in training)
    assert num_frozen_stages(model, WHOLE, ("stages.0", "exits.2")) == 1
    assert num_frozen_stages(model, WHOLE, ("stages.1",)) == 0
    assert num_frozen_stages(model, Segment(first=2, last=3), ("stages",)) == 2


def test_nothing_left_to_train_is_one_line():
    with pytest.raises(ConfigError, match="nothing of stage 2 and its exit is left to train"):
        check_trainable(["stages.0.w", "exits.0.w", "stages.1.w"], 2, ("stages",))
    plan = replace(PLAN, frozen=("stages", "exits.2"), exit_weights=(0.0, 0.0, 1.0))
    with pytest.raises(ConfigError, match="what its loss depends on is frozen"):
        train(cnn(), plan, initial_tensors(cnn(), 0), examples(20))


@pytest.mark.parametrize("field", [{"flat": True}, {"static_norm": True}], ids=str)
def test_what_does_not_go_together_is_told(field):
    with pytest.raises(ConfigError, match="frozen and .* exclude each other"):
        check_plan(replace(PLAN, frozen=("stages",), **field))
