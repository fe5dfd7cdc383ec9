"""SCAFFOLD's server by hand, and the whole method on quadratics."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from coordinator.config import AggregationOptions, ServerOptions
from coordinator.methods.registry import make_config, make_method
from edge_sdk.errors import ConfigError, ShapeError
from tests.support.examples import answer, client, cnn, config

BIAS = "exits.0.2.bias"
DEEP = "exits.2.2.bias"


def scaffold(**changes):
    return make_method(config("scaffold", weighting="equal", **changes))


def correction(method, name, who="z", exit=3):
    return method.assign(client(who, exit), 9).tensors[f"correction/{name}"]


def answers(method, *clients):
    """Each (name, exit, difference of its control variates, examples)."""
    updates = []
    for name, exit, difference, count in clients:
        job = method.assign(client(name, exit), 1)
        update = answer(client(name, exit), job, num_examples=count, shift=0.0)
        for key, tensor in update.tensors.items():
            if key.startswith("correction/"):
                update.tensors[key] = torch.full_like(tensor, difference)
        updates.append(update)
    return updates


def test_variates_begin_at_zero_and_not_from_the_weights():
    """Published baselines begin them from the weights."""
    job = scaffold().assign(client("a", 2), 1)
    beside = {name: t for name, t in job.tensors.items() if name.startswith("correction/")}
    assert all(not tensor.any() for tensor in beside.values())
    trained = {spec.name for spec in job.returns if "/" not in spec.name}
    buffers = {name for name in trained if "running_" in name or "num_batches" in name}
    assert buffers
    assert {f"correction/{name}" for name in trained - buffers} == set(beside)
    assert job.plan.correction
    assert scaffold().offer().plan.correction


def test_c_moves_by_the_share_of_known_clients_that_returned():
    """Round 1, a, b: mean (1 + 3) / 2 times 2 / 2 known. Round 2, c alone: 2 + 6 * 1 / 3 known.
    Stage 3 has one owner of the first round, b: 3, which stays."""
    method = scaffold()
    method.aggregate(1, answers(method, ("a", 1, 1.0, 5), ("b", 3, 3.0, 9)))
    assert correction(method, BIAS).tolist() == pytest.approx([2.0] * 3)
    assert correction(method, DEEP).tolist() == pytest.approx([3.0] * 3)
    method.aggregate(2, answers(method, ("c", 1, 6.0, 5)))
    assert correction(method, BIAS).tolist() == pytest.approx([4.0] * 3)
    assert correction(method, DEEP).tolist() == pytest.approx([3.0] * 3)


def test_c_counts_the_clients_that_a_run_is_sure_to_have():
    """Two of ten: the mean 2 of both, times 2 / 10."""
    for changes in ({"min_clients": 10}, {"population": '{"clients": 10}'}):
        method = scaffold(**changes)
        method.aggregate(1, answers(method, ("a", 1, 1.0, 5), ("b", 1, 3.0, 5)))
        assert correction(method, BIAS).tolist() == pytest.approx([0.4] * 3)


def test_by_examples_c_is_weighted_as_the_mean_is():
    """(1 * 10 + 3 * 30) / 40 = 2.5."""
    method = make_method(config("scaffold", weighting="examples"))
    method.aggregate(1, answers(method, ("a", 1, 1.0, 10), ("b", 1, 3.0, 30)))
    assert correction(method, BIAS).tolist() == pytest.approx([2.5] * 3)


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"optimizer": "adam"}, "--optimizer adam.*plain SGD"), ({"momentum": 0.9}, "--momentum 0.9")],
)
def test_what_breaks_the_estimate_of_the_gradient_is_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        scaffold(**changes)
    assert make_config("scaffold", cnn(), rounds=1).optimizer == "sgd"


@pytest.mark.parametrize("server_lr", [1.0, 0.5])
def test_two_unlike_quadratics_meet_at_the_optimum_of_their_mean(server_lr):
    """w^2 / 2 and 3 (w - 4)^2 / 2 together are least at 12 / 4 = 3. Five steps of 0.1 go the share
    1 - 0.9^5 to 0 and 1 - 0.7^5 to 4, so FedAvg would end at 4 (1 - 0.7^5) / (2 - 0.9^5 - 0.7^5) =
    2.6805. The clients' steps are done here, on the numbers of one bias."""
    curves = {"a": (1.0, 0.0), "b": (3.0, 4.0)}  # curvature and optimum
    method = scaffold(lr=0.1, server=ServerOptions(lr=server_lr))
    own = dict.fromkeys(curves, torch.zeros(3))
    for number in range(1, 101):
        updates = []
        for name, (curvature, optimum) in curves.items():
            job = method.assign(client(name, 1), number)
            start, shared = job.tensors[BIAS], job.tensors[f"correction/{BIAS}"]
            y = start.clone()
            for _ in range(5):
                y = y - 0.1 * (curvature * (y - optimum) - own[name] + shared)
            difference = -shared + (start - y) / (5 * 0.1)
            own[name] = own[name] + difference
            update = answer(client(name, 1), job, shift=0.0)
            changed = {BIAS: y, f"correction/{BIAS}": difference}
            updates.append(dataclasses.replace(update, tensors=update.tensors | changed))
        method.aggregate(number, updates)
    assert method.current()[BIAS].tolist() == pytest.approx([3.0] * 3, abs=1e-4)
    assert own["a"].tolist() == pytest.approx([3.0] * 3, abs=1e-3)  # the slope there
    assert own["b"].tolist() == pytest.approx([-3.0] * 3, abs=1e-3)
    assert correction(method, BIAS).tolist() == pytest.approx([0.0] * 3, abs=1e-3)


def test_a_robust_rule_also_bounds_c():
    """The median of 1, 1 and 1000 is 1."""
    method = scaffold(aggregation=AggregationOptions(rule="median"))
    clients = (("a", 1, 1.0, 5), ("b", 1, 1.0, 5), ("c", 1, 1000.0, 5))
    method.aggregate(1, answers(method, *clients))
    assert correction(method, BIAS).tolist() == [1.0] * 3


def test_a_clip_also_bounds_c():
    """The lower median of three norms is that of a difference of 1, so 1000 counts as 1."""
    method = scaffold(aggregation=AggregationOptions(clip=1.0))
    clients = (("a", 1, 1.0, 5), ("b", 1, 1.0, 5), ("c", 1, 1000.0, 5))
    metrics = method.aggregate(1, answers(method, *clients))
    assert metrics.values["clipped_updates"] == 1
    assert correction(method, BIAS).tolist() == pytest.approx([1.0] * 3)


def test_a_state_of_other_clients_or_models_is_refused():
    method = scaffold()
    method.aggregate(1, answers(method, ("a", 1, 1.0, 5)))
    state = method.state_dict()
    for key, wrong in (
        (f"rule/kept/{BIAS}", torch.zeros(4)),
        ("rule/known_ids", torch.zeros(2, dtype=torch.int64)),
        ("rule/known_weights", torch.zeros(1, 2)),
    ):
        with pytest.raises(ShapeError, match="checkpoint"):
            scaffold().load_state_dict(state | {key: wrong})
