"""FedRolex: the window, and the two defects of the published code."""

from __future__ import annotations

import torch

from edge_sdk.models.widths import slice_of
from edge_sdk.protocol.messages import ModelSpec
from tests.coordinator.methods.test_heterofl import MLP, client_of, method_of, returned

OWN = {"widths": (0.5, 1.0), "mask_absent": False}


def test_the_window_moves_by_a_channel_each_round():
    """Round 1 holds channels 0 and 1 of four, round 4 channels 3 and 0."""
    method = method_of("fedrolex", own=OWN)
    held = method.current()["stages.0.1.weight"]
    for round, window in ((1, [0, 1]), (2, [1, 2]), (4, [3, 0]), (6, [1, 2])):
        job = method.assign(client_of("a", 1), round)
        assert torch.equal(job.tensors["stages.0.1.weight"], held[window]), round
        assert torch.equal(
            job.tensors["exits.0.weight"], method.current()["exits.0.weight"][:, window]
        )


def test_every_channel_is_trained_though_nobody_holds_the_whole_model():
    method = method_of("fedrolex", own={"widths": (0.25,)})
    start = {name: tensor.clone() for name, tensor in method.current().items()}
    a, owners = client_of("a", 1), torch.zeros(4)
    for round in range(1, 5):
        before = {name: tensor.clone() for name, tensor in method.current().items()}
        method.aggregate(round, [returned(method, a, 9.0 + round, round=round)])
        after = method.current()
        owners += (after["stages.0.1.weight"] != before["stages.0.1.weight"]).any(1)
    assert owners.tolist() == [1, 1, 1, 1]
    for name, tensor in method.current().items():
        assert (tensor != start[name]).all(), name


def test_each_client_counts_once_in_every_tensor():
    """The published counter, restored within the loop over tensors, has the m-th client count m
    times: 0, 1 and 2 make 1.33 instead of 1."""
    method = method_of("fedrolex", own=OWN)
    cohort = [client_of(name, 2) for name in "abc"]
    for order in (1, -1):
        values = list(zip(cohort, (0.0, 1.0, 2.0), strict=True))[::order]
        method.aggregate(1, [returned(method, who, value) for who, value in values])
        for name, tensor in method.current().items():
            assert torch.allclose(tensor, torch.ones_like(tensor)), name


def test_an_update_is_put_where_its_own_round_held_it():
    """Of a job of round 2 that arrives in round 4."""
    method = method_of("fedrolex", own=OWN)
    before = method.current()["stages.0.1.weight"].clone()
    method.aggregate(4, [returned(method, client_of("a", 1), 9.0, round=2)])
    found = method.current()["stages.0.1.weight"]
    assert torch.equal(found[[0, 3]], before[[0, 3]])
    assert (found[[1, 2]] == 9).all()


def test_the_window_of_the_last_round_is_deployed():
    """Of three: channels 2 and 3, which were trained together last."""
    method = method_of("fedrolex", own=OWN | {"scaler": False})
    method.aggregate(3, [returned(method, client_of("b", 2), 2.0, round=3)])
    spec, tensors = method.deployed(client_of("a", 1))
    assert spec.width == 0.5
    assert torch.equal(tensors["stages.0.1.weight"], method.served()["stages.0.1.weight"][2:])


def test_blocks_and_their_shortcuts_hold_the_same_channels_in_every_round():
    """With the published --overlap each layer has an order of its own, and an identity shortcut
    adds unlike channels."""
    spec = ModelSpec(
        family="resnet18",
        input_shape=(1, 8, 8),
        num_classes=3,
        exit=1,
        options={"channels": (6, 6), "blocks": (2, 2)},
    )
    for round in range(1, 8):
        parts = slice_of(spec, 0.5, round - 1)
        window = [(round - 1 + c) % 6 for c in range(3)]
        for name, part in parts.items():
            for axis, kept in enumerate(part):
                assert kept is None or kept.tolist() == window, (name, axis)


def test_a_method_begins_where_heterofl_does():
    one, other = (
        method_of(name, own=OWN).assign(client_of("a", 1), 1) for name in ("fedrolex", "heterofl")
    )
    assert (
        one.model
        == other.model
        == ModelSpec(**{f: getattr(MLP, f) for f in MLP.__struct_fields__} | {"width": 0.5})
    )
    assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)
