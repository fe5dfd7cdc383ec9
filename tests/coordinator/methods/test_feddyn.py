"""FedDyn's server by hand, at equal and unequal depth, and DepthFL's beside it."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from msgspec.structs import replace

from coordinator.methods.depthfl import ramp
from coordinator.methods.registry import make_config, make_method
from edge_sdk.protocol.tensor_lists import stage_of
from tests.support.examples import answer, client, cnn, config

BIAS = "exits.0.2.bias"
DEEP = "exits.2.2.bias"


def method_of(name="feddyn", alpha=0.5, **changes):
    return make_method(config(name, own={"alpha": alpha}, weighting="equal", **changes))


def one_round(method, number, *clients):
    """Each (name, exit, movement)."""
    method.aggregate(
        number,
        [
            answer(client(name, exit), method.assign(client(name, exit), number), shift=shift)
            for name, exit, shift in clients
        ],
    )


def moved(method, start, name):
    difference = method.current()[name] - start[name]
    assert torch.allclose(difference, difference[0].expand_as(difference))
    return float(difference[0])


def test_two_rounds_by_hand():
    """alpha 0.5, four clients of which two take part. Round 1 moves by 1 and 3, mean 2: h = -0.5 *
    2/4 * 2 = -0.5, the model goes 2 + 0.5 / 0.5 = 3. Round 2, another two, 0 and 2, mean 1: h =
    -0.5 - 0.5 * 2/4 * 1 = -0.75, so it goes 1 + 0.75 / 0.5 = 2.5 further."""
    method = method_of(min_clients=4)
    start = method.current()
    one_round(method, 1, ("a", 1, 1.0), ("b", 1, 3.0))
    assert moved(method, start, BIAS) == pytest.approx(3.0, abs=1e-5)
    one_round(method, 2, ("c", 1, 0.0), ("d", 1, 2.0))
    assert moved(method, start, BIAS) == pytest.approx(5.5, abs=1e-5)
    job = method.assign(client("a", 1), 3)
    assert job.plan.dyn_alpha == method.offer().plan.dyn_alpha == 0.5
    assert not any("/" in name for name in job.tensors), "h stays here"


def test_statistics_follow_the_plain_mean():
    method = method_of()
    start = method.current()
    one_round(method, 1, ("a", 1, 2.0))
    name = next(name for name in start if name.endswith("running_mean"))
    assert moved(method, start, name) == pytest.approx(2.0, abs=1e-6)


@pytest.mark.parametrize(("name", "deep"), [("feddyn", 8.0), ("depthfl", 6.0)])
def test_a_deep_tensor_counts_its_owners(name, deep):
    """Two clients, one of them deep, which moves by 4. FedDyn: it is one of one owner, so h is -4
    alpha and the model goes 8. DepthFL: one of two clients, so h is -2 alpha and the model goes
    6."""
    method = method_of(name)
    start = method.current()
    one_round(method, 1, ("a", 1, 4.0), ("b", 3, 4.0))
    assert moved(method, start, DEEP) == pytest.approx(deep, abs=1e-5)
    assert moved(method, start, BIAS) == pytest.approx(8.0, abs=1e-5)
    one_round(method, 2, ("a", 1, 0.0))
    assert moved(method, start, DEEP) == pytest.approx(deep, abs=1e-5), "nobody owned it"


def test_unlike_quadratics_meet_at_the_optimum_of_their_mean():
    """w^2 / 2 and 3 (w - 4)^2 / 2 together are least at 3; one of both takes part in each round,
    and solves curvature (w - optimum) - g + alpha (w - start) = 0 exactly."""
    alpha, curves = 0.5, {"a": (1.0, 0.0), "b": (3.0, 4.0)}
    method = method_of(alpha=alpha, min_clients=2)
    own = dict.fromkeys(curves, torch.zeros(3))
    for number in range(1, 201):
        name = "ab"[number % 2]
        curvature, optimum = curves[name]
        job = method.assign(client(name, 1), number)
        start = job.tensors[BIAS]
        w = (curvature * optimum + own[name] + alpha * start) / (curvature + alpha)
        own[name] = own[name] - alpha * (w - start)
        update = answer(client(name, 1), job, shift=0.0)
        method.aggregate(number, [dataclasses.replace(update, tensors=update.tensors | {BIAS: w})])
    assert method.current()[BIAS].tolist() == pytest.approx([3.0] * 3, abs=1e-3)


def test_depthfl_ramp():
    """exp(-5 (1 - t/R)^2): e^-1.25 half way, 1 from R on."""
    assert ramp(150, 300) == pytest.approx(math.exp(-1.25))
    assert ramp(300, 300) == ramp(1000, 300) == ramp(1, 0) == 1.0
    made = make_method(make_config("depthfl", cnn(), rounds=10, seed=1))
    plans = [made.assign(client("a", 3), number).plan for number in (5, 10)]
    assert [plan.distill for plan in plans] == ["mutual"] * 2
    assert plans[0].distill_weight == pytest.approx(math.exp(-1.25))
    assert plans[1].distill_weight == 1.0
    assert made.offer().plan.distill_weight == 1.0


def test_depthfl_pairs_tensors_by_name():
    """Published code pairs them by their place, as if the tensors of a shallow client began the
    list of all. Stages and exits interleave otherwise: with exits after stages the fourth tensor of
    a client of one stage is its exit's, that of the whole model the second stage's."""
    method = method_of("depthfl")
    whole, shallow = (list(method.assign(client("a", exit), 1).tensors) for exit in (3, 1))
    assert whole[: len(shallow)] != shallow, "or this shows nothing"
    start = method.current()
    one_round(method, 1, ("a", 1, 1.0))
    for name, tensor in method.current().items():
        assert torch.equal(tensor, start[name]) == (stage_of(name)[1] > 1 or "num_" in name), name


def test_depthfl_as_published():
    made = make_config("depthfl", cnn(), rounds=1000, is_paper=True)
    assert made.plan(1).lr == 0.1
    assert made.plan(101).lr == pytest.approx(0.1 * 0.998**100)
    assert (made.weighting, made.epochs, made.batch_size) == ("equal", 5, 50)
    assert replace(made, lr_decay=1.0).plan(101).lr == 0.1
