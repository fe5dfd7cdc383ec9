"""A user's own change of the training inputs, by the name of its function."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from msgspec.structs import replace as changed

from edge_sdk.data.examples import Examples
from edge_sdk.errors import ConfigError
from edge_sdk.models import initial_tensors
from edge_sdk.protocol.messages import Plan, Segment
from edge_sdk.training.augmenting import load_augment
from edge_sdk.training.trainer import train
from tests.support.examples import cnn, examples

WHOLE = Plan(segments=(Segment(first=1, last=3),), batch_size=6, lr=0.1, optimizer="sgd")
DATA = examples(12)
X = torch.from_numpy(DATA.x)


@pytest.fixture
def own(monkeypatch):
    """A module of a user's, whose functions are set by a test."""
    module = ModuleType("own_transforms")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def trained(augment, plan: Plan = WHOLE, data: Examples = DATA) -> dict[str, torch.Tensor]:
    return train(cnn(), plan, initial_tensors(cnn(), 0), data, augment=augment).tensors


def assert_same(got, want) -> None:
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_what_is_trained_on_is_what_the_function_returns(own):
    own.double = lambda x: 2 * x
    doubled = replace(DATA, x=2 * DATA.x)
    assert_same(trained(load_augment("own_transforms:double", X)), trained(None, data=doubled))
    for_frozen = changed(WHOLE, segments=(Segment(first=2, last=3),), epochs=2)
    got = trained(load_augment("own_transforms:double", X), for_frozen)
    assert_same(got, trained(None, for_frozen, doubled))


@pytest.mark.parametrize("first", [1, 2])
def test_it_is_called_for_every_batch_of_every_epoch(own, first):
    seen = []
    own.look = lambda x: seen.append(tuple(x.shape)) or x
    augment = load_augment("own_transforms:look", X)
    assert seen == [(2, 1, 8, 8)]  # tried at once
    trained(augment, changed(WHOLE, segments=(Segment(first=first, last=3),), epochs=3))
    assert seen[1:] == [(6, 1, 8, 8)] * 6  # 3 epochs of 12 / 6 batches


def test_its_draws_are_a_function_of_the_jobs_seed(own):
    own.noise = lambda x: x + torch.rand_like(x)
    augment = load_augment("own_transforms:noise", X)
    once = trained(augment)
    torch.rand(3)  # what the process draws otherwise changes nothing
    assert_same(trained(augment), once)
    other = trained(augment, changed(WHOLE, seed=1))
    assert any(not torch.equal(other[name], once[name]) for name in once)


def test_the_data_stay_as_they_are(own):
    own.spoil = lambda x: x.mul_(0)
    before = X.clone()
    trained(load_augment("own_transforms:spoil", X))
    assert torch.equal(X, before)


def raises(x):
    raise ValueError("no\nway")


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (None, "got nothing of that name, expected a function"),
        (3, "got int, expected a function"),
        (raises, "raises ValueError: no\\nway; mend it"),
        (lambda x: x[:1], "got (1, 1, 8, 8) of torch.float32, expected (2, 1, 8, 8)"),
        (lambda x: x.double(), "got (2, 1, 8, 8) of torch.float64"),
        (lambda x: x.numpy(), "got ndarray"),
        (lambda x: x / 0, "gives NaN or infinite inputs"),
    ],
)
def test_what_is_wrong_with_it_is_one_line_at_the_start(own, function, said):
    own.function = function
    with pytest.raises(ConfigError) as caught:
        load_augment("own_transforms:function", X)
    assert str(caught.value).startswith("augment 'own_transforms:function'")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="no_such_module_anywhere"):
        load_augment("no_such_module_anywhere:function", X)
