"""FedDF: teachers by hand, a step by hand, what it leaves alone and what it refuses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from coordinator.aggregation.ensemble import Ensemble
from coordinator.cli.main import main
from coordinator.config import AggregationOptions, ServerOptions
from coordinator.methods.registry import make_method
from edge_sdk.data.contract import TrainedOn
from edge_sdk.data.loading import save_shard
from edge_sdk.errors import ConfigError, DataError
from edge_sdk.models import build
from edge_sdk.protocol.messages import InputScaling, ModelSpec
from tests.contract.methods import changed_names
from tests.support.examples import OWN, answer, client, config, examples, one_line, two_exits

PLAIN = ServerOptions(momentum=0.0, lr=1.0)


def method_of(name="feddf", own=None, **changes):
    mine = {"own": OWN[name] | (own or {})} if name in OWN else {}
    return make_method(config(name, server=PLAIN, **(mine | changes)))


def updates_of(method, exits=(1, 2, 3), round=1, **how):
    who = [client(name, exit) for name, exit in zip("abcdef", exits, strict=False)]
    return [answer(w, method.assign(w, round), **how) for w in who]


def ensemble_of(exit_1=(), exit_2=()):
    """Of two_exits() and the example x = (1, 2), whose exits answer (ln 3 f0, 0) and
    (0, ln 4 (f0 + f1)): (ln 3, 0) and (0, 3 ln 4). Given: factors by which clients of one and of
    two exits have the weights of each of their exits."""
    spec, tensors = two_exits()
    x = torch.tensor([[1.0, 2.0]])
    ensemble = Ensemble(spec, x, "cpu")
    for exit, factors in ((1, exit_1), (2, exit_2)):
        for factor in factors:
            own = {n: factor * t if n.startswith("exits.") else t for n, t in tensors.items()}
            held = {n: t for n, t in own.items() if exit == 2 or ".1." not in n[:9]}
            assert ensemble.add_(exit, held)
    return ensemble, spec, tensors


def test_each_exit_is_taught_by_the_mean_of_those_who_own_it():
    """Exit 1 by three clients of factors 0, 1 and 5: 2 ln 3; exit 2 by one of factor 5."""
    ensemble, *_ = ensemble_of(exit_1=(0.0, 1.0), exit_2=(5.0,))
    means = ensemble._answers.result({"1": torch.empty(0), "2": torch.empty(0)})
    assert means["1"].tolist() == [[pytest.approx(2 * math.log(3)), 0.0]]
    assert means["2"].tolist() == [[0.0, pytest.approx(15 * math.log(4), rel=1e-6)]]


def test_a_step_by_hand():
    """The student answers (ln 3, 0): probabilities 3/4 and 1/4. Its teacher has 1/2 and 1/2. The
    gradient of KL to the bias is (3/4 - 1/2, 1/4 - 1/2), and a step of SGD at rate 0.1 takes 0.1
    of it away; of two steps the second has half of the rate."""
    ensemble, spec, tensors = ensemble_of(exit_1=(0.0,))
    plan = config("owners-mean", optimizer="sgd", lr=0.1, momentum=0.0).plan(1)
    taught = ensemble.taught(tensors, plan, 1, 8, 0)
    bias = taught["exits.0.bias"] - tensors["exits.0.bias"]
    assert bias.tolist() == pytest.approx([-0.025, 0.025], abs=1e-6)
    assert all(name[:9].find(".1.") < 0 for name in taught), "nobody answered with exit 2"
    twice = ensemble.taught(tensors, plan, 2, 8, 0)
    model = build(spec)
    model.load(tensors | taught)
    (logits, _) = model.eval()(torch.tensor([[1.0, 2.0]]))
    share = float(logits.detach().softmax(-1)[0, 0]) - 0.5
    second = twice["exits.0.bias"] - taught["exits.0.bias"]
    assert second.tolist() == pytest.approx([-0.05 * share, 0.05 * share], abs=1e-6)


def test_without_steps_it_is_the_owners_mean_to_the_bit():
    method, plain = method_of(own={"fusion_steps": 0}), method_of("owners-mean")
    for each in (method, plain):
        each.aggregate(1, updates_of(each))
    assert not changed_names(method.current(), plain.current())


def test_the_fused_model_answers_more_like_its_clients_than_their_mean_does():
    x = torch.from_numpy(examples(24, shape=(1, 8, 8)).x)

    @torch.no_grad()
    def apart(method, updates):
        logits = []
        for update in updates:
            model = build(method.spec)
            model.load(update.tensors)
            logits.append(torch.stack(model.eval()(x)))
        model = build(method.spec)
        model.load(method.current())
        own = torch.stack(model.eval()(x)).log_softmax(-1)
        wanted = torch.stack(logits).mean(0).log_softmax(-1)
        return float((wanted.exp() * (wanted - own)).sum(-1).mean())

    found = {}
    for steps in (0, 60):
        method = method_of(own={"fusion_steps": steps, "fusion_batch": 24, "fusion_lr": 0.01})
        method._server_rule._x = x
        updates = updates_of(method, (3, 3, 3))
        method.aggregate(1, updates)
        found[steps] = apart(method, updates)
    assert found[60] < 0.5 * found[0]


def test_alike_clients_are_left_where_they_are():
    """The mean answers as they all do: nothing is to be learned but rounding, by steps of Adam."""
    method = method_of()
    updates = updates_of(method, (3, 3), shift=0.25)
    method.aggregate(1, updates)
    for name, tensor in method.current().items():
        assert torch.allclose(tensor.float(), updates[0].tensors[name].float(), atol=2e-3), name


def test_statistics_are_the_owners_mean():
    method, plain = method_of(), method_of("owners-mean")
    for each in (method, plain):
        each.aggregate(1, updates_of(each))
    changed = changed_names(method.current(), plain.current())
    buffers = {name for name, _ in build(method.spec).named_buffers()}
    assert changed
    assert not changed & buffers


def test_deep_stages_that_nobody_brought_stay_as_they_are():
    method = method_of()
    before = {name: tensor.clone() for name, tensor in method.current().items()}
    method.aggregate(1, updates_of(method, (1, 2)))
    changed = changed_names(before, method.current())
    assert changed
    assert not {name for name in changed if name.startswith(("stages.2.", "exits.2."))}


def test_who_answers_with_no_numbers_does_not_teach(caplog):
    """Finite weights whose products are not: the others teach as if it were not there."""
    method, other = method_of(), method_of()
    good, bad = updates_of(method, (3, 3))
    for name, tensor in bad.tensors.items():
        if name.startswith("exits."):
            tensor.fill_(3e38)
    ensemble = {}
    for each, updates in ((method, [good, bad]), (other, [good])):
        each.aggregate(1, updates)
        ensemble[each] = each._server_rule._ensemble._answers
    assert "b teaches nothing" in caplog.text
    want, got = (e.result({"3": torch.empty(0)})["3"] for e in ensemble.values())
    assert torch.equal(want, got)


def test_a_round_is_repeated_to_the_bit_and_another_draws_anew():
    first, again, other = (method_of() for _ in range(3))
    for method, round in ((first, 1), (again, 1), (other, 2)):
        method.aggregate(round, updates_of(method))
    assert not changed_names(first.current(), again.current())
    assert changed_names(first.current(), other.current())


def test_nothing_grows_with_the_clients():
    """Of an ensemble one mean of answers for each exit, whoever came."""
    method = method_of()
    sizes = []
    for exits in ((3,), (3, 2, 1, 1, 3, 2)):
        method.aggregate(1, updates_of(method, exits))
        held = method._server_rule._ensemble._answers._means
        sizes.append({name: tensor.shape for name, tensor in held.items()})
    assert sizes[0] == sizes[1] == dict.fromkeys("123", (24, 3))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"own": {}}, "give --public"),
        ({"own": {"public": ""}}, "give --public"),
        ({"own": {"public": "nowhere"}}, "nowhere"),
        (
            {"model": ModelSpec(family="mlp", input_shape=(5,), num_classes=3, exit=1)},
            r"--public digits has examples of \(1, 8, 8\), expected \(5,\)",
        ),
        (
            {
                "trained_on": TrainedOn(
                    scaling=InputScaling(low=-1, high=1, divisor=127.5, offset=1)
                )
            },
            "scale",
        ),
        ({"aggregation": AggregationOptions(rule="median")}, "--aggregation median has no place"),
    ],
)
def test_a_public_set_that_is_missing_or_another_is_refused(changes, said):
    with pytest.raises((ConfigError, DataError), match=said):
        make_method(config("feddf", **changes))


def test_labels_of_the_public_set_change_nothing(tmp_path):
    found = []
    data = examples(24)
    for number, y in enumerate((data.y, np.zeros(24, dtype=np.int64))):
        path = tmp_path / f"{number}.npz"
        save_shard(path, type(data)(data.x, y, 3))
        method = method_of(own={"public": str(path)})
        method.aggregate(1, updates_of(method))
        found.append(method.current())
    assert not changed_names(*found)


def test_a_run_without_a_public_set_is_one_line(tmp_path, capsys):
    command = ["emulate", "--method", "feddf", "--rounds", "1", "--run-dir", str(tmp_path / "run")]
    assert main(command) == 2
    error = one_line(capsys.readouterr().err, "edge-coordinator")
    assert "give --public" in error
    assert not (tmp_path / "run").exists()
