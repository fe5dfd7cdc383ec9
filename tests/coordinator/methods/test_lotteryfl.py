"""LotteryFL's server, by hand; training and pruning at the clients are made up here."""

from __future__ import annotations

import pytest
import torch
from msgspec.structs import replace

from coordinator.aggregation.border import Border
from coordinator.cohorts.base import ClientUpdate
from coordinator.cohorts.in_process import InProcessCohort
from coordinator.config import ServerOptions
from coordinator.methods.registry import make_config, make_method
from edge_sdk.errors import ConfigError, UpdateError
from edge_sdk.models import build, initial_tensors
from edge_sdk.models.masks import maskable, packed, unpacked
from edge_sdk.protocol.messages import Prune
from edge_sdk.protocol.plan_tensors import job_specs, update_specs
from edge_sdk.protocol.stream import layout
from edge_sdk.protocol.tensors import specs_of
from tests.support.examples import client, client_update, cnn, config, examples

A, B = client("a", 3), client("b", 3)
NAME = "stages.1.0.weight"  # (5, 4, 3, 3)


def method(**changes):
    return make_method(config("lotteryfl", **({"server": ServerOptions(serve="last")} | changes)))


def trained(who, job, moved, gone=(), **told):
    """What `who` returns: every kept weight moved, those of NAME with an index in `gone` pruned."""
    shapes = {name: tensor.shape for name, tensor in build(job.model).tensors().items()}
    tensors, masks = unpacked(job.tensors, shapes)
    mask = masks[NAME].clone()
    mask.view(-1)[list(gone)] = False
    masks[NAME] = mask
    tensors = {name: tensor + moved for name, tensor in tensors.items()}
    segments = job.plan.segments
    told = {"num_examples": 10, **told}
    return client_update(who, packed(tensors, masks), segments, model=job.model, **told)


def test_a_weight_is_the_mean_over_those_whose_mask_has_it():
    server = method(weighting="equal")
    before = server.current()[NAME].view(-1)
    updates = [
        trained(A, server.assign(A, 1), 1.0, gone=(0, 1)),
        trained(B, server.assign(B, 1), 3.0, gone=(1, 2)),
    ]
    server.aggregate(1, updates)
    after = server.current()[NAME].view(-1)
    moved = (after - before)[:4]
    assert moved.tolist() == pytest.approx([3.0, 0.0, 1.0, 2.0], abs=1e-5)
    assert after[1] == before[1]  # in nobody's, to the last bit


def test_a_client_is_sent_and_deployed_what_its_mask_leaves():
    server = method()
    server.aggregate(1, [trained(A, server.assign(A, 1), 1.0, gone=range(100))])
    job = server.assign(A, 2)
    assert len(job.tensors[f"packed/{NAME}"]) == 80
    assert len(server.assign(B, 2).tensors[f"packed/{NAME}"]) == 180
    _, own = server.deployed(A)
    globals = server.current()
    assert not own[NAME].view(-1)[:100].any()
    assert torch.equal(own[NAME].view(-1)[100:], globals[NAME].view(-1)[100:])
    assert torch.equal(own["exits.0.2.bias"], globals["exits.0.2.bias"])
    assert torch.equal(server.deployed(B)[1][NAME], globals[NAME])


def test_bytes_of_a_job_are_the_kept_weights_and_a_bit_for_each():
    """Of 9 x 4 + 9 x 16 + 9 x 20 + 9 x 30 convolution weights and 3 x 4 x 15 exit weights, once
    100 are gone, 4 bytes and an eighth; of the rest 4 bytes. No more up than down."""
    server = method()
    whole = server.assign(A, 1)
    server.aggregate(1, [trained(A, whole, 1.0, gone=range(100))])
    job = server.assign(A, 2)
    weights = [4 * 9, 4 * 4 * 9, 5 * 4 * 9, 6 * 5 * 9, 3 * 16, 3 * 20, 3 * 24]
    rest = 4 * (4 + 4 + 5 + 6) + 3 * 3  # of each norm four, of each exit a bias
    least = 4 * (sum(weights) - 100 + rest) + sum(weights) // 8
    padding = 8 * len(job.tensors)  # each tensor begins at a multiple of 8
    assert least <= layout(specs_of(job.tensors))[1] <= least + padding
    assert layout(job.returns)[1] == layout(specs_of(job.tensors))[1]
    initial = 4 * (sum(weights) + 2 * (4 + 4 + 5 + 6) + 3 * 3)  # parameters alone
    first = layout(specs_of(whole.tensors))[1]
    assert first >= initial + 4 * (sum(weights) + rest)


def test_what_travels_is_what_the_plan_lists():
    server = method()
    model = build(server.spec)
    specs, buffers = specs_of(model.tensors()), [name for name, _ in model.named_buffers()]
    for number, has_initial in ((1, True), (2, False)):
        job = server.assign(A, number)
        assert job.plan.prune == Prune(share=0.2, target=0.5, threshold=0.5)
        down = job_specs(job.plan, specs, buffers, has_initial=has_initial)
        assert list(specs_of(job.tensors)) == down  # nothing is pruned yet
        assert list(job.returns) == update_specs(job.plan, specs, buffers)
        server.aggregate(number, [trained(A, job, 0.1, state_round=number - 1)])


def test_initial_values_stay_those_of_the_start():
    server = method()
    start = initial_tensors(server.spec, 0)
    server.aggregate(1, [trained(A, server.assign(A, 1), 1.0)])
    job = server.assign(B, 2)
    for name, tensor in build(server.spec).named_parameters():
        assert torch.equal(job.tensors[f"initial/{name}"], start[name])
        assert not torch.equal(server.current()[name], start[name])
        assert tensor.shape == start[name].shape


def test_a_run_that_begins_from_a_file_begins_again_from_it():
    server = method()
    server.begin_from({NAME: torch.full((5, 4, 3, 3), 7.0)})
    job = server.assign(A, 1)
    assert (job.tensors[f"initial/{NAME}"] == 7).all()
    assert (job.tensors[f"packed/{NAME}"] == 7).all()


def test_biases_and_norms_are_sent_whole():
    job = method().assign(A, 1)
    masked = {name.removeprefix("mask/") for name in job.tensors if name.startswith("mask/")}
    assert masked == set(maskable(build(cnn())))
    assert "exits.0.2.bias" in job.tensors
    assert "stages.1.1.weight" in job.tensors


def test_a_late_update_moves_the_weights_of_now():
    """Sent w, returned w + 1; meanwhile the global weights moved by 4. Two rounds late it counts
    half: w + 4.5 where it kept, and what it pruned stays."""
    server = method(weighting="equal")
    start = server.current()[NAME].clone().view(-1)
    job = server.assign(A, 1)
    late = trained(A, job, 1.0, gone=(0,), staleness=2, sent=dict(job.tensors))
    for number in (1, 2):
        server.aggregate(number, [trained(B, server.assign(B, number), 2.0)])
    server.aggregate(3, [late])
    moved = (server.current()[NAME].view(-1) - start)[:2]
    assert moved.tolist() == pytest.approx([4.0, 4.5], abs=1e-4)


def test_an_update_whose_mask_grew_does_not_count():
    server = method()
    server.aggregate(1, [trained(A, server.assign(A, 1), 0.1, gone=range(100))])
    job = server.assign(A, 2)
    whole = trained(A, method().assign(A, 1), 0.1)
    guard = Border(build(server.spec), 10.0, epochs=1, seed=0)
    with pytest.raises(UpdateError, match="keeps 100 entries that its job's did not"):
        guard.check(whole, job.tensors)
    guard.check(trained(A, job, 0.1), job.tensors)


def test_a_refused_step_leaves_masks_as_they_were():
    server = method(server=ServerOptions(lr=1000.0, serve="last"))
    update = trained(A, server.assign(A, 1), 1e37, gone=range(100))
    assert server.aggregate(1, [update]).values["aggregate_refused"] == 1.0
    assert len(server.assign(A, 2).tensors[f"packed/{NAME}"]) == 180


def test_settings_of_the_paper_and_what_is_refused():
    settings = make_config("lotteryfl", cnn(), is_paper=True, rounds=1)
    assert (settings.weighting, settings.lr, settings.momentum) == ("equal", 0.01, 0.5)
    plan = make_method(settings).offer().plan
    assert plan.prune == Prune(share=0.2, target=0.5, threshold=0.5)
    assert plan.holdout == 0.1
    with pytest.raises(ConfigError, match="give --holdout"):
        make_method(replace(settings, holdout=0.0))


def test_clients_that_train_prune_to_the_target_and_no_further():
    """From everything by 0.8 a round: 0.8, 0.64, 0.512, 0.5; of the smallest layers a weight more
    or less is left, as shares are rounded down. Bytes follow, and initial values go once."""
    server = method(own={"prune_above": 0.0})
    cohort = InProcessCohort({"a": examples(24)}, {"a": 3}, 3)
    sizes = {"down": [], "up": []}
    for number in range(1, 7):
        job = server.assign(A, number)
        assert ("initial/exits.0.2.bias" in job.tensors) == (number == 1)
        (update,) = cohort.train({"a": job}, number, 0.0)
        assert isinstance(update, ClientUpdate), update
        Border(build(server.spec), 0.0, epochs=1, seed=0).check(update, job.tensors)
        cohort.accept(number, ["a"])
        server.aggregate(number, [update])
        assert update.message.state_round == number - 1
        assert update.bytes_up == layout(specs_of(update.tensors))[1]
        sizes["down"].append(update.bytes_down)
        sizes["up"].append(update.bytes_up)
        _, own = server.deployed(A)
        assert all(torch.isfinite(tensor).all() for tensor in own.values())
    masked = [own[name] for name in maskable(build(server.spec))]
    left = sum(int((weight != 0).sum()) for weight in masked)
    assert 0.5 <= left / sum(weight.numel() for weight in masked) < 0.52
    assert sizes["down"][1:] == sizes["up"][:-1]
    assert sizes["up"] == sorted(sizes["up"], reverse=True)
    assert sizes["up"][-1] == sizes["up"][-2] < sizes["up"][0]
