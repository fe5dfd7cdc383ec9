"""A model for each client by a hypernetwork: what is sent, what returns, and what a round makes of
it. P5, P6, P7 ... are defects or pitfalls of published code."""

from __future__ import annotations

import pytest
import torch

from coordinator.cohorts.base import Client
from coordinator.config import AggregationOptions, ServerOptions
from coordinator.methods.registry import defaults_of, make_config, make_method
from edge_sdk.errors import ConfigError, ShapeError
from edge_sdk.models import build
from edge_sdk.models.flat import num_weights, parameter_shapes
from edge_sdk.protocol.messages import Segment, Teacher
from tests.support.examples import OWN, client_update, cnn, config

NAMES = ("mh-pfedhn", "mh-pfedhngd", "pfedhn")
COHORT = [Client(id=name, exit=exit, variant=exit) for name, exit in (("a", 1), ("b", 1), ("c", 3))]
SIZES = [num_weights(parameter_shapes(build(cnn(exit=exit)))) for exit in (1, 2, 3)]


def fresh(name, seed=0, **own):
    return make_method(config(name, seed=seed, own=OWN[name] | own))


def returned(who, job, by=0.1, num_examples=10, **more):
    """An update moved by draws of the client's own."""
    rng = torch.Generator().manual_seed(sum(map(ord, who.id)))
    moved = {
        spec.name: job.tensors[spec.name] + by * torch.randn(spec.shape, generator=rng)
        if spec.dtype == "float32"
        else job.tensors[spec.name] + 1
        for spec in job.returns
    }
    return client_update(who, moved, job.plan.segments, num_examples=num_examples, **more)


def play(method, number=1, cohort=COHORT, order=1):
    jobs = {who.id: method.assign(who, number) for who in cohort}
    updates = [returned(who, jobs[who.id]) for who in cohort]
    return method.aggregate(number, updates[::order])


def sent(method, who):
    return method.assign(who, 1).tensors["flat/all"]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


def test_a_job_is_one_vector_of_the_client_s_weights_both_ways(name):
    method = fresh(name)
    for who in COHORT:
        job = method.assign(who, 1)
        flat = [spec for spec in job.returns if spec.role == "flat"]
        assert [(s.name, s.shape, s.dtype) for s in flat] == [
            ("flat/all", (SIZES[who.exit - 1],), "float32")
        ]
        assert job.model == cnn(exit=who.exit)
        assert job.plan.flat
        assert job.plan.keeps_state
        assert job.plan.segments == (Segment(first=1, last=who.exit),)
        assert job.plan.clip_norm == 50
        # the published models have one exit
        assert job.plan.exit_weights == (0.0,) * (who.exit - 1) + (1.0,)
        beside = [spec.name for spec in job.returns if spec.role != "flat"]
        assert beside == [f"teacher/{n}" for n in method.current()]
        assert [spec.name for spec in job.returns] == list(job.tensors)


def test_the_offer_is_the_cuts_of_the_model(name):
    offer = fresh(name).offer()
    assert offer.variants == tuple(cnn(exit=exit) for exit in (1, 2, 3))
    assert offer.plan.flat
    assert (offer.plan.teacher is not None) == (name == "mh-pfedhngd")


def test_a_client_s_own_model_needs_nothing_but_its_number_of_weights(name):
    method = fresh(name)
    own = Client(id="own", exit=2, num_weights=1234)
    job = method.assign(own, 1)
    assert job.tensors["flat/all"].shape == (1234,)
    before = sent(method, own)
    play(method, cohort=[*COHORT, own])
    assert not torch.equal(sent(method, own), before)
    with pytest.raises(ConfigError, match="client 'own' has a model of its own kind"):
        method.deployed(own)


def test_a_client_s_own_model_is_trained_as_one_segment_up_to_its_own_exit(name):
    """Whatever exits the run's model has: a device refuses segments that its model has not."""
    plan = fresh(name).assign(Client(id="own", exit=1, num_weights=100), 1).plan
    assert plan.segments == (Segment(first=1, last=1),)
    assert plan.exit_weights == (1.0,)


def test_clients_are_their_own(name):
    method = fresh(name, start="alike")
    a, b, _ = COHORT
    assert not torch.equal(sent(method, a), sent(method, b))
    assert torch.equal(sent(method, a), sent(fresh(name, start="alike"), a))
    assert not torch.equal(sent(method, a), sent(fresh(name, seed=1, start="alike"), a))


def test_what_is_deployed_is_what_is_sent_under_the_model_s_names(name):
    """P8: one order of the tensors, there and back."""
    method = fresh(name)
    play(method)
    for who in COHORT:
        spec, tensors = method.deployed(who)
        model = build(spec)
        model.load(tensors)
        assert list(tensors) == list(model.tensors())
        flat = torch.cat([p.detach().flatten() for p in model.parameters()])
        assert torch.equal(flat, sent(method, who))


@pytest.mark.parametrize("name", ["mh-pfedhn", "pfedhn"])
def test_one_client_a_round_is_the_published_sequence(name):
    """Each model is generated after the step of the client before, and the step is J^T (sent -
    returned), at the parameters that it was sent from."""
    method, other = fresh(name), fresh(name)
    network, variants = other._network, other._variants
    for number, who in enumerate([*COHORT, *COHORT], 1):
        job = method.assign(who, number)
        update = returned(who, job)
        method.aggregate(number, [update])
        variant = variants[who.exit - 1]
        began = variant.weights(network.generate(who.id, variant.num_weights))
        assert torch.equal(began, job.tensors["flat/all"])
        network.backward(who.id, variant.delta(began - update.tensors["flat/all"]))
        network.step()
    assert same(method.state_dict(), other.state_dict())


@pytest.mark.parametrize("name", ["mh-pfedhn", "pfedhn"])
def test_a_round_of_many_is_named_and_differs_from_the_sequence(name):
    """P5, P7: all were sent what the round began with, and have moved from that, whatever steps
    come between."""
    ways = {}
    for apply in ("successive", "summed"):
        method = ways[apply] = fresh(name, apply=apply)
        values = play(method).values
        assert values[f"steps_{apply}"] == (3 if apply == "successive" else 1)
        assert values["hypernetwork_gradient"] > 0
    ways["sequence"] = fresh(name)
    for who in COHORT:
        play(ways["sequence"], cohort=[who])
    made = [sent(method, COHORT[0]) for method in ways.values()]
    assert not torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])
    # by hand: gradients at parameters that have moved, of movements that have not
    method, other = ways["successive"], fresh(name)
    network = other._network
    moved = []
    for who in COHORT:
        variant = other._variants[who.exit - 1]
        update = returned(who, other.assign(who, 1))
        began = variant.weights(network.generate(who.id, variant.num_weights))
        moved.append((who.id, variant.delta(began - update.tensors["flat/all"])))
    orders = [[moved[i] for i in order] for order in ((0, 1, 2), (1, 2, 0), (2, 0, 1))]
    orders += [order[::-1] for order in orders]
    results = []
    start = {n: p.clone() for n, p in network.state_dict().items()}
    for order in orders:
        network.load_state_dict(start)
        for client, delta in order:
            network.backward(client, delta)
            network.step()
        results.append(network.state_dict())
    assert sum(same(method._network.state_dict(), result) for result in results) == 1


@pytest.mark.parametrize("apply", ["successive", "summed"])
def test_order_of_arrival_changes_nothing(name, apply):
    method, other = fresh(name, apply=apply), fresh(name, apply=apply)
    play(method)
    play(other, order=-1)
    assert same(method.state_dict(), other.state_dict())


def test_who_takes_no_part_keeps_its_embedding_and_its_head(name):
    """P3: after a round of everybody has left momentum in all of it."""
    method = fresh(name)
    play(method)
    before = {n: p.detach().clone() for n, p in method._network._parameters.items()}
    play(method, 2, cohort=COHORT[:1])
    head = method._network.layout(SIZES[2]).head
    for key, value in before.items():
        is_absent = key.endswith(("/b", "/c")) or key.startswith(f"head/{head}/")
        assert torch.equal(method._network._parameters[key], value) == is_absent, key


def test_a_round_without_updates_changes_nothing(name):
    method = fresh(name)
    play(method)
    before, state = method.current(), method.state_dict()
    assert method.aggregate(2, []).num_updates == 0
    assert method.current() is before
    assert same(method.state_dict(), state)


def test_absurd_updates_move_nothing(name):
    method = fresh(name)
    play(method)
    state = method.state_dict()
    updates = [returned(who, method.assign(who, 2), by=1e37) for who in COHORT]
    assert method.aggregate(2, updates).values["aggregate_refused"] == 1.0
    after = method.state_dict()
    assert same({k: t for k, t in after.items() if "light/" not in k},
                {k: t for k, t in state.items() if "light/" not in k})  # fmt: skip


@pytest.mark.parametrize("apply", ["successive", "summed"])
def test_state_goes_on_to_the_same_bits(name, apply):
    straight = fresh(name, apply=apply)
    play(straight)
    play(straight, 2, cohort=COHORT[1:])
    taken = straight.state_dict()
    saved = {key: taken[key].clone() for key in sorted(taken)}
    resumed = fresh(name, apply=apply)
    resumed.load_state_dict(saved)
    for method in (straight, resumed):
        play(method, 3, cohort=[*COHORT, Client(id="late", exit=2, variant=2)])
    assert same(straight.state_dict(), resumed.state_dict())
    assert all(torch.equal(taken[key], saved[key]) for key in saved), "a state taken stays"
    assert list(resumed.current()) == list(straight.current())
    with pytest.raises(ShapeError, match="checkpoint"):
        fresh(name, apply=apply).load_state_dict(saved | {"server/x": torch.zeros(1)})


def test_a_late_update_counts_with_what_its_job_began_from(name):
    """P7. What came late was brought forward to sent + share (returned - sent); generated anew,
    sent would be another vector."""
    late, plain = fresh(name), fresh(name)
    a = COHORT[0]
    old = late.assign(a, 1)
    for method in (late, plain):
        play(method, cohort=COHORT[1:])
    now = plain.assign(a, 2)
    step = 0.1 * torch.randn(SIZES[0], generator=torch.Generator().manual_seed(5))
    for method, job, more in ((late, old, {"staleness": 1, "sent": old.tensors}), (plain, now, {})):
        tensors = job.tensors | {"flat/all": job.tensors["flat/all"] + step}
        update = client_update(a, tensors, job.plan.segments, num_examples=9, **more)
        method.aggregate(2, [update])
    assert torch.allclose(sent(late, a), sent(plain, a), atol=1e-4)
    assert not torch.allclose(sent(late, a), now.tensors["flat/all"], atol=1e-4)


def test_new_clients_learn_their_embedding_only():
    """F and the head of a known size stay; P12: clipped by the embedding's gradient alone, which
    tests/coordinator/personal shows."""
    method = fresh("mh-pfedhn", novel_after=1)
    play(method)
    before = {n: p.detach().clone() for n, p in method._network._parameters.items()}
    novel = Client(id="novel", exit=1, variant=1)
    start = sent(method, novel)
    for number in (2, 3):
        play(method, number, cohort=[novel])
    now = method._network._parameters
    assert all(torch.equal(now[key], value) for key, value in before.items())
    assert not torch.equal(sent(method, novel), start)
    other = Client(id="other", exit=2, variant=2)  # of a size that nobody had: a head of its own
    start = sent(method, other)
    play(method, 4, cohort=[other])
    assert all(torch.equal(now[key], value) for key, value in before.items())
    assert not torch.equal(sent(method, other), start)


def test_weights_begin_as_a_fresh_model_s():
    """P6: published ones begin alike, scales of BatchNorm about 0."""
    gammas, others = {}, {}
    for start in ("alike", "fresh"):
        method = make_method(
            config("mh-pfedhn", model=cnn(channels=(16, 16, 16)), own={"start": start})
        )
        _, tensors = method.deployed(Client(id="a", exit=3, variant=3))
        gammas[start] = torch.cat(
            [t for n, t in tensors.items() if n.endswith(("1.weight", "4.weight")) and t.ndim == 1]
        )
        others[start] = {n: float(t.std()) for n, t in tensors.items() if t.ndim > 1}
    assert gammas["alike"].std() == pytest.approx(0.058, abs=0.005)
    assert abs(float(gammas["alike"].mean())) < 0.03
    assert gammas["fresh"].mean() == pytest.approx(1, abs=0.03)
    # torch's convolutions begin uniform in 1 / sqrt(inputs): 1 / sqrt(3 * 16 * 9) = 0.048
    assert others["alike"]["stages.1.0.weight"] == pytest.approx(0.058, rel=0.1)
    assert others["fresh"]["stages.1.0.weight"] == pytest.approx(0.048, rel=0.2)
    assert others["fresh"]["stages.0.0.weight"] == pytest.approx(1 / (3 * 9) ** 0.5, rel=0.2)


def test_the_light_model_teaches_and_is_a_client_of_its_own():
    method = fresh("mh-pfedhngd")
    job = method.assign(COHORT[2], 1)
    want = Teacher(model=cnn(exit=1), weight=0.2, temperature=15.0, is_trained=True)
    assert job.plan.teacher == want
    assert method.spec == cnn(exit=1)
    assert set(job.tensors) == {"flat/all"} | {f"teacher/{n}" for n in build(cnn(exit=1)).tensors()}
    # it shares the head of the clients of its size, and has an embedding of its own
    play(method)
    chunks = method._network.layout(SIZES[0]).num_chunks
    names = method._network._parameters
    assert {f"embedding/{chunks}/{who}" for who in ("(light)", "a", "b")} <= set(names)
    assert same(method.current(), method.served())
    assert method.served() is method.current()


def test_the_light_model_s_step_is_that_of_the_clients_mean_movement():
    """sum_i n_i / n J^T (theta_g - theta_i), as J^T is linear; before the clients' own steps, and
    with their heads left alone by it (P3). Statistics are the clients' mean."""
    method, other = fresh("mh-pfedhngd", start="alike"), fresh("mh-pfedhngd", start="alike")
    weights = {"a": 1, "b": 3}
    jobs = {who.id: (who, method.assign(who, 1)) for who in COHORT[:2]}
    updates = []
    for who, job in jobs.values():
        update = returned(who, job, num_examples=weights[who.id])
        update.tensors["flat/all"] = job.tensors["flat/all"]  # their own did not move
        updates.append(update)
    shapes = parameter_shapes(build(cnn(exit=1)))
    mean = {
        n: 0.25 * updates[0].tensors[f"teacher/{n}"] + 0.75 * updates[1].tensors[f"teacher/{n}"]
        for n in shapes
    }
    light = method.current()
    moved = torch.cat([(light[n] - mean[n]).flatten() for n in shapes])
    network = other._network
    network.backward("(light)", moved)
    network.step()
    for who in COHORT[:2]:
        network.backward(who.id, torch.zeros(SIZES[0]))
        network.step()
    metrics = method.aggregate(1, updates)
    assert metrics.values["steps_successive"] == 3
    for key, tensor in network.state_dict().items():
        assert torch.allclose(method.state_dict()[key].float(), tensor.float(), atol=1e-5), key
    statistic = "stages.0.1.running_mean"
    brought = [update.tensors[f"teacher/{statistic}"] for update in updates]
    want = 0.25 * brought[0] + 0.75 * brought[1]
    assert torch.allclose(method.current()[statistic], want, atol=1e-6)


def test_settings_of_one_global_model_are_refused(name):
    rule = AggregationOptions(rule="median")
    if name == "mh-pfedhngd":  # the light model is a mean
        play(make_method(config(name, aggregation=rule)))
    else:
        with pytest.raises(ConfigError, match="--aggregation median has no place"):
            make_method(config(name, aggregation=rule))
    for flag, changes in {
        "--clip": {"aggregation": AggregationOptions(clip=1.0)},
        "--init": {"init": "model.safetensors"},
        "--server-momentum": {"server": ServerOptions(momentum=0.5)},
        "--server-lr": {"server": ServerOptions(lr=0.5)},
    }.items():
        with pytest.raises(ConfigError, match=f"{flag} .*has no place"):
            make_method(config(name, **changes))


def test_the_paper_s_settings(name):
    own = {"start": "alike"} | ({} if name == "pfedhn" else {"hyper_lr": 2e-4})
    made = make_config(name, cnn(), is_paper=True, rounds=3)
    assert (made.lr, made.momentum, made.batch_size, made.optimizer) == (5e-3, 0.9, 64, "sgd")
    assert made.own == own
    if name != "pfedhn":  # the command line's own is 2
        assert defaults_of(name, is_paper=True)["epochs"] == 1
    assert made.participants == (1 if name == "pfedhn" else None)
    made = make_config(name, cnn(), is_paper=True, rounds=3, own={"apply": "summed"})
    assert made.own == own | {"apply": "summed"}
    made = make_config(name, cnn(), is_paper=True, rounds=3, own={"start": "fresh"})
    assert made.own == own | {"start": "fresh"}
