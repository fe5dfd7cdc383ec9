"""What generators learn from, in which units and in which order: parts of which a defect shows in
the figures only, not in the shape of the result."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from coordinator.config import RotationOptions
from coordinator.generators.registry import make_generator
from coordinator.generators.update_regression import SKETCH, _hashes, _sketched
from coordinator.methods.registry import make_method
from edge_sdk.models import initial_tensors
from edge_sdk.protocol.tensor_lists import stage_of
from tests.contract.test_generators import (
    COHORT,
    hypemefed,
    open_gate,
    options,
    owners_mean,
    play,
    related,
    same,
)
from tests.support.examples import client, cnn, config

RESIDUAL = ("svd-mlp-residual", "update-regression")


def updates_of(round, factor=1.0, cohort=COHORT, sign_of_deep=1.0):
    """Related updates of one round on the initial model, each moved `factor` times as far, deep
    stages with a sign of their own."""
    method = owners_mean()
    sent = method.current()
    made = []
    for place_, who in enumerate(cohort):
        update = related(who, method.assign(who, round), round, 5 + place_)
        moved = {}
        for key, tensor in update.tensors.items():
            sign = sign_of_deep if stage_of(key)[1] > 1 else 1.0
            moved[key] = sent[key].double() + factor * sign * (tensor - sent[key]).double()
        made.append(dataclasses.replace(update, tensors=moved))
    return made


def taught(name, rounds, **changes):
    """A generator after rounds of `updates_of`, what it generates in the last and its figures."""
    factor = changes.pop("factor", 1.0)
    sent = {key: t.double() for key, t in initial_tensors(cnn(), config("x").seed).items()}
    generator = make_generator(cnn(), options(name, **changes), 0)
    made, figures = {}, {}
    for number in range(1, rounds + 1):
        updates = updates_of(number, factor)
        for update in updates:
            generator.observe(update, sent, float(update.num_examples))
        figures = generator.fit(sent, number)
        made = {}
        for _, tensors in generator.generate(sent, sent):
            made |= {key: tensor - sent[key] for key, tensor in tensors.items()}
    return generator, made, figures


@pytest.mark.parametrize("name", RESIDUAL)
@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_predictions_scale_with_updates(name, factor):
    """Features, targets and what is chained from stage to stage are in units of their size."""
    _, made, figures = taught(name, 8)
    _, scaled, again = taught(name, 8, factor=factor)
    assert {stage_of(key)[1] for key in made} == {2, 3}
    for key, tensor in made.items():
        want = factor * tensor
        assert torch.allclose(scaled[key], want, rtol=2e-2, atol=2e-2 * float(want.std())), key
    for stage in (2, 3):
        trust = f"trust_stage_{stage}"
        assert figures[trust] == pytest.approx(again[trust], rel=2e-2, abs=1e-3)


@pytest.mark.parametrize("name", ["svd-mlp", "naive-mlp", "svd-mlp-residual"])
def test_first_figures_are_taken_before_learning(name):
    _, _, few = taught(name, 1, epochs=1)
    _, _, many = taught(name, 1, epochs=30)
    assert few["error_stage_2"] == many["error_stage_2"]
    _, _, few = taught(name, 2, epochs=1)
    _, _, many = taught(name, 2, epochs=30)
    assert few["error_stage_2"] != many["error_stage_2"]


@pytest.mark.parametrize("name", RESIDUAL)
def test_trust_is_judged_on_what_is_not_yet_learned(name):
    """A round in which deep stages move against everything seen so far: predictions agree with
    nothing, so a running mean of 0.8 is left of the trust, whatever is learned afterwards."""
    generator, _, figures = taught(name, 12, epochs=20, hidden=32)
    before = {stage: figures[f"trust_stage_{stage}"] for stage in (2, 3)}
    if name == "svd-mlp-residual":  # its stage 3 follows stage 2, which turned round as well
        generator._gates.fill_(0.5)
        before = {2: 0.5}
    assert min(before.values()) > 0.3
    sent = {key: t.double() for key, t in initial_tensors(cnn(), config("x").seed).items()}
    for update in updates_of(13, sign_of_deep=-1.0):
        generator.observe(update, sent, 1.0)
    after = generator.fit(sent, 13)
    for stage, trust in before.items():
        assert after[f"trust_stage_{stage}"] == pytest.approx(0.8 * trust, rel=1e-6)


@pytest.mark.parametrize("name", ["svd-mlp", "naive-mlp", "svd-mlp-residual"])
def test_order_of_arrival_does_not_matter_client_by_client(name):
    """One owner a step, as published: the drawn order is of ids, not of arrival."""
    sent = owners_mean().current()
    generators = [make_generator(cnn(), options(name, owners_per_step=1), 0) for _ in range(2)]
    for number in range(1, 5):
        updates = updates_of(number)
        for generator, arrived in zip(generators, (updates, updates[::-1]), strict=True):
            for update in arrived:
                generator.observe(update, sent, 1.0)
            generator.fit(sent, number)
            list(generator.generate(sent, sent))
    networks = [generator.networks.state_dict() for generator in generators]
    for key, tensor in networks[0].items():
        assert torch.allclose(tensor, networks[1][key], atol=1e-6), key


@pytest.mark.parametrize("name", ["svd-mlp", "naive-mlp"])
def test_epochs_are_those_of_the_options(name, monkeypatch):
    steps = []
    real = torch.optim.Adam.step
    monkeypatch.setattr(
        torch.optim.Adam, "step", lambda self, *a, **k: (steps.append(1), real(self, *a, **k))[1]
    )
    generator, _, _ = taught(name, 1, epochs=7, owners_per_step=0)
    assert len(steps) == 7 * len(generator.groups)
    steps.clear()
    taught(name, 1, epochs=7, owners_per_step=2)  # stage 2 has three owners, stage 3 two
    assert len(steps) == 7 * (2 + 1)


def test_one_owner_is_measured_against_a_running_mean():
    """y = d - D, D = 0.7 D + 0.3 d: of d = 1, 2 first D = 1, y = 0, then D = 1.3, y = 0.7."""
    generator = make_generator(cnn(), options("update-regression", rank=8), 0)
    cohort = [client("a", 1), client("z", 3)]
    sent = owners_mean().current()
    for number, moved in ((1, 1.0), (2, 2.0)):
        for update in updates_of(number, cohort=cohort):
            deep = {k: sent[k] + moved for k in update.tensors if stage_of(k)[1] > 1}
            update = dataclasses.replace(update, tensors=update.tensors | deep)
            generator.observe(update, sent, 1.0)
        generator.fit(sent, number)
    for stage in generator._stages.values():
        rows = [stage.basis.combine(row).mean().item() for row in stage.rows]
        assert rows == pytest.approx([0.0, 0.7], abs=2e-3)
        assert stage.basis.combine(stage.mean[0]).mean().item() == pytest.approx(1.3, abs=2e-3)


def test_features_have_a_mean_norm_of_one_per_tensor():
    generator = make_generator(cnn(), options("update-regression"), 0)
    sent = owners_mean().current()
    for update in updates_of(1):
        far = {k: sent[k] + 100 * (t - sent[k]) for k, t in update.tensors.items() if "bias" in k}
        update = dataclasses.replace(update, tensors=update.tensors | far)
        generator.observe(update, sent, 1.0)
    features = generator._normalised(generator._seen)
    sizes = [sent[name].numel() for name in generator._features]
    for name, block in zip(generator._features, features.split(sizes, 1), strict=True):
        assert block.norm(dim=1).mean().item() == pytest.approx(1.0, rel=1e-5), name


def test_lacking_clients_count_by_their_weight():
    """A client of next to no examples turns its stage 1 round: nothing that is generated moves."""
    made = []
    for sign in (1.0, -1.0):
        generator = make_generator(cnn(), options("update-regression"), 0)
        sent = owners_mean().current()
        for number in range(1, 8):
            for update in updates_of(number):
                weight = 1.0
                if update.client.id == "a":
                    weight = 1e-9
                    turned = {
                        k: sent[k] + sign * (t - sent[k]).float() for k, t in update.tensors.items()
                    }
                    update = dataclasses.replace(update, tensors=turned)
                generator.observe(update, sent, weight)
            generator.fit(sent, number)
            tensors = [t for _, t in generator.generate(sent, sent)]
        made.append({key: tensor for found in tensors for key, tensor in found.items()})
    assert made[0]
    for key, tensor in made[0].items():
        assert torch.allclose(tensor, made[1][key], atol=1e-5), key
        assert not torch.equal(tensor, sent[key]), key


def test_sketches_have_signs():
    """Without them entries of one bucket add up: 18000 ones would have a product of 18000^2 / 4096,
    not 18000 with a standard deviation of sqrt(2 / 4096) 18000 = 398."""
    ones = torch.ones(40, 50, 3, 3)
    sketch = _sketched(ones.flatten(), _hashes("stages.0.0.weight", tuple(ones.shape), 1))
    assert len(sketch) == SKETCH
    assert float(sketch @ sketch) == pytest.approx(18000, abs=5 * 398)


def test_owners_so_far_come_back_with_the_state():
    """`needy` draws by them."""
    settings = config("hypemefed", rotation=RotationOptions(mode="add", draw="needy"))
    method, resumed = make_method(settings), make_method(settings)
    play(method, 3)
    resumed.load_state_dict({key: t.clone() for key, t in method.state_dict().items()})
    assert resumed._owners.tolist() == method._owners.tolist()
    assert max(resumed._owners.tolist()) > 0


def test_open_gate_of_the_residual_networks_changes_the_model():
    shut, opened = hypemefed("svd-mlp-residual"), hypemefed("svd-mlp-residual")
    for method in (shut, opened):
        play(method, 4)
    shut._generator._gates.fill_(0.0)
    open_gate(opened)
    for method in (shut, opened):
        play(method, 1, first=5)
    assert not same(shut, opened)
