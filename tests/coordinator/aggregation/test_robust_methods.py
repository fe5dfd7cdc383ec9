"""Robust aggregation and clipping in a method: what diverges is left out, and a run with a harmful
client."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from msgspec.structs import replace

from coordinator.aggregation.movement import MEMORY
from coordinator.cohorts.base import Absence, ArrivedUpdate, ClientUpdate
from coordinator.cohorts.in_process import InProcessCohort
from coordinator.config import AggregationOptions, GeneratorOptions
from coordinator.fleet.flow_control import Budget
from coordinator.fleet.jobs import Jobs
from coordinator.fleet.spool import Spool
from coordinator.methods.registry import make_method
from coordinator.settings import checked
from edge_sdk.data.loading import load_dataset
from edge_sdk.errors import ConfigError
from edge_sdk.protocol.messages import ExitResult, Update
from edge_sdk.protocol.tensors import Sender
from tests.support.examples import ROBUST, answer, client, config, examples, options_of
from tests.support.jobs import Mailbox
from tools.bench.robust import accuracy


def test_training_that_diverges_in_this_process_is_an_absence():
    """The network's border has its own test; emulating processes run this same function. The loss
    of the only step is fine, what it makes of the weights is not."""
    method = make_method(config("owners-mean"))
    cohort = InProcessCohort({name: examples(8) for name in "ab"}, {"a": 1, "b": 1}, 3)
    work = {who.id: method.assign(who, 1) for who in cohort.clients()}
    plan = replace(work["b"].plan, optimizer="sgd", lr=3e38, weight_decay=100.0)
    work["b"] = dataclasses.replace(work["b"], plan=plan)
    good, bad = cohort.train(work, 1, 0.0)
    assert isinstance(good, ClientUpdate)
    assert isinstance(bad, Absence)
    assert "NaN or infinite" in bad.detail
    assert method.aggregate(1, [good]).num_updates == 1


@pytest.mark.parametrize(("value", "counts"), [(1.0, True), (math.nan, False), (math.inf, False)])
def test_update_that_is_not_finite_does_not_come_back_from_the_spool(tmp_path, value, counts):
    """Whole and with the right digest, as after a restart of the coordinator."""
    method, sent, spool = make_method(config("fedavg-s")), [], Spool(tmp_path)
    who = dataclasses.replace(client("a", 1), num_examples=10)
    job = method.assign(who, 1)

    def jobs():
        note = Mailbox(lambda name, message, _: bool(sent.append(message)))
        return Jobs("run", spool, Budget(2**20), note)

    jobs().give(who, job, 1, 0.0)
    trained = {spec.name: job.tensors[spec.name] for spec in job.returns}
    name = "exits.0.2.bias"
    stream = Sender(trained | {name: torch.full_like(trained[name], value)})
    update = Update(
        job=sent[0].id,
        digest=stream.digest(),
        round=1,
        num_examples=10,
        num_steps=1,
        phases={},
        exits=(ExitResult(exit=1, loss=1.0, metric=0.5),),
        peak_memory_bytes=0,
        tensors=stream.specs,
    )
    spool.storage(1, "a")(stream.total_bytes).write(0, stream.part(0))
    arrived = ArrivedUpdate(
        update=update, segments=job.plan.segments, upload_s=0.0, bytes_down=0, bytes_up=0
    )
    spool.save_update(1, "a", arrived)
    resumed = jobs()
    resumed.give(who, job, 1, 0.0)
    assert [type(found) for found in resumed.finished] == [ClientUpdate] * counts
    assert (sent[-1] == sent[0]) != counts  # the job once more, or Accepted


@pytest.mark.parametrize("rule", ROBUST)
def test_a_round_clipped_and_robust_leaves_out_who_is_far_away(rule):
    """Of four clients that move by 1 one moves by 1e6: the model moves by about 1."""
    options = AggregationOptions(rule=rule, clip=2.0)
    method = make_method(config("fedavg-l", aggregation=options))
    before = method.current()
    jobs = {who: method.assign(client(who, 3), 1) for who in "abcd"}
    shifts = {"a": 1.0, "b": 1.0, "c": 1.0, "d": 1e6}
    updates = [answer(client(who, 3), job, shift=shifts[who]) for who, job in jobs.items()]
    metrics = method.aggregate(1, updates)
    assert metrics.values["clipped_updates"] == 1
    for name, tensor in method.current().items():
        if tensor.is_floating_point():
            assert torch.allclose(tensor, before[name] + 1, atol=1e-3), name
    assert method.state_dict()["clip"].shape == (3, 2, MEMORY)


def test_settings_reach_the_method_and_are_checked():
    for changes, flag in (
        ({"trim": 0.5}, "--trim is 0.5"),
        ({"clip": -1.0}, "--clip is -1.0"),
    ):
        with pytest.raises(ConfigError, match=flag):
            checked(config("owners-mean", aggregation=AggregationOptions(**changes)))
    known = "mean, median, norm-bounded, trimmed-mean"
    with pytest.raises(ConfigError, match=f"unknown aggregation rule 'mode'; known: {known};"):
        make_method(config("owners-mean", aggregation=AggregationOptions(rule="mode")))


def test_gain_keeps_its_meaning_under_a_robust_rule():
    """Generated tensors count as gain x their weight beside the owners' whole weight: with a gain
    of 0 the result is the rule's alone."""
    cohort = [client("a", 1), client("b", 1), client("c", 3), client("d", 3)]
    results = {}
    for gain in (0.0, 1.0):
        generator = GeneratorOptions(
            name="svd-mlp", gain=gain, rank=4, hidden=8, epochs=1, generate="conv"
        )
        method = make_method(
            config("hypemefed", generator=generator, aggregation=options_of("median"))
        )
        updates = [answer(who, method.assign(who, 1)) for who in cohort]
        sent = method.current()
        method.aggregate(1, updates)
        results[gain] = method.current()
    name = "stages.1.0.weight"
    owners = torch.stack([update.tensors[name] for update in updates[2:]]).mean(0)
    assert torch.allclose(results[0.0][name], owners, atol=1e-6)
    assert not torch.allclose(results[1.0][name], owners, atol=1e-6)
    assert not torch.equal(results[0.0][name], sent[name])


DIGITS: dict[str, AggregationOptions] = {
    "trimmed-mean": options_of("trimmed-mean"),
    "median": options_of("median"),
    "norm-bounded": options_of("norm-bounded"),
    "clip": AggregationOptions(clip=1.0),
}


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits", 0)


def after_six_rounds(digits, options, harmful=("client-010",)):
    return accuracy(digits, "fedavg-l", options, harmful, rounds=6, factor=1e6)[-1]


@pytest.fixture(scope="module")
def undisturbed(digits):
    return after_six_rounds(digits, AggregationOptions(), harmful=())


def test_one_harmful_client_ruins_the_plain_mean(digits, undisturbed):
    assert undisturbed > 0.6
    assert after_six_rounds(digits, AggregationOptions()) < 0.25  # 0.1 is chance


@pytest.mark.parametrize("protection", DIGITS)
def test_one_harmful_client_does_not_ruin_the_others(digits, undisturbed, protection):
    assert after_six_rounds(digits, DIGITS[protection]) > undisturbed - 0.1
