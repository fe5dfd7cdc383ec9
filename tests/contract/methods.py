"""What the suites over all methods share: clients for every model that a method offers, made
updates, the whole of what a method has learned, and which method a check is not for, and why."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch

from coordinator.cohorts.base import Client, ClientUpdate
from coordinator.config import GeneratorOptions, ServerOptions
from coordinator.methods.base import Method
from coordinator.methods.registry import make_method
from edge_sdk.models import build
from edge_sdk.models.flat import num_weights, parameter_shapes
from edge_sdk.protocol.tensors import Tensors
from tests.support.examples import answer, client, config

PLAIN = ServerOptions(momentum=0.0, lr=1.0)
NO_GENERATION = GeneratorOptions(gain=0.0)

STALE = "it is the published defect itself, kept to be measured"
WHOLE = "the whole model for everybody, whatever a client holds"
# (method, check) -> why the check is not for it. Nothing else may be left out.
EXCEPT = {
    ("stale-copy", "identical"): STALE,
    ("stale-copy", "influence"): STALE,
    ("fedavg-l", "holds"): WHOLE,
    ("fedavg", "holds"): WHOLE,
    ("fedavg", "deployed"): "shallow exits are not trained, so the whole model is deployed",
    ("hypemefed", "order"): "its networks see their owners in a drawn order",
}
PARTS = "it averages parts of tensors, which rules and clipping do not know, and refuses them"
for method in ("heterofl", "fedrolex", "scalefl", "lotteryfl"):
    EXCEPT |= {(method, check): PARTS for check in ("rule", "clip")}
EXCEPT["heterotune", "clip"] = "each backbone is its own; it refuses clipping"
BEYOND = "its model is the mean less h / alpha, which lies beyond the mean"
for name in ("feddyn", "depthfl"):
    EXCEPT |= {(name, check): BEYOND for check in ("identical", "weight", "fedavg")}
FUSED = "the mean goes on being trained, all stages together; see its own tests"
EXCEPT |= {("feddf", check): FUSED for check in ("identical", "weight", "fedavg", "influence")}
EXCEPT["feddf", "rule"] = "its teacher is a plain mean, so it refuses a robust rule"
FACTORS = "what travels are factors of a weight, which everybody trains; see its own tests"
EXCEPT |= {("fedhm", check): FACTORS for check in ("identical", "unowned")}
EXCEPT["fedhm", "weight"] = "where none had the whole model, the global one counts as one more"
GENERATED = ("mh-pfedhn", "mh-pfedhngd", "pfedhn")
NO_MEAN = "it generates models, so none is a mean; see methods/test_generated.py"
REFUSED = "it has no global model, and refuses such settings"
for check in ("identical", "alike", "weight", "influence", "unowned", "finite", "fedavg"):
    EXCEPT |= {(method, check): NO_MEAN for method in GENERATED}
for check in ("begin", "server", "clip", "rule"):
    EXCEPT |= {(method, check): REFUSED for method in GENERATED}
del EXCEPT["mh-pfedhngd", "rule"]  # its light model is a mean
EXCEPT |= {(method, "statistics"): "no statistics travel" for method in ("mh-pfedhn", "pfedhn")}


def unless_except(name: str, check: str) -> None:
    if why := EXCEPT.get((name, check)):
        pytest.skip(f"{name}: {why}")


def fresh(name: str, **changes: object) -> Method:
    """A new method with the plain mean as its server step."""
    return make_method(config(name, **({"server": PLAIN} | changes)))


def clients_of(
    method: Method, exits: Sequence[int] = (1, 1, 2, 3), names: str = "abcdefgh"
) -> list[Client]:
    """A client of each of these exits. Of a method that offers models to choose among, the first of
    three exits stands for the cheapest, the third for the dearest."""
    made = [client(name, exit) for name, exit in zip(names, exits, strict=False)]
    offer = method.offer()
    if not (variants := offer.variants):
        return made
    places = [1 + (who.exit - 1) * (len(variants) - 1) // 2 for who in made]
    sizes = [0] * len(variants)
    if offer.plan.flat:
        sizes = [num_weights(parameter_shapes(build(spec))) for spec in variants]
    return [
        dataclasses.replace(
            who,
            variant=place,
            exit=variants[place - 1].exit,
            stages=(),
            num_weights=sizes[place - 1],
        )
        for who, place in zip(made, places, strict=True)
    ]


def weak_clients(method: Method) -> list[Client]:
    """Two that can hold the least and no more."""
    return [dataclasses.replace(who, stages=()) for who in clients_of(method, (1, 1))]


def one_round(
    method: Method, cohort: Sequence[Client], number: int = 1, **changes: object
) -> list[ClientUpdate]:
    """Made updates of these clients; `changes` as `answer` takes them."""
    updates = [answer(who, method.assign(who, number), **changes) for who in cohort]  # type: ignore[arg-type]
    method.aggregate(number, updates)
    return updates


def learned(method: Method, cohort: Sequence[Client]) -> Tensors:
    """Copies of the global model; where each client has its own, of all of those."""
    found = dict(method.current())
    for who in () if found else cohort:
        found |= {f"{who.id}: {name}": t for name, t in method.deployed(who)[1].items()}
    assert found
    return {name: tensor.clone() for name, tensor in found.items()}


def changed_names(before: Tensors, after: Tensors) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def is_statistic(name: str) -> bool:
    """Of BatchNorm: a method may take them of fewer owners than weights."""
    return name.endswith((".running_mean", ".running_var"))
