"""HeteroFL, and what methods share that cut by width: slices and owners by hand, classifier rows,
late updates, what is deployed."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from msgspec import UNSET
from msgspec.structs import replace

from coordinator.cohorts.base import Client
from coordinator.cohorts.in_process import train_here
from coordinator.config import AggregationOptions, ServerOptions
from coordinator.methods.heterofl import PAPER
from coordinator.methods.registry import defaults_of, make_method
from edge_sdk.errors import CapacityError, ConfigError
from edge_sdk.models import build
from edge_sdk.models.scaling import scaled_layers
from edge_sdk.protocol.messages import ModelSpec
from tests.support.examples import answer, client_update, config, examples

MLP = ModelSpec(family="mlp", input_shape=(2,), num_classes=3, exit=1, options={"widths": 4})
PLAIN = ServerOptions(momentum=0.0, lr=1.0)


def method_of(name="heterofl", model=MLP, own=UNSET, **changes):
    settings = {"model": model, "own": own, "server": PLAIN} | changes
    return make_method(config(name, **settings))


def client_of(name, variant, exit=1):
    return Client(id=name, exit=exit, variant=variant, num_examples=100)


def returned(method, who, value, num_examples=1, round=1):
    """An update whose every number is `value`."""
    job = method.assign(who, round)
    tensors = {name: torch.full_like(tensor, value) for name, tensor in job.tensors.items()}
    told = {"num_examples": num_examples, "round": round}
    return client_update(who, tensors, job.plan.segments, model=job.model, **told)


def test_worked_example():
    """Four channels; a holds the first two with weight 1, b all with weight 3: where both are,
    (1 * 1 + 3 * 5) / 4 = 4, else 5."""
    method = method_of(own={"widths": (0.5, 1.0)})
    a, b = client_of("a", 1), client_of("b", 2)
    assert tuple(method.assign(a, 1).tensors["stages.0.1.weight"].shape) == (2, 2)
    assert tuple(method.assign(a, 1).tensors["exits.0.weight"].shape) == (3, 2)
    method.aggregate(1, [returned(method, a, 1.0), returned(method, b, 5.0, 3)])
    found = method.current()
    assert found["stages.0.1.weight"].tolist() == [[4, 4], [4, 4], [5, 5], [5, 5]]
    assert found["stages.0.2.weight"].tolist() == [4, 4, 5, 5]
    assert found["stages.0.2.running_mean"].tolist() == [5, 5, 5, 5], "of the whole model alone"
    assert found["exits.0.weight"].tolist() == [[4, 4, 5, 5]] * 3
    assert found["exits.0.bias"].tolist() == [4, 4, 4]


def test_widths_are_redrawn_up_to_the_one_held():
    """Every width up to it in some round, each about as often, the same again for the same seed;
    what returns is added where it was cut."""
    own = {"widths": (0.25, 0.5, 1.0), "redraw_widths": True}
    method, again = method_of(own=own), method_of(own=own)
    a, b = client_of("a", 1), client_of("b", 3)
    drawn = [method.assign(b, number).model.width for number in range(1, 301)]
    assert drawn == [again.assign(b, number).model.width for number in range(1, 301)]
    assert all(70 < drawn.count(width) < 130 for width in (0.25, 0.5, 1.0))
    assert {method.assign(a, number).model.width for number in range(1, 20)} == {0.25}
    number = drawn.index(0.5) + 1
    before = method.current()["stages.0.1.weight"].clone()
    method.aggregate(number, [returned(method, b, 7.0, round=number)])
    found = method.current()["stages.0.1.weight"]
    assert found[:2].eq(7).all()
    assert found[2:].equal(before[2:])
    assert method.deployed(b)[0].width == 1.0, "what it can run stays what it holds"


def test_one_width_and_plain_settings_are_fedavg():
    """Of clients that train in earnest, the same seeds: the same bytes."""
    off = {"static_norm": False, "mask_absent": False, "scaler": False, "clip_norm": 0.0}
    model = config("heterofl").model
    results = []
    for name, own in (("heterofl", {"widths": (1.0,)} | off), ("fedavg-l", UNSET)):
        method = method_of(name, model, own)
        cohort = [client_of(each, 1, 3) for each in "ab"]
        for number in (1, 2):
            updates = [
                train_here(who, method.assign(who, number), examples(9, seed=seed), "cpu")
                for seed, who in enumerate(cohort)
            ]
            method.aggregate(number, updates)
        results.append(method.current())
    for name, tensor in results[0].items():
        assert torch.allclose(tensor, results[1][name], atol=1e-6), name


def test_each_model_has_statistics_of_its_own():
    """Those of clients of one model are averaged; the whole model has the widest's that ever came,
    and before it came those that there were."""
    method = method_of(own={"widths": (0.5, 1.0)})
    a, b, c = client_of("a", 1), client_of("b", 2), client_of("c", 1)
    mean_of = "stages.0.2.running_mean"

    def seen():
        models = [method.assign(who, 9).tensors[mean_of].tolist() for who in (a, b)]
        return [method.current()[mean_of].tolist(), *models]

    method.aggregate(1, [returned(method, a, 1.0)])
    assert seen() == [[1, 1, 0, 0], [1, 1], [1, 1, 0, 0]]
    method.aggregate(
        2, [returned(method, a, 2.0), returned(method, b, 5.0), returned(method, c, 4.0)]
    )
    assert seen() == [[5, 5, 5, 5], [3, 3], [5, 5, 5, 5]]
    method.aggregate(3, [returned(method, a, 7.0)])
    assert seen() == [[5, 5, 5, 5], [7, 7], [5, 5, 5, 5]]
    method.server.options = replace(PLAIN, serve="last")
    assert method.deployed(a)[1][mean_of].tolist() == [7, 7]
    assert method.served() is method.current()
    again = method_of(own={"widths": (0.5, 1.0)})
    again.load_state_dict(method.state_dict())
    assert again.assign(a, 4).tensors[mean_of].tolist() == [7, 7]


def test_bytes_of_a_job_are_those_of_the_narrow_model():
    method = method_of(model=config("heterofl").model)
    for place, model in enumerate(method.offer().variants, 1):
        down = method.assign(client_of("a", place, 3), 1).tensors
        assert model.width == (0.125, 0.25, 0.5, 0.75, 1.0)[place - 1]
        want = {name: tensor.shape for name, tensor in build(model).tensors().items()}
        assert {name: tensor.shape for name, tensor in down.items()} == want
        assert all(tensor.is_contiguous() for tensor in down.values())


def test_a_part_counts_in_momentum_where_it_is_held():
    """Momentum of channels that only b holds stays as it is in a round of a alone."""
    server = ServerOptions(momentum=0.5, lr=1.0)
    method = method_of(own={"widths": (0.5, 1.0)}, server=server)
    a, b = client_of("a", 1), client_of("b", 2)
    method.aggregate(1, [answer(b, method.assign(b, 1), shift=1.0)])
    before = method.current()["stages.0.1.weight"].clone()
    for number in (2, 3):
        method.aggregate(number, [answer(a, method.assign(a, number), shift=0.0)])
    after = method.current()["stages.0.1.weight"]
    assert torch.equal(after[2:], before[2:])
    assert torch.allclose(after[:2], before[:2] + 0.5 + 0.25, atol=1e-5)
    method.aggregate(4, [answer(b, method.assign(b, 4), shift=0.0)])
    later = method.current()["stages.0.1.weight"]
    assert torch.allclose(later[2:], before[2:] + 0.5, atol=1e-5), "as in the round after b's"
    assert torch.allclose(later[:2], after[:2] + 0.125, atol=1e-5)


def test_a_row_that_came_back_as_it_was_sent_is_nobodys():
    """a has no example of class 2, b none of class 0; nobody has class 1."""
    method = method_of(own={"widths": (0.5, 1.0)})
    before = method.current()["exits.0.weight"].clone()
    updates = []
    for who, own, step in ((client_of("a", 1), 0, 2.0), (client_of("b", 2), 2, 4.0)):
        job = method.assign(who, 1)
        tensors = dict(job.tensors)
        for name in ("exits.0.weight", "exits.0.bias"):
            tensors[name] = job.tensors[name].clone()
            tensors[name][own] += step
        told = {"model": job.model, "num_examples": 1}
        updates.append(client_update(who, tensors, job.plan.segments, **told))
    method.aggregate(1, updates)
    moved = method.current()["exits.0.weight"] - before
    want = [[2, 2, 0, 0], [0, 0, 0, 0], [4, 4, 4, 4]]
    assert torch.allclose(moved, torch.tensor(want, dtype=torch.float32), atol=1e-6)
    unmasked = method_of(own={"widths": (0.5, 1.0), "mask_absent": False})
    unmasked.aggregate(1, updates)
    assert torch.allclose(
        unmasked.current()["exits.0.weight"][0, :2] - before[0, :2], torch.ones(2)
    )


def test_a_client_without_a_class_has_no_say_in_its_row():
    """Trained in earnest, with weight decay and momentum: labels 0 and 1 of 3 only."""
    method = method_of(optimizer="sgd", lr=0.1, momentum=0.9, weight_decay=0.01)
    data = examples(12, shape=(2,))
    data = data.take(np.flatnonzero(data.y < 2))
    before = {name: tensor.clone() for name, tensor in method.current().items()}
    who = client_of("a", 5)
    method.aggregate(1, [train_here(who, method.assign(who, 1), data, "cpu")])
    for name in ("exits.0.weight", "exits.0.bias"):
        assert torch.equal(method.current()[name][2], before[name][2])
        assert not torch.equal(method.current()[name][0], before[name][0])


def test_a_late_update_counts_from_what_its_part_is_now():
    """a moved by 2 from what it was sent; a round later it counts half: (2 / 2 + 0) / 2."""
    method = method_of(own={"widths": (0.5, 1.0)}, staleness_half_life=1.0)
    a, b = client_of("a", 1), client_of("b", 2)
    job = method.assign(a, 1)
    method.aggregate(1, [answer(b, method.assign(b, 1), shift=7.0)])
    before = method.current()["stages.0.1.weight"].clone()
    late = answer(a, job, shift=2.0)
    late = dataclasses.replace(late, staleness=1, sent=job.tensors)
    method.aggregate(2, [late, answer(b, method.assign(b, 2), shift=0.0)])
    moved = method.current()["stages.0.1.weight"] - before
    assert torch.allclose(moved, torch.tensor([[0.5] * 2] * 2 + [[0.0] * 2] * 2), atol=1e-5)


def test_the_plan_of_a_job_and_of_the_offer():
    method = method_of()
    for plan in (method.offer().plan, method.assign(client_of("a", 1), 1).plan):
        assert (plan.static_norm, plan.mask_absent, plan.scaler) == (True, True, "training")
        assert plan.clip_norm == 1
    off = method_of(
        own={"static_norm": False, "mask_absent": False, "scaler": False, "clip_norm": 0.0}
    )
    assert off.assign(client_of("a", 5), 1).plan == replace(
        config("heterofl", model=MLP).plan(1), seed=off.assign(client_of("a", 5), 1).plan.seed
    )


def test_a_deployed_narrow_model_divides_in_its_weights():
    """What training computes with a Scaler the deployed model computes without."""
    spec = config("heterofl").model
    method = method_of(model=spec, own={"widths": (0.5, 1.0)})
    model, tensors = method.deployed(client_of("a", 1, 3))
    alone = build(model).eval()
    alone.load(tensors)
    trained = build(model).eval()
    trained.load(method.assign(client_of("a", 1, 3), 1).tensors)
    for layer in scaled_layers(trained).values():
        layer.register_forward_hook(lambda layer, given, out: out / 0.5)
    x = torch.rand(4, *spec.input_shape)
    for one, other in zip(alone(x), trained(x), strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    whole = method.deployed(client_of("b", 2, 3))[1]
    assert all(torch.equal(tensor, method.served()[name]) for name, tensor in whole.items())


def test_widths_are_offered_once_and_cheapest_first():
    method = method_of(own={"widths": (1.0, 0.25, 1.0)})
    assert [model.width for model in method.offer().variants] == [0.25, 1.0]


def test_a_client_that_holds_none_of_the_models_gets_no_job():
    for variant in (0, 6):
        with pytest.raises(CapacityError, match="a holds none of the 5 models"):
            method_of().assign(client_of("a", variant), 1)


@pytest.mark.parametrize("changes", [{"rule": "median"}, {"clip": 2.0}])
def test_what_compares_whole_tensors_is_refused(changes):
    with pytest.raises(ConfigError, match=r"'heterofl': --(aggregation median|clip 2.0) has no"):
        method_of(aggregation=AggregationOptions(**changes))


def test_settings_of_the_paper():
    assert defaults_of("heterofl", is_paper=True) == PAPER
    assert (PAPER["lr"], PAPER["momentum"], PAPER["weighting"]) == (0.1, 0.9, "equal")
    assert PAPER["own.widths"] == (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)


def test_coverage_tells_what_share_of_the_model_anybody_held():
    method = method_of(own={"widths": (0.5, 1.0)})
    a = client_of("a", 1)
    metrics = method.aggregate(1, [returned(method, a, 1.0)])
    # of 4 x 2 weights, scales and shifts of 4, 3 x 4 and 3 of the exit: 4 + 4 + 6 + 3 of 31
    assert metrics.values["coverage"] == pytest.approx(17 / 31)
