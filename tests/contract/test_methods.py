"""What every method must do; each test catches a defect that published code has."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from coordinator.aggregation.registry import RULES
from coordinator.cohorts.in_process import InProcessCohort
from coordinator.config import AggregationOptions, GeneratorOptions, ServerOptions
from coordinator.methods.registry import METHODS, make_method
from edge_sdk.errors import ConfigError
from edge_sdk.protocol.messages import TensorSpec
from edge_sdk.protocol.tensor_lists import stage_of
from tests.support.examples import answer, client, client_update, config, examples

COHORT = [client("a", 1), client("b", 1), client("c", 2), client("d", 3)]
PLAIN = ServerOptions(momentum=0.0, lr=1.0)


NO_GENERATION = GeneratorOptions(gain=0.0)


@pytest.fixture(params=METHODS)
def name(request):
    return request.param


AGGREGATIONS = {rule: AggregationOptions(rule=rule) for rule in RULES}
AGGREGATIONS["clip"] = AggregationOptions(clip=1.0)


@pytest.fixture(params=AGGREGATIONS)
def aggregation(request):
    return AGGREGATIONS[request.param]


def fresh(name, **changes):
    """A new method with the plain mean as its server step."""
    return make_method(config(name, **({"server": PLAIN} | changes)))


def one_round(method, cohort=COHORT, number=1, **changes):
    updates = [answer(who, method.assign(who, number), **changes) for who in cohort]
    method.aggregate(number, updates)
    return updates


STALE = "stale-copy is the published defect itself, kept to be measured"


def test_identical_clients_in_identical_model_out(name, aggregation):
    if name == "stale-copy":
        pytest.skip(STALE)
    # published code divides a sum of n by n - 1, or averages aliased tensors twice.
    # what is generated is not what the clients sent, so generation is off here.
    method = fresh(name, generator=NO_GENERATION, aggregation=aggregation)
    before = method.current()
    updates = one_round(method, shift=0.25)
    owned = {key for update in updates for key in update.tensors}
    assert owned
    for key, tensor in method.current().items():
        expected = before[key] + 0.25 if key in owned else before[key]
        assert torch.equal(tensor, expected), key


def test_order_of_clients_does_not_matter(name, aggregation):
    method, other = (fresh(name, aggregation=aggregation) for _ in range(2))
    updates = [answer(who, method.assign(who, 1), num_examples=7 + len(who.id)) for who in COHORT]
    method.aggregate(1, updates)
    # hypernetworks see their owners in a drawn order, so only the mean itself is order-free
    other.aggregate(1, updates if name == "hypemefed" else reversed(updates))
    for key, tensor in method.current().items():
        assert torch.allclose(tensor, other.current()[key], atol=1e-6), key


def test_mean_is_weighted_by_examples(name):
    # two owners of exit 1 with 1 and 3 examples, moved by 10 and by 30: (10 + 90) / 4 = 25
    method = fresh(name, generator=NO_GENERATION)
    before = method.current()["exits.0.2.bias"]
    a, b = client("a", 1), client("b", 1)
    method.aggregate(
        1,
        [
            answer(a, method.assign(a, 1), num_examples=1, shift=10.0),
            answer(b, method.assign(b, 1), num_examples=3, shift=30.0),
        ],
    )
    moved = method.current()["exits.0.2.bias"] - before
    assert torch.allclose(moved, torch.full_like(moved, 25.0), atol=1e-4)


def test_equal_weighting_counts_clients_alike(name):
    # as above, but (10 + 30) / 2 = 20
    method = fresh(name, generator=NO_GENERATION, weighting="equal")
    before = method.current()["exits.0.2.bias"]
    a, b = client("a", 1), client("b", 1)
    jobs = [(a, 1, 10.0), (b, 3, 30.0)]
    method.aggregate(
        1, [answer(c, method.assign(c, 1), num_examples=n, shift=s) for c, n, s in jobs]
    )
    moved = method.current()["exits.0.2.bias"] - before
    assert torch.allclose(moved, torch.full_like(moved, 20.0), atol=1e-4)


def test_client_without_a_tensor_has_no_influence_on_it(name, aggregation):
    if name == "stale-copy":
        pytest.skip(STALE)
    changes = {"generator": NO_GENERATION, "aggregation": aggregation}
    method, other = (fresh(name, **changes) for _ in range(2))
    if method.spec.exit == 1 or not any(
        len(method.assign(who, 1).returns) < len(method.current()) for who in COHORT
    ):
        pytest.skip("every client owns every tensor of this method")
    updates = [answer(who, method.assign(who, 1)) for who in COHORT]
    method.aggregate(1, updates)
    weak = updates[0]
    far = {name: tensor + 100 for name, tensor in weak.tensors.items()}
    changed = client_update(weak.client, far, weak.segments, num_examples=1000)
    other.aggregate(1, [changed, *updates[1:]])
    for key, tensor in method.current().items():
        is_owned = key in weak.tensors
        assert torch.equal(tensor, other.current()[key]) != is_owned, key


def test_tensor_that_nobody_owns_is_unchanged(name, aggregation):
    method = fresh(name, aggregation=aggregation)
    weak = [client("a", 1), client("b", 1)]
    weak = [dataclasses.replace(who, stages=()) for who in weak]
    before = method.current()
    updates = one_round(method, weak)
    owned = {key for update in updates for key in update.tensors}
    for key, tensor in method.current().items():
        if key not in owned:
            assert torch.equal(tensor, before[key]), key


def test_momentum_does_not_move_what_nobody_owns(name):
    """A round with every owner fills the momentum of every tensor; then only weak clients come."""
    method = make_method(config(name, server=ServerOptions(momentum=0.5, lr=0.75)))
    one_round(method)
    before = method.current()
    weak = [dataclasses.replace(client(letter, 1), stages=()) for letter in "ab"]
    updates = one_round(method, weak, number=2)
    owned = {key for update in updates for key in update.tensors}
    moved = {
        key for key, tensor in method.current().items() if not torch.equal(tensor, before[key])
    }
    assert moved == owned


def test_round_without_updates_changes_nothing(name, aggregation):
    method = fresh(name, aggregation=aggregation)
    before, state = method.current(), method.state_dict()
    method.aggregate(1, [])
    assert method.current() is before
    assert all(torch.equal(tensor, state[key]) for key, tensor in method.state_dict().items())


def test_a_step_that_is_not_finite_is_refused(name):
    """Weights moved by 1e37 at a rate of 1000 would exceed float32's 3.4e38."""
    method = fresh(name, server=ServerOptions(lr=1000.0), generator=NO_GENERATION)
    before = method.current()
    updates = [answer(who, method.assign(who, 1), shift=1e37) for who in COHORT]
    assert method.aggregate(1, updates).values["aggregate_refused"] == 1.0
    assert method.current() is before
    for tensor in method.state_dict().values():
        assert torch.isfinite(tensor).all()


def test_every_storage_once(name):
    # published code registers exits twice, so every exit tensor is averaged twice
    method = fresh(name)
    storages = [tensor.untyped_storage().data_ptr() for tensor in method.current().values()]
    assert len(set(storages)) == len(storages)


def test_state_goes_on_as_if_never_stopped(name, aggregation):
    settings = config(name, server=ServerOptions(momentum=0.5, lr=0.75), aggregation=aggregation)
    straight, stopped = make_method(settings), make_method(settings)
    for number in (1, 2):
        one_round(straight, number=number)
        one_round(stopped, number=number)
    resumed = make_method(settings)
    taken = stopped.state_dict()
    saved = {key: tensor.clone() for key, tensor in taken.items()}
    resumed.load_state_dict(saved)
    one_round(stopped, number=3)
    assert all(torch.equal(taken[key], saved[key]) for key in saved), "a state taken stays"
    one_round(straight, number=3)
    one_round(resumed, number=3)
    for kind in ("current", "served"):
        want, got = getattr(straight, kind)(), getattr(resumed, kind)()
        assert list(want) == list(got)
        assert all(torch.equal(want[key], got[key]) for key in want), kind


def test_assignments_are_what_the_client_can_hold(name):
    method = fresh(name)
    if name == "fedavg-l":
        pytest.skip("fedavg-l is the bound: the whole model for everybody")
    for who in COHORT:
        job = method.assign(who, 1)
        for segment in job.plan.segments:
            assert (segment.first == 1 and segment.last <= who.exit) or (
                segment.first == segment.last and segment.first in who.stages
            )
        down = set(job.tensors)
        assert {spec.name for spec in job.returns} <= down
        deepest = max(segment.last for segment in job.plan.segments)
        assert {stage_of(key)[1] for key in down} <= set(range(1, deepest + 1))


def test_deployed_part_is_a_model_of_its_own(name):
    method = fresh(name)
    one_round(method)
    for who in COHORT:
        spec, tensors = method.deployed(who)
        assert spec.exit <= who.exit
        assert set(tensors) == {n for n in method.served() if stage_of(n)[1] <= spec.exit}


def test_real_training_repeats_bit_by_bit(name):
    shards = {who.id: examples(12 + 3 * i, seed=i) for i, who in enumerate(COHORT)}
    exits = {who.id: who.exit for who in COHORT}
    results = []
    for _ in range(2):
        method = fresh(name)
        cohort = InProcessCohort(shards, exits, 3)
        for number in (1, 2):
            work = {who.id: method.assign(who, number) for who in cohort.clients()}
            method.aggregate(number, cohort.train(work, number, 0.0))
        results.append(method.current())
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])
    start = fresh(name).current()
    assert not torch.equal(results[0]["exits.0.2.weight"], start["exits.0.2.weight"])


def test_returns_lists_what_training_gives(name):
    method = fresh(name)
    shards = {who.id: examples(12, seed=i) for i, who in enumerate(COHORT)}
    cohort = InProcessCohort(shards, {who.id: who.exit for who in COHORT}, 3)
    work = {who.id: method.assign(who, 1) for who in cohort.clients()}
    for update in cohort.train(work, 1, 0.0):
        want: tuple[TensorSpec, ...] = work[update.client.id].returns
        assert list(update.tensors) == [spec.name for spec in want]


def test_unknown_method_lists_the_known():
    with pytest.raises(ConfigError, match="hypemefed.*stage-rotation"):
        make_method(config("fedavgx"))
