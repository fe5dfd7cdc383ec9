"""A generator that cannot compute ends no round: the round has the owners' means, the next is as
after a new start of the generator."""

from __future__ import annotations

import pytest
import torch

from coordinator.config import GeneratorOptions, RotationOptions, ServerOptions
from coordinator.generators.registry import GENERATORS
from coordinator.methods.registry import make_method
from tests.support.examples import answer, client, config

NAMES = [name for name in GENERATORS if name != "none"]
COHORT = [client("a", 1), client("b", 1), client("c", 2), client("d", 3), client("e", 3)]
LINALG = torch.linalg.LinAlgError("the input matrix is singular")


def method(generator):
    options = GeneratorOptions(name=generator, rank=4, hidden=8, epochs=2, memory_rows=8)
    server, rotation = ServerOptions(serve="last"), RotationOptions(mode="off")
    return make_method(
        config("hypemefed", server=server, rotation=rotation, generator=options, seed=3)
    )


def play(made, number):
    updates = [answer(who, made.assign(who, number)) for who in COHORT]
    return made.aggregate(number, updates)


def same(one, other):
    return all(torch.equal(one.current()[name], t) for name, t in other.current().items())


@pytest.mark.parametrize("phase", ["observe", "fit", "generate"])
@pytest.mark.parametrize("error", [LINALG, OverflowError("too large"), ValueError("NaN")])
@pytest.mark.parametrize("name", NAMES)
def test_a_round_without_its_generator_is_the_owners_mean(name, phase, error, caplog):
    failing, plain = method(name), method("none")

    def fails(*_):
        raise error

    setattr(failing._generator, phase, fails)
    metrics = play(failing, 1)
    play(plain, 1)
    assert metrics.values["generator_failed"] == 1.0
    assert f"round 1: the generator cannot go on: {error}" in caplog.text
    assert same(failing, plain)
    begun_anew = method(name)
    begun_anew.server.load_state_dict(failing.server.state_dict())
    for number in range(2, 8):
        for one in (failing, begun_anew):
            assert "generator_failed" not in play(one, number).values
    assert same(failing, begun_anew), "from the next round on it is as after a new start"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_a_memory_from_which_nothing_can_be_computed_is_given_up(value):
    """As a run of an earlier version kept it."""
    spoilt = method("update-regression")
    for number in range(1, 6):
        play(spoilt, number)
    state = spoilt.state_dict()
    state["generator/2/rows"].fill_(value)
    spoilt.load_state_dict(state)
    failed = [play(spoilt, number).values.get("generator_failed", 0.0) for number in range(6, 18)]
    assert sum(failed) >= 1.0
    assert failed[-6:] == [0.0] * 6
    for tensor in spoilt.state_dict().values():
        assert torch.isfinite(tensor).all()


@pytest.mark.parametrize("name", NAMES)
def test_what_is_made_is_finite_or_not_used(name):
    garbled, plain = method(name), method("none")

    def makes(current, mean):
        yield 5.0, {"stages.1.0.weight": torch.full_like(current["stages.1.0.weight"], 1e39)}

    garbled._generator.generate = makes
    assert play(garbled, 1).values["generator_failed"] == 1.0
    play(plain, 1)
    assert same(garbled, plain)


def test_two_largest_floats_that_differ_in_sign_change_nothing():
    """Their difference is infinite, in the mean and in the served average."""
    made = make_method(config("owners-mean", server=ServerOptions(serve="ema")))
    who = [client("a", 3), client("b", 3)]
    updates = [
        answer(w, made.assign(w, 1), shift=s) for w, s in zip(who, (3e38, -3e38), strict=True)
    ]
    before = made.current()
    assert made.aggregate(1, updates).values["aggregate_refused"] == 1.0
    assert made.current() is before
    assert all(torch.isfinite(t).all() for t in made.state_dict().values())
