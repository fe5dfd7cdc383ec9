"""Generated models learn: of clients with two classes each, on real digits; and a run of them goes
on as if it had not been stopped."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from coordinator.cohorts.base import Client
from coordinator.cohorts.budget import Variant
from coordinator.cohorts.in_process import InProcessCohort
from coordinator.methods.registry import make_config, make_method
from coordinator.runs.rounds import run_rounds
from coordinator.store.opening import open_store
from edge_sdk.data.loading import load_dataset
from edge_sdk.protocol.messages import ModelSpec
from edge_sdk.training.trainer import train
from tests.support.examples import client_update, config, examples

SPEC = ModelSpec(
    family="mlp", input_shape=(1, 8, 8), num_classes=10, exit=2, options={"widths": (16, 16)}
)
NETWORK = {"hyper_hidden": 32, "embedding": 16, "chunk": 256}
OWN = {
    "mh-pfedhn": NETWORK | {"hyper_lr": 1e-2},
    "mh-pfedhngd": NETWORK | {"hyper_lr": 3e-3},
    "pfedhn": {"hyper_hidden": 16, "hyper_lr": 0.1},
}
ROUNDS = 10


@pytest.fixture(scope="module")
def shards():
    """Four clients of two classes each, by their ids; 40 examples of each class."""
    data = load_dataset("digits", 0, 400, None).train
    pairs = [(0, 1), (2, 3), (4, 5), (1, 2)]
    return {
        f"client-{n}": data.take(np.flatnonzero(np.isin(data.y, pair)))
        for n, pair in enumerate(pairs)
    }


def cohort_of(shards):
    """Of two sizes, by turns."""
    return [Client(id=name, exit=1 + n % 2, variant=1 + n % 2) for n, name in enumerate(shards)]


def play(method, cohort, shards, kept, number):
    """A round; the share of all held-out examples that the models, as they were sent, answer
    right. kept: what each client keeps."""
    updates, correct, asked = [], 0, 0
    for who in cohort:
        job = method.assign(who, number)
        result = train(
            job.model, job.plan, dict(job.tensors), shards[who.id], state=kept.get(who.id)
        )
        kept[who.id] = result.state
        correct += result.holdout.metric * result.holdout.num_examples
        asked += result.holdout.num_examples
        updates.append(
            client_update(who, result.tensors, job.plan.segments, num_examples=result.num_examples)
        )
    method.aggregate(number, updates)
    return correct / asked


@pytest.mark.parametrize("name", OWN)
def test_personal_models_beat_local_chance(shards, name):
    """A client's larger class is half of what it has; without its data a tenth is chance."""
    method = make_method(
        make_config(name, SPEC, rounds=ROUNDS, batch_size=8, own=OWN[name], seed=1)
    )
    cohort, kept = cohort_of(shards), {}
    accuracy = [play(method, cohort, shards, kept, n) for n in range(1, ROUNDS + 1)]
    assert accuracy[0] < 0.3
    assert accuracy[-1] > 0.7


@pytest.mark.parametrize("name", OWN)
def test_a_run_goes_on_to_the_same_bits(tmp_path, name):
    """Stopped after each round, with another method and cohort each time: server's and clients'."""
    settings = config(name, rounds=3, participants=2, holdout=0.25)
    shards = {who: examples(16, seed=n) for n, who in enumerate("abc")}
    exits = {"a": 1, "b": 2, "c": 3}
    variants = {who: Variant(exit, exit, 0) for who, exit in exits.items()}

    def run(folder, most):
        cohort = InProcessCohort(shards, exits, 3, variants=variants, states=folder / "clients")
        store = open_store(folder, settings, "emulate", folder.exists())
        method, until = make_method(settings), store.next_round() + most
        run_rounds(store, method, cohort, None, should_stop=lambda: store.next_round() == until)
        figures = [row["figures"]["holdout_loss"] for row in store.history()]
        store.close()
        return method.state_dict(), figures

    straight = run(tmp_path / "straight", 3)
    for _ in range(3):
        stopped = run(tmp_path / "stopped", 1)
    assert straight[0].keys() == stopped[0].keys()
    assert all(torch.equal(straight[0][key], tensor) for key, tensor in stopped[0].items())
    assert straight[1] == stopped[1], "by statistics that the clients kept"
