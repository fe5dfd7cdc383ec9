"""`--freeze`: every method refuses it in one line, or leaves what is frozen as it was, bit by bit,
on its clients and in whatever its server does."""

from __future__ import annotations

import pytest
import torch
from msgspec.structs import replace

from coordinator.cohorts.base import Absence
from coordinator.config import AggregationOptions, GeneratorOptions, RotationOptions, ServerOptions
from coordinator.generators.registry import GENERATORS
from coordinator.methods.registry import METHODS, make_method
from edge_sdk.errors import ConfigError
from edge_sdk.protocol.messages import Adapters
from edge_sdk.protocol.stream import layout
from edge_sdk.protocol.tensor_lists import is_frozen
from edge_sdk.protocol.tensors import specs_of
from tests.contract.test_methods_training import cohort_of
from tests.support.examples import cnn, config

FROZEN = {"backbone": ("stages",), "stages=1": ("stages.0",), "stages=2": ("stages.1",)}
ADAM = ServerOptions(optimizer="fedadam", momentum=0.9, lr=0.01)


def rounds_of(freeze: str, settings) -> None:
    """Two rounds; what is frozen is the same object, and the served model's has the same bytes."""
    method, frozen = make_method(settings), FROZEN[freeze]
    for tensor in method.current().values():
        tensor[tensor == 0] = -0.0 if tensor.is_floating_point() else 0  # signs must stay, too
    before = dict(method.current())
    cohort = cohort_of(method)
    for round in (1, 2):
        work = {who.id: method.assign(who, round) for who in cohort.clients()}
        assert all(job.plan.frozen == frozen for job in work.values())
        updates = []
        for update in cohort.train(work, round, 0.0):
            assert not isinstance(update, Absence), update
            updates.append(update)
            job, kept = work[update.client.id], {n for n in before if is_frozen(n, frozen)}
            sent = {n: t for n, t in job.tensors.items() if round == 1 or n not in kept}
            assert update.bytes_down == layout(specs_of(sent)).total_bytes
            assert not kept & set(update.tensors)
        assert "generator_failed" not in method.aggregate(round, updates).values
    held, served = method.current(), method.served()
    assert any(not torch.equal(tensor, before[name]) for name, tensor in held.items())
    for name, tensor in before.items():
        if is_frozen(name, frozen):
            assert held[name] is tensor, name
            assert torch.equal(served[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("freeze", FROZEN)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_leaves_what_is_frozen_or_refuses(name, freeze):
    changes = {} if name != "fedavg-s" else {"freeze": "backbone"}
    settings = config(name, **{"freeze": freeze, "server": ADAM} | changes)
    if not METHODS[name].has_place("freeze"):
        with pytest.raises(ConfigError, match=f"method '{name}': --freeze .* has no place there"):
            make_method(settings)
        return
    rounds_of(changes.get("freeze", freeze), settings)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_adapters_alone_or_refuses(name):
    adapted = replace(cnn(), adapters=Adapters(kind="lora", rank=1))
    settings = config(name, model=adapted)
    if not METHODS[name].has_place("freeze"):
        with pytest.raises(ConfigError, match=f"method '{name}': --adapt lora has no place there"):
            make_method(settings)
        return
    rounds_of("backbone", settings)


@pytest.mark.parametrize("freeze", FROZEN)
@pytest.mark.parametrize("generate", ["conv", "all"])
@pytest.mark.parametrize("name", [name for name in GENERATORS if name != "none"])
def test_no_generator_makes_what_is_frozen(name, generate, freeze):
    made = GeneratorOptions(name=name, generate=generate, rank=4, hidden=8, epochs=2)
    rotation = RotationOptions(mode="add")
    rounds_of(freeze, config("hypemefed", freeze=freeze, generator=made, rotation=rotation))


@pytest.mark.parametrize("rule", ["trimmed-mean", "median", "norm-bounded"])
def test_robust_rules_and_clipping_leave_it(rule):
    aggregation = AggregationOptions(rule=rule, clip=2.0)
    rounds_of("stages=1", config("owners-mean", freeze="stages=1", aggregation=aggregation))
