"""ScaleFL: levels cut in depth and width, weights of exits, self-distillation, its defects."""

from __future__ import annotations

import pytest
import torch
from msgspec import UNSET

from coordinator.config import DistillOptions
from coordinator.methods.registry import defaults_of
from edge_sdk.errors import ConfigError
from edge_sdk.models.losses import exit_distillation
from edge_sdk.protocol.tensor_lists import stage_of
from tests.coordinator.methods.test_heterofl import client_of, method_of
from tests.support.examples import answer, cnn


def scalefl(own=UNSET, exits=3, **changes):
    model = cnn(exits, (8,) * exits)
    return method_of("scalefl", model, own, rounds=8, **changes)


def test_a_weak_client_holds_no_deep_weights():
    """The published sub-model has the full depth at the level's width, and only stops early."""
    method = scalefl()
    for level, width in ((1, 0.7), (2, 0.75), (3, 1.0)):
        job = method.assign(client_of("a", level, level), 1)
        assert (job.model.exit, job.model.width) == (level, width)
        assert {stage_of(name)[1] for name in job.tensors} == set(range(1, level + 1))
        assert job.tensors["stages.0.0.weight"].shape[0] == (6, 6, 8)[level - 1]  # ceil(5.6), 6


def test_weights_of_exits_are_their_numbers_over_the_sum():
    method = scalefl()
    plans = [method.assign(client_of("a", level, level), 1).plan for level in (1, 2, 3)]
    assert [plan.exit_weights for plan in plans] == [
        (1.0,),
        pytest.approx((1 / 3, 2 / 3)),
        pytest.approx((1 / 6, 2 / 6, 3 / 6)),
    ]
    assert {plan.scaler for plan in plans} == {"always"}


def test_self_distillation_begins_after_a_quarter_of_the_rounds_and_is_off_by_default():
    method = scalefl({"gamma": 0.05})
    weights = [
        method.assign(client_of("a", 3, 3), round).plan.distill_weight for round in range(1, 9)
    ]
    assert weights == [0, 0, *[0.05] * 6]
    plan = method.offer().plan
    assert (plan.distill, plan.distill_weight, plan.distill_temperature) == (
        "deepest-to-shallow",
        0.05,
        3.0,
    )
    off = scalefl().assign(client_of("a", 3, 3), 8).plan
    assert (off.distill, off.distill_weight) == ("none", 0.0)


def test_the_teacher_gets_no_gradient_and_kl_is_summed_over_the_classes():
    """Exit 1 of a level of two weighs 1/3: gamma T^2 / 3 KL, of (0.8, 0.2) from (0.5, 0.5) with
    T = 1: 0.8 ln 1.6 + 0.2 ln 0.4 = 0.19274; the published code would divide it by 2 classes."""
    plan = scalefl({"gamma": 0.5, "temperature": 1.0}).assign(client_of("a", 2, 2), 8).plan
    student = torch.zeros(1, 2, requires_grad=True)
    teacher = torch.tensor([[0.8, 0.2]]).log().requires_grad_()
    loss = exit_distillation([student, teacher], plan.exit_weights, plan)
    assert loss.item() == pytest.approx(0.5 / 3 * 0.19274, abs=1e-5)
    loss.backward()
    assert teacher.grad is None
    assert student.grad[0].tolist() == pytest.approx([-0.05, 0.05])  # 0.5 / 3 (0.5 - 0.8)


def test_deep_stages_are_moved_by_those_who_hold_them_alone():
    method = scalefl()
    before = {name: tensor.clone() for name, tensor in method.current().items()}
    for who in (client_of("a", 1, 1), client_of("b", 2, 2)):
        method.aggregate(1, [answer(who, method.assign(who, 1), shift=1.0)])
    for name, tensor in method.current().items():
        assert torch.equal(tensor, before[name]) == (stage_of(name)[1] == 3), name
    stem = method.current()["stages.0.0.weight"] - before["stages.0.0.weight"]
    assert stem[:, 0, 0, 0].tolist() == pytest.approx([2] * 6 + [0] * 2)


def test_levels_of_other_numbers_of_exits():
    for exits, want in (
        (1, (1.0,)),
        (2, (0.75, 1.0)),
        (4, (0.7, 0.7, 0.75, 1.0)),
        (5, (0.7, 0.7, 0.7, 0.75, 1.0)),
    ):
        assert tuple(model.width for model in scalefl(exits=exits).offer().variants) == want


@pytest.mark.parametrize("widths", [(0.5, 1.0), (0.9, 0.5, 1.0)])
def test_widths_that_are_no_levels_are_refused(widths):
    with pytest.raises(ConfigError, match="expected one for each of 3 exits, none smaller than"):
        scalefl({"widths": widths})


def test_settings_that_it_has_of_its_own_are_refused():
    for changes in (
        {"exit_weights": (1.0, 1.0, 1.0)},
        {"distill": DistillOptions(direction="mutual")},
    ):
        with pytest.raises(
            ConfigError, match=r"'scalefl': --(exit-weights|distill) .* has no place"
        ):
            scalefl(**changes)


def test_the_paper_runs_without_self_distillation():
    paper = defaults_of("scalefl", is_paper=True)
    assert (paper["lr"], paper["batch_size"], paper["epochs"]) == (0.1, 16, 5)
    assert not any("gamma" in path for path in paper)
