"""What every method must do with updates; each test catches a defect that published code has. The
updates are made here; real training is in test_methods_training.py."""

from __future__ import annotations

import pytest
import torch

from coordinator.aggregation.registry import RULES
from coordinator.config import AggregationOptions, ServerOptions
from coordinator.methods.registry import METHODS, make_method
from edge_sdk.errors import ConfigError
from edge_sdk.models import build
from edge_sdk.protocol.messages import ModelSpec
from edge_sdk.protocol.tensor_lists import role_of, stage_of
from tests.contract.methods import (
    EXCEPT,
    NO_GENERATION,
    PLAIN,
    changed_names,
    clients_of,
    fresh,
    is_statistic,
    learned,
    one_round,
    unless_except,
    weak_clients,
)
from tests.support.examples import answer, client_update, config

AGGREGATIONS = {rule: AggregationOptions(rule=rule) for rule in RULES}
AGGREGATIONS["clip"] = AggregationOptions(clip=1.0)
BIAS = "exits.0.2.bias"  # of an exit that every client trains


@pytest.fixture(params=METHODS)
def name(request):
    return request.param


@pytest.fixture(params=AGGREGATIONS)
def aggregation(request, name):
    if request.param != "mean":
        unless_except(name, "clip" if request.param == "clip" else "rule")
    return AGGREGATIONS[request.param]


def test_identical_clients_in_identical_model_out(name, aggregation):
    """Published code divides a sum of n by n - 1, or averages aliased tensors twice. What is
    generated is not what clients sent, so generation is off."""
    unless_except(name, "identical")
    method = fresh(name, generator=NO_GENERATION, aggregation=aggregation)
    cohort = clients_of(method)
    before = learned(method, cohort)
    updates = one_round(method, cohort, shift=0.25)
    owned = {role_of(key)[1] for update in updates for key in update.tensors} & before.keys()
    assert owned
    for key, tensor in learned(method, cohort).items():
        moved = tensor == before[key] + 0.25  # of a tensor that is held in part, a part
        assert (moved | (tensor == before[key])).all(), key
        assert bool(moved.any()) == (key in owned), key


def test_alike_clients_are_as_one(name):
    """As above for methods whose clients return something else than what they hold."""
    unless_except(name, "alike")
    results = []
    for exits in ((3,), (3, 3, 3)):
        method = fresh(name, generator=NO_GENERATION)
        cohort = clients_of(method, exits)
        one_round(method, cohort, shift=0.25)
        results.append(learned(method, cohort[:1]))
    assert not changed_names(*results)


def test_order_of_clients_does_not_matter(name, aggregation):
    unless_except(name, "order")
    method, other = (fresh(name, aggregation=aggregation) for _ in range(2))
    cohort = clients_of(method)
    updates = [answer(who, method.assign(who, 1), num_examples=7 + ord(who.id)) for who in cohort]
    method.aggregate(1, updates)
    other.aggregate(1, reversed(updates))
    after = learned(other, cohort)
    for key, tensor in learned(method, cohort).items():
        assert torch.allclose(tensor, after[key], atol=1e-6), key


@pytest.mark.parametrize(("weighting", "mean"), [("examples", 25.0), ("equal", 20.0)])
def test_weight_of_a_client(name, weighting, mean):
    """Two owners with 1 and 3 examples, moved by 10 and by 30: (10 + 90) / 4 = 25 by examples,
    (10 + 30) / 2 = 20 where they count alike."""
    unless_except(name, "weight")
    method = fresh(name, generator=NO_GENERATION, weighting=weighting)
    before = method.current()[BIAS]
    a, b = weak_clients(method)
    jobs = [(a, 1, 10.0), (b, 3, 30.0)]
    method.aggregate(
        1, [answer(c, method.assign(c, 1), num_examples=n, shift=s) for c, n, s in jobs]
    )
    moved = method.current()[BIAS] - before
    assert torch.allclose(moved, torch.full_like(moved, mean), atol=1e-4)


def test_client_without_an_element_has_no_influence_on_it(name, aggregation):
    unless_except(name, "influence")
    changes = {"generator": NO_GENERATION, "aggregation": aggregation}
    alone, method, other = (fresh(name, **changes) for _ in range(3))
    cohort = clients_of(method)
    before = learned(method, cohort)
    updates = [answer(who, method.assign(who, 1)) for who in cohort]
    weak = updates[0]
    alone.aggregate(1, [weak])
    holds = {key: tensor != before[key] for key, tensor in learned(alone, cohort).items()}
    if all(mask.all() for mask in holds.values()):
        pytest.skip("every client holds everything")
    method.aggregate(1, updates)
    far = {key: t if not t.is_floating_point() else t + 100 for key, t in weak.tensors.items()}
    told = {"num_examples": 1000, "num_steps": weak.message.num_steps}
    changed = client_update(weak.client, far, weak.segments, model=weak.model, **told)
    other.aggregate(1, [changed, *updates[1:]])
    after = learned(other, cohort)
    for key, tensor in learned(method, cohort).items():
        differs = tensor != after[key]
        assert not (differs & ~holds[key]).any(), key
        if not is_statistic(key):
            assert differs.any() == holds[key].any(), key


def test_tensor_that_nobody_owns_is_unchanged(name, aggregation):
    unless_except(name, "unowned")
    method = fresh(name, aggregation=aggregation)
    weak = weak_clients(method)
    before = learned(method, weak)
    updates = one_round(method, weak)
    owned = {role_of(key)[1] for update in updates for key in update.tensors}
    assert changed_names(before, learned(method, weak)) <= owned


def test_momentum_does_not_move_what_nobody_owns(name):
    """A round with every owner fills the momentum of every tensor; then only weak clients come."""
    unless_except(name, "unowned")
    method = make_method(config(name, server=ServerOptions(momentum=0.5, lr=0.75)))
    cohort = clients_of(method)
    one_round(method, cohort)
    before = learned(method, cohort)
    updates = one_round(method, weak_clients(method), number=2)
    owned = {role_of(key)[1] for update in updates for key in update.tensors}
    changed = changed_names(before, learned(method, cohort))
    assert changed <= owned
    assert all(is_statistic(key) for key in owned - changed)


def test_round_without_updates_changes_nothing(name, aggregation):
    method = fresh(name, aggregation=aggregation)
    before, state = method.current(), method.state_dict()
    method.aggregate(1, [])
    assert method.current() is before
    assert all(torch.equal(tensor, state[key]) for key, tensor in method.state_dict().items())


def test_a_step_that_is_not_finite_is_refused(name):
    """Weights moved by 1e37 at a rate of 1000 would exceed float32's 3.4e38."""
    unless_except(name, "finite")
    method = fresh(name, server=ServerOptions(lr=1000.0), generator=NO_GENERATION)
    before = method.current()
    updates = [answer(who, method.assign(who, 1), shift=1e37) for who in clients_of(method)]
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
    has_step = (name, "server") not in EXCEPT
    server = ServerOptions(momentum=0.5, lr=0.75) if has_step else PLAIN
    settings = config(name, server=server, aggregation=aggregation)
    straight, stopped = make_method(settings), make_method(settings)
    cohort = clients_of(straight)
    for number in (1, 2):
        one_round(straight, cohort, number)
        one_round(stopped, cohort, number)
    resumed = make_method(settings)
    taken = stopped.state_dict()
    saved = {key: tensor.clone() for key, tensor in taken.items()}
    resumed.load_state_dict(saved)
    one_round(stopped, cohort, 3)
    assert all(torch.equal(taken[key], saved[key]) for key in saved), "a state taken stays"
    one_round(straight, cohort, 3)
    one_round(resumed, cohort, 3)
    for kind in ("current", "served", "state_dict"):
        want, got = getattr(straight, kind)(), getattr(resumed, kind)()
        assert list(want) == list(got) or kind == "state_dict"
        assert not changed_names(want, got), kind


def test_what_a_method_keeps_does_not_grow(name):
    """A hundred rounds of one cohort leave a state of the size that the second left."""
    method = fresh(name, generator=NO_GENERATION)
    cohort = clients_of(method)
    sizes = []
    for number in range(1, 101):
        one_round(method, [cohort[number % 4]], number)
        sizes.append({key: tensor.shape for key, tensor in method.state_dict().items()})
    assert sizes[-1] == sizes[7]


def test_a_job_has_the_size_that_was_configured(name):
    """Published code trains another rank than the configured one. Each tensor of a job is one of
    the model that it names, which is the whole one cut at an exit, or the client's variant."""
    method = fresh(name)
    variants = method.offer().variants
    for who in clients_of(method):
        job = method.assign(who, 1)
        whole = variants[who.variant - 1] if variants else method.spec
        for field in set(ModelSpec.__struct_fields__) - {"exit"}:
            assert getattr(job.model, field) == getattr(whole, field), field
        have = build(job.model).tensors()
        weights = {key: t for key, t in job.tensors.items() if role_of(key)[0] == "weight"}
        assert weights.keys() <= have.keys()
        for key, tensor in weights.items():
            assert (tensor.shape, tensor.dtype) == (have[key].shape, have[key].dtype), key


def test_assignments_are_what_the_client_can_hold(name):
    unless_except(name, "holds")
    method = fresh(name)
    for who in clients_of(method):
        job = method.assign(who, 1)
        for segment in job.plan.segments:
            assert (segment.first == 1 and segment.last <= who.exit) or (
                segment.first == segment.last and segment.first in who.stages
            )
        deepest = max(segment.last for segment in job.plan.segments)
        rests = {role_of(key)[1] for key in job.tensors} - {"all"}
        assert {stage_of(key)[1] for key in rests} <= set(range(1, deepest + 1))


def test_the_offer_has_all_that_a_job_asks_for(name):
    """A device plans for the offer: a job that asks for more is refused there."""
    method = fresh(name)
    offer = method.offer()
    for who in clients_of(method):
        plan = method.assign(who, 3).plan
        assert plan.epochs <= offer.plan.epochs
        for field in ("batch_size", "micro_batch", "recompute", "optimizer", "flat", "prune"):
            assert getattr(plan, field) == getattr(offer.plan, field), field
        for field in (
            "momentum",
            "prox_mu",
            "distill_weight",
            "dyn_alpha",
            "correction",
            "holdout",
        ):
            assert bool(getattr(offer.plan, field)) or not getattr(plan, field), field


def test_deployed_part_is_a_model_of_its_own(name):
    unless_except(name, "deployed")
    method = fresh(name)
    cohort = clients_of(method)
    one_round(method, cohort)
    for who in cohort:
        spec, tensors = method.deployed(who)
        assert spec.exit <= who.exit
        have = build(spec).tensors()
        assert {key: t.shape for key, t in tensors.items()} == {k: t.shape for k, t in have.items()}


@pytest.mark.parametrize("weighting", ["examples", "equal"])
def test_whole_clients_alone_are_fedavg(name, weighting):
    """Of a first round of clients that hold the whole model the result is their mean, to float
    rounding."""
    unless_except(name, "fedavg")
    changes = {"generator": NO_GENERATION, "weighting": weighting}
    method, plain = fresh(name, **changes), fresh("fedavg-l", **changes)
    cohort = clients_of(method, (3, 3, 3))
    shared = set(method.current())
    for each in (method, plain):
        jobs = [each.assign(who, 1) for who in cohort]
        each.aggregate(1, [answer(w, j, 5 + ord(w.id)) for w, j in zip(cohort, jobs, strict=True)])
    assert shared
    for key in shared:
        assert torch.allclose(method.current()[key], plain.current()[key], atol=1e-6), key


def test_unknown_method_lists_the_known():
    with pytest.raises(ConfigError, match="hypemefed.*stage-rotation"):
        make_method(config("fedavgx"))
