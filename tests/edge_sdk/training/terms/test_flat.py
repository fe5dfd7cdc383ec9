"""All weights as one vector: training is the same, and statistics stay on the device."""

import pytest
import torch
from msgspec.structs import replace

from edge_sdk.errors import ShapeError
from edge_sdk.models import build, initial_tensors
from edge_sdk.models.flat import flatten, parameter_shapes
from edge_sdk.protocol.messages import Plan, Segment
from edge_sdk.protocol.tensors import specs_of
from edge_sdk.training.trainer import train
from tests.support.examples import cnn, examples

SPEC = cnn(exit=2)
PLAN = Plan(segments=(Segment(first=1, last=2),), batch_size=8, lr=0.01, flat=True, seed=3)
SHAPES = parameter_shapes(build(SPEC))
SENT = initial_tensors(SPEC, 5)
BUFFERS = [name for name in SENT if name not in SHAPES]
JOB = {"flat/all": flatten(SENT, SHAPES)}


def test_training_is_that_of_the_tensors():
    plain = train(SPEC, replace(PLAN, flat=False), SENT, examples(24))
    result = train(SPEC, PLAN, JOB, examples(24))
    assert list(result.tensors) == ["flat/all"]
    (spec,) = specs_of(result.tensors)
    assert (spec.role, spec.dtype) == ("flat", "float32")
    assert torch.equal(result.tensors["flat/all"], flatten(plain.tensors, SHAPES))
    assert result.state.keys() == {f"statistics/{name}" for name in BUFFERS}
    for name in BUFFERS:
        assert torch.equal(result.state[f"statistics/{name}"], plain.tensors[name]), name


def test_the_next_round_goes_on_with_the_statistics_that_were_kept():
    data, plan = examples(24), replace(PLAN, holdout=0.25)
    kept = {f"statistics/{name}": SENT[name] + 2 for name in BUFFERS}
    result = train(SPEC, plan, JOB, data, state=dict(kept), state_round=4)
    plain = replace(plan, flat=False)
    with_them = train(SPEC, plain, SENT | {name: SENT[name] + 2 for name in BUFFERS}, data)
    without = train(SPEC, plain, SENT, data)
    assert result.holdout == with_them.holdout != without.holdout, "tested with its own"
    for name in BUFFERS:
        assert torch.equal(result.state[f"statistics/{name}"], with_them.tensors[name]), name
    assert result.state_round == 4
    for name in BUFFERS:  # what the caller holds is its own
        assert torch.equal(kept[f"statistics/{name}"], SENT[name] + 2)


def test_statistics_of_another_model_are_left_out():
    other = cnn(exit=2, channels=(6, 5, 4))
    kept = {f"statistics/{n}": t for n, t in initial_tensors(other, 0).items() if "running" in n}
    result = train(SPEC, PLAN, JOB, examples(24), state=kept, state_round=4)
    assert result.state_round == 0
    assert result.state.keys() == train(SPEC, PLAN, JOB, examples(24)).state.keys()


def test_a_vector_for_another_model_is_refused():
    with pytest.raises(ShapeError, match="weights came for a model of"):
        train(SPEC, PLAN, {"flat/all": torch.zeros(7)}, examples(24))
    with pytest.raises(ShapeError, match="lacks tensors flat/all"):
        train(SPEC, PLAN, SENT, examples(24))


def test_statistics_that_are_not_finite_are_not_kept():
    """Weights of 1e20 have activations whose variance is beyond float32, though BatchNorm makes the
    loss, and so the vector that is returned, finite."""
    sent = {"flat/all": JOB["flat/all"] * 1e20}
    with pytest.raises(ShapeError, match="what this client keeps: statistics/.* NaN or infinite"):
        train(SPEC, PLAN, sent, examples(24))
