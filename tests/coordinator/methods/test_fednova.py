"""FedNova by a worked example with unequal steps."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from msgspec.structs import replace

from coordinator.methods.fednova import steps_in_all
from coordinator.methods.registry import make_method
from edge_sdk.errors import ConfigError
from tests.support.examples import answer, client, config

BIAS = "exits.0.2.bias"
DEEP = "exits.2.2.bias"


def method_of(**changes):
    return make_method(config("fednova", batch_size=8, epochs=10, **changes))


def moved(method, name, *clients):
    """Each (name, exit, examples, steps, movement)."""
    before = method.current()[name]
    method.aggregate(
        1,
        [
            answer(
                client(who, exit),
                method.assign(client(who, exit), 1),
                num_examples=count,
                num_steps=steps,
                shift=shift,
            )
            for who, exit, count, steps, shift in clients
        ],
    )
    difference = method.current()[name] - before
    assert torch.allclose(difference, difference[0].expand_as(difference), atol=1e-5)
    return float(difference[0])


A, B = ("a", 1, 10, 2, 4.0), ("b", 3, 30, 6, 6.0)


@pytest.mark.parametrize("clients", [(A, B), (B, A)])
def test_unequal_steps(clients):
    """Shares 1/4 and 3/4; a step of a moves 2, one of b moves 1: the mean step is 2/4 + 3/4 = 1.25,
    the mean number of steps 2/4 + 18/4 = 5, so it goes 6.25 (FedAvg: 5.5)."""
    assert moved(method_of(), BIAS, *clients) == pytest.approx(6.25, abs=1e-5)
    # the only owner of a tensor is its mean
    assert moved(method_of(), DEEP, *clients) == pytest.approx(6.0, abs=1e-5)


def test_equal_weights():
    """Shares of one half: mean step 1.5, mean number of steps 4."""
    assert moved(method_of(weighting="equal"), BIAS, A, B) == pytest.approx(6.0, abs=1e-5)


def test_statistics_follow_the_plain_mean():
    method = method_of()
    name = next(name for name in method.current() if name.endswith("running_mean"))
    assert moved(method, name, A, B) == pytest.approx(5.5, abs=1e-5)


def test_more_steps_than_the_plan_has_do_not_count():
    """10 epochs of 8 examples in batches of 8 are 10 steps: the mean step is (10 / 10 + 2) / 2, the
    mean number (10 + 2) / 2. No steps count as one."""
    liar, other = ("a", 1, 8, 2**40, 10.0), ("b", 1, 8, 2, 4.0)
    assert moved(method_of(), BIAS, liar, other) == pytest.approx(9.0, abs=1e-4)
    assert moved(method_of(), BIAS, ("a", 1, 8, 0, 1.0)) == pytest.approx(1.0, abs=1e-5)


def test_a_bounded_client_counts_less_and_is_no_faster_for_it():
    """Each step of both moves 0.5. Of 100 examples the second counts with 10, whose steps are 20:
    the mean number of steps is 20, so it goes 10. Were its 50 divided by 20, it would go 30."""
    method = method_of()
    before = method.current()[BIAS]
    updates = []
    for name, count, steps, shift in (("a", 10, 20, 10.0), ("b", 100, 100, 50.0)):
        job = method.assign(client(name, 1), 1)
        made = answer(client(name, 1), job, num_examples=count, num_steps=steps, shift=shift)
        updates.append(dataclasses.replace(made, most_examples=10))
    method.aggregate(1, updates)
    moved = method.current()[BIAS] - before
    assert moved.tolist() == pytest.approx([10.0] * 3, abs=1e-4)


def test_what_steps_add_up_to():
    """Momentum 0.5, two steps: gradients move the client 1.5 and 1 times. FedProx at lr 0.1 and mu
    1: the first of two steps is shortened by 0.9."""
    plan = config("fednova", optimizer="sgd", lr=0.1).plan(1)
    assert steps_in_all(plan, 7) == 7
    assert steps_in_all(replace(plan, momentum=0.5), 2) == pytest.approx(2.5)
    assert steps_in_all(replace(plan, prox_mu=1.0), 2) == pytest.approx(1.9)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"optimizer": "adam"}, "--optimizer adam"),
        ({"momentum": 0.9, "prox_mu": 0.1}, "--prox-mu and --momentum"),
        ({"lr": 1.0, "prox_mu": 1.0}, "overshoots"),
    ],
)
def test_what_has_no_sum_of_steps_is_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        method_of(**changes)
