"""Who trains which stage, and what it does to the mean."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from coordinator.cohorts.base import Client
from coordinator.config import DistillOptions, RotationOptions, ServerOptions
from coordinator.methods.registry import make_method
from coordinator.methods.rotation import draw_order, fixed, rotation
from edge_sdk.errors import ConfigError
from edge_sdk.protocol.tensor_lists import stage_of
from tests.support.examples import answer, client, config

NONE = [0.0] * 3


def pairs(segments):
    return [(segment.first, segment.last) for segment in segments]


def drawn(options, who, rounds=400, owners=NONE, deadline_s=0.0):
    rule = rotation(options, 7, deadline_s)
    return Counter(tuple(pairs(rule(who, r, owners))) for r in range(rounds))


def test_off_is_the_prefix():
    assert drawn(RotationOptions(), client("a", 2)) == {((1, 2),): 400}


def test_add_draws_one_deeper_stage_by_turns():
    found = drawn(RotationOptions(mode="add"), client("a", 1))
    assert set(found) == {((1, 1), (2, 2)), ((1, 1), (3, 3))}
    assert min(found.values()) > 160  # 200 each expected


def test_add_all_takes_every_stage_it_can_hold():
    every = RotationOptions(mode="add", stages=0)
    assert set(drawn(every, client("a", 1))) == {((1, 1), (2, 2), (3, 3))}
    assert set(drawn(every, Client(id="a", exit=1, stages=(3,)))) == {((1, 1), (3, 3))}
    assert set(drawn(every, Client(id="a", exit=1))) == {((1, 1),)}
    assert set(drawn(every, client("a", 3))) == {((1, 3),)}


def test_only_what_fits_the_deadline_is_added():
    # prefix 4 s, stage 2 in 3 s, stage 3 in 5 s
    who = Client(id="a", exit=1, stages=(2, 3), prefix_s=4.0, stage_s=(3.0, 5.0))
    every = RotationOptions(mode="add", stages=0)
    assert set(drawn(every, who, deadline_s=12.0)) == {((1, 1), (2, 2), (3, 3))}
    # 9 s: one of them, whichever is drawn first
    assert set(drawn(every, who, deadline_s=9.0)) == {((1, 1), (2, 2)), ((1, 1), (3, 3))}
    # 7 s: stage 2 beside the prefix, or instead of it when stage 3 is drawn first
    found = drawn(every, who, deadline_s=7.0)
    assert set(found) == {((1, 1), (2, 2)), ((1, 1),), ((2, 2),), ((3, 3),)}
    # 5 s: nothing fits beside
    assert set(drawn(every, who, deadline_s=5.0)) == {((1, 1),), ((2, 2),), ((3, 3),)}


def test_replace_draws_one_of_all_stages():
    found = drawn(RotationOptions(mode="replace"), client("a", 2), rounds=900)
    assert set(found) == {((1, 2),), ((3, 3),)}
    assert found[((1, 2),)] == pytest.approx(600, abs=60)  # two of three stages are its prefix


def test_needy_favours_stages_with_few_owners():
    # chances 1 / (1 + 3) and 1 / (1 + 0): stage 3 in 4 of 5 rounds
    options = RotationOptions(mode="add", draw="needy")
    found = drawn(options, client("a", 1), rounds=1000, owners=[9.0, 3.0, 0.0])
    assert found[((1, 1), (3, 3))] == pytest.approx(800, abs=60)


def test_draws_are_functions_of_seed_round_and_client():
    assert draw_order({1: 1.0, 2: 1.0, 3: 1.0}, "a") == draw_order({3: 1.0, 2: 1.0, 1: 1.0}, "a")
    orders = {tuple(draw_order({1: 1.0, 2: 1.0, 3: 1.0}, f"{n}")) for n in range(100)}
    assert len(orders) == 6


def test_fixed_asks_for_the_same_of_everybody():
    assert pairs(fixed(3)(client("a", 1), 1, NONE)) == [(1, 3)]


def test_owners_are_counted_and_kept():
    settings = config("hypemefed", rotation=RotationOptions(mode="add", draw="needy"))
    method = make_method(settings)
    who = [client("a", 1), client("b", 2)]
    updates = [answer(c, method.assign(c, 1)) for c in who]
    method.aggregate(1, updates)
    want = torch.zeros(3, dtype=torch.float64)
    for update in updates:
        for segment in update.segments:
            want[segment.first - 1 : segment.last] += 1
    assert torch.equal(method.state_dict()["owners"], want)
    assert want.tolist()[0] == 2


def test_damping_by_hand():
    # stage 3: one owner of 10 examples among 40, moved by 8: rho = 1/4, with p = 0.5 half the way
    cohort = [client(letter, 1) for letter in "abc"] + [client("d", 3)]
    moves = {}
    for power in (0.0, 0.5, 1.0):
        method = make_method(config("owners-mean", server=ServerOptions(damping=power)))
        before = method.current()
        method.aggregate(1, [answer(who, method.assign(who, 1), shift=8.0) for who in cohort])
        moved = {k: (t - before[k]).mean().item() for k, t in method.current().items()}
        moves[power] = [moved["stages.0.0.weight"], moved["stages.2.0.weight"]]
        assert moved["stages.2.1.running_mean"] == pytest.approx(moves[power][1], abs=1e-4)
    assert moves[0.0] == pytest.approx([8, 8], abs=1e-4)
    assert moves[0.5] == pytest.approx([8, 4], abs=1e-4)
    assert moves[1.0] == pytest.approx([8, 2], abs=1e-4)


def test_stale_copy_counts_clients_with_what_they_were_sent():
    cohort = [client(letter, 1) for letter in "abc"] + [client("d", 3)]
    method = make_method(config("stale-copy"))
    before = method.current()
    method.aggregate(1, [answer(who, method.assign(who, 1), shift=8.0) for who in cohort])
    for key, tensor in method.current().items():
        want = 8.0 if stage_of(key)[1] == 1 else 2.0  # (3 * 0 + 8) / 4 = 2 where only d trained
        assert torch.allclose(tensor, before[key] + want, atol=1e-4), key


def test_the_weight_of_distillation_rises_over_the_rounds():
    options = DistillOptions(direction="mutual", weight=2.0, ramp_rounds=4)
    assert [options.weight_at(r) for r in (1, 2, 4, 9)] == [0.5, 1.0, 2.0, 2.0]
    method = make_method(config("owners-mean", distill=options))
    plan = method.assign(client("a", 3), 1).plan
    assert (plan.distill, plan.distill_weight) == ("mutual", 0.5)
    assert config("owners-mean").plan(5).distill_weight == 0.0


def test_automatic_distillation_is_for_stages_with_few_owners():
    """Owners of stage 3 over those of stage 1: nobody yet, then 1 of 3 and 3 of 6."""
    settings = config("owners-mean", distill=DistillOptions(direction="auto", ramp_rounds=0))
    assert settings.plan(1).distill == "shallow-to-deep"  # what devices count with
    method = make_method(settings)
    taught = []
    for number, exits in ((1, (1, 2, 3)), (2, (1, 3, 3)), (3, (1, 1, 3))):
        cohort = [client(str(place_), exit) for place_, exit in enumerate(exits)]
        jobs = [(who, method.assign(who, number)) for who in cohort]
        taught += [{(job.plan.distill, job.plan.distill_weight) for _, job in jobs}]
        method.aggregate(number, [answer(who, job) for who, job in jobs])
    on, off = {("shallow-to-deep", 1.0)}, {("none", 0.0)}
    assert taught == [off, on, off]
    (four,) = {method.assign(client("x", 3), 4).plan.distill}  # 4 of 9
    assert four == "shallow-to-deep"
    resumed = make_method(settings)
    resumed.load_state_dict(method.state_dict())
    assert resumed.assign(client("x", 3), 4).plan.distill == "shallow-to-deep"


def test_damping_counts_those_who_trained():
    """What is generated moves the aggregate, not the share: 1 owner of 4, generated exactly its
    mean, p = 1: a quarter of the way."""
    cohort = [client(letter, 1) for letter in "abc"] + [client("d", 3)]
    method = make_method(config("hypemefed", server=ServerOptions(damping=1.0)))
    before = method.current()

    def generate(current, mean):
        yield 30.0, {"stages.2.0.weight": mean["stages.2.0.weight"]}

    method._generator.generate = generate
    method.aggregate(1, [answer(who, method.assign(who, 1), shift=8.0) for who in cohort])
    moved = method.current()["stages.2.0.weight"] - before["stages.2.0.weight"]
    assert moved.mean().item() == pytest.approx(2.0, abs=1e-4)


def test_only_hypemefed_generates():
    settings = config("owners-mean", generator=config("hypemefed").generator)
    with pytest.raises(ConfigError, match="--generator svd-mlp has no place there"):
        make_method(settings)
