"""What every method must do with clients that train in earnest."""

from __future__ import annotations

import pytest
import torch

from coordinator.cohorts.base import Absence
from coordinator.cohorts.in_process import train_here
from coordinator.methods.registry import METHODS
from edge_sdk.protocol.tensors import specs_of
from tests.contract.methods import changed_names, clients_of, fresh, learned
from tests.support.examples import examples


@pytest.fixture(params=METHODS)
def name(request):
    return request.param


def trained(method, number):
    """The updates of one round, as they come in."""
    for place, who in enumerate(clients_of(method)):
        shard = examples(12 + 3 * place, seed=place)
        result = train_here(who, method.assign(who, number), shard, "cpu")
        assert not isinstance(result, Absence), result
        yield result


def test_real_training_repeats_bit_by_bit(name):
    results = []
    for _ in range(2):
        method = fresh(name)
        cohort = clients_of(method)
        start = learned(method, cohort)
        for number in (1, 2):
            method.aggregate(number, trained(method, number))
        results.append(learned(method, cohort))
    assert not changed_names(*results)
    assert changed_names(results[0], start)


def test_returns_lists_what_training_gives(name):
    method = fresh(name)
    jobs = {who.id: method.assign(who, 1) for who in clients_of(method)}
    for update in trained(method, 1):
        want = jobs[update.client.id].returns
        assert list(update.tensors) == [spec.name for spec in want]
        for got, spec in zip(specs_of(update.tensors), want, strict=True):
            assert got == spec or (got.role == spec.role == "packed" and got.shape <= spec.shape)
            assert torch.isfinite(update.tensors[spec.name].float()).all()
