"""A model of its own for each client: what it answers, and runs that have nothing else."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from coordinator.cohorts.base import Client, Offer
from coordinator.cohorts.in_process import RUN
from coordinator.methods.base import Metrics
from coordinator.runs.exporting import chosen_part, own_model, try_export
from coordinator.runs.own_models import STATES, OwnModels, has_global, write_model
from coordinator.store.store import Store
from edge_sdk.data.partition import split_holdout
from edge_sdk.errors import ConfigError
from edge_sdk.models import build, initial_tensors
from edge_sdk.protocol.messages import Plan, Segment
from edge_sdk.training.client_state import ClientState
from tests.support.examples import client, client_update, cnn, config, examples

NAMES = ("a", "b")


class Constant:
    """Client a's model says class 0 to everything, b's class 1; there is none for all."""

    spec = cnn(exit=1)

    def offer(self):
        return Offer(self.spec, Plan(segments=(Segment(first=1, last=1),)))

    def current(self):
        return {}

    served = current

    def deployed(self, who):
        tensors = {name: tensor.clone() for name, tensor in initial_tensors(self.spec, 0).items()}
        weight, bias = [name for name in tensors if name.startswith("exits.0")]
        tensors[weight].zero_()
        tensors[bias] = torch.tensor([float(k == NAMES.index(who.id)) for k in range(3)])
        return self.spec, tensors


def labelled(*labels):
    data = examples(len(labels))
    return type(data)(x=data.x, y=np.array(labels, dtype=np.int64), num_classes=3)


def test_each_client_is_asked_for_its_own_model_on_its_own_holdout():
    """A quarter of a's 8 (0 0 0 0 1 1 1 1) is one of each class, so its constant 0 has half;
    of b's 16 ones all 4."""
    shards = {"a": labelled(*[0] * 4 + [1] * 4), "b": labelled(*[1] * 16)}
    own = OwnModels([client(name, 1) for name in NAMES], shards, 0.25)
    results = own.results(Constant())
    assert {n: (round(r.metric * r.num_examples), r.num_examples) for n, r in results.items()} == {
        "a": (1, 2),
        "b": (4, 4),
    }
    figures = own.figures(Constant())
    assert figures["personal_accuracy"] == pytest.approx(5 / 6), "every example counts alike"
    assert figures["personal_accuracy_q50"] == pytest.approx(0.75), "every client counts alike"
    assert (figures["personal_clients"], figures["personal_examples"]) == (2, 6)


def test_the_holdout_is_what_a_device_sets_aside():
    shard = examples(20)
    own = OwnModels([client("a", 1)], {"a": shard}, 0.3)
    assert np.array_equal(own._holdouts["a"].x, split_holdout(shard, 0.3)[1].x)


def test_statistics_that_a_client_keeps_belong_to_its_model():
    """Inputs that statistics of a client shift far away get another answer."""
    spec, shard = cnn(exit=1), examples(60)

    class Plain(Constant):
        def deployed(self, who):
            return spec, initial_tensors(spec, 0)

    mean = next(name for name in initial_tensors(spec, 0) if name.endswith("running_mean"))
    kept = {f"statistics/{mean}": initial_tensors(spec, 0)[mean] + 100.0}
    kept["correction/x"] = torch.zeros(1)
    who = [client("a", 1)]
    plain = OwnModels(who, {"a": shard}, 0.5).results(Plain())["a"]
    shifted = OwnModels(who, {"a": shard}, 0.5, lambda name: kept).results(Plain())["a"]
    assert shifted.loss != plain.loss


def test_who_has_no_holdout_is_left_out():
    own = OwnModels([client("a", 1)], {"a": examples(3)}, 0.1)
    assert own.results(Constant()) == {}
    assert own.figures(Constant()) == {}


class Flat(Constant):
    """Its jobs bring one vector of weights, so statistics of BatchNorm stay with the client."""

    def offer(self):
        return Offer(self.spec, Plan(segments=(Segment(first=1, last=1),), flat=True))


def test_an_own_model_is_exported_with_what_its_client_keeps(tmp_path):
    """Of an emulated client from its state in the run's folder; refused where that is not there."""
    store = Store.create(tmp_path, config("owners-mean"), "emulate")
    with pytest.raises(
        ConfigError,
        match="client 'a' keeps the statistics of BatchNorm itself.*: edge-sdk export ~/",
    ):
        own_model(store, Flat(), client("a", 1))
    buffers = {f"statistics/{name}": b + 1 for name, b in build(Flat.spec).named_buffers()}
    state = ClientState(tmp_path / STATES / "a")
    state.save(RUN, 1, buffers)
    with pytest.raises(ConfigError, match="has none of them"):
        own_model(store, Flat(), client("a", 1))
    state.accept(RUN, 1)
    store.commit(1, Metrics(), {}, "2026-01-01T00:00:00+00:00", 1.0)
    _, tensors = own_model(store, Flat(), client("a", 1))
    assert all(torch.equal(tensors[n.removeprefix("statistics/")], b) for n, b in buffers.items())
    store.close()


def test_a_model_that_only_its_client_can_build_is_not_exported(tmp_path):
    class Unknown(Constant):
        def deployed(self, who):
            return self.spec, {"flat/all": torch.zeros(7)}

    store = Store.create(tmp_path, config("owners-mean"), "serve")
    with pytest.raises(ConfigError, match="a model of its own, of 7 weights, which only it can bu"):
        own_model(store, Unknown(), Client(id="a", exit=1, num_weights=7))
    store.close()


def test_without_a_model_for_all_nothing_is_written_or_exported(tmp_path, caplog):
    """One line each, which says what to do instead."""
    method = Constant()
    assert not has_global(method)
    store = Store.create(tmp_path, config("owners-mean"), "serve")
    store.record_clients([client("a", 1)])
    list(store.record_results(1, [client_update(client("a", 1), {}, ())]))
    store.commit(1, Metrics(), {}, "2026-01-01T00:00:00+00:00", 1.0)
    with caplog.at_level(logging.INFO):
        assert write_model(store, method) is None
    assert "so no model.safetensors is written; edge-coordinator export --run" in caplog.text
    assert not (tmp_path / "model.safetensors").exists()
    with pytest.raises(ConfigError, match=r"--export there: .* none for all; leave it out; edge-c"):
        try_export(method, None, "there")
    with pytest.raises(ConfigError, match=r"none for all; give --client: a$"):
        chosen_part(store, method, None, None)
    spec, tensors = chosen_part(store, method, "a", None)
    assert spec == method.spec
    assert tensors.keys() == method.deployed(client("a", 1))[1].keys()
    store.close()
