"""LotteryFL on the device: masks, the decision, the new beginning."""

from typing import Any

import pytest
import torch
from msgspec.structs import replace

from edge_sdk.errors import ConfigError
from edge_sdk.models import build, initial_tensors
from edge_sdk.models.masks import maskable, packed, unpacked
from edge_sdk.protocol.messages import Plan, Prune, Segment
from edge_sdk.protocol.plan_tensors import job_specs, update_specs
from edge_sdk.protocol.tensors import specs_of
from edge_sdk.training.terms.pruning import without_smallest
from edge_sdk.training.trainer import TrainResult, train
from tests.support.examples import cnn, examples

SPEC = cnn(exit=1)
MODEL = build(SPEC)
SHAPES = {name: tensor.shape for name, tensor in MODEL.tensors().items()}
PARAMETERS = [name for name, _ in MODEL.named_parameters()]
THETA_0 = initial_tensors(SPEC, 0)
INITIAL = {f"initial/{name}": THETA_0[name] for name in PARAMETERS}
MASKABLE = maskable(MODEL)
PLAN = Plan(
    segments=(Segment(first=1, last=1),),
    batch_size=6,
    optimizer="sgd",
    lr=0.05,
    momentum=0.5,
    weight_decay=0.01,
    holdout=0.25,
    prune=Prune(share=0.2, target=0.3, threshold=0.0),
)


def full() -> dict[str, torch.Tensor]:
    return {name: torch.ones(SHAPES[name], dtype=torch.bool) for name in MASKABLE}


def run(
    plan: Plan = PLAN,
    weights: dict[str, torch.Tensor] = THETA_0,
    masks: dict[str, torch.Tensor] | None = None,
    **others: Any,
) -> tuple[TrainResult, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The result, its weights and its masks."""
    sent = packed(weights, masks or full()) | others.pop("initial", INITIAL)
    result = train(SPEC, plan, sent, examples(24), **others)
    return result, *unpacked(result.tensors, SHAPES)


def trained() -> dict[str, torch.Tensor]:
    plan = replace(PLAN, prune=None, epochs=3)
    return train(SPEC, plan, THETA_0, examples(24)).tensors


def test_the_smallest_of_those_left_go():
    weights = torch.tensor([[0.1, -5.0, 0.0], [-0.2, 3.0, 0.3]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    # 5 left: 0.4 of them are the two smallest, 0.1 and -0.2; the 0.0 is gone already
    want = [[False, True, False], [False, True, True]]
    assert without_smallest(weights, mask, 0.4).tolist() == want
    assert without_smallest(weights, mask, 0.39).sum() == 4  # one goes
    assert mask.sum() == 5


def test_of_equal_weights_the_first_go():
    weights = torch.tensor([1.0, -1.0, 1.0, 0.5, 2.0])
    mask = torch.tensor([True, True, True, True, True])
    assert without_smallest(weights, mask, 0.4).tolist() == [False, True, True, False, True]
    assert without_smallest(weights, mask, 0.1).tolist() == mask.tolist()


def test_each_layer_loses_its_share_and_the_rest_begins_again():
    theta = trained()
    plan = replace(PLAN, lr=1e-9)
    _, weights, masks = run(plan, theta)
    assert sorted(masks) == sorted(MASKABLE)
    for name in MASKABLE:
        left = theta[name][masks[name]].abs()
        gone = theta[name][~masks[name]].abs()
        assert len(gone) == int(0.2 * theta[name].numel()), name
        assert gone.max() <= left.min(), name  # by what was received, not by the initial values
        assert torch.allclose(weights[name][masks[name]], THETA_0[name][masks[name]], atol=1e-6)
        assert not weights[name][~masks[name]].any()
    for name in set(PARAMETERS) - set(MASKABLE):  # biases and scales are never pruned
        assert torch.allclose(weights[name], THETA_0[name], atol=1e-6), name
        assert not torch.allclose(theta[name], THETA_0[name], atol=1e-6), name


def test_training_never_writes_into_the_initial_values():
    """Published code binds biases to the initial values' own storage."""
    before = {name: tensor.clone() for name, tensor in INITIAL.items()}
    first, _, _ = run(replace(PLAN, epochs=3))
    for name, tensor in before.items():
        assert torch.equal(INITIAL[name], tensor), name
        assert torch.equal(first.state[name], tensor), name
        kept = first.state[name]
        assert all(kept.data_ptr() != t.data_ptr() for t in first.tensors.values())
    second, _, _ = run(initial={}, state=first.state, state_round=1)
    assert (second.state_round, sorted(second.state)) == (1, sorted(before))
    for name, tensor in before.items():
        assert torch.equal(second.state[name], tensor), name


def test_what_is_pruned_stays_zero_and_a_small_weight_is_not_pruned():
    masks = full()
    masks[MASKABLE[0]].view(-1)[:5] = False
    weights = {name: tensor.clone() for name, tensor in THETA_0.items()}
    weights[MASKABLE[0]].view(-1)[5] = 0.0  # published code takes it for pruned
    never = replace(PLAN, prune=Prune(share=0.2, target=1.0), epochs=3)
    result, after, found = run(never, weights, masks)
    assert found[MASKABLE[0]].view(-1)[:6].tolist() == [False] * 5 + [True]
    assert not after[MASKABLE[0]].view(-1)[:5].any()
    assert after[MASKABLE[0]].view(-1)[5] != 0
    assert result.tensors[f"packed/{MASKABLE[0]}"].shape == (masks[MASKABLE[0]].sum(),)


@pytest.mark.parametrize(
    ("prune", "is_pruned"),
    [
        (Prune(share=0.2, target=0.3, threshold=1.0), False),  # never all right
        (Prune(share=0.2, target=0.3, threshold=0.0), True),
        (Prune(share=0.2, target=1.0, threshold=0.0), False),  # enough is gone
    ],
    ids=str,
)
def test_the_decision_is_by_the_holdout_and_the_target(prune, is_pruned):
    result, _, masks = run(replace(PLAN, prune=prune))
    assert result.holdout is not None
    assert result.holdout.metric < 1
    assert (sum(int(mask.sum()) for mask in masks.values()) < numbers()) == is_pruned


def numbers() -> int:
    return sum(SHAPES[name].numel() for name in MASKABLE)


def test_the_target_is_not_passed():
    plan = replace(PLAN, prune=Prune(share=0.5, target=0.8, threshold=0.0))
    _, _, masks = run(plan)
    left = sum(int(mask.sum()) for mask in masks.values()) / numbers()
    assert 0.8 <= left < 0.82


def test_who_can_prune_no_more_goes_on_from_what_it_received():
    """Shares are rounded down by layer, so a client may stay a weight above its target for good."""
    plan = replace(PLAN, prune=Prune(share=0.2, target=0.5, threshold=0.0), lr=1e-9)
    theta = trained()
    masks, counts = full(), [numbers()]
    while len(counts) < 10 and (len(counts) < 2 or counts[-1] < counts[-2]):
        _, weights, masks = run(plan, theta, masks)
        counts.append(sum(int(mask.sum()) for mask in masks.values()))
    assert counts[-1] == counts[-2] > 0.5 * numbers()  # above the target, and none went
    for name in PARAMETERS:
        received = theta[name] * masks[name] if name in masks else theta[name]
        assert torch.allclose(weights[name], received, atol=1e-6), name
        assert not torch.allclose(weights[name], THETA_0[name], atol=1e-6), name


def test_without_initial_values_nothing_is_pruned():
    result, _, masks = run(initial={})
    assert all(bool(mask.all()) for mask in masks.values())
    assert (result.state_round, result.state) == (0, {})


def test_tensors_are_those_that_both_sides_list():
    model, buffers = specs_of(THETA_0), set(THETA_0) - set(PARAMETERS)
    listed = [s.name for s in job_specs(PLAN, model, buffers, has_initial=True)]
    assert listed == [*packed(THETA_0, full()), *INITIAL]
    result, _, _ = run(replace(PLAN, prune=Prune(share=0.2, target=1.0)))
    assert specs_of(result.tensors) == tuple(update_specs(PLAN, model, buffers))


def test_it_needs_a_holdout():
    with pytest.raises(ConfigError, match="prune needs a holdout, by which it is decided"):
        run(replace(PLAN, holdout=0.0))
