"""Plain FedAvg, and FedProx beside it."""

from __future__ import annotations

import pytest
import torch

from coordinator.config import DistillOptions
from coordinator.methods.registry import make_config, make_method
from edge_sdk.errors import ConfigError, UsageError
from edge_sdk.training.trainer import train
from tests.support.examples import client, cnn, config, examples


def test_fedavg_trains_the_last_exit_of_the_whole_model_alone():
    method = make_method(config("fedavg", optimizer="sgd", lr=0.1))
    job = method.assign(client("a", 1), 1)
    assert job.plan.segments[0].last == 3
    got = train(job.model, job.plan, job.tensors, examples(16)).tensors
    parameters = [name for name in got if name.endswith(("weight", "bias"))]
    moved = {name for name in parameters if not torch.equal(got[name], job.tensors[name])}
    heads = {name for name in parameters if name.startswith(("exits.0", "exits.1"))}
    assert heads
    assert moved == set(parameters) - heads
    assert method.deployed(client("a", 1))[0].exit == 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"distill": DistillOptions(direction="mutual")}, "--distill"),
        ({"exit_weights": (1.0, 1.0, 1.0)}, "--exit-weights"),
    ],
)
def test_fedavg_has_no_place_for_other_exits(changes, said):
    with pytest.raises(ConfigError, match=f"{said}.*has no place there"):
        make_method(config("fedavg", **changes))


def epochs_of(share, number, clients=40):
    made = make_config("fedprox", cnn(), rounds=9, epochs=5, own={"stragglers": share})
    method = make_method(made)
    return [method.assign(client(f"c{i}", 1), number).plan.epochs for i in range(clients)]


def test_fedprox_stragglers_train_some_epochs_less():
    """Half of 40, drawn: all but 9 to 31 with a chance of 1 in 3000. The same when drawn again, and
    others in the next round."""
    found = epochs_of(0.5, 1)
    assert 9 <= sum(epochs < 5 for epochs in found) <= 31
    assert set(found) == {1, 2, 3, 4, 5}
    assert epochs_of(0.5, 1) == found
    assert epochs_of(0.5, 2) != found
    assert epochs_of(0.0, 1) == [5] * 40
    assert max(epochs_of(1.0, 1)) == 4


def test_fedprox_settings():
    made = make_method(make_config("fedprox", cnn(), rounds=1))
    assert made.offer().plan.prox_mu == made.assign(client("a", 1), 1).plan.prox_mu == 0.01
    with pytest.raises(UsageError, match="--stragglers is 1.5"):
        make_method(make_config("fedprox", cnn(), rounds=1, own={"stragglers": 1.5}))
